"""Swaps for EfficientViT (B and L) of timm: multi-scale linear attention with the feature map relu."""

import torch
from timm.models.efficientvit_mit import LiteMLA
from torch import Tensor

from cxv_kernels import linear_attention

from .swap import Example, Swap, other_feature_map, refuse_torchscript


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
