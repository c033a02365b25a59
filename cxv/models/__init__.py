"""The models of the paper."""

from .cxv import CLTV, CNV, CPV, CXV
from .registry import create_model, list_models

__all__ = ["CLTV", "CNV", "CPV", "CXV", "create_model", "list_models"]
