"""Compile the Triton kernels exactly as they would be launched, without a GPU.

The launches are recorded, not guessed: every case of :mod:`cxv_kernels.testing` and a training step of each model run
on the CPU, forward and backward, while :func:`recording` takes each kernel with its arguments.
"""

import argparse
import hashlib
import importlib
import math
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

import cxv
import cxv_kernels
from cxv_kernels import _triton, dispatch, testing


@dataclass(frozen=True)
class Card:
    """Limits of a multiprocessor of an architecture (CUDA programming guide)."""

    warps: int
    blocks: int
    shared: int  # bytes of a multiprocessor
    block_shared: int  # bytes that one block may have
    block_reserved: int  # bytes of it that the system keeps
    registers: int = 65536

    def occupancy(self, registers: int, shared: int, warps: int) -> float:
        """The share of the warps that can be resident; registers of a thread, shared bytes and warps of a block."""
        per_warp = -(-max(registers, 1) * 32 // 256) * 256
        by_registers = self.registers // per_warp // warps
        by_shared = self.shared // max(shared + self.block_reserved, 1)
        return min(self.warps // warps, self.blocks, by_registers, by_shared) * warps / self.warps


# sm_75: Triton has no tensor cores there, so only the ops that multiply no matrices are supported.
CARDS = {
    75: Card(32, 16, 64 << 10, 64 << 10, 0),
    80: Card(64, 32, 164 << 10, 99 << 10, 1 << 10),  # a block's limit is that of sm_86, sm_89 and sm_120
    90: Card(64, 32, 228 << 10, 227 << 10, 1 << 10),
}


@dataclass
class Launch:
    """A kernel as it was first launched: which case did it, and what Triton compiles."""

    case: str
    kernel: Any  # triton.JITFunction
    dtype: str
    grid: tuple[int, ...] = ()
    arguments: tuple[Any, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    error: str | None = None  # why there is no kernel

    @property
    def name(self) -> str:
        """The @triton.jit function's."""
        return self.kernel.__name__ if self.kernel else "—"

    def rounds(self, constants: dict[str, Any]) -> float:
        """How often the loop over tokens runs per token of a head; 0 without such a loop."""
        given = dict(zip(self.kernel.arg_names, self.arguments, strict=False))
        if "sizes" not in given:
            return 0
        _, tokens, size, _ = given["sizes"]
        rounds = math.prod(self.grid) * -(-min(size, tokens) // constants["BLOCK_N"])
        return rounds / math.prod(self.arguments[0].shape[:3])


# The modules with the Triton kernels' launchers.
_OPS = ("performer_attention", "conv_norm", "dropout", "nystrom_attention")
LAUNCHERS = {op: f"cxv_kernels.ops.{op}.triton" for op in _OPS}
LAUNCHERS["linear_attention"] = "cxv_kernels.ops.linear_attention.triton.launch"
IMPLICIT_GEMM = "conv_norm implicit GEMM"  # off by default: the case that is not among the cases
MODELS = {"cpv-1/4": "performer_attention", "cnv-1/4": "nystrom_attention", "cltv-1/4": "linear_attention"}


# --- recording ---------------------------------------------------------------------------------------------------


@contextmanager
def recording(take: Callable[..., None], arch: int = 80) -> Iterator[None]:
    """Record launches: in the block, Triton treats every device as ``arch``, and a launch calls ``take`` instead."""

    def launch(op: str, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        if 0 not in grid:
            take(kernel, grid, arguments, {"enable_fp_fusion": True} | options)

    def capability(_: torch.device) -> int:
        return arch

    with (
        mock.patch.object(_triton, "launch", launch),
        mock.patch.object(_triton, "capability", capability),
        dispatch.use_backend("triton"),
    ):
        yield


def launches(
    dtype: torch.dtype,
    arch: int,
    batch: int = 1,
    heads: int = 4,
    tokens: int = 1024,
    dim: int = 32,
    features: int | None = None,
    only: Sequence[str] | None = None,
    ragged: bool = False,
) -> list[Launch]:
    """Return the launches of the ops, forward and backward, and of a training step of each model on ``arch``.

    Args:
        features: the Performer's random features, or None for ⌊D ln D⌋.
        ragged: sizes that divide by nothing, as :func:`cxv_kernels.testing.cases` has them; no models.
        only: ops ("conv_norm"), single cases of theirs ("performer_attention relu") and models ("cpv-1/4"), which are
            recorded at ``dim`` 32 alone.
    """
    found: list[Launch] = []

    def wanted(label: str) -> bool:
        return only is None or label in only or label.partition(" ")[0] in only

    name = str(dtype).removeprefix("torch.")
    with recording(lambda *_: None, arch):
        served = {op for op in cxv_kernels.OPS if dispatch.explain_backend(op, dtype=dtype)["triton"] == "supported"}

    def during(case: str, run: Callable[[], Any]) -> None:
        try:
            with recording(lambda kernel, *rest: found.append(Launch(case, kernel, name, *rest)), arch):
                run()
        except Exception as error:  # the report lists the error and continues without the launches of this case
            words = f"raises {type(error).__name__}: {' '.join(str(error).split())}"
            found.append(Launch(case, None, name, error=words[:300]))

    for case in testing.cases(batch, heads, tokens, dim, ragged, features=features):
        label = f"{case.op} {case.label}"
        if case.op in served and wanted(label):
            inputs = [torch.randn(shape).to(dtype) for shape in case.shapes]
            during(label, partial(testing.outputs_and_gradients, case, inputs, "triton", dtype))
    if "conv_norm" in served and wanted(IMPLICIT_GEMM) and arch >= 80 and not ragged:
        x = torch.randn(1, 128, 32, 32).to(dtype, memory_format=torch.channels_last)
        weight, norm = torch.randn(128, 128, 3, 3).to(dtype), (torch.ones(128), torch.zeros(128))
        module = importlib.import_module(LAUNCHERS["conv_norm"])
        with mock.patch.object(module, "prefers_implicit_gemm", return_value=True):
            during(IMPLICIT_GEMM, partial(cxv_kernels.conv_norm, x, weight, None, *norm))
    for model_name, attention in MODELS.items() if dim == 32 and not ragged else ():
        if {attention, "conv_norm", "dropout", "gelu_dropout"} <= served and wanted(model_name):
            during(model_name, partial(_training_step, model_name, dtype))
    return found


def _training_step(name: str, dtype: torch.dtype) -> None:
    """Forward and backward of a model for one image, under autocast in 16 bits."""
    low = dtype in (torch.float16, torch.bfloat16)
    stored = torch.float32 if low else dtype
    model = cxv.create_model(name, use_fused=True).to(stored).train()
    with torch.autocast("cpu", dtype, enabled=low):
        loss = F.cross_entropy(model(torch.randn(1, 3, 32, 32).to(stored)), torch.tensor([1]))
    loss.backward()


# --- compiling ---------------------------------------------------------------------------------------------------


def check_triton(parser: argparse.ArgumentParser) -> None:
    """Exit with an error of the command line if Triton cannot compile."""
    if _triton.TRITON_MISSING:
        parser.error(_triton.TRITON_MISSING)
    if _triton.interpreting():
        parser.error("TRITON_INTERPRET=1 is set: there is nothing to compile")


@dataclass
class Compiled:
    """What the compiler made of a launch for one architecture."""

    kernel: str
    case: str
    dtype: str
    arch: int
    options: dict[str, Any]  # num_warps, num_stages
    constants: dict[str, Any]
    error: str | None = None
    registers: int = 0  # per thread
    spills: int = 0  # loads and stores of local memory
    shared: int = 0  # bytes of a block
    cubin: int = 0  # bytes
    dot: bool = False  # whether it multiplies matrices
    occupancy: float = 0.0
    instructions: dict[str, int] = field(default_factory=dict)  # by family
    serialized: bool = False  # ptxas had Hopper's asynchronous products wait for one another
    issued: float | None = None  # instructions of a warp that a token costs in the loop over tokens, if there is one

    @property
    def fault(self) -> str:
        """Return the reason why the kernel cannot be launched, or an empty string."""
        if self.error:
            return self.error
        if self.shared > CARDS[self.arch].block_shared:
            return f"{self.shared} bytes of shared memory"
        if self.dot and self.arch >= 80 and self.instructions["HMMA"] + self.instructions["WGMMA"] == 0:
            return "no tensor cores"
        if self.spills:
            return f"{self.spills} spills"
        return "products wait for one another" if self.serialized else ""


FAMILIES = {
    "HMMA": r"HMMA",
    "WGMMA": r"(HGMMA|WGMMA)",
    "FFMA": r"(FFMA|FMUL|FADD)",
    "MUFU": r"MUFU",
    "LDG": r"(LDG|LDGSTS|UBLKCP)",
    "STG": r"STG",
    "LDL": r"LDL",
    "STL": r"STL",
}


def _source(launch: Launch, arch: int) -> tuple[Any, Any, dict[str, Any]]:
    """(ASTSource, target, options) as Triton's own launcher would make them for these arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", arch, 32)
    backend, kernel = make_backend(target), launch.kernel
    bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *launch.arguments, **launch.options
    )
    options = {"debug": kernel.debug, **options}
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, {**launch.options, **options}, bound, specialization, options
    )
    return ASTSource(kernel, signature, constants, attributes), target, dict(parsed.__dict__)


def _key(source: Any, options: dict[str, Any]) -> str:
    return hashlib.sha256(f"{source.hash()} {sorted(options.items(), key=str)}".encode()).hexdigest()


_queue: list[tuple[Launch, Any, Any, dict[str, Any]]] = []  # inherited by the forked workers: kernels do not pickle


def _compile(disassemble: bool, index: int) -> Compiled:
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    launch, source, target, options = _queue[index]
    names = {"num_warps": options["num_warps"], "num_stages": options["num_stages"]}
    constants = {}
    for path, value in source.constants.items():
        constants |= getattr(value, "values", {launch.kernel.arg_names[path[0]]: _plain(value)})
    made = Compiled(launch.name, launch.case, launch.dtype, target.arch, names, constants)
    try:
        compiled = triton.compile(source, target=target, options=options)
    except Exception as error:
        lines = [line for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
        made.error = " | ".join(lines[:2] + lines[-1:])[:500]
        return made
    made.dot = "tt.dot" in compiled.asm["ttir"]
    sass = _read(made, compiled, disassemble)
    made.serialized = _serialized(compiled.asm["ptx"], get_ptxas(target.arch).path)
    rounds = launch.rounds(constants)
    if rounds and disassemble:
        made.issued = instructions_of_a_round(sass, constants.get("BLOCKS", 1)) * compiled.metadata.num_warps * rounds
    return made


def _plain(value: Any) -> Any:
    return value if isinstance(value, int | float | str | None) else getattr(value, "__name__", str(value))


def instructions_of_a_round(sass: str, blocks: int) -> int:
    """Of the loop with the most instructions, that over tokens: what a round issues, if loops inside run ``blocks``
    times. What comes before and after the loop is left out."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/][^;]*);", sass)]
    loops = []
    for at, text in code:
        target = re.search(r"\bBRA\b.* 0x([0-9a-f]+)", text)
        if target and int(target.group(1), 16) < at:
            first = int(target.group(1), 16)
            loops.append((sum(first <= a <= at for a, _ in code), first, at))
    if not loops:
        return len(code)
    most, first, last = max(loops)
    inside = [count for count, a, b in loops if (a, b) != (first, last) and first <= a and b <= last]
    return most + (blocks - 1) * sum(inside)


def _serialized(ptx: str, ptxas: str) -> bool:
    """Return True if ptxas reports that each wgmma waits for the one before, which loses most of their speed."""
    if "wgmma.mma_async" not in ptx:
        return False
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE).group(1)
        command = [ptxas, f"--gpu-name={target}", "--verbose", file.name, "-o", os.devnull]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return "serialized" in done.stderr


def _read(made: Compiled, compiled: Any, disassemble: bool) -> str:
    """Add the data of the machine code to the row, and return what cuobjdump prints."""
    from triton import knobs

    made.shared, made.cubin = compiled.metadata.shared, len(compiled.asm["cubin"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", *(["-sass"] if disassemble else []), file.name]
        sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    made.registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", sass).groups())
    made.occupancy = CARDS[made.arch].occupancy(made.registers, made.shared, compiled.metadata.num_warps)
    if not disassemble:
        ptx = compiled.asm["ptx"]
        made.instructions = {"HMMA": ptx.count("mma.sync"), "WGMMA": ptx.count("wgmma.mma_async")}
        made.spills = stack // 4
        return sass
    opcodes = Counter(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*)", sass, re.MULTILINE))
    made.instructions = {
        family: sum(count for opcode, count in opcodes.items() if re.match(rf"{pattern}(\.|$)", opcode))
        for family, pattern in FAMILIES.items()
    } | {"all": sum(opcodes.values())}
    made.spills = made.instructions["LDL"] + made.instructions["STL"]
    return sass


def compile_all(found: Sequence[tuple[int, Launch]], jobs: int = 2, disassemble: bool = True) -> list[Compiled]:
    """Compile each (architecture, launch) in ``jobs`` processes. Equal ones are compiled once and give one object.

    Args:
        disassemble: Read the machine code, which takes as long as ptxas does. If False, the rows have the tensor cores'
            instructions of PTX alone, the words on the stack as their spills, and no ``issued``.
    """
    _queue.clear()
    places: list[int | Compiled] = []  # in the queue, or what is known already
    seen: dict[str, int] = {}
    for arch, launch in found:
        if launch.error:
            places.append(Compiled(launch.name, launch.case, launch.dtype, arch, {}, {}, launch.error))
            continue
        source, target, options = _source(launch, arch)
        key = f"{arch} {_key(source, options)}"
        if key not in seen:
            seen[key] = len(_queue)
            _queue.append((launch, source, target, options))
        places.append(seen[key])
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        made = list(pool.map(partial(_compile, disassemble), range(len(_queue))))
    return [made[place] if isinstance(place, int) else place for place in places]
