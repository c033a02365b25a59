"""Convolutional X-formers for Vision (Jeevan & Sethi, arXiv 2201.10271)."""

from .models import CLTV, CNV, CPV, CXV, create_model, list_models
from .training import DualOpT

__version__ = "0.1.0"

__all__ = ["CLTV", "CNV", "CPV", "CXV", "DualOpT", "create_model", "list_models"]
