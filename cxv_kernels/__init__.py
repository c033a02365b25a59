"""Linear attention and conv + norm for PyTorch: fused kernels, each beside a plain-PyTorch reference.

Every op takes ``backend=None``: the one set by :func:`use_backend`, by default ``"auto"``. Numbers may be Python's or
NumPy's, or arrays and tensors without dimensions. The attention ops take DTensors and compute them split by batch or by
heads. Nested tensors must be padded, with a ``key_mask``; sparse tensors must be made dense.
"""

import torch

from . import self_check  # noqa: F401  validates GPU kernels on their first use
from ._version import __version__
from .backends import BACKENDS, OPS, bind_backend, explain_backend, get_backend, use_backend
from .conv_norm import conv_norm
from .dropout import dropout, dropout_mask, dropout_seed, gelu_dropout
from .integrations.accelerate import accelerate
from .integrations.attention_interface import register_with_transformers
from .linear_attention import kv_state, linear_attention
from .nystrom_attention import nystrom_attention
from .performer_attention import num_random_features, orthogonal_projection, performer_attention, performer_features
from .surgery import replace_attention

for _op in OPS:
    torch.fx.wrap(_op)  # torch.fx records a call of cxv_kernels.<op> as one node: its checks need real tensors

__all__ = [
    "BACKENDS",
    "OPS",
    "__version__",
    "accelerate",
    "bind_backend",
    "conv_norm",
    "dropout",
    "dropout_mask",
    "dropout_seed",
    "explain_backend",
    "gelu_dropout",
    "get_backend",
    "kv_state",
    "linear_attention",
    "num_random_features",
    "nystrom_attention",
    "orthogonal_projection",
    "performer_attention",
    "performer_features",
    "register_with_transformers",
    "replace_attention",
    "use_backend",
]
