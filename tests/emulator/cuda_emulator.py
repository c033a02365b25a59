"""Builds csrc/cuda for the host under the emulator (simt.h), and lends its kernels memory that is watched."""

import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
TORCH = Path(torch.__file__).parent
CXX = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++").split()[0], "g++"))), None)
_folder = tempfile.TemporaryDirectory()  # goes with the process
needs_cxx = pytest.mark.skipif(CXX is None, reason="no C++ compiler")
LAUNCH = re.compile(r"(\w+)<<<([^,]+), ([^,]+), ([^,]+), (\w+)>>>\(([^;]*)\);")
# Only the kernels' accesses to memory are reported to the emulator. The rest is what PyTorch's headers want of CUDA's.
FLAGS = ("-Og", "-fsanitize=thread", "-xc++", "-include", "cuda_runtime.h", f"-I{TORCH}/include", "-DUSE_CUDA")
FLAGS += ("-DCXV_DEVICE=CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000")


def compile_cxx(*arguments: str | Path) -> None:
    command = [CXX, "-std=c++20", "-fPIC", "-w", f"-I{HERE}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def copy_sources(folder: Path) -> Path:
    """Copy csrc, with every launch replaced, into the folder and return the copy."""
    copied = Path(shutil.copytree(HERE.parents[1] / "csrc", folder / "csrc"))
    for source in (copied / "cuda").rglob("*.cu*"):
        text = LAUNCH.sub(r"simt::launch_on(\5, \2, \3, \4, \1, \6);", source.read_text())
        assert "<<<" not in text, f"{source.name} has a launch that {LAUNCH.pattern} does not find"
        source.write_text(text.replace("STD_CUDA_KERNEL_LAUNCH_CHECK();", ""))
    return copied


def compile_sources(sources: Sequence[Path], folder: Path) -> list[Path]:
    """Compile files of the copy; return their object files, in the folder."""
    objects = [folder / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda source, target: compile_cxx(*FLAGS, "-c", source, "-o", target), sources, objects))
    return objects


@cache
def emulator() -> Path:
    """Its object file, compiled once for all of the process's libraries."""
    target = Path(_folder.name) / "simt.o"
    compile_cxx("-O2", "-c", HERE / "simt.cpp", "-o", target)
    return target


def build(source: str, csrc: Path, folder: Path, objects: Sequence[Path] = ()) -> ctypes.CDLL:
    """Compile tests/emulator/<source> with the copy of csrc, and link it with the emulator and more object files."""
    kernels, library = folder / "kernels.o", folder / "simt.so"
    compile_cxx(*FLAGS, f"-I{csrc}", "-c", HERE / source, "-o", kernels)
    compile_cxx("-shared", emulator(), kernels, *objects, "-o", library)
    return ctypes.CDLL(str(library))


def call(function, *arguments) -> None:
    """Call a function of the library, which returns an error message or null."""
    function.restype = ctypes.c_char_p
    failure = function(*arguments)
    assert failure is None, failure.decode()


class View(ctypes.Structure):
    """cxv::View."""

    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 4)]

    def __init__(self, t=None):
        super().__init__(*((t.data_ptr(), tuple(t.stride())) if t is not None else ()))


# cxv::FeatureMap: linear_attention's elu is by its exponents, kv_state's is φ itself.
NUMBERS = {"softmax": 0, "kv_state elu": 1, "relu": 2, "favor": 3, "favor_exact": 4, "favor_relu": 5, "elu": 6}


class Arguments(ctypes.Structure):
    """cxv::LinearAttentionParams, field by field."""

    _fields_ = [
        ("dtype", ctypes.c_int),
        ("feature_map", ctypes.c_int),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "queries", "keys", "dim", "value_dim")),
        *((name, View) for name in ("q", "k", "v", "out")),
        ("key_mask", ctypes.c_void_p),
        ("mask_stride", ctypes.c_int64 * 2),
        ("key_splits", ctypes.c_int64),
        ("query_splits", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("state", "key_stat")),
        *((name, View) for name in ("grad_out", "grad_q", "grad_k", "grad_v")),
        *((name, ctypes.c_void_p) for name in ("grad_state", "grad_z")),
        ("features", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("projection", "key_max")),
    ]


class Arena:
    """Memory for tensors, in a with block: a kernel that touches what lies between them or writes an input fails."""

    READ, WRITE = 1, 2

    def __init__(self, library: ctypes.CDLL, size: int = 1 << 23):
        self.memory = torch.full((size + 64,), 0xFF, dtype=torch.uint8)
        self.memory = self.memory[-self.memory.data_ptr() % 64 :]
        self.allowed = torch.zeros_like(self.memory)
        self.used = 64
        self.library = library

    def __enter__(self):
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in (self.memory, self.allowed))
        self.library.simt_arena(next(pointers), ctypes.c_int64(self.memory.numel()), next(pointers))
        return self

    def __exit__(self, *_):
        self.library.simt_arena(None, ctypes.c_int64(0), None)

    def put(self, x: torch.Tensor, access: int = READ) -> torch.Tensor:
        """x with its strides and its alignment, here."""
        if x.numel() == 0:
            return x
        elements = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
        begin = (self.used + 63) // 64 * 64 + x.data_ptr() % 16
        self.used = begin + elements * x.itemsize + 64
        assert self.used <= self.memory.numel()
        bytes_of = (*(step * x.itemsize for step in x.stride()), 1)
        self.allowed.as_strided((*x.shape, x.itemsize), bytes_of, begin).fill_(access)
        y = self.memory[begin : begin + elements * x.itemsize].view(x.dtype).as_strided(x.shape, x.stride())
        return y.copy_(x)

    def result(self, shape, dtype, strides=None) -> torch.Tensor:
        """A tensor to be written, full of NaN; a kernel may read it back."""
        x = torch.empty(shape, dtype=dtype) if strides is None else torch.empty_strided(shape, strides, dtype=dtype)
        return self.put(x.fill_(torch.nan), self.READ | self.WRITE)


def make(shape, dtype, seed, layout="bhnd"):
    """A tensor (B, H, N, C): contiguous, with channels before tokens (NCHW), or a slice with gaps."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if layout == "nchw":
        return x.transpose(-2, -1).contiguous().transpose(-2, -1)
    if layout == "gaps":
        b, h, n, c = shape
        big = torch.full((b, n, h, 2 * c + 3), torch.nan, dtype=dtype).transpose(1, 2)
        big[..., 1 : 2 * c + 1 : 2] = x
        return big[..., 1 : 2 * c + 1 : 2]
    return x
