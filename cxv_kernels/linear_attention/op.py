"""The fused op: fake implementations, autograd, and what its kernels can serve."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import backends
from .._extension import CPP_MISSING, CUDA_MISSING
from ..autograd import double_backward, like_layout, serves_cpu
from ..validation import accumulate_dtype
from .reference import linear_attention_reference

if CPP_MISSING is None:

    @torch.library.register_fake("cxv_kernels::linear_attention_forward")
    def _(q, k, v, key_mask, feature_map, eps):
        batch, heads, dim, value_dim = *q.shape[:2], q.shape[3], v.shape[3]
        out = like_layout(q, (*q.shape[:3], value_dim))
        state = q.new_empty((batch, heads, dim, value_dim), dtype=accumulate_dtype(q.dtype))
        return out, state, state.new_empty((batch, heads, dim))

    @torch.library.register_fake("cxv_kernels::linear_attention_backward")
    def _(grad_out, q, k, v, key_mask, state, key_stat, feature_map, eps):
        return tuple(like_layout(t, tuple(t.shape)) for t in (q, k, v))


class LinearAttention(torch.autograd.Function):
    """(q, k, v, key_mask, feature_map, eps) → (out, state, key_stat); the last two carry no gradient."""

    @staticmethod
    def forward(q, k, v, key_mask, feature_map, eps):
        return torch.ops.cxv_kernels.linear_attention_forward(q, k, v, key_mask, feature_map, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        q, k, v, key_mask, ctx.feature_map, ctx.eps = inputs
        _, state, key_stat = output
        ctx.mark_non_differentiable(state, key_stat)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, key_mask, state, key_stat)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: None):
        if grad_out is None:
            return (None,) * 6
        q, k, v, key_mask, state, key_stat = ctx.saved_tensors
        arguments = (grad_out, q, k, v, key_mask, state, key_stat, ctx.feature_map, ctx.eps)
        return (*LinearAttentionBackward.apply(*arguments), None, None, None)


class LinearAttentionBackward(torch.autograd.Function):
    """The fused backward, itself differentiable: its gradient is that of the reference's."""

    @staticmethod
    def forward(grad_out, q, k, v, key_mask, state, key_stat, feature_map, eps):
        return torch.ops.cxv_kernels.linear_attention_backward(
            grad_out, q, k, v, key_mask, state, key_stat, feature_map, eps
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        grad_out, q, k, v, key_mask, _, _, ctx.feature_map, ctx.eps = inputs
        ctx.save_for_backward(grad_out, q, k, v, key_mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        *differentiable, key_mask = ctx.saved_tensors
        grad_out, *inputs = differentiable
        reference = partial(linear_attention_reference, feature_map=ctx.feature_map, eps=ctx.eps, key_mask=key_mask)
        second = double_backward(reference, inputs, [grad_out], grads)
        return (*second[0], *second[1], *(None,) * 5)


def _cuda(device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    if CUDA_MISSING or device.type != "cuda":
        return CUDA_MISSING or f"serves CUDA devices, not {device.type}"
    return f"serves heads of at most 128 channels, not {dim}" if dim > 128 else None


backends.register("linear_attention", "cpp", serves_cpu)
backends.register("linear_attention", "cuda", _cuda)
