"""Build the fake CUDA device, with csrc/cuda's kernels in the emulator."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import torch
from cuda_emulator import HERE, emulator

from cxv_kernels.library import CPP_MISSING

ROOT = HERE.parent.parent
TORCH = Path(torch.__file__).parent
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


def _kernels(folder: Path, pool: ThreadPoolExecutor) -> None:
    """The package's ``_cuda``, every launch replaced."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for source in (folder / "csrc" / "cuda").rglob("*.cu*"):
        text = LAUNCH.sub(r"simt::launch_on(\5, \2, \3, \4, \1, \6);", source.read_text())
        assert "<<<" not in text, f"{source.name} has a launch that {LAUNCH.pattern} does not find"
        source.write_text(text)
    flags = ["-std=c++20", "-O0", "-fPIC", "-w", f"-I{HERE}", "-fsanitize=thread", "-DUSE_CUDA", "-DCXV_DEVICE=CUDA"]
    flags += [f"-I{TORCH}/include", "-include", "cuda_runtime.h", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    sources = [
        folder / "csrc" / "host" / f"{op}.cpp" for op in ("conv_norm", "linear_attention", "performer_attention")
    ]
    sources += sorted((folder / "csrc" / "cuda").rglob("*.cu"))
    objects = [folder / f"{i}.o" for i in range(len(sources))]
    jobs = [
        pool.submit(run, "g++", *flags, "-xc++", "-c", pair[0], "-o", pair[1])
        for pair in zip(sources, objects, strict=True)
    ]
    for job in jobs:
        job.result()
    linked = [f"-L{TORCH}/lib", "-Wl,--no-as-needed", "-ltorch_cuda", "-ltorch_cpu", "-lc10"]
    run("g++", "-shared", *objects, emulator(), "-o", folder / "cxv_kernels" / "_cuda.abi3.so", *linked)


def build(folder: Path) -> dict[str, str]:
    """Compile all of it into ``folder``, with a copy of the project; return the environment of a process that sees it.

    FAKE_DEVICE_ARCH is the compute capability of the device, 75 or 90, for example.
    """
    for name in ("cxv", "cxv_kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("_cuda*", "__pycache__"))
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(_aten, folder), pool.submit(_runtime, folder)]
        _kernels(folder, pool)
        aten, runtime = (job.result() for job in jobs)
    return {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "0",
        "LD_PRELOAD": str(runtime),
        "TRITON_LIBCUDA_PATH": str(folder),
        "FAKE_DEVICE_ATEN": str(aten),
        "PYTHONPATH": f"{folder}{os.pathsep}{HERE}",
    }
