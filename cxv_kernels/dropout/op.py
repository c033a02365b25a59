"""The fused op: fake implementation, autograd, and what its kernels can serve."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import backends
from .._triton import define, serves_triton
from ..autograd import FusedFunction, double_backward, kernels, register_fake, serves_cpu
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


def _save(ctx: Any, seed: Tensor, *tensors: Tensor) -> None:
    """Save the tensors for backward, and the seed without a saved tensor hook.

    A checkpoint recomputes up to the last op that saves a tensor. With a saved seed it would run the dropout at the end
    of a residual branch, and the linear map before it, once more.
    """
    if torch.compiler.is_compiling():  # the compiler decides what is recomputed
        ctx.save_for_backward(*tensors, seed)
        ctx.seed = None
    else:
        ctx.save_for_backward(*tensors)
        # inference tensors have no version
        ctx.seed, ctx.seed_version = seed, None if seed.is_inference() else seed._version


def _saved(ctx: Any) -> tuple[Tensor, ...]:
    """The tensors, and the seed.

    Raises:
        RuntimeError: one of them was changed in place.
    """
    seed = ctx.seed
    if seed is None:
        return ctx.saved_tensors
    if ctx.seed_version is not None and seed._version != ctx.seed_version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: the seed "
            f"[{seed.type()} {list(seed.shape)}] is at version {seed._version}; expected version {ctx.seed_version} "
            "instead"
        )
    return *ctx.saved_tensors, seed


class Dropout(FusedFunction):
    """(x, residual, seed, p, offset, backend) → out. It is linear in x, so its gradient is itself, of any order."""

    @staticmethod
    def forward(x, residual, seed, p, offset, backend):
        return kernels(backend).dropout(x, residual, seed, p, offset)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, _, seed, ctx.p, ctx.offset, ctx.backend = inputs
        _save(ctx, seed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        grad_x = None
        if ctx.needs_input_grad[0]:
            (seed,) = _saved(ctx)
            grad_x = Dropout.apply(grad.contiguous(), None, seed, ctx.p, ctx.offset, ctx.backend)
        return grad_x, grad if ctx.needs_input_grad[1] else None, None, None, None, None


class GeluDropout(FusedFunction):
    """(x, seed, p, offset, backend) → out; x is kept, and what is between the two is not."""

    @staticmethod
    def forward(x, seed, p, offset, backend):
        return kernels(backend).gelu_dropout_forward(x, seed, p, offset)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, seed, ctx.p, ctx.offset, ctx.backend = inputs
        _save(ctx, seed, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        x, seed = _saved(ctx)
        return GeluDropoutBackward.apply(grad.contiguous(), x, seed, ctx.p, ctx.offset, ctx.backend), *(None,) * 4


class GeluDropoutBackward(FusedFunction):
    """The fused backward, itself differentiable: its gradient is that of the reference's."""

    @staticmethod
    def forward(grad, x, seed, p, offset, backend):
        return kernels(backend).gelu_dropout_backward(grad, x, seed, p, offset)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        grad, x, seed, ctx.p, ctx.offset, _ = inputs
        _save(ctx, seed, grad, x)

    @staticmethod
    def backward(ctx: Any, second: Tensor):
        grad, x, seed = _saved(ctx)
        reference = partial(gelu_dropout_reference, p=ctx.p, seed=seed, offset=ctx.offset)
        of_grad, of_x = double_backward(reference, [x], [grad], [second])
        return *of_grad, *of_x, *(None,) * 4


for op in ("dropout", "gelu_dropout"):
    backends.register(op, "cpu", serves_cpu)
    backends.register(op, "triton", partial(serves_triton, tensor_cores=False))
