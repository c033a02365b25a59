"""Linear attention with the feature maps softmax (used by CLTV), elu + 1 and relu. README.md has the derivation."""

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
    """Compute non-causal linear attention, in O(N·D·E) operations per head.

    With S = Σₙ φ(k)ₙᵀ vₙ and z = Σₙ φ(k)ₙ, the feature map selects one of three mechanisms:

    - ``"softmax"``: out = φ(q) S, where φ(q) is the softmax of D^-¼·q over the channels and φ(k) the softmax of
      D^-¼·k over the tokens. This is the linear transformer of the paper (section 3.1).
    - ``"elu"``: out = φ(q) S / (φ(q)·z) with φ(x) = elu(x) + 1 (Katharopoulos et al. 2020, eq. 5 to 7).
    - ``"relu"``: out = φ(q) S / (φ(q)·z + eps) with φ(x) = relu(x).

    State, statistics and division are float32 (float64 for float64 inputs). Under autocast, q, k and v are cast to the
    autocast dtype. The op saves q, k, v and O(D·E) numbers per head for the backward pass. Second and higher
    derivatives use the reference. Forward-mode AD and ``torch.func.vmap`` require ``backend="reference"``.

    Args:
        q: Queries, shape (B, H, N_q, D), in float64, float32, float16 or bfloat16, with any strides.
        k: Keys, shape (B, H, N_k, D), in the dtype of q.
        v: Values, shape (B, H, N_k, E), in the dtype of q.
        feature_map: ``"softmax"``, ``"elu"`` or ``"relu"``.
        eps: Number added to the denominator of ``"relu"``. The other feature maps ignore it.
        key_mask: Boolean tensor of shape (B, N_k), True for visible keys. A query without visible keys gets zeros.
        backend: Backend for this call, see :func:`cxv_kernels.use_backend`. Default: the one set there.

    Returns:
        Tensor of shape (B, H, N_q, E) in the dtype of q. Its dimensions have the order of q's in memory.

    Raises:
        ValueError: If a rank, shape or device does not match, or ``feature_map``, ``eps`` or ``backend`` is invalid.
        TypeError: If a dtype is not supported, or q, k and v have different dtypes.
        RuntimeError: If the named backend does not support the call.

    Example::

        q, k, v = (torch.randn(2, 4, 1024, 32, requires_grad=True) for _ in range(3))
        out = cxv_kernels.linear_attention(q, k, v, feature_map="elu")
    """
    check_choice("feature_map", feature_map, FEATURE_MAPS)
    eps = check_eps(eps)
    q, k, v = autocast_inputs(q, k, v)
    check_attention(q, k, v)
    check_key_mask(key_mask, k)
    selected = dispatch.resolve("linear_attention", q, backend, max(q.shape[-1], v.shape[-1]))
    with computing("linear_attention", q=q, k=k, v=v, key_mask=key_mask):
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
    """Compute the state of :func:`linear_attention`: S = Σₙ φ(k)ₙᵀ vₙ and z = Σₙ φ(k)ₙ.

    Args:
        k: Keys, shape (B, H, N, D). Dtypes and strides are as in :func:`linear_attention`.
        v: Values, shape (B, H, N, E), in the dtype of k.
        feature_map: ``"softmax"`` (softmax of D^-¼·k over the tokens), ``"elu"`` (elu(k) + 1) or ``"relu"``.
        key_mask: Boolean tensor of shape (B, N), True for visible keys.
        backend: Backend for this call, see :func:`cxv_kernels.use_backend`. Default: the one set there.

    Returns:
        S of shape (B, H, D, E) and z of shape (B, H, D), in float32 (float64 for float64 inputs). For ``"softmax"``, S
        is already normalized, and z is 1 (0 if no key is visible).

    Raises:
        ValueError: As :func:`linear_attention`.
        TypeError: As :func:`linear_attention`.
        RuntimeError: As :func:`linear_attention`.
    """
    check_choice("feature_map", feature_map, FEATURE_MAPS)
    k, v = autocast_inputs(k, v)
    check_keys_values(k, v)
    check_key_mask(key_mask, k)
    selected = dispatch.resolve("kv_state", k, backend, max(k.shape[-1], v.shape[-1]))
    with computing("kv_state", k=k, v=v, key_mask=key_mask):
        if selected == "reference":
            return kv_state_reference(k, v, feature_map, key_mask)
        state, key_stat = kv_state_op(k, v, key_mask, feature_map, selected)
        return state, z_of(key_stat, feature_map)
