"""Performer attention (FAVOR+) with the softmax and relu kernels. README.md has the math."""

from functools import partial

from torch import Tensor

from ... import dispatch
from ...validation import (
    accumulate_dtype,
    autocast_inputs,
    check_attention,
    check_choice,
    check_eps,
    check_key_mask,
    check_same,
    check_tensor,
    computing,
    to_number,
)
from .op import performer_attention_op, performer_features_op, unsupported_options
from .reference import (
    DEFAULT_EPS,
    KERNELS,
    LEAST_EPS,
    STABILIZERS,
    num_random_features,
    orthogonal_projection,
    performer_attention_reference,
    performer_features_reference,
)

__all__ = ["num_random_features", "orthogonal_projection", "performer_attention", "performer_features"]


def _check_options(x: Tensor, projection: Tensor, kernel: str, eps: float | None, stabilizer: str) -> float | None:
    """``eps`` as a Python number."""
    check_choice("kernel", kernel, KERNELS)
    check_choice("stabilizer", stabilizer, STABILIZERS)
    check_tensor("projection", projection, 2, "(M, D)")
    check_same("projection", projection, "q", x, dtype=False)
    if projection.shape[0] == 0:
        raise ValueError("projection must have at least one row, got M = 0")
    if projection.shape[1] == 0:
        raise ValueError("projection must have at least one column, got D = 0")
    if projection.shape[1] != x.shape[-1]:
        raise ValueError(f"projection has D = {projection.shape[1]}, the heads have D = {x.shape[-1]}: they must agree")
    return None if eps is None else check_eps(eps)


def performer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    kernel: str = "softmax",
    *,
    eps: float | None = None,
    stabilizer: str = "head",
    key_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Non-causal Performer attention, O(N·M·(D + E)): out = φ(q) S / (φ(q)·z), S = Σ φ(k)ᵀv, z = Σ φ(k).

    ``"softmax"`` (FAVOR+, Choromanski et al. 2021, eq. 5 and 7): φ(x) = exp(D^-¼·x·Wᵀ − ‖x‖²/(2√D) − s) + eps,
    with s the largest D^-¼·x·Wᵀ over a query's features, or over the features and keys of a head. ``"relu"``:
    φ(x) = relu(D^-¼·x·Wᵀ) + eps. Paper section 3.1.

    Args:
        q: (B, H, N_q, D); k: (B, H, N_k, D); v: (B, H, N_k, E). float64, float32, float16 or bfloat16, one dtype,
            any strides. Under autocast they are cast to its dtype; the projection is not.
        projection: W (M, D), any floating dtype, see :func:`cxv_kernels.orthogonal_projection`.
        kernel: ``"softmax"`` or ``"relu"``.
        eps: None is 1e-4 for softmax (the paper's) and 1e-3 for relu. With 0 the softmax kernel's maxima are taken
            over the whole exponent, so that no key is lost to underflow (FAVOR+ proper). Between 0 and 1e-30 the op
            runs in float64, on a GPU in plain PyTorch.
        stabilizer: ``"head"`` takes the keys' maximum per (batch, head), and no gradient flows through the maxima.
            ``"batch"`` is the paper's released code: the keys' maximum is that of the whole batch, so one image
            changes another's output, and gradients flow through the maxima of queries and keys.
        key_mask: bool (B, N_k), True where a key is seen. A query that sees no key gets zeros.
        backend: see :func:`cxv_kernels.use_backend`; None takes the one set there.

    Returns:
        (B, H, N_q, E) in q's dtype, its dimensions laid out in memory in q's order. State, statistics and the
        division are float32 (float64 for float64).

    Saved for backward: q, k, v and the state, O(M·E) per head. The fused kernels support ``stabilizer="head"`` and a
    projection without gradient; second and higher derivatives go through the reference, forward-mode AD and vmap need
    ``backend="reference"``.

    Raises:
        ValueError: a wrong rank, shape, device, option or backend; TypeError: a wrong or mixed dtype;
        RuntimeError: the named backend does not support the call.
    """
    q, k, v = autocast_inputs(q, k, v)
    check_attention(q, k, v)
    check_key_mask(key_mask, k)
    eps = _check_options(q, projection, kernel, eps, stabilizer)
    dim, check_options = (
        max(q.shape[-1], v.shape[-1]),
        partial(unsupported_options, projection, stabilizer, eps, q.dtype),
    )
    selected = dispatch.resolve("performer_attention", q, backend, dim, check_options)
    with computing("performer_attention", q=q, k=k, v=v, projection=projection, key_mask=key_mask):
        if selected == "reference":
            return performer_attention_reference(q, k, v, projection, kernel, eps, stabilizer, key_mask)
        eps = DEFAULT_EPS[kernel] if eps is None else eps
        projection = projection.to(accumulate_dtype(q.dtype))
        if not 0 < eps < LEAST_EPS:
            return performer_attention_op(q, k, v, projection, key_mask, kernel, eps, selected)[0]
        wide = (t.double() for t in (q, k, v, projection))
        return performer_attention_op(*wide, key_mask, kernel, eps, selected)[0].to(q.dtype)


def performer_features(
    x: Tensor,
    projection: Tensor,
    is_query: bool,
    kernel: str = "softmax",
    *,
    eps: float | None = None,
    stabilizer: str = "head",
    backend: str | None = None,
) -> Tensor:
    """The random features φ(x) alone, with FAVOR+'s factor M^-½ for the softmax kernel.

    Args:
        x: (B, H, N, D); dtypes and strides as in :func:`performer_attention`.
        projection: W (M, D).
        is_query: each query has its own maximum; the keys have that of their head or, with ``stabilizer="batch"``,
            of the batch.
        kernel, eps, stabilizer, backend: as in :func:`performer_attention`.

    Returns:
        (B, H, N, M) in x's dtype.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`performer_attention`.
    """
    (x,) = autocast_inputs(x)
    check_tensor("x", x, 4, "(B, H, N, D)")
    is_query = to_number(is_query)
    if not isinstance(is_query, bool):
        raise TypeError(f"is_query must be a bool, got {type(is_query).__name__}")
    eps = _check_options(x, projection, kernel, eps, stabilizer)
    check_options = partial(unsupported_options, projection, stabilizer, None, x.dtype)
    selected = dispatch.resolve("performer_features", x, backend, x.shape[-1], check_options)
    with computing("performer_features", x=x, projection=projection):
        if selected == "reference":
            return performer_features_reference(x, projection, is_query, kernel, eps, stabilizer)
        eps = DEFAULT_EPS[kernel] if eps is None else eps
        projection = projection.to(accumulate_dtype(x.dtype))
        return performer_features_op(x, projection, is_query, kernel, eps, selected)[0]
