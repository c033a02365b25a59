"""The fused parts around scaled-dot-product attention: fake implementations, autograd, and what the kernels serve."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends
from .._triton import define, serves_triton
from ..autograd import double_backward, kernels, like_layout, register_fake, serves_cpu
from ..validation import accumulate_dtype
from .reference import mix_reference, residual_reference

_MAX_DIM = 128  # of the Triton kernels

for schema in (
    "nystrom_means(Tensor x, int landmarks) -> Tensor means",
    "nystrom_means_backward(Tensor grad_means, Tensor x) -> Tensor grad_x",
    "nystrom_mix(Tensor q_means, Tensor k_means, Tensor summary) -> Tensor mixed",
    "nystrom_mix_backward(Tensor grad_mixed, Tensor q_means, Tensor k_means, Tensor summary)"
    " -> (Tensor grad_q_means, Tensor grad_k_means, Tensor grad_summary)",
    "nystrom_residual(Tensor attention, Tensor v, Tensor weight) -> Tensor out",
    "nystrom_residual_backward(Tensor grad_out, Tensor v, Tensor weight) -> (Tensor grad_v, Tensor grad_weight)",
):
    define(schema, "cxv_kernels.nystrom_attention.triton")


def _like(x: Tensor) -> Tensor:
    return like_layout(x, tuple(x.shape))


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
def _(grad_mixed, q_means, k_means, summary):
    return _like(q_means), _like(k_means), _like(summary)


@register_fake("nystrom_residual")
def _(attention, v, weight):
    return _like(attention)


@register_fake("nystrom_residual_backward")
def _(grad_out, v, weight):
    return _like(v), _like(weight)


class Means(torch.autograd.Function):
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


class MeansBackward(torch.autograd.Function):
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


class Mix(torch.autograd.Function):
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
        return *MixBackward.apply(grad, *ctx.saved_tensors, ctx.backend), None


class MixBackward(torch.autograd.Function):
    """The fused backward, itself differentiable: its gradient is that of the reference's."""

    @staticmethod
    def forward(grad, q_means, k_means, summary, backend):
        return kernels(backend).nystrom_mix_backward(grad, q_means, k_means, summary)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        grad, *inputs = ctx.saved_tensors
        second = double_backward(mix_reference, inputs, [grad], grads)
        return *second[0], *second[1], None


class Residual(torch.autograd.Function):
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
        return grad, *ResidualBackward.apply(grad, *ctx.saved_tensors, ctx.backend), None


class ResidualBackward(torch.autograd.Function):
    """The fused backward, itself differentiable: its gradient is that of the reference's."""

    @staticmethod
    def forward(grad, v, weight, backend):
        return kernels(backend).nystrom_residual_backward(grad, v, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        grad, *inputs = ctx.saved_tensors
        second = double_backward(residual_reference, inputs, [grad], grads)
        return *second[0], *second[1], None


def nystrom_attention_fused(
    q: Tensor, k: Tensor, v: Tensor, landmarks: int, residual_weight: Tensor | None, backend: str
) -> Tensor:
    """See :func:`cxv_kernels.nystrom_attention`; 1 ≤ landmarks ≤ tokens."""
    q_means, k_means = Means.apply(q, landmarks, backend), Means.apply(k, landmarks, backend)
    summary = F.scaled_dot_product_attention(q_means.to(q.dtype), k, v)
    mixed = Mix.apply(q_means, k_means, summary, backend)
    out = F.scaled_dot_product_attention(q, k_means.to(q.dtype), mixed)
    return out if residual_weight is None else Residual.apply(out, v, residual_weight, backend)


def _serves(device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    if dim > _MAX_DIM:
        return f"serves heads of at most {_MAX_DIM} channels, not {dim}"
    return serves_triton(device, dtype, dim, tensor_cores=False)


backends.register("nystrom_attention", "cpp", serves_cpu)
backends.register("nystrom_attention", "triton", _serves)
