"""Swaps for EfficientViT (B and L) of timm: multi-scale linear attention with the feature map relu."""

import torch
from timm.models.efficientvit_mit import LiteMLA
from torch import Tensor

from .shared import multiscale_relu_attention
from .swap import Example, Swap, other_feature_map, refuse_torchscript


class FusedLiteMLA(LiteMLA):
    """LiteMLA with :func:`cxv_kernels.linear_attention`."""

    __prepare_scriptable__ = refuse_torchscript

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C, H, W) to (B, C_out, H, W)."""
        qkv = self.qkv(x)
        scales = (qkv, *(aggregate(qkv) for aggregate in self.aggreg))
        return self.proj(multiscale_relu_attention(scales, self.dim, self.eps))


def _examples() -> list[Example]:
    return [(LiteMLA(8, 8, dim=4, scales=scales), (torch.randn(2, 8, 3, 4),)) for scales in ((), (3, 5))]


SWAPS = (
    Swap(
        owner=LiteMLA,
        fused=FusedLiteMLA,
        unsupported=lambda module: other_feature_map(module.kernel_func),
        examples=_examples,
    ),
)
