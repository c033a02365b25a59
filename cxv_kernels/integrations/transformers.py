"""Swaps for the Nyströmformer of transformers."""

from typing import Any

import torch
from torch import Tensor
from transformers.models.nystromformer.configuration_nystromformer import NystromformerConfig
from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

from cxv_kernels import nystrom_attention

from .swap import Example, Swap, other_residual, refuse_torchscript


class FusedNystromformerSelfAttention(NystromformerSelfAttention):
    """NystromformerSelfAttention with :func:`cxv_kernels.nystrom_attention`, for calls without a mask or maps."""

    __prepare_scriptable__ = refuse_torchscript

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        """Map hidden_states (B, N, C) to a tuple with (B, N, C), and the attention map if requested."""
        # the op has no mask, and accepts other numbers of tokens than the configured one
        if attention_mask is not None or output_attentions or hidden_states.shape[-2] != self.seq_len:
            return super().forward(hidden_states, attention_mask, output_attentions)
        q, k, v = (
            layer(hidden_states).unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        weight = None if self.conv_kernel_size is None else self.conv.weight
        # the rows of a softmax sum to 1, so the scale of "original" is the scale of our "batch"
        init = "batch" if self.init_option == "original" else "head"
        out = nystrom_attention(q, k, v, self.num_landmarks, residual_weight=weight, pinv_init=init)
        return (out.transpose(1, 2).flatten(2),)


def _unsupported(module: Any) -> str | None:
    if module.num_landmarks == module.seq_len:
        return "computes softmax attention: it has as many landmarks as tokens"
    if module.seq_len % module.num_landmarks:
        return f"has {module.seq_len} tokens, which {module.num_landmarks} landmarks do not divide"
    return None if module.conv_kernel_size is None else other_residual(module.conv, module.num_attention_heads)


def _examples() -> list[Example]:
    config = NystromformerConfig(
        hidden_size=8, num_attention_heads=2, num_landmarks=3, segment_means_seq_len=12, conv_kernel_size=3
    )
    return [(NystromformerSelfAttention(config), (torch.randn(2, 12, 8),))]


SWAPS = (
    Swap(
        owner=NystromformerSelfAttention,
        fused=FusedNystromformerSelfAttention,
        unsupported=_unsupported,
        examples=_examples,
    ),
)
