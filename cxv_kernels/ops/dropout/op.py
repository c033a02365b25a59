"""The fused ops: fake implementations, autograd, and what the kernels support."""

from typing import Any

import torch
from torch import Tensor

from ...autograd import (
    FusedFunction,
    FusedOp,
    apply_fused,
    differentiate_operator,
    records_gradients,
    refuse_compiled_transforms,
)
from ...dispatch import Support, register
from ...library import overload, register_fake, register_triton
from .reference import gelu_dropout_reference

_TRITON = "cxv_kernels.ops.dropout.triton"


def _save(ctx: Any, *tensors: Tensor) -> None:
    """Save the tensors for backward, and the last one, the seed, without a saved tensor hook.

    A checkpoint recomputes up to the last op that saves a tensor. With a saved seed it would run the dropout at the end
    of a residual branch, and the linear map before it, once more.
    """
    if torch.compiler.is_compiling():  # the compiler decides what is recomputed
        ctx.save_for_backward(*tensors)
        ctx.seed = None
    else:
        *tensors, seed = tensors
        ctx.save_for_backward(*tensors)
        # inference tensors have no version
        ctx.seed, ctx.seed_version = seed, None if seed.is_inference() else seed._version


def _saved(ctx: Any) -> tuple[Tensor, ...]:
    """Return the saved tensors.

    Raises:
        RuntimeError: If a saved tensor was modified in place.
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


gelu_dropout_op = FusedOp(
    "gelu_dropout",
    gelu_dropout_reference,
    lambda x, seed, p, offset: torch.empty_like(x),
    triton=_TRITON,
    backward=lambda kernel, grad_out, x, seed, p, offset: kernel(grad_out.contiguous(), x, seed, p, offset),
    save=_save,
    saved=_saved,
)

register_triton("dropout", _TRITON)
register_fake("dropout", lambda x, residual, seed, p, offset: torch.empty_like(x))
_KERNELS = {"cpu": overload("dropout"), "triton": overload("dropout", "triton")}


class DropoutFunction(FusedFunction):
    """(x, residual, seed, p, offset, backend) → out. It is linear in x, so its gradient is itself, of any order."""

    op = "dropout"

    @staticmethod
    def forward(x, residual, seed, p, offset, backend):
        refuse_compiled_transforms()
        return _KERNELS[backend](x, residual, seed, p, offset)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, _, seed, ctx.p, ctx.offset, ctx.backend = inputs
        _save(ctx, seed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        grad_x = None
        if ctx.needs_input_grad[0]:
            (seed,) = _saved(ctx)
            grad_x = DropoutFunction.apply(grad.contiguous(), None, seed, ctx.p, ctx.offset, ctx.backend)
        return grad_x, grad if ctx.needs_input_grad[1] else None, None, None, None, None


differentiate_operator("dropout", DropoutFunction)


def dropout_op(x: Tensor, residual: Tensor | None, seed: Tensor, p: float, offset: int, backend: str) -> Tensor:
    """The operator ``dropout``, differentiable."""
    if records_gradients(x, residual):
        return apply_fused(DropoutFunction, x, residual, seed, p, offset, backend)
    return DropoutFunction.forward(x, residual, seed, p, offset, backend)


for _op in ("dropout", "gelu_dropout"):
    register(_op, cpu=Support(), triton=Support())
