"""The fused op: fake implementation, autograd, and what its kernels can serve."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import backends
from .._triton import define, serves_triton
from ..autograd import double_backward, kernels, register_fake, serves_cpu
from .reference import gelu_dropout_reference

for schema in (
    "dropout(Tensor x, Tensor? residual, Tensor seed, float p, int offset) -> Tensor",
    "gelu_dropout_forward(Tensor x, Tensor seed, float p, int offset) -> Tensor",
    "gelu_dropout_backward(Tensor grad_out, Tensor x, Tensor seed, float p, int offset) -> Tensor",
):
    define(schema, "cxv_kernels.dropout.triton")


@register_fake("dropout")
def _(x, residual, seed, p, offset):
    return torch.empty_like(x)


@register_fake("gelu_dropout_forward")
def _(x, seed, p, offset):
    return torch.empty_like(x)


@register_fake("gelu_dropout_backward")
def _(grad_out, x, seed, p, offset):
    return torch.empty_like(x)


class Dropout(torch.autograd.Function):
    """(x, residual, seed, p, offset, backend) → out. It is linear in x, so its gradient is itself, of any order."""

    @staticmethod
    def forward(x, residual, seed, p, offset, backend):
        return kernels(backend).dropout(x, residual, seed, p, offset)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, _, seed, ctx.p, ctx.offset, ctx.backend = inputs
        ctx.seed = seed  # not "saved": a checkpoint that needs no more of what it recomputes stops before this op

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = Dropout.apply(grad.contiguous(), None, ctx.seed, ctx.p, ctx.offset, ctx.backend)
        return grad_x, grad if ctx.needs_input_grad[1] else None, None, None, None, None


class GeluDropout(torch.autograd.Function):
    """(x, seed, p, offset, backend) → out; x is kept, and what is between the two is not."""

    @staticmethod
    def forward(x, seed, p, offset, backend):
        return kernels(backend).gelu_dropout_forward(x, seed, p, offset)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, ctx.seed, ctx.p, ctx.offset, ctx.backend = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        (x,) = ctx.saved_tensors
        return GeluDropoutBackward.apply(grad.contiguous(), x, ctx.seed, ctx.p, ctx.offset, ctx.backend), *(None,) * 4


class GeluDropoutBackward(torch.autograd.Function):
    """The fused backward, itself differentiable: its gradient is that of the reference's."""

    @staticmethod
    def forward(grad, x, seed, p, offset, backend):
        return kernels(backend).gelu_dropout_backward(grad, x, seed, p, offset)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        grad, x, ctx.seed, ctx.p, ctx.offset, _ = inputs
        ctx.save_for_backward(grad, x)

    @staticmethod
    def backward(ctx: Any, second: Tensor):
        grad, x = ctx.saved_tensors
        reference = partial(gelu_dropout_reference, p=ctx.p, seed=ctx.seed, offset=ctx.offset)
        of_grad, of_x = double_backward(reference, [x], [grad], [second])
        return *of_grad, *of_x, *(None,) * 4


for op in ("dropout", "gelu_dropout"):
    backends.register(op, "cpp", serves_cpu)
    backends.register(op, "triton", partial(serves_triton, tensor_cores=False))
