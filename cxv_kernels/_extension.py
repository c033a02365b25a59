"""Loads the compiled libraries, which register their ops with PyTorch, and remembers why one is missing."""

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

# What the Python side expects of the C++ library: one that was built from older sources must not be half used.
_OPS = (
    *(f"{op}_attention_{way}" for op in ("linear", "performer") for way in ("forward", "backward")),
    *(f"{op}_{way}" for op in ("kv_state", "performer_features", "conv_norm") for way in ("forward", "backward")),
    *(
        f"nystrom_{part}{way}"
        for part in ("means", "summary", "mix", "readout", "residual")
        for way in ("", "_backward")
    ),
    "dropout",
    *(f"gelu_dropout_{way}" for way in ("forward", "backward")),
    "cuda_compiled_for",
)


def build_info() -> dict[str, str]:
    """Compiler, PyTorch and CUDA of the build, and the CPU instruction set in use; empty if nothing was compiled, or
    by another Python: ``_C`` alone is of one Python's version."""
    try:
        from . import _C
    except ImportError:
        return {}
    return _C.build_info() | {"cpu_isa": _C.cpu_isa()}


def _load(name: str) -> str | None:
    """Load cxv_kernels/<name>.*so; None if that went well, else the reason in words."""
    found = [p for s in EXTENSION_SUFFIXES if (p := Path(__file__).parent / f"{name}{s}").exists()]
    if not found:
        why = build_info().get("cuda_missing") if name == "_cuda" else None
        return f"was not built ({why or 'the build log says why, pip install -v shows it'}; see README, Installation)"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"was built but does not load: {error.__cause__ or error}"  # PyTorch's own words name the file alone
    return None


def _load_cpp() -> str | None:
    reason = _load("_cpu")
    if reason is None and not all(hasattr(torch.ops.cxv_kernels, op) for op in _OPS):
        reason = "was built from other sources than these: run `pip install` again"
    return reason


CPP_MISSING = _load_cpp()


def _load_cuda() -> str | None:
    if CPP_MISSING:
        return CPP_MISSING
    if torch.version.cuda is None:
        return "needs a CUDA build of PyTorch"
    return _load("_cuda")


CUDA_MISSING = _load_cuda()
