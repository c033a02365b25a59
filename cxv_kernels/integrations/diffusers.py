"""Swaps for diffusers: the linear-attention processors of SANA and the multi-scale linear attention of DC-AE."""

from functools import partial
from typing import Any

import torch
from diffusers.models import attention_processor as processors
from diffusers.models.attention_processor import Attention, SanaMultiscaleLinearAttention
from torch import Tensor

from cxv_kernels import linear_attention

from .shared import multiscale_relu_attention
from .swap import Example, Swap, other_feature_map


class FusedProcessor:
    """A processor that calls our op. ``original`` is the processor that it replaces."""

    def __init__(self, original: Any):
        self.original = original


def _relu_attention(attn: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """query (B, N_q, C), key and value (B, N_k, C) → (B, N_q, C), before the output layers."""
    if not query.dtype == key.dtype == value.dtype:  # a norm in another precision
        query, key, value = query.float(), key.float(), value.float()
    q, k, v = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (query, key, value))
    return linear_attention(q, k, v, "relu", eps=1e-15).transpose(1, 2).flatten(2)


def _output(attn: Attention, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Apply the output layers to x (B, N, C), in the dtype of the hidden states."""
    x = attn.to_out[1](attn.to_out[0](x.to(dtype)))
    return x.clip(-65504, 65504) if dtype == torch.float16 else x


class FusedSanaLinearAttnProcessor(FusedProcessor):
    """``SanaLinearAttnProcessor2_0`` with :func:`cxv_kernels.linear_attention`. Like the original it ignores masks."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Map hidden_states (B, N, C) to (B, N, C)."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        return _output(attn, _relu_attention(attn, query, key, value), hidden_states.dtype)


class FusedPAGSanaLinearAttnProcessor(FusedProcessor):
    """SANA's processor for perturbed-attention guidance: tokens in the last part of the batch attend to themselves."""

    parts = 2

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Map hidden_states (B, N, C) to (B, N, C), B a multiple of ``parts``."""
        *attended, perturbed = hidden_states.chunk(self.parts)
        x = torch.cat(attended)
        x = _relu_attention(attn, attn.to_q(x), attn.to_k(x), attn.to_v(x))
        return torch.cat([_output(attn, part, hidden_states.dtype) for part in (x, attn.to_v(perturbed))])


class FusedPAGCFGSanaLinearAttnProcessor(FusedPAGSanaLinearAttnProcessor):
    """The same with classifier-free guidance."""

    parts = 3


class FusedSanaMultiscaleAttnProcessor(FusedProcessor):
    """``SanaMultiscaleAttnProcessor2_0`` with :func:`cxv_kernels.linear_attention`, for any number of pixels."""

    def __call__(self, attn: SanaMultiscaleLinearAttention, hidden_states: Tensor) -> Tensor:
        """Map hidden_states (B, C, H, W) to (B, C_out, H, W)."""
        residual, dtype = hidden_states, hidden_states.dtype
        x = hidden_states.movedim(1, -1)
        qkv = torch.cat([attn.to_q(x), attn.to_k(x), attn.to_v(x)], dim=3).movedim(-1, 1)
        scales = (qkv, *(block(qkv) for block in attn.to_qkv_multiscale))
        out = multiscale_relu_attention(scales, attn.attention_head_dim, attn.eps).to(dtype)
        x = attn.to_out(out.movedim(1, -1)).movedim(-1, 1)
        last = attn.norm_type == "rms_norm"  # normalizes the last dimension; the other norms expect channels first
        x = attn.norm_out(x.movedim(1, -1)).movedim(-1, 1) if last else attn.norm_out(x)
        return x + residual if attn.residual_connection else x


def _unsupported(module: Any) -> str | None:
    if type(module.processor).__name__ == "SanaLinearAttnProcessor3_0":
        return "rotates q and k only in the numerator (SanaLinearAttnProcessor3_0), which the ops do not support"
    return None


def _multiscale_examples() -> list[Example]:
    return [
        (SanaMultiscaleLinearAttention(8, 8, attention_head_dim=4, **options), (torch.randn(2, 8, *size),))
        for options in ({"norm_type": "rms_norm", "residual_connection": True}, {"kernel_sizes": ()})
        for size in ((2, 2), (3, 4))  # linear and quadratic
    ]


def _examples(processor: type, **options: Any) -> list[Example]:
    attention = Attention(query_dim=8, heads=2, dim_head=4, kv_heads=2, bias=True, processor=processor(), **options)
    return [(attention, (torch.randn(6, 5, 8),))]


_PROCESSORS: tuple[tuple[str, type, dict[str, Any]], ...] = (
    ("SanaLinearAttnProcessor2_0", FusedSanaLinearAttnProcessor, {"qk_norm": "rms_norm_across_heads"}),
    ("PAGIdentitySanaLinearAttnProcessor2_0", FusedPAGSanaLinearAttnProcessor, {}),
    ("PAGCFGSanaLinearAttnProcessor2_0", FusedPAGCFGSanaLinearAttnProcessor, {}),
)
SWAPS = (
    *(
        Swap(
            owner=Attention,
            attribute="processor",
            original=original,
            fused=fused,
            unsupported=_unsupported,
            examples=partial(_examples, original, **options),
        )
        for name, fused, options in _PROCESSORS
        if (original := getattr(processors, name, None)) is not None  # the releases have different processors
    ),
    Swap(
        owner=SanaMultiscaleLinearAttention,
        attribute="processor",
        original=processors.SanaMultiscaleAttnProcessor2_0,
        fused=FusedSanaMultiscaleAttnProcessor,
        unsupported=lambda module: other_feature_map(module.nonlinearity),
        examples=_multiscale_examples,
    ),
)
