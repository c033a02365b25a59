"""Build the fake CUDA device, with csrc/cuda's kernels in the emulator."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import torch
from cuda_emulator import HERE, TORCH, compile_cxx, compile_sources, emulator

from cxv_kernels.library import CPP_MISSING

ROOT = HERE.parent.parent


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
    """Run a compiler; raise with its output if it fails."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _runtime(folder: Path) -> Path:
    target = folder / "libcuda.so.1"
    flags = ["-O1", "-shared", HERE / "runtime.c", "-o", target]
    soname = "-soname,libcuda.so.1"
    if include := _triton_headers():
        run("gcc", "-std=gnu11", "-fPIC", "-w", f"-Wl,{soname}", f"-I{include}", *flags)
    else:
        run("nvcc", "-Xcompiler=-fPIC,-w,-std=gnu11", "-Xlinker", soname, "--cudart=none", *flags)
    return target


def _aten(folder: Path) -> Path:
    target = folder / "aten.so"
    include = [f"-I{TORCH}/include", f"-I{TORCH}/include/torch/csrc/api/include"]
    linked = [f"-L{TORCH}/lib", "-ltorch_cpu", "-lc10"]
    run("g++", "-std=c++20", "-O0", "-shared", "-fPIC", "-w", *include, HERE / "aten.cpp", "-o", target, *linked)
    return target


def _kernels(folder: Path, csrc: Path, attention: Sequence[Path]) -> None:
    """The package's ``_cuda``, in the emulator."""
    sources = [csrc / "host" / f"{op}.cpp" for op in ("conv_norm", "linear_attention", "performer_attention")]
    objects = compile_sources([*sources, csrc / "cuda" / "device.cu"], folder)
    linked = [f"-L{TORCH}/lib", "-Wl,--no-as-needed", "-ltorch_cuda", "-ltorch_cpu", "-lc10"]
    target = folder / "cxv_kernels" / "_cuda.abi3.so"
    compile_cxx("-shared", *objects, *attention, emulator(), "-o", target, *linked)


def build(folder: Path, csrc: Path, attention: Sequence[Path]) -> dict[str, str]:
    """Compile all of it into ``folder``, with a copy of the project; return the environment of a process that sees it.

    ``csrc`` and ``attention`` are what the fixtures of these names give. FAKE_DEVICE_ARCH is the compute capability of
    the device, 75 or 90, for example.
    """
    for name in ("csrc", "cxv", "cxv_kernels"):  # csrc has the schemas of the ops
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("_cuda*", "__pycache__"))
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(_aten, folder), pool.submit(_runtime, folder)]
        _kernels(folder, csrc, attention)
        aten, runtime = (job.result() for job in jobs)
    return {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "0",
        "LD_PRELOAD": str(runtime),
        "TRITON_LIBCUDA_PATH": str(folder),
        "FAKE_DEVICE_ATEN": str(aten),
        "PYTHONPATH": f"{folder}{os.pathsep}{HERE}",
    }
