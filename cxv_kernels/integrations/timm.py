"""Swaps for EfficientViT (B and L) of timm: multi-scale linear attention with the feature map relu."""

from typing import Any

import torch
from timm.models.efficientvit_mit import LiteMLA
from torch import Tensor, nn

from cxv_kernels import linear_attention

from .swap import ClassSwap, Example, is_unmodified, refuse_torchscript


class FusedLiteMLA(LiteMLA):
    """LiteMLA with :func:`cxv_kernels.linear_attention`."""

    __prepare_scriptable__ = refuse_torchscript

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, H, W) to (B, C_out, H, W)."""
        batch, _, height, width = x.shape
        qkv = self.qkv(x)
        qkv = torch.cat([qkv, *(aggregate(qkv) for aggregate in self.aggreg)], dim=1)
        heads = qkv.reshape(batch, -1, 3, self.dim, height * width)
        q, k, v = (part.transpose(-1, -2) for part in heads.unbind(2))
        out = linear_attention(q, k, v, "relu", eps=self.eps)
        return self.proj(out.transpose(-1, -2).reshape(batch, -1, height, width))


def _unsupported(module: Any) -> str | None:
    if not is_unmodified(module.kernel_func, nn.ReLU):
        return f"has the feature map {type(module.kernel_func).__name__}, or a hook on it, and not a plain ReLU"
    return None


def _examples() -> list[Example]:
    return [(LiteMLA(8, 8, dim=4, scales=scales), (torch.randn(2, 8, 3, 4),)) for scales in ((), (3, 5))]


SWAPS = (ClassSwap(LiteMLA, FusedLiteMLA, unsupported=_unsupported, examples=_examples),)
