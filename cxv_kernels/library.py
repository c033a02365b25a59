"""Loads the compiled libraries and registers the Triton kernels, with the schemas of csrc/ops.cpp.

That file is the only copy of the schemas. It is parsed here, so that Triton's kernels need no compiled library, and so
that a library that was built from another version of it is not used.
"""

import functools
import importlib
import re
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).parent
NAMESPACES = ("cxv_kernels", "cxv_kernels_triton")  # of the C++ (CPU and CUDA) and of the Triton implementations
_triton_library = torch.library.Library(NAMESPACES[1], "FRAGMENT")


def _read_schemas() -> dict[str, Any]:
    """Return the name of each operator → its ``FunctionSchema``."""
    copies = (_PACKAGE / "ops.cpp", _PACKAGE.parent / "csrc" / "ops.cpp")  # of a wheel, and of a checkout
    text = next(path for path in copies if path.exists()).read_text()
    definitions = re.findall(r'm\.def\(((?:\s*"[^"]*")+)\s*\)', text)
    schemas = ["".join(re.findall(r'"([^"]*)"', definition)) for definition in definitions]
    return {s.partition("(")[0]: torch._C.parse_schema(f"{NAMESPACES[0]}::{s}") for s in schemas}


SCHEMAS = _read_schemas()


def build_info() -> dict[str, str]:
    """Compiler, PyTorch and CUDA of the build, and the CPU instruction set in use; empty if nothing was compiled, or
    by another Python: ``_C`` alone is of one Python's version."""
    try:
        from . import _C
    except ImportError:
        return {}
    return _C.build_info() | {"cpu_isa": _C.cpu_isa()}


def _load(name: str) -> str | None:
    """Load cxv_kernels/<name>.*so. Return None if it is loaded, else the reason in words."""
    found = [path for suffix in EXTENSION_SUFFIXES if (path := _PACKAGE / f"{name}{suffix}").exists()]
    if not found:
        reason = build_info().get("cuda_missing") if name == "_cuda" else None
        return (
            f"was not built ({reason or 'the build log says why, pip install -v shows it'}; see README, Installation)"
        )
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"was built but does not load: {error.__cause__ or error}"  # PyTorch's own words name the file alone
    return None


def _load_cpp() -> str | None:
    reason = _load("_cpu")
    if reason is None and any(overload(name) is None or overload(name)._schema != SCHEMAS[name] for name in SCHEMAS):
        reason = "was built from other sources than these: run `pip install` again"
    return reason


def overload(name: str, backend: str = "cpu") -> Any:
    """Return the operator with the kernels of ``backend``, or None if it is not registered."""
    packet = getattr(getattr(torch.ops, NAMESPACES[backend == "triton"]), name, None)
    return None if packet is None else packet.default


CPP_MISSING = _load_cpp()


def _load_cuda() -> str | None:
    if CPP_MISSING:
        return CPP_MISSING
    if torch.version.cuda is None:
        return "needs a CUDA build of PyTorch"
    return _load("_cuda")


CUDA_MISSING = _load_cuda()


def register_triton(name: str, module: str) -> None:
    """Declare ``cxv_kernels_triton::<name>``, whose kernels are launched by the function of that name in ``module``.

    The module, and Triton with it, is imported at the first call.
    """

    @functools.cache
    def launcher():
        return getattr(importlib.import_module(module), name)

    _triton_library.define(str(SCHEMAS[name]).partition("::")[2])
    for key in ("CUDA", "CPU"):  # the CPU: by Triton's interpreter
        _triton_library.impl(name, lambda *args: launcher()(*args), key)


def register_fake(name: str, fake: Callable, triton_fake: Callable | None = None) -> None:
    """Register the fake implementation of an operator in both namespaces, as far as they have it.

    Args:
        triton_fake: that of the Triton kernels, if their results have other shapes.
    """
    for namespace, backend, function in zip(NAMESPACES, ("cpu", "triton"), (fake, triton_fake or fake), strict=True):
        if overload(name, backend) is not None:
            torch.library.register_fake(f"{namespace}::{name}", function)
