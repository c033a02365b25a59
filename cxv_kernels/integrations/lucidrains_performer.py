"""Swaps for performer-pytorch: FAVOR+, its relu features and softmax linear attention."""

from typing import Any

import torch
from performer_pytorch.performer_pytorch import FastAttention
from torch import Tensor

from cxv_kernels import performer_attention

from .shared import softmax_linear_attention
from .swap import Example, Swap, other_feature_map, refuse_torchscript


class FusedFastAttention(FastAttention):
    """FastAttention with :func:`cxv_kernels.performer_attention` or :func:`cxv_kernels.linear_attention`."""

    __prepare_scriptable__ = refuse_torchscript

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, H, N_q, D), k (B, H, N_k, D), v (B, H, N_k, E) → (B, H, N_q, E)."""
        if not q.dim() == k.dim() == v.dim() == 4 or not q.dtype == k.dtype == v.dtype:
            return super().forward(q, k, v)
        if self.no_projection:
            return softmax_linear_attention(q, k, v)
        kernel, eps = ("relu", 1e-3) if self.generalized_attention else ("softmax", 1e-4)
        return performer_attention(q, k, v, self.projection_matrix, kernel, eps=eps)


def _unsupported(module: Any) -> str | None:
    if module.causal:
        return "is causal"
    return other_feature_map(module.kernel_fn) if module.generalized_attention and not module.no_projection else None


def _examples() -> list[Example]:
    variants = ({}, {"generalized_attention": True}, {"no_projection": True})
    shape = (2, 2, 5, 4)
    return [(FastAttention(4, 6, **v), tuple(torch.randn(shape) for _ in range(3))) for v in variants]


SWAPS = (Swap(owner=FastAttention, fused=FusedFastAttention, unsupported=_unsupported, examples=_examples),)
