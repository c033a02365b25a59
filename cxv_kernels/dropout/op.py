"""The fused op: fake implementation, autograd, and what its kernel can serve."""

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..autograd import kernels, register_fake, serves_cpu


@register_fake("dropout")
def _(x, residual, seed, p, offset):
    return torch.empty_like(x)


class Dropout(torch.autograd.Function):
    """(x, residual, seed, p, offset, backend) → out. It is linear in x, so its gradient is itself, of any order."""

    @staticmethod
    def forward(x, residual, seed, p, offset, backend):
        return kernels(backend).dropout(x, residual, seed, p, offset)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, residual, seed, ctx.p, ctx.offset, ctx.backend = inputs
        ctx.has_residual = residual is not None
        ctx.seed = seed  # not "saved": a checkpoint that needs no more of what it recomputes stops before this op

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = Dropout.apply(grad.contiguous(), None, ctx.seed, ctx.p, ctx.offset, ctx.backend)
        return grad_x, grad if ctx.has_residual else None, None, None, None, None


backends.register("dropout", "cpp", serves_cpu)
