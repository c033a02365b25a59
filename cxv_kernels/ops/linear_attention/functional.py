"""Linear attention with the feature maps softmax (the pair of CLTV), elu + 1 and relu. README.md has the math."""

from torch import Tensor

from ... import dispatch
from ...validation import (
    autocast_inputs,
    check_attention,
    check_choice,
    check_eps,
    check_key_mask,
    check_keys_values,
    computing,
)
from .op import kv_state_op, linear_attention_op, z_of
from .reference import FEATURE_MAPS, kv_state_reference, linear_attention_reference

__all__ = ["kv_state", "linear_attention"]


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: str = "softmax",
    *,
    eps: float = 1e-6,
    key_mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Non-causal linear attention, O(N·D·E).

    ``"softmax"``: softmax over D of D^-¼·q, times (softmax over tokens of D^-¼·k)ᵀ v, with no denominator (the
    paper's linear transformer, section 3.1). ``"elu"``: φ = elu + 1, out = φ(q)·S / (φ(q)·z) with S = Σ φ(k)ᵀv and
    z = Σ φ(k) (Katharopoulos et al. 2020, eq. 5-7). ``"relu"``: φ = relu, the denominator plus ``eps``.

    Args:
        q: (B, H, N_q, D); k: (B, H, N_k, D); v: (B, H, N_k, E). float64, float32, float16 or bfloat16, one dtype,
            any strides. Under autocast they are cast to its dtype.
        feature_map: ``"softmax"``, ``"elu"`` or ``"relu"``.
        eps: added to the denominator of ``"relu"``; not used by the others.
        key_mask: bool (B, N_k), True where a key is seen. A query that sees no key gets zeros.
        backend: see :func:`cxv_kernels.use_backend`; None takes the one set there.

    Returns:
        (B, H, N_q, E) in q's dtype, its dimensions laid out in memory in q's order. State, statistics and the
        division are float32 (float64 for float64).

    Saved for backward: q, k, v and the state, O(D·E) per head. Second and higher derivatives go
    through the reference; forward-mode AD and vmap need ``backend="reference"``.

    Raises:
        ValueError: a wrong rank, shape, device, feature map, eps or backend; TypeError: a wrong or mixed dtype;
        RuntimeError: the named backend does not support the call.
    """
    check_choice("feature_map", feature_map, FEATURE_MAPS)
    eps = check_eps(eps)
    q, k, v = autocast_inputs(q, k, v)
    check_attention(q, k, v)
    check_key_mask(key_mask, k)
    with computing("linear_attention", q=q, k=k, v=v, key_mask=key_mask):
        selected = dispatch.resolve("linear_attention", q, backend, max(q.shape[-1], v.shape[-1]))
        if selected == "reference":
            return linear_attention_reference(q, k, v, feature_map, eps, key_mask)
        return linear_attention_op(q, k, v, key_mask, feature_map, eps, selected)[0]


def kv_state(
    k: Tensor,
    v: Tensor,
    feature_map: str = "elu",
    *,
    key_mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The key pass alone: what linear attention remembers of all tokens.

    Args:
        k: (B, H, N, D); v: (B, H, N, E); dtypes and strides as in :func:`linear_attention`.
        feature_map: ``"softmax"`` (over tokens, of D^-¼·k), ``"elu"`` (elu + 1) or ``"relu"``.
        key_mask: bool (B, N), True where a key is seen.
        backend: see :func:`cxv_kernels.use_backend`.

    Returns:
        S = Σ φ(k)ᵀ v (B, H, D, E) and z = Σ φ(k) (B, H, D), float32 (float64 for float64). For ``"softmax"`` S is
        already normalized and z is 1 (0 where no key is seen).

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`linear_attention`.
    """
    check_choice("feature_map", feature_map, FEATURE_MAPS)
    k, v = autocast_inputs(k, v)
    check_keys_values(k, v)
    check_key_mask(key_mask, k)
    with computing("kv_state", k=k, v=v, key_mask=key_mask):
        selected = dispatch.resolve("kv_state", k, backend, max(k.shape[-1], v.shape[-1]))
        if selected == "reference":
            return kv_state_reference(k, v, feature_map, key_mask)
        state, key_stat = kv_state_op(k, v, key_mask, feature_map, selected)
        return state, z_of(key_stat, feature_map)
