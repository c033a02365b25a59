"""FAVOR+ in plain PyTorch: the oracle, the fallback and the export path."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...validation import accumulate_dtype, check_count
from ..linear_attention.reference import attend_by_exponents, divide, hide_keys, rescaled

KERNELS = ("softmax", "relu")
STABILIZERS = ("head", "batch")
DEFAULT_EPS = {"softmax": 1e-4, "relu": 1e-3}
# With an eps between 0 and this value, features that underflow float32 still change the result.
LEAST_EPS = 1e-30


def num_random_features(dim: int) -> int:
    """Return the number of random features that the paper uses for a head of D channels: ⌊D ln D⌋, at least 1.

    Args:
        dim: D, the channels of a head. 32 channels give 110 features.

    Raises:
        TypeError: If ``dim`` is not an int.
        ValueError: If ``dim`` is below 1.
    """
    dim = check_count("dim", dim)
    return max(1, int(dim * math.log(dim)))


def orthogonal_projection(
    num_features: int,
    dim: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Draw the random projection of FAVOR+: orthogonal rows with Gaussian norms (Choromanski et al. 2021, section 3).

    The rows within each block of D rows are orthogonal. Each row is rescaled to the norm of a new Gaussian vector. The
    numbers are drawn on the CPU in float64, so a generator gives the same projection on every device.

    Args:
        num_features: M, the number of rows.
        dim: D, the channels of a head.
        generator: CPU generator. Default: PyTorch's global generator.
        dtype: Dtype of the result.
        device: Device of the result.

    Returns:
        Tensor of shape (M, D).

    Raises:
        TypeError: If ``num_features`` or ``dim`` is not an int.
        ValueError: If ``num_features`` or ``dim`` is below 1.
    """
    num_features, dim = check_count("num_features", num_features), check_count("dim", dim)
    draw = {"generator": generator, "dtype": torch.float64, "device": "cpu"}  # whatever the default device
    blocks = []
    for _ in range(math.ceil(num_features / dim)):
        q, r = torch.linalg.qr(torch.randn(dim, dim, **draw))
        blocks.append((q * r.diagonal().sign()).T)  # the sign makes the rotation uniform (Haar)
    norms = torch.randn(num_features, dim, **draw).norm(dim=1, keepdim=True)
    return (torch.cat(blocks)[:num_features] * norms).to(device, dtype)


def _project(x: Tensor, projection: Tensor) -> Tensor:
    """D^-¼·x·Wᵀ, (B, H, N, M)."""
    return (x * x.shape[-1] ** -0.25) @ projection.to(x.dtype).T


def _half_norm(x: Tensor) -> Tensor:
    """‖x‖²/(2√D), (B, H, N, 1)."""
    return x.square().sum(dim=-1, keepdim=True) / (2 * math.sqrt(x.shape[-1]))


def _key_maximum(exponent: Tensor, stabilizer: str, key_mask: Tensor | None) -> Tensor:
    """Return the largest exponent over the features and visible tokens of a head, or of the batch; 0 without tokens."""
    if key_mask is not None:
        exponent = exponent.masked_fill(~key_mask[:, None, :, None], float("-inf"))
    if exponent.numel() == 0:
        return exponent.new_zeros(())
    largest = exponent.amax(dim=(-2, -1), keepdim=True) if stabilizer == "head" else exponent.amax()
    return largest.masked_fill(largest == float("-inf"), 0)


def favor_features(
    x: Tensor,
    projection: Tensor,
    is_query: bool,
    kernel: str,
    eps: float,
    stabilizer: str = "head",
    key_mask: Tensor | None = None,
) -> Tensor:
    """Return φ(x) without the factor M^-½, in the dtype of x. The maxima are detached if ``stabilizer="head"``."""
    z = _project(x, projection)
    if kernel == "relu":
        return F.relu(z) + eps
    half_norm = _half_norm(x)
    bounded = z if eps else z - half_norm
    bounded = bounded.detach() if stabilizer == "head" else bounded
    shift = bounded.amax(dim=-1, keepdim=True) if is_query else _key_maximum(bounded, stabilizer, key_mask)
    return (z - (half_norm + shift)).exp() + eps


def performer_features_reference(
    x: Tensor,
    projection: Tensor,
    is_query: bool,
    kernel: str = "softmax",
    eps: float | None = None,
    stabilizer: str = "head",
) -> Tensor:
    """See :func:`cxv_kernels.performer_features`."""
    eps = DEFAULT_EPS[kernel] if eps is None else eps
    phi = favor_features(x.to(accumulate_dtype(x.dtype)), projection, is_query, kernel, eps, stabilizer)
    return (phi * projection.shape[0] ** -0.5 if kernel == "softmax" else phi).to(x.dtype)


def performer_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    kernel: str = "softmax",
    eps: float | None = None,
    stabilizer: str = "head",
    key_mask: Tensor | None = None,
) -> Tensor:
    """See :func:`cxv_kernels.performer_attention`. Computes in float32 (float64 for float64 inputs)."""
    eps = DEFAULT_EPS[kernel] if eps is None else eps
    out_dtype, dtype = q.dtype, torch.float64 if 0 < eps < LEAST_EPS else accumulate_dtype(q.dtype)
    q, k, v = q.to(dtype), *hide_keys(k.to(dtype), v.to(dtype), key_mask)
    if k.shape[2] == 0:
        nothing = (q.sum(dim=-1, keepdim=True) + k.sum() + v.sum()) * 0
        return nothing.expand(*q.shape[:3], v.shape[3]).to(out_dtype)
    if kernel == "softmax" and eps == 0:  # the original FAVOR+, whose shifts all cancel
        exponents = _project(q, projection), _project(k, projection) - _half_norm(k)
        return attend_by_exponents(*exponents, v, key_mask).to(out_dtype)
    phi_q = favor_features(q, projection, True, kernel, eps, stabilizer)
    phi_k = favor_features(k, projection, False, kernel, eps, stabilizer, key_mask)
    if key_mask is not None:
        phi_k = phi_k.masked_fill(~key_mask[:, None, :, None], 0)
    state, z = phi_k.transpose(-2, -1) @ v, phi_k.sum(dim=-2)
    state, z, _ = rescaled(state, z)
    return divide(phi_q @ state, phi_q @ z.unsqueeze(-1)).to(out_dtype)
