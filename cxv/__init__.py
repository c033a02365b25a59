"""Convolutional X-formers for Vision (Jeevan & Sethi, arXiv 2201.10271)."""

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
