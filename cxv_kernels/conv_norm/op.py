"""The fused op: fake implementations, autograd, and what its kernels can serve."""

from typing import Any

import torch
from torch import Tensor

from .. import backends
from .._triton import define, serves_triton
from ..autograd import FusedFunction, double_backward, kernels, register_fake, serves_cpu, serves_cuda
from ..validation import accumulate_dtype, without_autocast
from .reference import conv_norm_reference

MAX_CHANNELS = 4096

for schema in (
    "conv_norm_forward(Tensor x, Tensor weight, Tensor? bias, Tensor gamma, Tensor beta, float eps)"
    " -> (Tensor out, Tensor rstd)",
    "conv_norm_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias, Tensor out, Tensor rstd, Tensor gamma,"
    " Tensor beta, float eps, bool[5] needed) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias,"
    " Tensor grad_gamma, Tensor grad_beta)",
):
    define(schema, "cxv_kernels.conv_norm.triton")

_OPTIONS = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, transposed, output padding, groups


def convolution(x: Tensor, weight: Tensor) -> Tensor:
    """PyTorch's 3×3 convolution, without bias."""
    return torch.ops.aten.convolution(x, weight, None, *_OPTIONS)


def convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, needed: list[bool]) -> tuple[Tensor, Tensor]:
    """Its gradients of x and weight, as far as ``needed``, else empty (0)."""
    grads = torch.ops.aten.convolution_backward(grad, x, weight, None, *_OPTIONS, [*needed[:2], False])
    return tuple(g if need else x.new_empty(0) for g, need in zip(grads, needed[:2], strict=False))


@register_fake("conv_norm_forward")
def _(x, weight, bias, gamma, beta, eps):
    return convolution(x, weight), x.new_empty((x.shape[0], *x.shape[2:]), dtype=accumulate_dtype(x.dtype))


@register_fake("conv_norm_backward")
def _(grad_out, x, weight, bias, out, rstd, gamma, beta, eps, needed):
    vectors = (bias if needed[2] else x, gamma, beta)
    return (
        *convolution_backward(out, x, weight, needed),
        *(t.new_empty(gamma.shape if need else 0) for t, need in zip(vectors, needed[2:], strict=True)),
    )


def _as(x: Tensor, *parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    """The parameters in x's dtype; under autocast theirs is another, and no copy of them is kept for backward."""
    return tuple(None if t is None else t.to(x.dtype) for t in parameters)


class ConvNorm(FusedFunction):
    """(x, weight, bias, gamma, beta, eps, backend) → (out, rstd); rstd carries no gradient."""

    @staticmethod
    def forward(x, weight, bias, gamma, beta, eps, backend):
        return kernels(backend).conv_norm_forward(x, *_as(x, weight, bias), gamma, beta, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, weight, bias, gamma, beta, ctx.eps, ctx.backend = inputs
        out, rstd = output
        ctx.mark_non_differentiable(rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, gamma, beta, out, rstd)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: None):
        if grad_out is None:
            return (None,) * 7
        x, weight, bias, gamma, beta, out, rstd = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[:5])
        with without_autocast(x):
            arguments = (grad_out, x, weight, bias, gamma, beta, out, rstd, ctx.eps, needed, ctx.backend)
            grads = ConvNormBackward.apply(*arguments)
        return (*grads, None, None)


class ConvNormBackward(FusedFunction):
    """The fused backward, itself differentiable: its gradient is that of the reference's."""

    @staticmethod
    def forward(grad_out, x, weight, bias, gamma, beta, out, rstd, eps, needed, backend):
        grads = kernels(backend).conv_norm_backward(
            grad_out, x, *_as(x, weight, bias), out, rstd, gamma, beta, eps, needed
        )
        inputs = (x, weight, bias, gamma, beta)
        return tuple(g.to(t.dtype) if need else None for g, t, need in zip(grads, inputs, needed, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        grad_out, x, weight, bias, gamma, beta, _, _, ctx.eps, *_ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_out, x, weight, bias, gamma, beta)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None):
        grad_out, *inputs = ctx.saved_tensors
        given = [t is not None for t in inputs]  # all but perhaps bias

        def reference(*tensors: Tensor) -> Tensor:
            rest = iter(tensors)
            x, weight, bias, gamma, beta = (next(rest) if there else None for there in given)
            return conv_norm_reference(x, *_as(x, weight, bias), gamma, beta, ctx.eps)

        pairs = [(t, g) for t, g in zip(inputs, grads, strict=True) if t is not None]
        (of_grad,), rest = double_backward(reference, [t for t, _ in pairs], [grad_out], [g for _, g in pairs])
        second = iter(rest)
        return (of_grad, *(next(second) if there else None for there in given), *(None,) * 5)


backends.register("conv_norm", "cpu", serves_cpu)
backends.register("conv_norm", "cuda", serves_cuda(3072, (torch.float32, torch.float16), narrowest=3))


def _serves(device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    if dim > MAX_CHANNELS:
        return f"serves at most {MAX_CHANNELS} channels, for a pixel's lie in one program's registers, not {dim}"
    return serves_triton(device, dtype, dim, tensor_cores=False)


backends.register("conv_norm", "triton", _serves)
