"""The models of the paper."""

from .cxv import CLTV, CNV, CPV, CXV
from .hybrid import HybridViLT, HybridViN, HybridViP
from .registry import create_model, list_models

__all__ = ["CLTV", "CNV", "CPV", "CXV", "HybridViLT", "HybridViN", "HybridViP", "create_model", "list_models"]
