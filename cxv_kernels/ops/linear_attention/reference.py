"""Linear attention in plain PyTorch: the oracle, the fallback and the export path."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...validation import accumulate_dtype

FEATURE_MAPS = ("softmax", "elu", "relu")


def _feature_map(x: Tensor, feature_map: str) -> Tensor:
    # exp instead of elu(x) + 1, whose terms cancel: below −16 it is 0 in float32
    return below_zero(x).exp() + F.relu(x) if feature_map == "elu" else F.relu(x)


def below_zero(x: Tensor) -> Tensor:
    """Return min(x, 0) with derivative 1 at 0 (the derivative of clamp depends on the version of PyTorch)."""
    return x - F.relu(x)


def largest(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Return the detached maximum over ``dim`` (kept), or 0 if it is −∞ or ``x`` is empty."""
    if x.numel() == 0:
        return x.detach().sum(dim=dim, keepdim=True)
    top = x.detach().amax(dim=dim, keepdim=True)
    return top.masked_fill(top == float("-inf"), 0)


def hide_keys(k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Replace hidden keys and their values by zeros, because 0 · NaN would change results and gradients."""
    if key_mask is None:
        return k, v
    hidden = ~key_mask[:, None, :, None]
    return k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)


def rescaled(state: Tensor, z: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return (S u, z u, u) with a factor u that makes the largest z of a head 2^digits.

    φ(q)·z is then not subnormal. If eps outweighs φ(q)·z, u keeps eps below 1. The result of attention does not depend
    on a common factor of S, z and eps.
    """
    info = torch.finfo(z.dtype)
    top = largest(z, -1)
    unit = 2 / info.eps / top.masked_fill(top == 0, 2 / info.eps).clamp(min=4 / (info.eps * info.max))
    if eps > 0:
        unit = unit.clamp(max=min(1 / eps, info.max))
    return state * unit.unsqueeze(-1), z * unit, unit


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return numerator (…, E) / denominator (…, 1), or 0 if the denominator is 0 (a query without visible keys)."""
    return numerator / denominator.masked_fill(denominator == 0, 1)


def kv_state_reference(
    k: Tensor, v: Tensor, feature_map: str = "elu", key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute S = Σ φ(k)ᵀv (B, H, D, E) and z = Σ φ(k) (B, H, D), in float32 (float64 for float64 inputs).

    For ``"softmax"``, φ(k) is the softmax over tokens of D^-¼·k, so z is 1 (0 without visible keys).
    """
    dtype = accumulate_dtype(k.dtype)
    k, v = hide_keys(k.to(dtype), v.to(dtype), key_mask)
    hidden = None if key_mask is None else ~key_mask[:, None, :, None]
    if feature_map == "softmax":
        k = k * k.shape[-1] ** -0.25
        phi = (k if hidden is None else k.masked_fill(hidden, float("-inf"))).softmax(dim=-2)
    else:
        phi = _feature_map(k, feature_map)
    if hidden is not None:
        phi = phi.masked_fill(hidden, 0)
    return phi.transpose(-2, -1) @ v, phi.sum(dim=-2)


def attend_by_exponents(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, factors: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Compute attention with the features exp(q) and exp(k), each times its factor, for exponents q, k (B, H, N, F).

    The exponents of a feature are relative to its largest over the keys, and the exponents of a query to its largest
    over the features. So the denominator is at least 1, and nothing underflows.
    """
    if key_mask is not None:
        k = k.masked_fill(~key_mask[:, None, :, None], float("-inf"))
    shift = largest(k, -2)
    phi = (k - shift).exp() if factors is None else (k - shift).exp() * factors[1]
    z = phi.sum(dim=-2, keepdim=True)
    weight = q + shift.masked_fill(z.detach() == 0, float("-inf"))
    weight = (weight - largest(weight, -1)).exp()
    weight = weight if factors is None else weight * factors[0]
    return divide(weight @ (phi.transpose(-2, -1) @ v), weight @ z.transpose(-2, -1))


def linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: str = "softmax",
    eps: float = 1e-6,
    key_mask: Tensor | None = None,
) -> Tensor:
    """See :func:`cxv_kernels.linear_attention`. Computes in float32 (float64 for float64 inputs)."""
    x = q.to(accumulate_dtype(q.dtype))
    if feature_map == "elu":
        k, v = hide_keys(k.to(x.dtype), v.to(x.dtype), key_mask)  # φ(x) = exp(min(x, 0))·(1 + max(x, 0))
        factors = (1 + F.relu(x), 1 + F.relu(k))
        return attend_by_exponents(below_zero(x), below_zero(k), v, key_mask, factors).to(q.dtype)
    state, z = kv_state_reference(k, v, feature_map, key_mask)
    if feature_map == "softmax":
        out = (x * x.shape[-1] ** -0.25).softmax(dim=-1) @ state
    else:
        phi = F.relu(x)
        state, z, unit = rescaled(state, z, eps)
        out = divide(phi @ state, phi @ z.unsqueeze(-1) + eps * unit.unsqueeze(-1))
    return out.to(q.dtype)
