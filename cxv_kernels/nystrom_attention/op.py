"""The fused op in pieces: fake implementations, autograd, and what the kernels serve."""

from typing import Any

import torch
from torch import Tensor

from .. import backends
from .._extension import CPP_MISSING
from ..autograd import double_backward, like_layout, serves_cpu
from ..validation import accumulate_dtype
from .reference import attend_reference, mix_reference, residual_reference

if CPP_MISSING is None:

    def _like(x: Tensor) -> Tensor:
        return like_layout(x, tuple(x.shape))

    @torch.library.register_fake("cxv_kernels::nystrom_means")
    def _(x, landmarks):
        return x.new_empty((*x.shape[:2], landmarks, x.shape[3]), dtype=accumulate_dtype(x.dtype))

    @torch.library.register_fake("cxv_kernels::nystrom_means_backward")
    def _(grad_means, x):
        return _like(x)

    @torch.library.register_fake("cxv_kernels::nystrom_summary")
    def _(q_means, k, v):
        landmarks = q_means.shape[2]
        return like_layout(v, (*v.shape[:2], landmarks, v.shape[3])), q_means.new_empty((*v.shape[:2], landmarks))

    @torch.library.register_fake("cxv_kernels::nystrom_summary_backward")
    def _(grad_summary, q_means, k, v, summary, log_sums):
        return _like(q_means), _like(k), _like(v)

    @torch.library.register_fake("cxv_kernels::nystrom_readout")
    def _(q, k_means, mixed):
        return like_layout(q, (*q.shape[:3], mixed.shape[3]))

    @torch.library.register_fake("cxv_kernels::nystrom_readout_backward")
    def _(grad_out, q, k_means, mixed):
        return _like(q), _like(k_means), _like(mixed)

    @torch.library.register_fake("cxv_kernels::nystrom_mix")
    def _(q_means, k_means, summary):
        return _like(summary)

    @torch.library.register_fake("cxv_kernels::nystrom_mix_backward")
    def _(grad_mixed, q_means, k_means, summary):
        return _like(q_means), _like(k_means), _like(summary)

    @torch.library.register_fake("cxv_kernels::nystrom_residual")
    def _(attention, v, weight):
        return _like(attention)

    @torch.library.register_fake("cxv_kernels::nystrom_residual_backward")
    def _(grad_out, v, weight):
        return _like(v), _like(weight)


class Means(torch.autograd.Function):
    """(x, landmarks) → segment means; x is kept for its layout alone."""

    @staticmethod
    def forward(x, landmarks):
        return torch.ops.cxv_kernels.nystrom_means(x, landmarks)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return MeansBackward.apply(grad, *ctx.saved_tensors), None


class MeansBackward(torch.autograd.Function):
    """The transpose of a linear map: its own backward is that map."""

    @staticmethod
    def forward(grad, x):
        return torch.ops.cxv_kernels.nystrom_means_backward(grad, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.landmarks = inputs[0].shape[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return Means.apply(grad, ctx.landmarks), None


class Summary(torch.autograd.Function):
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
        return SummaryBackward.apply(grad, *ctx.saved_tensors)


class SummaryBackward(torch.autograd.Function):
    """The fused backward, itself differentiable: its gradient is that of the reference's."""

    @staticmethod
    def forward(grad, q_means, k, v, summary, log_sums):
        return torch.ops.cxv_kernels.nystrom_summary_backward(grad, q_means, k, v, summary, log_sums)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        grad, *inputs = ctx.saved_tensors
        second = double_backward(attend_reference, inputs, [grad], grads)
        return (*second[0], *second[1], None, None)


class Readout(torch.autograd.Function):
    """(q, k_means, mixed) → softmax(q k_meansᵀ) mixed."""

    @staticmethod
    def forward(q, k_means, mixed):
        return torch.ops.cxv_kernels.nystrom_readout(q, k_means, mixed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return ReadoutBackward.apply(grad, *ctx.saved_tensors)


class ReadoutBackward(torch.autograd.Function):
    """The fused backward, itself differentiable: its gradient is that of the reference's."""

    @staticmethod
    def forward(grad, q, k_means, mixed):
        return torch.ops.cxv_kernels.nystrom_readout_backward(grad, q, k_means, mixed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        grad, *inputs = ctx.saved_tensors
        second = double_backward(attend_reference, inputs, [grad], grads)
        return (*second[0], *second[1])


class Mix(torch.autograd.Function):
    """(q_means, k_means, summary) → A⁺ summary; backward computes A and its inverse again."""

    @staticmethod
    def forward(q_means, k_means, summary):
        return torch.ops.cxv_kernels.nystrom_mix(q_means, k_means, summary)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return MixBackward.apply(grad, *ctx.saved_tensors)


class MixBackward(torch.autograd.Function):
    """The fused backward, itself differentiable: its gradient is that of the reference's."""

    @staticmethod
    def forward(grad, q_means, k_means, summary):
        return torch.ops.cxv_kernels.nystrom_mix_backward(grad, q_means, k_means, summary)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        grad, *inputs = ctx.saved_tensors
        second = double_backward(mix_reference, inputs, [grad], grads)
        return (*second[0], *second[1])


class Residual(torch.autograd.Function):
    """(attention, v, weight) → attention + the convolution of v."""

    @staticmethod
    def forward(attention, v, weight):
        return torch.ops.cxv_kernels.nystrom_residual(attention, v, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        return (grad, *ResidualBackward.apply(grad, *ctx.saved_tensors))


class ResidualBackward(torch.autograd.Function):
    """The fused backward, itself differentiable: its gradient is that of the reference's."""

    @staticmethod
    def forward(grad, v, weight):
        return torch.ops.cxv_kernels.nystrom_residual_backward(grad, v, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        grad, *inputs = ctx.saved_tensors
        second = double_backward(residual_reference, inputs, [grad], grads)
        return (*second[0], *second[1])


def nystrom_attention_fused(q: Tensor, k: Tensor, v: Tensor, landmarks: int, residual_weight: Tensor | None) -> Tensor:
    """See :func:`cxv_kernels.nystrom_attention`; 1 ≤ landmarks ≤ tokens."""
    q_means, k_means = Means.apply(q, landmarks), Means.apply(k, landmarks)
    summary, _ = Summary.apply(q_means, k, v)
    mixed = Mix.apply(q_means, k_means, summary)
    out = Readout.apply(q, k_means, mixed)
    return out if residual_weight is None else Residual.apply(out, v, residual_weight)


backends.register("nystrom_attention", "cpp", serves_cpu)
