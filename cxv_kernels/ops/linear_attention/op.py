"""The fused ops: fake implementations, autograd, and what the kernels support.

The outputs ``state`` and ``key_stat`` of linear_attention are opaque: each backend has its own layout for its backward
kernels, and no other backend reads them. The outputs of kv_state are S and a statistic of z on every backend.
"""

from torch import Tensor

from ...autograd import FusedOp, like_layout
from ...dispatch import CUDA_DTYPES, Support, register
from ...validation import accumulate_dtype
from .reference import kv_state_reference, linear_attention_reference

_TRITON = "cxv_kernels.ops.linear_attention.triton.launch"


def fake_out(q: Tensor, v: Tensor) -> Tensor:
    """Return an empty tensor for the output of attention, (B, H, N, E)."""
    return like_layout(q, (*q.shape[:3], v.shape[3]))


def fake_state(q: Tensor, features: int, value_dim: int) -> tuple[Tensor, Tensor]:
    """Return empty tensors for the state of the C++ kernels: (B, H, F, E) and a statistic (B, H, F)."""
    state = q.new_empty((*q.shape[:2], features, value_dim), dtype=accumulate_dtype(q.dtype))
    return state, state.new_empty((*q.shape[:2], features))


def triton_state(q: Tensor, features: int, value_dim: int) -> tuple[Tensor, Tensor]:
    """Return empty tensors for the state of the Triton kernels: U (B, H, F + 2, E) and statistics (B, H, 2 F + 1)."""
    state = q.new_empty((*q.shape[:2], features + 2, value_dim), dtype=accumulate_dtype(q.dtype))
    return state, state.new_empty((*q.shape[:2], 2 * features + 1))


def _fake(q, k, v, key_mask, feature_map, eps):
    return fake_out(q, v), *fake_state(q, q.shape[3], v.shape[3])


def _triton_fake(q, k, v, key_mask, feature_map, eps):
    return fake_out(q, v), *triton_state(q, q.shape[3], v.shape[3])


def _fake_kv_state(k, v, key_mask, feature_map):
    return fake_state(k, k.shape[3], v.shape[3])


def _kv_state_backward(kernel, grad_state, grad_z, k, v, key_mask, state, key_stat, feature_map, needed):
    if feature_map == "softmax":  # S is normalized and z is 1, so this is the gradient through the normalization
        grad_z = -(grad_state * state).sum(dim=-1)
    return kernel(grad_state, grad_z, k, v, key_mask, key_stat, feature_map, needed)


def z_of(key_stat: Tensor, feature_map: str) -> Tensor:
    """Return z = Σ φ(k) for the statistic of the key pass."""
    if feature_map != "softmax":
        return key_stat.clone()
    # z is 1. It is 0 if no key is visible (the statistic is then infinite), and NaN if the statistic is NaN.
    return (key_stat - key_stat + 1).masked_fill(key_stat.isinf(), 0)


linear_attention_op = FusedOp(
    "linear_attention", linear_attention_reference, _fake, triton=_TRITON, triton_fake=_triton_fake
)
kv_state_op = FusedOp("kv_state", kv_state_reference, _fake_kv_state, triton=_TRITON, backward=_kv_state_backward)

for _op in ("linear_attention", "kv_state"):
    register(
        _op,
        cpu=Support(),
        cuda=Support(CUDA_DTYPES, max_channels=64),
        triton=Support(max_channels=128, tensor_cores=True),
    )
