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
PINV_PRODUCTS = 6 * 4  # iterations of the pseudo-inverse, and matrix products of each


def _formula(op: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Register the formula of ``op`` in each namespace that has it. A formula receives shapes instead of tensors."""
    namespaces = (torch.ops.cxv_kernels, torch.ops.cxv_kernels_triton)
    return register_flop_formula([getattr(namespace, op) for namespace in namespaces if hasattr(namespace, op)])


def _linear_attention(q: Shape, k: Shape, v: Shape, features: int, denominator: bool, needed: Sequence[int]) -> int:
    """Count the products φ(q)·(φ(k)ᵀv) and φ(q)·z that the gradients of q, k and v need, given by ``needed``."""
    state = 2 * prod(k[:3]) * features * v[3]
    out = 2 * prod(q[:3]) * features * v[3]
    z = 2 * prod(q[:3]) * features if denominator else 0
    of_q, of_k, of_v = needed
    return state * (of_k + of_v) + out * (of_q + (of_k or of_v)) + z * (of_q + of_k)


def _forward(q: Shape, k: Shape, v: Shape, features: int, denominator: bool) -> int:
    return _linear_attention(q, k, v, features, denominator, (1, 0, 0)) + 2 * prod(k[:3]) * features * v[3]


@_formula("linear_attention_forward")
def _(q: Shape, k: Shape, v: Shape, key_mask: Shape | None, feature_map: str, eps: float, **_: Any) -> int:
    return _forward(q, k, v, k[3], feature_map != "softmax")


@_formula("linear_attention_backward")
def _(grad_out, q, k, v, key_mask, state, key_stat, feature_map, eps, needed, **_: Any) -> int:
    return _linear_attention(q, k, v, k[3], feature_map != "softmax", needed)


@_formula("kv_state_forward")
def _(k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(k) * v[3]


@_formula("kv_state_backward")
def _(grad_state, grad_z, k, v, key_mask, key_stat, feature_map, needed, **_: Any) -> int:
    return 2 * prod(k) * v[3] * sum(needed)


@_formula("performer_attention_forward")
def _(q: Shape, k: Shape, v: Shape, projection: Shape, *_: Any, **__: Any) -> int:
    return _forward(q, k, v, projection[0], True) + 2 * (prod(q) + prod(k)) * projection[0]


@_formula("performer_attention_backward")
def _(grad_out, q, k, v, projection, key_mask, state, key_stat, key_max, kernel, eps, needed, **_: Any) -> int:
    project = 2 * (prod(q) * needed[0] + prod(k) * needed[1]) * projection[0]
    return _linear_attention(q, k, v, projection[0], True, needed) + project


@_formula("performer_features_forward")
def _(x: Shape, projection: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(x) * projection[0]


@_formula("performer_features_backward")
def _(grad_phi: Shape, x: Shape, projection: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(x) * projection[0]


@_formula("conv_norm_forward")
def _(x: Shape, weight: Shape, *_: Any, out_shape: Any, **__: Any) -> int:
    return conv_flop_count(x, weight, out_shape[0])


@_formula("conv_norm_backward")
def _(grad_out, x, weight, bias, out, rstd, gamma, beta, eps, needed, **_: Any) -> int:
    return _convolution_backward(out, x, weight, 1, needed)


def _convolution_backward(out: Shape, x: Shape, weight: Shape, groups: int, needed: Sequence[bool]) -> int:
    options = ([1], [0], [1], False, [0], groups, [*needed[:2], False])
    return conv_backward_flop(out, x, weight, None, *options, out_val=(x, weight, None))


@_formula("nystrom_summary")
def _(q_means: Shape, k: Shape, v: Shape, **_: Any) -> int:
    return sdpa_flop_count(q_means, k, v)


@_formula("nystrom_summary_backward")
def _(grad: Shape, q_means: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, q_means, k, v)


@_formula("nystrom_readout")
def _(q: Shape, k_means: Shape, mixed: Shape, **_: Any) -> int:
    return sdpa_flop_count(q, k_means, mixed)


@_formula("nystrom_readout_backward")
def _(grad: Shape, q: Shape, k_means: Shape, mixed: Shape, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k_means, mixed)


@_formula("nystrom_mix")
def _(q_means: Shape, k_means: Shape, summary: Shape, **_: Any) -> int:
    batch, heads, landmarks, dim = q_means
    return 2 * batch * heads * landmarks**2 * (dim + PINV_PRODUCTS * landmarks + summary[3])


@_formula("nystrom_mix_backward")
def _(grad, q_means, k_means, summary, needed, **_: Any) -> int:
    batch, heads, landmarks, dim = q_means
    of_means = needed[0] or needed[1]
    inner = dim * (needed[0] + needed[1]) + of_means * (2 * PINV_PRODUCTS * landmarks + summary[3])
    return 2 * batch * heads * landmarks**2 * (inner + summary[3] * needed[2])


def _as_channels(x: Shape) -> Shape:
    """Return (B, H·E, N) for (B, H, N, E): the shape in which the residual is a convolution."""
    return x[0], x[1] * x[3], x[2]


@_formula("nystrom_residual")
def _(attention: Shape, v: Shape, weight: Shape, **_: Any) -> int:
    out = _as_channels(v)
    return conv_flop_count(out, (out[1], 1, weight[2]), out)


@_formula("nystrom_residual_backward")
def _(grad: Shape, v: Shape, weight: Shape, needed: Sequence[bool], **_: Any) -> int:
    out = _as_channels(v)
    return _convolution_backward(out, out, (out[1], 1, weight[2]), out[1], needed)


for _op, _count in (
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, sdpa_flop),
    (torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward, sdpa_backward_flop),
):
    flop_registry.setdefault(_op, _count)
