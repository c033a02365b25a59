"""The fused ops: fake implementations, autograd, and what the kernels can serve."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import backends
from .._triton import NAMESPACE, define
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
from ..linear_attention.op import serves_attention, triton_state
from ..validation import accumulate_dtype
from .reference import LEAST_EPS, performer_attention_reference, performer_features_reference

_TRITON = "cxv_kernels.performer_attention.triton"
define(
    "performer_attention_forward(Tensor q, Tensor k, Tensor v, Tensor projection, Tensor? key_mask, str kernel,"
    " float eps) -> (Tensor out, Tensor state, Tensor key_stat, Tensor key_max)",
    _TRITON,
)
define(
    "performer_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor projection,"
    " Tensor? key_mask, Tensor state, Tensor key_stat, Tensor key_max, str kernel, float eps, bool[3] needed)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    _TRITON,
)
define(
    "performer_features_forward(Tensor x, Tensor projection, bool is_query, str kernel, float eps)"
    " -> (Tensor phi, Tensor key_max)",
    _TRITON,
)
define(
    "performer_features_backward(Tensor grad_phi, Tensor x, Tensor projection, Tensor key_max, bool is_query,"
    " str kernel, float eps) -> Tensor",
    _TRITON,
)


@register_fake("performer_attention_forward", "cxv_kernels")
def _(q, k, v, projection, key_mask, kernel, eps):
    heads, features, value_dim = tuple(q.shape[:2]), projection.shape[0], v.shape[3]
    out = like_layout(q, (*q.shape[:3], value_dim))
    state = q.new_empty((*heads, features, value_dim), dtype=accumulate_dtype(q.dtype))
    return out, state, state.new_empty((*heads, features)), state.new_empty(heads)


@register_fake("performer_attention_forward", NAMESPACE)
def _(q, k, v, projection, key_mask, kernel, eps):
    out = like_layout(q, (*q.shape[:3], v.shape[3]))
    return out, *triton_state(q, projection.shape[0], v.shape[3]), projection.new_empty(q.shape[:2])


@register_fake("performer_attention_backward")
def _(grad_out, q, k, v, projection, key_mask, state, key_stat, key_max, kernel, eps, needed):
    return new_gradients((q, k, v), needed)


@register_fake("performer_features_forward")
def _(x, projection, is_query, kernel, eps):
    phi = like_layout(x, (*x.shape[:3], projection.shape[0]))
    return phi, x.new_empty(x.shape[:2], dtype=accumulate_dtype(x.dtype))


@register_fake("performer_features_backward")
def _(grad_phi, x, projection, key_max, is_query, kernel, eps):
    return like_layout(x, tuple(x.shape))


def declined(projection: Tensor, stabilizer: str, eps: float | None, dtype: torch.dtype, backend: str) -> str | None:
    """Why this fused backend does not take these arguments, if so. ``eps``: attention's, None for the default."""
    if eps is not None and 0 < eps < LEAST_EPS and backend != "cpu":
        return f"does not serve an eps between 0 and {LEAST_EPS:g}, which needs float64"
    # its weights of features are factors, of which float16 holds an absolute 1e-10
    if eps is not None and 0 < eps < 1e-5 and backend == "triton" and dtype == torch.float16:
        return "does not serve an eps between 0 and 1e-05 in float16"
    if stabilizer != "head":
        return f"does not serve stabilizer={stabilizer!r}"
    if projection.requires_grad:
        return "does not serve a projection that requires grad"
    features = projection.shape[0]
    return f"serves at most 512 features, not {features}" if backend == "triton" and features > 512 else None


def _in_float64(eps: float, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, in float64 where this eps needs it."""
    return tuple(t.double() for t in tensors) if 0 < eps < LEAST_EPS else tensors


class PerformerAttention(FusedFunction):
    """(q, k, v, projection, key_mask, kernel, eps, backend) → (out, state, key_stat, key_max), out differentiable."""

    @staticmethod
    def forward(q, k, v, projection, key_mask, kernel, eps, backend):
        inputs = _in_float64(eps, q, k, v, projection)
        out, *state = kernels(backend).performer_attention_forward(*inputs, key_mask, kernel, eps)
        return out.to(q.dtype), *state

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.kernel, ctx.eps, ctx.backend = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: None):
        if grad_out is None:
            return (None,) * 8
        needed = list(ctx.needs_input_grad[:3])
        arguments = (grad_out, *ctx.saved_tensors, ctx.kernel, ctx.eps, needed, ctx.backend)
        grads = PerformerAttentionBackward.apply(*arguments)
        return (*grads, *(None,) * 5)


class PerformerAttentionBackward(FusedFunction):
    """The fused backward, itself differentiable: its gradient is that of the reference's."""

    @staticmethod
    def forward(grad_out, q, k, v, projection, key_mask, state, key_stat, key_max, kernel, eps, needed, backend):
        inputs = _in_float64(eps, grad_out, q, k, v, projection)
        grads = kernels(backend).performer_attention_backward(
            *inputs, key_mask, state, key_stat, key_max, kernel, eps, needed
        )
        return only_needed([grad.to(q.dtype) for grad in grads], needed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.kernel, ctx.eps, *_ = inputs[-4:]
        ctx.save_for_backward(*inputs[:6])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        grad_out, q, k, v, projection, key_mask = ctx.saved_tensors
        reference = partial(
            performer_attention_reference, projection=projection, kernel=ctx.kernel, eps=ctx.eps, key_mask=key_mask
        )
        second = double_backward(reference, [q, k, v], [grad_out], grads)
        return (*second[0], *second[1], *(None,) * 9)


class PerformerFeatures(FusedFunction):
    """(x, projection, is_query, kernel, eps, backend) → (φ, key_max); key_max carries no gradient."""

    @staticmethod
    def forward(x, projection, is_query, kernel, eps, backend):
        return kernels(backend).performer_features_forward(x, projection, is_query, kernel, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, projection, *ctx.options = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, projection, output[1])

    @staticmethod
    def backward(ctx: Any, grad_phi: Tensor | None, _: None):
        if grad_phi is None:
            return (None,) * 6
        return (PerformerFeaturesBackward.apply(grad_phi, *ctx.saved_tensors, *ctx.options), *(None,) * 5)


class PerformerFeaturesBackward(FusedFunction):
    """The fused backward of performer_features, itself differentiable."""

    @staticmethod
    def forward(grad_phi, x, projection, key_max, is_query, kernel, eps, backend):
        return kernels(backend).performer_features_backward(grad_phi, x, projection, key_max, is_query, kernel, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        grad_phi, x, projection, _, *ctx.options, _ = inputs
        ctx.save_for_backward(grad_phi, x, projection)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        grad_phi, x, projection = ctx.saved_tensors
        is_query, kernel, eps = ctx.options

        def reference(x: Tensor) -> Tensor:
            return performer_features_reference(x, projection, is_query, kernel, eps)

        second = double_backward(reference, [x], [grad_phi], [grad])
        return (*second[0], *second[1], *(None,) * 6)


backends.register("performer_attention", "cpu", serves_cpu)
backends.register("performer_features", "cpu", serves_cpu)
for _op in ("performer_attention", "performer_features"):
    backends.register(_op, "cuda", serves_cuda(64, (torch.float32, torch.float16)))
    backends.register(_op, "triton", serves_attention)
