"""Linear attention in plain PyTorch: the oracle, the fallback and the export path."""

import torch.nn.functional as F
from torch import Tensor

from ..validation import accumulate_dtype

FEATURE_MAPS = ("softmax", "elu", "relu")


def _feature_map(x: Tensor, feature_map: str) -> Tensor:
    return F.elu(x) + 1 if feature_map == "elu" else F.relu(x)


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator (…, E) / denominator (…, 1), with 0 where the denominator is 0: a query that sees no key gets zeros."""
    return numerator / denominator.masked_fill(denominator == 0, 1)


def kv_state_reference(
    k: Tensor, v: Tensor, feature_map: str = "elu", key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """S = Σ φ(k)ᵀv (B, H, D, E) and z = Σ φ(k) (B, H, D), in float32 (float64 for float64).

    For ``"softmax"``, φ(k) is the softmax over tokens of D^-¼·k, so z is 1 (0 where there is no key).
    """
    dtype = accumulate_dtype(k.dtype)
    k, v = k.to(dtype), v.to(dtype)
    hidden = None if key_mask is None else ~key_mask[:, None, :, None]
    if feature_map == "softmax":
        k = k * k.shape[-1] ** -0.25
        phi = (k if hidden is None else k.masked_fill(hidden, float("-inf"))).softmax(dim=-2)
    else:
        phi = _feature_map(k, feature_map)
    if hidden is not None:
        phi = phi.masked_fill(hidden, 0)
    return phi.transpose(-2, -1) @ v, phi.sum(dim=-2)


def linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: str = "softmax",
    eps: float = 1e-6,
    key_mask: Tensor | None = None,
) -> Tensor:
    """See :func:`cxv_kernels.linear_attention`; computed in float32 (float64 for float64), returned in q's dtype."""
    state, z = kv_state_reference(k, v, feature_map, key_mask)
    x = q.to(state.dtype)
    if feature_map == "softmax":
        out = (x * x.shape[-1] ** -0.25).softmax(dim=-1) @ state
    else:
        phi = _feature_map(x, feature_map)
        denominator = phi @ z.unsqueeze(-1)
        out = divide(phi @ state, denominator + eps if feature_map == "relu" else denominator)
    return out.to(q.dtype)
