"""Loads the compiled libraries, which register their ops with PyTorch, and remembers why one is missing."""

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch


def _load(name: str) -> str | None:
    """Load cxv_kernels/<name>.*so; None if that went well, else the reason in words."""
    found = [p for s in EXTENSION_SUFFIXES if (p := Path(__file__).parent / f"{name}{s}").exists()]
    if not found:
        return "was not built (the build log says why; see README, Installation)"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"was built but does not load: {error}"
    return None


CPP_MISSING = _load("_cpu")


def _load_cuda() -> str | None:
    if CPP_MISSING:
        return CPP_MISSING
    if torch.version.cuda is None:
        return "needs a CUDA build of PyTorch"
    return _load("_cuda")


CUDA_MISSING = _load_cuda()


def build_info() -> dict[str, str]:
    """Compiler, PyTorch and CUDA of the build, and the CPU instruction set in use; empty if nothing was compiled."""
    try:
        from . import _C
    except ImportError:
        return {}
    return _C.build_info() | {"cpu_isa": _C.cpu_isa()}
