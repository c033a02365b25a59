"""Builds the host as a GPU, with csrc/cuda's kernels in the emulator (tests/simt): what a process needs to see one."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "simt"))

from host import SIMT, emulator

from cxv_kernels.library import CPP_MISSING

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TORCH = Path(torch.__file__).parent
_folder = tempfile.TemporaryDirectory()  # for what is compiled once; it goes with the process
LAUNCH = re.compile(r"(\w+)<<<([^,]+), ([^,]+), ([^,]+), (\w+)>>>\(([^;]*)\);")


def _triton_headers() -> Path | None:
    """CUDA's headers in Triton's wheel, if they are of CUDA 13."""
    if (triton := find_spec("triton")) is None:
        return None
    include = Path(triton.origin).parent / "backends" / "nvidia" / "include"
    return include if "#define CUDA_VERSION 13" in (include / "cuda.h").read_text() else None


def missing() -> str | None:
    """Why it cannot be built here, or None."""
    if CPP_MISSING or not (shutil.which("gcc") and shutil.which("g++")):
        return CPP_MISSING or "needs gcc and g++"
    if not (_triton_headers() or shutil.which("nvcc")):
        return "needs the headers of CUDA 13: nvcc's, or those of a newer Triton"
    if sys.platform != "linux" or not (torch.version.cuda or "").startswith("13."):
        return "is CUDA 13's runtime on Linux, for a PyTorch built for it"
    return None


def run(*command: object) -> None:
    """A compiler; what it says if it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@cache
def _runtime() -> Path:
    target = Path(_folder.name) / "libcuda.so.1"
    flags = ["-O1", "-shared", HERE / "runtime.c", "-o", target]
    soname = "-soname,libcuda.so.1"
    if include := _triton_headers():
        run("gcc", "-std=gnu11", "-fPIC", "-w", f"-Wl,{soname}", f"-I{include}", *flags)
    else:
        run("nvcc", "-Xcompiler=-fPIC,-w,-std=gnu11", "-Xlinker", soname, "--cudart=none", *flags)
    return target


@cache
def _aten() -> Path:
    target = Path(_folder.name) / "aten.so"
    include = [f"-I{TORCH}/include", f"-I{TORCH}/include/torch/csrc/api/include"]
    linked = [f"-L{TORCH}/lib", "-ltorch_cpu", "-lc10"]
    run("g++", "-std=c++20", "-O0", "-shared", "-fPIC", "-w", *include, HERE / "aten.cpp", "-o", target, *linked)
    return target


def _kernels(folder: Path, arch: int, pool: ThreadPoolExecutor) -> None:
    """csrc/cuda, every launch replaced, as the package's ``_cuda``."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    sources = sorted((folder / "csrc" / "cuda").iterdir())
    for source in sources:
        text = LAUNCH.sub(r"simt::launch_on(\5, \2, \3, \4, \1, \6);", source.read_text())
        assert "<<<" not in text, f"{source.name} has a launch that {LAUNCH.pattern} does not find"
        source.write_text(text)
    flags = ["-std=c++20", "-O0", "-fPIC", "-w", f"-I{SIMT}", "-fsanitize=thread", "-DUSE_CUDA", "-xc++", "-c"]
    flags += [f"-I{folder}/csrc/include", f"-I{TORCH}/include", "-include", "cuda_runtime.h"]
    flags += ["-DSIMT_SM80"] * (arch >= 80) + ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
    objects = [(source, folder / f"{source.stem}.o") for source in sources if source.suffix == ".cu"]
    jobs = [pool.submit(run, "g++", *flags, source, "-o", target) for source, target in objects]
    for job in jobs:
        job.result()
    linked = [f"-L{TORCH}/lib", "-Wl,--no-as-needed", "-ltorch_cuda", "-ltorch_cpu", "-lc10"]
    targets = [target for _, target in objects]
    run("g++", "-shared", *targets, emulator(), "-o", folder / "cxv_kernels" / "_cuda.abi3.so", *linked)


@dataclass(frozen=True)
class HostGPU:
    """A copy of the project in ``folder``, whose CUDA library is the emulated one."""

    folder: Path
    arch: int

    @property
    def environment(self) -> dict[str, str]:
        """Of a process that sees it."""
        return {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "0",
            "LD_PRELOAD": str(_runtime()),
            "TRITON_LIBCUDA_PATH": str(_runtime().parent),
            "HOST_GPU_ARCH": str(self.arch),
            "HOST_GPU_ATEN": str(_aten()),
            "PYTHONPATH": f"{self.folder}{os.pathsep}{HERE}",
        }


def build(folder: Path, arch: int) -> HostGPU:
    """Compile all of it into ``folder``."""
    for name in ("cxv", "cxv_kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("_cuda*", "__pycache__"))
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(part) for part in (_aten, _runtime, emulator)]
        for job in jobs:
            job.result()
        _kernels(folder, arch, pool)
    return HostGPU(folder, arch)
