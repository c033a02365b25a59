"""The fused op in pieces: fake implementations, autograd, and what the kernels serve."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from .._triton import define, serves_triton
from ..autograd import (
    FusedFunction,
    apply_fused,
    double_backward,
    kernels,
    like_layout,
    new_gradients,
    only_needed,
    register_fake,
    serves_cpu,
)
from ..validation import accumulate_dtype
from .reference import attend_reference, mix_reference, residual_reference

_MAX_DIM = 128  # of the Triton kernels

for schema in (
    "nystrom_means(Tensor x, int landmarks) -> Tensor means",
    "nystrom_means_backward(Tensor grad_means, Tensor x) -> Tensor grad_x",
    "nystrom_mix(Tensor q_means, Tensor k_means, Tensor summary) -> Tensor mixed",
    "nystrom_mix_backward(Tensor grad_mixed, Tensor q_means, Tensor k_means, Tensor summary, bool[3] needed)"
    " -> (Tensor grad_q_means, Tensor grad_k_means, Tensor grad_summary)",
    "nystrom_residual(Tensor attention, Tensor v, Tensor weight) -> Tensor out",
    "nystrom_residual_backward(Tensor grad_out, Tensor v, Tensor weight, bool[2] needed)"
    " -> (Tensor grad_v, Tensor grad_weight)",
):
    define(schema, "cxv_kernels.nystrom_attention.triton")


def _like(x: Tensor) -> Tensor:
    return like_layout(x, tuple(x.shape))


@register_fake("nystrom_summary", "cxv_kernels")
def _(q_means, k, v):
    landmarks = q_means.shape[2]
    return like_layout(v, (*v.shape[:2], landmarks, v.shape[3])), q_means.new_empty((*v.shape[:2], landmarks))


@register_fake("nystrom_summary_backward", "cxv_kernels")
def _(grad_summary, q_means, k, v, summary, log_sums, needed):
    return new_gradients((q_means, k, v), needed)


@register_fake("nystrom_readout", "cxv_kernels")
def _(q, k_means, mixed):
    return like_layout(q, (*q.shape[:3], mixed.shape[3]))


@register_fake("nystrom_readout_backward", "cxv_kernels")
def _(grad_out, q, k_means, mixed, needed):
    return new_gradients((q, k_means, mixed), needed)


@register_fake("nystrom_means")
def _(x, landmarks):
    return x.new_empty((*x.shape[:2], landmarks, x.shape[3]), dtype=accumulate_dtype(x.dtype))


@register_fake("nystrom_means_backward")
def _(grad_means, x):
    return _like(x)


@register_fake("nystrom_mix")
def _(q_means, k_means, summary):
    return _like(summary)


@register_fake("nystrom_mix_backward")
def _(grad_mixed, q_means, k_means, summary, needed):
    return new_gradients((q_means, k_means, summary), needed)


@register_fake("nystrom_residual")
def _(attention, v, weight):
    return _like(attention)


@register_fake("nystrom_residual_backward")
def _(grad_out, v, weight, needed):
    return new_gradients((v, weight), needed)


class Means(FusedFunction):
    """(x, landmarks, backend) → segment means; x is kept for its layout alone."""

    @staticmethod
    def forward(x, landmarks, backend):
        return kernels(backend).nystrom_means(x, landmarks)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, _, ctx.backend = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return MeansBackward.apply(grad, *ctx.saved_tensors, ctx.backend), None, None


class MeansBackward(FusedFunction):
    """The transpose of a linear map: its own backward is that map."""

    @staticmethod
    def forward(grad, x, backend):
        return kernels(backend).nystrom_means_backward(grad, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.landmarks, ctx.backend = inputs[0].shape[2], inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return Means.apply(grad, ctx.landmarks, ctx.backend), None, None


class Summary(FusedFunction):
    """(q_means, k, v) → softmax(q_means kᵀ) v and each landmark's log Σ e^logit, which has no gradient."""

    @staticmethod
    def forward(q_means, k, v):
        return torch.ops.cxv_kernels.nystrom_summary(q_means, k, v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs, *output)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _):
        return SummaryBackward.apply(grad, *ctx.saved_tensors, list(ctx.needs_input_grad))


class SummaryBackward(FusedFunction):
    """The fused backward, itself differentiable: its gradient is that of the reference's."""

    @staticmethod
    def forward(grad, q_means, k, v, summary, log_sums, needed):
        grads = torch.ops.cxv_kernels.nystrom_summary_backward(grad, q_means, k, v, summary, log_sums, needed)
        return only_needed(grads, needed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        grad, *inputs = ctx.saved_tensors
        second = double_backward(attend_reference, inputs, [grad], grads)
        return (*second[0], *second[1], None, None, None)


class Readout(FusedFunction):
    """(q, k_means, mixed) → softmax(q k_meansᵀ) mixed."""

    @staticmethod
    def forward(q, k_means, mixed):
        return torch.ops.cxv_kernels.nystrom_readout(q, k_means, mixed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return ReadoutBackward.apply(grad, *ctx.saved_tensors, list(ctx.needs_input_grad))


class ReadoutBackward(FusedFunction):
    """The fused backward, itself differentiable: its gradient is that of the reference's."""

    @staticmethod
    def forward(grad, q, k_means, mixed, needed):
        grads = torch.ops.cxv_kernels.nystrom_readout_backward(grad, q, k_means, mixed, needed)
        return only_needed(grads, needed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        grad, *inputs = ctx.saved_tensors
        second = double_backward(attend_reference, inputs, [grad], grads)
        return (*second[0], *second[1], None)


class Mix(FusedFunction):
    """(q_means, k_means, summary, backend) → A⁺ summary; backward computes A and its inverse again."""

    @staticmethod
    def forward(q_means, k_means, summary, backend):
        return kernels(backend).nystrom_mix(q_means, k_means, summary)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.backend = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return *MixBackward.apply(grad, *ctx.saved_tensors, list(ctx.needs_input_grad[:3]), ctx.backend), None


class MixBackward(FusedFunction):
    """The fused backward, itself differentiable: its gradient is that of the reference's."""

    @staticmethod
    def forward(grad, q_means, k_means, summary, needed, backend):
        return only_needed(kernels(backend).nystrom_mix_backward(grad, q_means, k_means, summary, needed), needed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        grad, *inputs = ctx.saved_tensors
        second = double_backward(mix_reference, inputs, [grad], grads)
        return *second[0], *second[1], None, None


class Residual(FusedFunction):
    """(attention, v, weight, backend) → attention + the convolution of v."""

    @staticmethod
    def forward(attention, v, weight, backend):
        return kernels(backend).nystrom_residual(attention, v, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, v, weight, ctx.backend = inputs
        ctx.save_for_backward(v, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        of_attention, *needed, _ = ctx.needs_input_grad
        grads = (None, None)
        if any(needed):
            grads = ResidualBackward.apply(grad, *ctx.saved_tensors, needed, ctx.backend)
        return grad if of_attention else None, *grads, None


class ResidualBackward(FusedFunction):
    """The fused backward, itself differentiable: its gradient is that of the reference's."""

    @staticmethod
    def forward(grad, v, weight, needed, backend):
        return only_needed(kernels(backend).nystrom_residual_backward(grad, v, weight, needed), needed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs[:3])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        grad, *inputs = ctx.saved_tensors
        second = double_backward(residual_reference, inputs, [grad], grads)
        return *second[0], *second[1], None, None


def nystrom_attention_fused(
    q: Tensor, k: Tensor, v: Tensor, landmarks: int, residual_weight: Tensor | None, backend: str
) -> Tensor:
    """See :func:`cxv_kernels.nystrom_attention`; 1 ≤ landmarks ≤ tokens."""
    q_means, k_means = apply_fused(Means, q, landmarks, backend), apply_fused(Means, k, landmarks, backend)
    if backend == "triton":  # a GPU's own attention kernels serve few keys well
        summary = F.scaled_dot_product_attention(q_means.to(q.dtype), k, v)
        mixed = apply_fused(Mix, q_means, k_means, summary, backend)
        out = F.scaled_dot_product_attention(q, k_means.to(q.dtype), mixed)
    else:
        summary, _ = apply_fused(Summary, q_means, k, v)
        mixed = apply_fused(Mix, q_means, k_means, summary, backend)
        out = apply_fused(Readout, q, k_means, mixed)
    return out if residual_weight is None else apply_fused(Residual, out, v, residual_weight, backend)


def declined(pinv_init: str, backend: str) -> str | None:
    """Return why the fused backends do not support these arguments; None if they do."""
    return None if pinv_init == "head" else f"does not support pinv_init={pinv_init!r}"


def _serves(device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    if dim > _MAX_DIM:
        return f"serves heads of at most {_MAX_DIM} channels, not {dim}"
    return serves_triton(device, dtype, dim, tensor_cores=False)


backends.register("nystrom_attention", "cpu", serves_cpu)
backends.register("nystrom_attention", "triton", _serves)
