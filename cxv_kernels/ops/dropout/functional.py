"""Counter-based dropout: the mask is a function of a seed and is not stored. README.md has the definition."""

import torch
from torch import Tensor

from ... import dispatch
from ...validation import autocast_inputs, check_count, check_dense, check_number, check_same, check_tensor, computing
from .op import dropout_op, gelu_dropout_op
from .reference import dropout_reference, gelu_dropout_reference, keep_mask, keep_threshold

__all__ = ["dropout", "dropout_mask", "dropout_seed", "gelu_dropout"]


def dropout_seed(device: str | torch.device = "cpu", generator: torch.Generator | None = None) -> Tensor:
    """Draw a seed for :func:`dropout` and :func:`gelu_dropout`.

    Args:
        device: Device of the seed.
        generator: Generator of that device. Default: its global generator, which ``torch.manual_seed`` controls.

    Returns:
        int64 tensor without dimensions.
    """
    return torch.randint(2**62, (), device=device, generator=generator)


def dropout_mask(seed: Tensor, count: int, p: float, offset: int = 0) -> Tensor:
    """Return the mask of :func:`dropout` for the elements offset to offset + count − 1.

    Args:
        seed: int64 tensor with one element, see :func:`dropout_seed`.
        count: Number of elements, at least 0.
        p: Probability of a zero, as in :func:`dropout`.
        offset: Index of the first element, at least 0.

    Returns:
        Boolean tensor of shape (count,) on the device of the seed, True for the elements that are kept.

    Raises:
        ValueError: If ``count``, ``p`` or ``offset`` is out of range, or the seed is not one int64.
        TypeError: If the seed is not a tensor, ``p`` is not a number, or ``count`` or ``offset`` is not an int.
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
    """Check the arguments and return ``p`` and ``offset`` as Python numbers."""
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
    """Apply dropout and add a residual in one pass: x ⊙ keep / P(keep) + residual (Srivastava et al. 2014).

    ``keep`` is a function of the seed and the index of an element (Philox4x32-10), so every device, backend and number
    of threads drops the same elements. The op saves only the seed for the backward pass.

    Args:
        x: Tensor of any shape, in float64, float32, float16 or bfloat16. It is copied if it is not contiguous.
        p: Probability of a zero, in [0, 1), rounded to a multiple of 2^-16. P(keep) is rounded in the same way, so the
            expectation of the result is x.
        seed: int64 tensor with one element on the device of x, see :func:`dropout_seed`.
        residual: Tensor of the shape and dtype of x, or None.
        offset: Index of the first element of x in the mask. With it a slice of a tensor gets its slice of the mask.
        backend: Backend for this call, see :func:`cxv_kernels.use_backend`. Default: the one set there.

    Returns:
        Contiguous tensor of the shape and dtype of x. It is computed in float32 (float64 for float64 inputs) and
        rounded once.

    Raises:
        ValueError: If ``p`` or ``offset`` is out of range, the residual has another shape, the seed is not one int64,
            or the devices differ.
        TypeError: If dtypes differ, ``p`` is not a number, or ``offset`` is not an int.
        RuntimeError: If the named backend does not support the call. The backward pass raises it if the seed was
            modified in place.
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
    """Apply the exact GELU(x) = x Φ(x) (Hendrycks & Gimpel 2016) and dropout in one pass.

    The mask is that of :func:`dropout`. The op saves only x and the seed for the backward pass.

    Args:
        x: Tensor of any shape, in float64, float32, float16 or bfloat16. It is copied if it is not contiguous.
        p: As in :func:`dropout`.
        seed: As in :func:`dropout`.
        offset: As in :func:`dropout`.
        backend: Backend for this call, see :func:`cxv_kernels.use_backend`. Default: the one set there.

    Returns:
        Contiguous tensor of the shape and dtype of x. It is computed in float32 (float64 for float64 inputs) and
        rounded once.

    Raises:
        ValueError: As :func:`dropout`.
        TypeError: As :func:`dropout`.
        RuntimeError: As :func:`dropout`.
    """
    p, offset = _check(x, p, seed, offset)
    selected = dispatch.resolve("gelu_dropout", x, backend)
    with computing("gelu_dropout", x=x, seed=seed):
        if selected == "reference":
            return gelu_dropout_reference(x.contiguous(), p, seed, offset)
        return gelu_dropout_op(x.contiguous(), seed, p, offset, selected)
