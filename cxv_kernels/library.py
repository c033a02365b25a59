"""Load the compiled libraries and register the Triton kernels, with the schemas of csrc/ops.cpp.

That file is the only copy of the schemas. This module parses it, so the Triton kernels need no compiled library, and a
library that was built from another version of the file is detected and not used.
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
NAMESPACES = ("cxv_kernels", "cxv_kernels_triton")  # of the C++ implementations (CPU and CUDA), and of Triton's
_triton_library = torch.library.Library(NAMESPACES[1], "FRAGMENT")


def _read_schemas() -> dict[str, Any]:
    """Return a dict from the name of each operator to its ``FunctionSchema``."""
    copies = (_PACKAGE / "ops.cpp", _PACKAGE.parent / "csrc" / "ops.cpp")  # in a wheel, and in a checkout
    text = next(path for path in copies if path.exists()).read_text(encoding="utf-8")
    definitions = re.findall(r'm\.def\(((?:\s*"[^"]*")+)\s*\)', text)
    schemas = ["".join(re.findall(r'"([^"]*)"', definition)) for definition in definitions]
    return {s.partition("(")[0]: torch._C.parse_schema(f"{NAMESPACES[0]}::{s}") for s in schemas}


SCHEMAS = _read_schemas()


def build_info() -> dict[str, str]:
    """Return the compiler, PyTorch and CUDA version of the build, and the CPU instruction set in use.

    The dict is empty if the C++ library is missing.
    """
    found = overload("build_info")
    return {} if found is None else dict(line.split("=", 1) for line in found().splitlines())


def _load(name: str) -> str | None:
    """Load cxv_kernels/<name>.*so. Return None if it is loaded, else the reason."""
    found = [path for suffix in EXTENSION_SUFFIXES if (path := _PACKAGE / f"{name}{suffix}").exists()]
    if not found:
        reason = build_info().get("cuda_missing") if name == "_cuda" else None
        return f"was not built ({reason or 'run pip install -v to see the reason'}; see docs/install.md)"
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        return f"was built but does not load: {error.__cause__ or error}"  # PyTorch's message has only the name
    return None


def _load_cpp() -> str | None:
    reason = _load("_cpu")
    if reason is None and any(overload(name) is None or overload(name)._schema != SCHEMAS[name] for name in SCHEMAS):
        reason = "was built from another version of the sources: run `pip install` again"
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
    """Declare ``cxv_kernels_triton::<name>``, implemented by the function ``<name>`` in ``module``.

    The module and Triton are imported at the first call.
    """

    @functools.cache
    def launcher():
        return getattr(importlib.import_module(module), name)

    _triton_library.define(str(SCHEMAS[name]).partition("::")[2])
    for key in ("CUDA", "CPU"):  # on the CPU with Triton's interpreter
        _triton_library.impl(name, lambda *args: launcher()(*args), key)


def register_fake(name: str, fake: Callable, triton_fake: Callable | None = None) -> None:
    """Register the fake implementation of an operator in the namespaces that have the operator.

    Args:
        triton_fake: Fake implementation of the Triton kernels, if their results have other shapes.
    """
    for namespace, backend, function in zip(NAMESPACES, ("cpu", "triton"), (fake, triton_fake or fake), strict=True):
        if overload(name, backend) is not None:
            torch.library.register_fake(f"{namespace}::{name}", function)
