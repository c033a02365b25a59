"""The fused op: fake implementations, autograd, and what its kernels can serve."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import backends
from .._triton import NAMESPACE, define, serves_triton
from ..autograd import (
    FusedFunction,
    double_backward,
    kernels,
    like_layout,
    new_gradients,
    only_needed,
    register_fake,
    serves_cpu,
    serves_cuda,
)
from ..validation import accumulate_dtype
from .reference import kv_state_reference, linear_attention_reference

_TRITON = "cxv_kernels.linear_attention.triton"
define(
    "linear_attention_forward(Tensor q, Tensor k, Tensor v, Tensor? key_mask, str feature_map, float eps)"
    " -> (Tensor out, Tensor state, Tensor key_stat)",
    _TRITON,
)
define(
    "linear_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? key_mask, Tensor state,"
    " Tensor key_stat, str feature_map, float eps, bool[3] needed)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    _TRITON,
)
define(
    "kv_state_forward(Tensor k, Tensor v, Tensor? key_mask, str feature_map) -> (Tensor state, Tensor key_stat)",
    _TRITON,
)
define(
    "kv_state_backward(Tensor grad_state, Tensor grad_z, Tensor k, Tensor v, Tensor? key_mask, Tensor key_stat,"
    " str feature_map, bool[2] needed) -> (Tensor grad_k, Tensor grad_v)",
    _TRITON,
)


@register_fake("linear_attention_forward", "cxv_kernels")
def _(q, k, v, key_mask, feature_map, eps):
    batch, heads, dim, value_dim = *q.shape[:2], q.shape[3], v.shape[3]
    out = like_layout(q, (*q.shape[:3], value_dim))
    state = q.new_empty((batch, heads, dim, value_dim), dtype=accumulate_dtype(q.dtype))
    return out, state, state.new_empty((batch, heads, dim))


@register_fake("linear_attention_forward", NAMESPACE)
def _(q, k, v, key_mask, feature_map, eps):
    return like_layout(q, (*q.shape[:3], v.shape[3])), *triton_state(q, q.shape[3], v.shape[3])


def triton_state(q: Tensor, features: int, value_dim: int) -> tuple[Tensor, Tensor]:
    """What the Triton kernels keep of a head: U (B, H, F + 2, E) and the statistics (B, H, 2 F + 1)."""
    state = q.new_empty((*q.shape[:2], features + 2, value_dim), dtype=accumulate_dtype(q.dtype))
    return state, state.new_empty((*q.shape[:2], 2 * features + 1))


@register_fake("linear_attention_backward")
def _(grad_out, q, k, v, key_mask, state, key_stat, feature_map, eps, needed):
    return new_gradients((q, k, v), needed)


@register_fake("kv_state_forward")
def _(k, v, key_mask, feature_map):
    state = k.new_empty((*k.shape[:2], k.shape[3], v.shape[3]), dtype=accumulate_dtype(k.dtype))
    return state, state.new_empty((*k.shape[:2], k.shape[3]))


@register_fake("kv_state_backward")
def _(grad_state, grad_z, k, v, key_mask, key_stat, feature_map, needed):
    return new_gradients((k, v), needed)


class LinearAttention(FusedFunction):
    """(q, k, v, key_mask, feature_map, eps, backend) → (out, state, key_stat); the last two carry no gradient."""

    @staticmethod
    def forward(q, k, v, key_mask, feature_map, eps, backend):
        return kernels(backend).linear_attention_forward(q, k, v, key_mask, feature_map, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        q, k, v, key_mask, ctx.feature_map, ctx.eps, ctx.backend = inputs
        _, state, key_stat = output
        ctx.mark_non_differentiable(state, key_stat)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, key_mask, state, key_stat)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: None):
        if grad_out is None:
            return (None,) * 7
        q, k, v, key_mask, state, key_stat = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[:3])
        arguments = (grad_out, q, k, v, key_mask, state, key_stat, ctx.feature_map, ctx.eps, needed, ctx.backend)
        return (*LinearAttentionBackward.apply(*arguments), *(None,) * 4)


class LinearAttentionBackward(FusedFunction):
    """The fused backward, itself differentiable: its gradient is that of the reference's."""

    @staticmethod
    def forward(grad_out, q, k, v, key_mask, state, key_stat, feature_map, eps, needed, backend):
        grads = kernels(backend).linear_attention_backward(
            grad_out, q, k, v, key_mask, state, key_stat, feature_map, eps, needed
        )
        return only_needed(grads, needed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        grad_out, q, k, v, key_mask, _, _, ctx.feature_map, ctx.eps, *_ = inputs
        ctx.save_for_backward(grad_out, q, k, v, key_mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        *differentiable, key_mask = ctx.saved_tensors
        grad_out, *inputs = differentiable
        reference = partial(linear_attention_reference, feature_map=ctx.feature_map, eps=ctx.eps, key_mask=key_mask)
        second = double_backward(reference, inputs, [grad_out], grads)
        return (*second[0], *second[1], *(None,) * 7)


class KvState(FusedFunction):
    """(k, v, key_mask, feature_map, backend) → (S, z, key_stat); the last carries no gradient."""

    @staticmethod
    def forward(k, v, key_mask, feature_map, backend):
        state, stat = kernels(backend).kv_state_forward(k, v, key_mask, feature_map)
        # softmax: 1, 0 where no key is seen and the statistic is infinite, NaN where it is NaN
        z = (stat - stat + 1).masked_fill(stat.isinf(), 0) if feature_map == "softmax" else stat.clone()
        return state, z, stat

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        k, v, key_mask, ctx.feature_map, ctx.backend = inputs
        state, _, stat = output
        ctx.mark_non_differentiable(stat)
        ctx.save_for_backward(k, v, key_mask, state, stat)

    @staticmethod
    def backward(ctx: Any, grad_state: Tensor, grad_z: Tensor, _: Tensor):
        needed = list(ctx.needs_input_grad[:2])
        grads = KvStateBackward.apply(grad_state, grad_z, *ctx.saved_tensors, ctx.feature_map, needed, ctx.backend)
        return (*grads, *(None,) * 3)


class KvStateBackward(FusedFunction):
    """The fused backward of kv_state, itself differentiable."""

    @staticmethod
    def forward(grad_state, grad_z, k, v, key_mask, state, key_stat, feature_map, needed, backend):
        if feature_map == "softmax":  # S is normalized, and z is 1: what S's gradient does to the normalization
            grad_z = -(grad_state * state).sum(dim=-1)
        grads = kernels(backend).kv_state_backward(grad_state, grad_z, k, v, key_mask, key_stat, feature_map, needed)
        return only_needed(grads, needed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        grad_state, grad_z, k, v, key_mask, _, _, ctx.feature_map, *_ = inputs
        ctx.save_for_backward(grad_state, grad_z, k, v, key_mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        grad_state, grad_z, k, v, key_mask = ctx.saved_tensors
        reference = partial(kv_state_reference, feature_map=ctx.feature_map, key_mask=key_mask)
        second = double_backward(reference, [k, v], [grad_state, grad_z], grads)
        return (*second[0], *second[1], *(None,) * 6)


def serves_attention(device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    """The capability check of the Triton attention kernels."""
    reason = serves_triton(device, dtype, dim)
    return reason or (f"serves heads of at most 128 channels, not {dim}" if dim > 128 else None)


backends.register("linear_attention", "cpu", serves_cpu)
backends.register("kv_state", "cpu", serves_cpu)
for _op in ("linear_attention", "kv_state"):
    backends.register(_op, "cuda", serves_cuda(64, (torch.float32, torch.float16)))
    backends.register(_op, "triton", serves_attention)
