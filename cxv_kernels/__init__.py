"""Fused linear attention and conv + norm for PyTorch, each with a plain PyTorch reference.

Every op has an argument ``backend``. By default it uses the backend set by :func:`use_backend`, which is initially
``"auto"``. Numeric arguments can be Python or NumPy numbers, or arrays and tensors without dimensions. The attention
ops support DTensors that are sharded by batch or by heads. Pad nested tensors and pass a ``key_mask``; convert sparse
tensors to dense ones.
"""

import torch

from . import self_check  # noqa: F401  validates GPU kernels on their first use
from ._version import __version__
from .convert import replace_attention
from .dispatch import BACKENDS, bind_backend, explain_backend, get_backend, registered_ops, use_backend
from .integrations.accelerate import accelerate
from .integrations.attention_interface import register_with_transformers
from .ops.conv_norm.functional import conv_norm
from .ops.dropout.functional import dropout, dropout_mask, dropout_seed, gelu_dropout
from .ops.linear_attention.functional import kv_state, linear_attention
from .ops.nystrom_attention.functional import nystrom_attention
from .ops.performer_attention.functional import (
    num_random_features,
    orthogonal_projection,
    performer_attention,
    performer_features,
)

OPS = registered_ops()
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
