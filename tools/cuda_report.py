"""Report the code that nvcc generates for the CUDA kernels, without a GPU.

    python tools/cuda_report.py [--arch 75]

Reads the built library (cxv_kernels/_cuda*.so) with cuobjdump: registers, spills, shared memory, resident warps and
tensor-core instructions of each kernel.
"""

import argparse
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent

# A multiprocessor of a T4, by the Turing white paper.
T4_WARPS, T4_REGISTERS, T4_SHARED, T4_BLOCKS = 32, 65536, 64 * 1024, 16

DTYPES = {"__half": 2, "float": 4}
MAPS = {3: "favor", 5: "favor_relu", 0: "softmax", 2: "relu", 6: "elu"}  # cxv::FeatureMap; relu is kv_state's elu too
PROJECTED = ("favor", "favor_relu")
PASSES = ("key_pass", "query_pass", "query_backward", "query_backward_sums", "key_backward")
STEPS = ("max", "forward", "backward")


@dataclass(frozen=True)
class Kernel:
    """One kernel of one architecture. sass: (address, instruction) in order; size: D and E, padded."""

    name: str
    dtype: str
    size: int
    map: str
    step: str  # of performer_features
    registers: int
    stack: int
    sass: tuple[tuple[int, str], ...]

    def count(self, *prefixes: str) -> int:
        return sum(text.startswith(prefixes) for _, text in self.sass)

    @property
    def spills(self) -> int:
        return self.stack + self.count("STL", "LDL")

    @property
    def tensor_core_share(self) -> float:
        """Return the share of the multiply-adds in the inner loops (each instruction once) that use tensor cores."""
        loop = self.inner_loops
        tensor = 1024 * sum(t.startswith("HMMA.1688") for t in loop)  # multiply-adds of a warp; FFMA has 32
        return tensor / max(1, tensor + 32 * sum(t.startswith("FFMA") for t in loop))

    @property
    def inner_loops(self) -> list[str]:
        """The instructions of the loops that do the tensor cores' work and hold no other such loop."""
        loops = []
        for address, text in self.sass:
            target = re.search(r"BRA.* 0x([0-9a-f]+)", text)
            if target and int(target.group(1), 16) < address:
                first = int(target.group(1), 16)
                if any("HMMA" in t for a, t in self.sass if first <= a <= address):
                    loops.append((first, address))
        inner = [one for one in loops if not any(o != one and one[0] <= o[0] and o[1] <= one[1] for o in loops)]
        return [t for a, t in self.sass if not loops or any(first <= a <= last for first, last in inner)]


@cache
def cuobjdump() -> str | None:
    """Return the path of the toolkit's tool, or of Triton's."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(path) if path.exists() else None


def library() -> Path | None:
    """The built library, if there is one."""
    return next(iter(sorted((ROOT / "cxv_kernels").glob("_cuda*.so"))), None)


def dump(*arguments: str) -> str:
    """Return the output of cuobjdump."""
    done = subprocess.run([cuobjdump(), *arguments], capture_output=True, text=True, check=True)
    return done.stdout


@cache
def usage(arch: int) -> dict[str, tuple[int, int, int]]:
    """Of every kernel of the built library for sm_<arch>: registers, bytes of stack, bytes of static shared memory.

    Raises:
        RuntimeError: there is no library or no cuobjdump.
    """
    path = library()
    if path is None or cuobjdump() is None:
        raise RuntimeError("the CUDA library was not built, or there is no cuobjdump")
    printed = dump("-res-usage", "-arch", f"sm_{arch}", str(path))
    lines = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", printed)
    return {name: (int(registers), int(stack), int(shared)) for name, registers, stack, shared in lines}


@cache
def kernels(arch: int) -> tuple[Kernel, ...]:
    """The tensor-core kernels of the built library for sm_<arch>.

    Raises:
        RuntimeError: there is no library or no cuobjdump.
    """
    used = usage(arch)
    found = []
    for part in dump("-sass", "-arch", f"sm_{arch}", str(library())).split("Function : ")[1:]:
        mangled, _, body = part.partition("\n")
        match = re.fullmatch(
            rf"_ZN3cxv4cuda\d+({'|'.join(PASSES)}|features)I(6__half|f)Li(\d+)ELNS_10FeatureMapE(\d)E"
            r"(?:LNS0_4StepE(\d)E)?EEv.*",
            mangled.strip(),
        )
        if match is None:
            continue
        name, dtype, size, map_, step = match.groups()
        sass = tuple(
            (int(address, 16), re.sub(r"^@!?U?P\w+ ", "", text.strip()))
            for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/][^;]*);", body)
        )
        dtype = {"f": "float"}.get(dtype, dtype.lstrip("0123456789"))
        step = STEPS[int(step)] if step else ""
        found.append(Kernel(name, dtype, int(size), MAPS[int(map_)], step, *used[mangled.strip()][:2], sass))
    return tuple(found)


def launch(name: str, dtype: str, size: int, map_: str, features: int) -> tuple[int, int]:
    """(threads, bytes of shared memory) of a launch: what SumsShape and TokensShape say, which a test compares."""
    width, pad, projected = DTYPES[dtype], 8, map_ in PROJECTED

    def tile(rows: int) -> int:
        return max(rows, size) * (min(rows, size) + pad) * width

    if name in ("key_pass", "query_backward_sums"):
        tokens = 32 if width == 4 else 64
        return 32 * (4 if projected else size // 16), 2 * tile(tokens) + 3 * tokens * 4
    warps = 4 if width == 4 else 8
    most = (64 if size == 64 else 128) // (width // 2) if projected else size
    chunk = min(most, (features + 15) // 16 * 16)
    matrices = (name != "features") + (2 if width == 2 else 1) * projected
    return 32 * warps, tile(16 * warps) + chunk * (matrices * (size + pad) * width + 2 * 4)


def resident_warps(kernel: Kernel, features: int) -> int:
    """Warps of a multiprocessor of sm_75 at a time, by registers and shared memory."""
    threads, shared = launch(kernel.name, kernel.dtype, kernel.size, kernel.map, features)
    warps = threads // 32
    by_registers = T4_REGISTERS // ((kernel.registers + 7) // 8 * 8 * 32) // warps
    by_shared = T4_SHARED // ((shared + 255) // 256 * 256)
    return warps * min(by_registers, by_shared, T4_BLOCKS, T4_WARPS // warps)


def report(arch: int = 75, features: int = 110) -> str:
    """A table in Markdown, for this script and for compile_report."""
    lines = [
        f"| kernel, sm_{arch} | registers | spills | shared memory | HMMA | of multiply-adds | warps on sm_75 |",
        "|---|---|---|---|---|---|---|",
    ]
    for k in sorted(kernels(arch), key=lambda k: (k.dtype, k.map, k.size, k.name, k.step)):
        shared = launch(k.name, k.dtype, k.size, k.map, features)[1]
        lines.append(
            f"| {k.name}{k.step and ' ' + k.step} {k.dtype} {k.size} {k.map} | {k.registers} | {k.spills} | "
            f"{shared / 1024:.1f} KB | {k.count('HMMA')} | {k.tensor_core_share:.0%} | {resident_warps(k, features)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, default=75, choices=(75,))
    print(report(parser.parse_args().arch))
