"""Swaps for the package nystrom-attention."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from nystrom_attention.nystrom_attention import NystromAttention
from torch import Tensor

from cxv_kernels import nystrom_attention

from .swap import Example, Swap, other_residual, refuse_torchscript


class FusedNystromAttention(NystromAttention):
    """NystromAttention with :func:`cxv_kernels.nystrom_attention`, for calls without a mask or attention maps."""

    __prepare_scriptable__ = refuse_torchscript

    def forward(
        self, x: Tensor, mask: Tensor | None = None, return_attn: bool = False, return_attn_matrices: bool = False
    ) -> Any:
        """Map x (B, N, C) to (B, N, C), and return the attention maps if requested."""
        if mask is not None or return_attn or return_attn_matrices:
            return super().forward(x, mask, return_attn, return_attn_matrices)
        tokens = x.shape[1]
        x = F.pad(x, (0, 0, -tokens % self.num_landmarks, 0))  # each landmark is the mean of equally many tokens
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.to_qkv(x).chunk(3, dim=-1))
        weight = self.res_conv.weight if self.residual else None
        # the package uses one initial scale for the whole batch
        out = nystrom_attention(q, k, v, self.num_landmarks, residual_weight=weight, pinv_init="batch")
        return self.to_out(out.transpose(1, 2).flatten(2))[:, -tokens:]


def _unsupported(module: Any) -> str | None:
    if module.pinv_iterations != 6:
        return f"runs {module.pinv_iterations} iterations of the pseudo-inverse, the op runs 6"
    dim = module.to_qkv.out_features // (3 * module.heads)
    if not math.isclose(module.scale, dim**-0.5):
        return f"scales by {module.scale:.4g}, the op by 1/√D = {dim**-0.5:.4g}"
    return other_residual(module.res_conv, module.heads) if module.residual else None


def _examples() -> list[Example]:
    sizes = {"dim": 8, "dim_head": 4, "heads": 2, "num_landmarks": 3}
    modules = [NystromAttention(**sizes, residual=False), NystromAttention(**sizes, residual_conv_kernel=3)]
    return [(module, (torch.randn(2, tokens, 8),)) for module in modules for tokens in (2, 9, 10)]


SWAPS = (Swap(owner=NystromAttention, fused=FusedNystromAttention, unsupported=_unsupported, examples=_examples),)
