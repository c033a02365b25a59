"""Counter-based dropout: its mask is a function of a seed, never stored. README.md has the definition."""

import torch
from torch import Tensor

from ... import dispatch
from ...validation import autocast_inputs, check_count, check_dense, check_number, check_same, check_tensor, computing
from .op import dropout_op, gelu_dropout_op
from .reference import dropout_reference, gelu_dropout_reference, keep_mask, keep_threshold

__all__ = ["dropout", "dropout_mask", "dropout_seed", "gelu_dropout"]


def dropout_seed(device: str | torch.device = "cpu", generator: torch.Generator | None = None) -> Tensor:
    """A seed for :func:`dropout`: one int64, drawn on ``device`` from its generator, which ``manual_seed`` governs."""
    return torch.randint(2**62, (), device=device, generator=generator)


def dropout_mask(seed: Tensor, count: int, p: float, offset: int = 0) -> Tensor:
    """Which of the elements offset … offset + count − 1 :func:`dropout` keeps: bool (count,), on seed's device.

    Raises:
        ValueError: count, p or offset out of range, a seed that is not one int64; TypeError: a seed that is no tensor,
            numbers of another type.
    """
    _check_seed(seed)
    count, offset = check_count("count", count, 0), check_count("offset", offset, 0)
    return keep_mask(seed, count, _check_probability(p), offset)


def _check_seed(seed: Tensor) -> None:
    if not isinstance(seed, Tensor):
        raise TypeError(f"seed must be a torch.Tensor, see dropout_seed, got {type(seed).__name__}")
    check_dense("seed", seed)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"seed must be one int64, got {seed.dtype} of shape {tuple(seed.shape)}")


def _check_probability(p: float) -> float:
    p = check_number("p", p)
    if not 0 <= p < 1 or keep_threshold(p) == 0:
        raise ValueError(f"p must be in [0, 1 - 2^-17), got {p}")
    return p


def _check(x: Tensor, p: float, seed: Tensor, offset: int) -> tuple[float, int]:
    """p and offset as Python numbers."""
    check_tensor("x", x, None)
    p, offset = _check_probability(p), check_count("offset", offset, 0)
    _check_seed(seed)
    check_same("seed", seed, "x", x, dtype=False)
    return p, offset


def dropout(
    x: Tensor,
    p: float,
    seed: Tensor,
    *,
    residual: Tensor | None = None,
    offset: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Dropout (Srivastava et al. 2014), and a residual added in the same pass: x ⊙ keep / P(keep) + residual.

    ``keep`` is a function of the seed and of the element's index alone (Philox4x32-10), the same on every device and
    backend, for any number of threads; so nothing but the seed is saved for backward.

    Args:
        x: any shape, float64, float32, float16 or bfloat16; copied if it is not contiguous.
        p: the probability of a zero, in [0, 1), rounded to a multiple of 2^-16; P(keep) is rounded alike, so that the
            expectation is x.
        seed: one int64 on x's device, see :func:`dropout_seed`.
        residual: of x's shape and dtype, or None.
        offset: the index of x's first element in the mask: a part of a tensor gets its part of the tensor's mask.
        backend: see :func:`cxv_kernels.use_backend`; None takes the one set there.

    Returns:
        x's shape and dtype, contiguous; rounded once from float32 (float64 for float64).

    Raises:
        ValueError: p or offset out of range, a residual of another shape, a seed that is not one int64, another device;
        TypeError: dtypes that differ, a p that is not a number, an offset that is not an int; RuntimeError: the named
        backend does not support the call. Backward raises RuntimeError if the seed was changed in place since.
    """
    p, offset = _check(x, p, seed, offset)
    if residual is not None:
        check_tensor("residual", residual, None)
        (x, residual) = autocast_inputs(x, residual)
        check_same("residual", residual, "x", x)
        if residual.shape != x.shape:
            raise ValueError(f"residual has shape {tuple(residual.shape)}, x {tuple(x.shape)}: they must agree")
    selected = dispatch.resolve("dropout", x, backend)
    with computing("dropout", x=x, residual=residual, seed=seed):
        if selected == "reference":
            return dropout_reference(x.contiguous(), p, seed, residual, offset)
        residual = None if residual is None else residual.contiguous()
        return dropout_op(x.contiguous(), residual, seed, p, offset, selected)


def gelu_dropout(x: Tensor, p: float, seed: Tensor, *, offset: int = 0, backend: str | None = None) -> Tensor:
    """Dropout of GELU(x) = x Φ(x) (Hendrycks & Gimpel 2016, the exact form), in one pass; x alone is kept for backward.

    The mask is that of :func:`dropout`.

    Args:
        x: any shape, float64, float32, float16 or bfloat16; copied if it is not contiguous.
        p, seed, offset, backend: as in :func:`dropout`.

    Returns:
        x's shape and dtype, contiguous; rounded once from float32 (float64 for float64).

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`dropout`.
    """
    p, offset = _check(x, p, seed, offset)
    selected = dispatch.resolve("gelu_dropout", x, backend)
    with computing("gelu_dropout", x=x, seed=seed):
        if selected == "reference":
            return gelu_dropout_reference(x.contiguous(), p, seed, offset)
        return gelu_dropout_op(x.contiguous(), seed, p, offset, selected)
