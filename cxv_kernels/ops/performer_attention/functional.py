"""Performer attention (FAVOR+) with the softmax and relu kernels. README.md has the derivation."""

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


def _check_options(
    name: str, x: Tensor, projection: Tensor, kernel: str, eps: float | None, stabilizer: str
) -> float | None:
    """Check the options shared by both ops and return ``eps`` as a Python number. ``name`` is the name of ``x``."""
    check_choice("kernel", kernel, KERNELS)
    check_choice("stabilizer", stabilizer, STABILIZERS)
    check_tensor("projection", projection, 2, "(M, D)")
    check_same("projection", projection, name, x, dtype=False)
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
    """Compute non-causal Performer attention (FAVOR+), in O(N·M·(D + E)) operations per head.

    out = φ(q) S / (φ(q)·z) with S = Σₙ φ(k)ₙᵀ vₙ and z = Σₙ φ(k)ₙ (paper section 3.1). The kernel selects the random
    features φ:

    - ``"softmax"``: φ(x) = exp(D^-¼·x·Wᵀ − ‖x‖²/(2√D) − s) + eps (Choromanski et al. 2021, eq. 5 and 7). For a query,
      s is the largest element of its D^-¼·x·Wᵀ. For the keys, s is the largest element over all features and keys of
      the head.
    - ``"relu"``: φ(x) = relu(D^-¼·x·Wᵀ) + eps.

    State, statistics and division are float32 (float64 for float64 inputs). Under autocast, q, k and v are cast to the
    autocast dtype; the projection is not. The op saves q, k, v and O(M·E) numbers per head for the backward pass. The
    fused kernels support ``stabilizer="head"`` and a projection that does not require grad (or any projection under
    ``torch.no_grad()``). Second and higher derivatives use the reference. Forward-mode AD and ``torch.func.vmap``
    require ``backend="reference"``.

    Args:
        q: Queries, shape (B, H, N_q, D), in float64, float32, float16 or bfloat16, with any strides.
        k: Keys, shape (B, H, N_k, D), in the dtype of q.
        v: Values, shape (B, H, N_k, E), in the dtype of q.
        projection: W, shape (M, D), in any floating dtype, see :func:`cxv_kernels.orthogonal_projection`.
        kernel: ``"softmax"`` or ``"relu"``.
        eps: Number added to the features. Default: 1e-4 for ``"softmax"``, as in the paper, and 1e-3 for ``"relu"``.
            With 0 the softmax kernel takes its maxima over the whole exponent, which is the original FAVOR+, and no key
            underflows. Between 0 and 1e-30 the op computes in float64, on a GPU in plain PyTorch.
        stabilizer: ``"head"`` uses one maximum of the keys per (batch, head), and the maxima are detached. ``"batch"``
            uses one maximum of the keys for the whole batch, as the released code of the paper does: an image then
            changes the output of other images, and gradients flow through the maxima of queries and keys.
        key_mask: Boolean tensor of shape (B, N_k), True for visible keys. A query without visible keys gets zeros.
        backend: Backend for this call, see :func:`cxv_kernels.use_backend`. Default: the one set there.

    Returns:
        Tensor of shape (B, H, N_q, E) in the dtype of q. Its dimensions have the order of q's in memory.

    Raises:
        ValueError: If a rank, shape or device does not match, or an option or ``backend`` is invalid.
        TypeError: If a dtype is not supported, or q, k and v have different dtypes.
        RuntimeError: If the named backend does not support the call.

    Example::

        q, k, v = (torch.randn(2, 4, 1024, 32, requires_grad=True) for _ in range(3))
        w = cxv_kernels.orthogonal_projection(cxv_kernels.num_random_features(32), 32)
        out = cxv_kernels.performer_attention(q, k, v, w)
    """
    q, k, v = autocast_inputs(q, k, v)
    check_attention(q, k, v)
    check_key_mask(key_mask, k)
    eps = _check_options("q", q, projection, kernel, eps, stabilizer)
    check_options = partial(unsupported_options, projection, stabilizer, eps, q.dtype)
    selected = dispatch.resolve("performer_attention", q, backend, max(q.shape[-1], v.shape[-1]), check_options)
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
    """Compute the random features φ(x) of :func:`performer_attention`.

    For the softmax kernel the result has the factor M^-½ of FAVOR+, which cancels in attention.

    Args:
        x: Queries or keys, shape (B, H, N, D). Dtypes and strides are as in :func:`performer_attention`.
        projection: W, shape (M, D), in any floating dtype.
        is_query: If True, each token has its own maximum. If False, all tokens of a head (of the whole batch with
            ``stabilizer="batch"``) share one maximum.
        kernel: As in :func:`performer_attention`.
        eps: As in :func:`performer_attention`.
        stabilizer: As in :func:`performer_attention`.
        backend: Backend for this call, see :func:`cxv_kernels.use_backend`. Default: the one set there.

    Returns:
        Tensor of shape (B, H, N, M) in the dtype of x.

    Raises:
        ValueError: As :func:`performer_attention`.
        TypeError: As :func:`performer_attention`, or if ``is_query`` is not a bool.
        RuntimeError: As :func:`performer_attention`.
    """
    (x,) = autocast_inputs(x)
    check_tensor("x", x, 4, "(B, H, N, D)")
    is_query = to_number(is_query)
    if not isinstance(is_query, bool):
        raise TypeError(f"is_query must be a bool, got {type(is_query).__name__}")
    eps = _check_options("x", x, projection, kernel, eps, stabilizer)
    check_options = partial(unsupported_options, projection, stabilizer, None, x.dtype)
    selected = dispatch.resolve("performer_features", x, backend, x.shape[-1], check_options)
    with computing("performer_features", x=x, projection=projection):
        if selected == "reference":
            return performer_features_reference(x, projection, is_query, kernel, eps, stabilizer)
        eps = DEFAULT_EPS[kernel] if eps is None else eps
        projection = projection.to(accumulate_dtype(x.dtype))
        return performer_features_op(x, projection, is_query, kernel, eps, selected)[0]
