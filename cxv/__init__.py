"""Convolutional X-formers for Vision (Jeevan & Sethi, arXiv 2201.10271)."""

import importlib

TYPE_CHECKING = False  # the import of typing takes longer than the rest of this file
if TYPE_CHECKING:
    from typing import Any

    from cxv_kernels import __version__

    from .models import CLTV, CNV, CPV, CXV, HybridViLT, HybridViN, HybridViP, create_model, list_models
    from .sharing import save_safetensors
    from .training import DualOpT

__all__ = [
    "CLTV",
    "CNV",
    "CPV",
    "CXV",
    "DualOpT",
    "HybridViLT",
    "HybridViN",
    "HybridViP",
    "__version__",
    "create_model",
    "list_models",
    "save_safetensors",
]
_MODULES = {"DualOpT": ".training", "save_safetensors": ".sharing", "__version__": "cxv_kernels"}  # the rest: .models


def __getattr__(name: str) -> "Any":
    """Import a public name or a submodule when it is used first.

    The command can therefore handle Ctrl-C while PyTorch is being imported.
    """
    if name in __all__:
        module = importlib.import_module(_MODULES.get(name, ".models"), __name__)
        return globals().setdefault(name, getattr(module, name))
    try:
        if not name.startswith("_"):
            return importlib.import_module(f".{name}", __name__)
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> "list[str]":
    return sorted({*globals(), *__all__})
