"""FLOP formulas of the fused ops for ``torch.utils.flop_counter.FlopCounterMode``.

After ``import cxv_kernels.flops`` the counter counts a fused op like its reference, forward and backward. The counter
puts hooks on every layer, so our models do not recompute while it counts, and each op is counted once. The module also
registers the formula of PyTorch's attention for the CPU. The package itself does not import this module, because the
counter imports Triton.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import (
    conv_backward_flop,
    conv_flop_count,
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop,
    sdpa_backward_flop_count,
    sdpa_flop,
    sdpa_flop_count,
)

Shape = Sequence[int]
Needed = Sequence[bool]
PINV_PRODUCTS = 6 * 4  # iterations of the pseudo-inverse, and matrix products of each


def _attention(q: Shape, k: Shape, v: Shape, features: int, denominator: bool, needed: Needed | None = None) -> int:
    """Count the products φ(q)·(φ(k)ᵀv) and φ(q)·z of the forward pass, or those of the gradients of q, k and v."""
    state, out = 2 * prod(k[:3]) * features * v[3], 2 * prod(q[:3]) * features * v[3]
    z = 2 * prod(q[:3]) * features if denominator else 0
    if needed is None:
        return state + out + z
    of_q, of_k, of_v = needed
    return state * (of_k + of_v) + out * (of_q + (of_k or of_v)) + z * (of_q + of_k)


def _linear_attention_backward(grad_out, q, k, v, key_mask, state, key_stat, feature_map, eps, needed, **_):
    return _attention(q, k, v, k[3], feature_map != "softmax", needed)


def _performer_backward(grad_out, q, k, v, projection, mask, state, key_stat, key_max, kernel, eps, needed, **_):
    products = 2 * (prod(q) * needed[0] + prod(k) * needed[1]) * projection[0]
    return _attention(q, k, v, projection[0], True, needed) + products


def _convolution_backward(out: Shape, x: Shape, weight: Shape, groups: int, needed: Needed) -> int:
    options = ([1], [0], [1], False, [0], groups, [*needed[:2], False])
    return conv_backward_flop(out, x, weight, None, *options, out_val=(x, weight, None))


def _mix(q_means: Shape, k_means: Shape, summary: Shape, **_: Any) -> int:
    batch, heads, landmarks, dim = q_means
    return 2 * batch * heads * landmarks**2 * (dim + PINV_PRODUCTS * landmarks + summary[3])


def _mix_backward(grad: Shape, q_means: Shape, k_means: Shape, summary: Shape, needed: Needed, **_: Any) -> int:
    batch, heads, landmarks, dim = q_means
    of_means = needed[0] or needed[1]
    inner = dim * (needed[0] + needed[1]) + of_means * (2 * PINV_PRODUCTS * landmarks + summary[3])
    return 2 * batch * heads * landmarks**2 * (inner + summary[3] * needed[2])


def _as_convolution(v: Shape, weight: Shape) -> tuple[Shape, Shape]:
    """Return (B, H·E, N) and (H·E, 1, K) for (B, H, N, E) and (H, 1, K, 1): the residual as a convolution."""
    return (v[0], v[1] * v[3], v[2]), (v[1] * v[3], 1, weight[2])


def _residual(attention: Shape, v: Shape, weight: Shape, **_: Any) -> int:
    x, taps = _as_convolution(v, weight)
    return conv_flop_count(x, taps, x)


def _residual_backward(grad: Shape, v: Shape, weight: Shape, needed: Needed, **_: Any) -> int:
    x, taps = _as_convolution(v, weight)
    return _convolution_backward(x, x, taps, x[1], needed)


# The formulas receive the arguments of the operators in csrc/ops.cpp, with shapes instead of tensors.
_FORMULAS: dict[str, Callable[..., int]] = {
    "linear_attention_forward": lambda q, k, v, mask, feature_map, *_, **__: _attention(
        q, k, v, k[3], feature_map != "softmax"
    ),
    "linear_attention_backward": _linear_attention_backward,
    "kv_state_forward": lambda k, v, *_, **__: 2 * prod(k) * v[3],
    "kv_state_backward": lambda grad_s, grad_z, k, v, *rest, **_: 2 * prod(k) * v[3] * sum(rest[-1]),
    "performer_attention_forward": lambda q, k, v, w, *_, **__: (
        _attention(q, k, v, w[0], True) + 2 * (prod(q) + prod(k)) * w[0]
    ),
    "performer_attention_backward": _performer_backward,
    "performer_features_forward": lambda x, w, *_, **__: 2 * prod(x) * w[0],
    "performer_features_backward": lambda grad, x, w, *_, **__: 2 * prod(x) * w[0],
    "conv_norm_forward": lambda x, weight, *_, out_shape, **__: conv_flop_count(x, weight, out_shape[0]),
    "conv_norm_backward": lambda grad, x, weight, bias, out, *rest, **_: _convolution_backward(
        out, x, weight, 1, rest[-1]
    ),
    "nystrom_summary": lambda q_means, k, v, **_: sdpa_flop_count(q_means, k, v),
    "nystrom_summary_backward": lambda *args, **_: sdpa_backward_flop_count(*args[:4]),
    "nystrom_readout": lambda q, k_means, mixed, **_: sdpa_flop_count(q, k_means, mixed),
    "nystrom_readout_backward": lambda *args, **_: sdpa_backward_flop_count(*args[:4]),
    "nystrom_mix": _mix,
    "nystrom_mix_backward": _mix_backward,
    "nystrom_residual": _residual,
    "nystrom_residual_backward": _residual_backward,
}
for _op, _formula in _FORMULAS.items():
    _spaces = [space for space in (torch.ops.cxv_kernels, torch.ops.cxv_kernels_triton) if hasattr(space, _op)]
    register_flop_formula([getattr(space, _op) for space in _spaces])(_formula)

for _aten, _count in (
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, sdpa_flop),
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, sdpa_backward_flop),
):
    flop_registry.setdefault(_aten, _count)
