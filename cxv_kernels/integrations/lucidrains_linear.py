"""Swaps for linear-attention-transformer: softmax linear attention over tokens and over pixels."""

from functools import partial
from typing import Any

import torch
from linear_attention_transformer.images import ImageLinearAttention
from linear_attention_transformer.linear_attention_transformer import SelfAttention, causal_linear_attn, linear_attn
from torch import Tensor

from cxv_kernels import linear_attention

from .shared import softmax_linear_attention
from .swap import Example, Swap, refuse_torchscript


def fused_linear_attn(q: Tensor, k: Tensor, v: Tensor, kv_mask: Tensor | None = None) -> Tensor:
    """``linear_attn`` with :func:`cxv_kernels.linear_attention`: q (B, H, N_q, D), k and v (B, H, N_k, D)."""
    return softmax_linear_attention(q, k, v, kv_mask) * q.shape[-1] ** -0.5


class FusedImageLinearAttention(ImageLinearAttention):
    """ImageLinearAttention with :func:`cxv_kernels.linear_attention`."""

    __prepare_scriptable__ = refuse_torchscript

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Map x (B, C, H, W) to (B, C_out, H, W)."""
        batch, channels, height, width = x.shape
        q, k, v = (
            layer(x).reshape(batch, self.heads, -1, height * width).transpose(-1, -2)
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        if context is not None:
            context = context.reshape(batch, channels, 1, -1)
            context_k, context_v = (
                layer(context).reshape(batch, self.heads, self.key_dim, -1).transpose(-1, -2)
                for layer in (self.to_k, self.to_v)
            )
            context_k = context_k * self.key_dim**0.25  # the package scales only q and k of the image
            k, v = torch.cat((k, context_k), dim=2), torch.cat((v, context_v), dim=2)
        out = linear_attention(q, k, v)
        return self.to_out(out.transpose(-1, -2).reshape(batch, -1, height, width))


def _unsupported(module: Any) -> str | None:
    if isinstance(module.global_attn_fn, partial) and module.global_attn_fn.func is causal_linear_attn:
        return "is causal"
    return None


def _unsupported_image(module: Any) -> str | None:
    return None if module.norm_queries else "has queries without softmax (norm_queries=False)"


def _image_examples() -> list[Example]:
    module = ImageLinearAttention(8, key_dim=4, value_dim=4, heads=2)
    return [(module, (torch.randn(2, 8, 3, 4), *context)) for context in ((), (torch.randn(2, 8, 5),))]


def _examples() -> list[Example]:
    mask = torch.arange(6).expand(2, 6) < torch.tensor([[4], [6]])
    return [(SelfAttention(8, 2), (torch.randn(2, 6, 8), *rest)) for rest in ((), (mask,))]


SWAPS = (
    Swap(
        owner=SelfAttention,
        attribute="global_attn_fn",
        original=linear_attn,
        fused=fused_linear_attn,
        unsupported=_unsupported,
        examples=_examples,
    ),
    Swap(
        owner=ImageLinearAttention,
        fused=FusedImageLinearAttention,
        unsupported=_unsupported_image,
        examples=_image_examples,
    ),
)
