"""FAVOR+ in Triton: linear_attention's passes with a projection; performer_features has a kernel of its own."""

import triton
import triton.language as tl
from torch import Tensor

from ...autograd import like_layout
from ..linear_attention.triton.launch import LaunchPlan, strides_of
from ..linear_attention.triton.primitives import (
    feature,
    feature_grad,
    half_norm,
    head_ptr,
    init_max,
    load_projection,
    load_tokens,
    project,
    store_tokens,
)


@triton.jit
def features(x_ptr, w_ptr, key_max_ptr, phi_ptr, grad_x_ptr, strides, sizes, P: tl.constexpr):
    """φ(x) of the tokens of a split, or the gradient of x.

    x, grad_x (B, H, N, D), w (F, D), key_max (B·H), phi (B, H, N, F): φ, or its gradient. Without grad_x: forward.
    Without key_max, as for queries: each row has its own maximum.
    """
    x_strides, w_strides, phi_strides, grad_x_strides = strides
    H, N, TOKENS, SPLITS = sizes
    ACC: tl.constexpr = w_ptr.dtype.element_ty
    T: tl.constexpr = x_ptr.dtype.element_ty
    i_bh, i_s = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    x_ptr, phi_ptr = head_ptr(x_ptr, x_strides, i_bh, H), head_ptr(phi_ptr, phi_strides, i_bh, H)
    if grad_x_ptr is not None:
        grad_x_ptr = head_ptr(grad_x_ptr, grad_x_strides, i_bh, H)
    o_d, o_f = tl.arange(0, P.BLOCK_D), tl.arange(0, P.BLOCK_F)
    if P.BLOCKS == 1:
        b_w, b_wt, b_w_lo = load_projection(w_ptr, w_strides, o_f, P, T)
    end = tl.minimum((i_s + 1) * TOKENS, N)
    for i_n in range(i_s * TOKENS, end, P.BLOCK_N):
        o_n = i_n + tl.arange(0, P.BLOCK_N).to(tl.int64)
        m_n = o_n < end
        b_x = load_tokens(x_ptr, x_strides, o_n, m_n, o_d, P.D)
        running_max = init_max(P.BLOCK_N, P, ACC)
        b_factor = tl.full([P.BLOCK_N], P.RATIO, ACC)
        if P.EXP:
            for i_f in range(P.BLOCKS):
                if P.BLOCKS > 1:
                    b_w, b_wt, b_w_lo = load_projection(w_ptr, w_strides, i_f * P.BLOCK_F + o_f, P, T)
                running_max = tl.maximum(running_max, tl.max(project(b_x, b_wt, b_w_lo, P), 1))
            if key_max_ptr is not None:
                b_factor *= tl.exp2(running_max - half_norm(b_x, P, ACC) - tl.load(key_max_ptr + i_bh))
            elif P.EPS != 0:
                b_factor *= tl.exp2(-half_norm(b_x, P, ACC))
        b_dx = tl.zeros([P.BLOCK_N, P.BLOCK_D], ACC)
        b_da1 = tl.zeros([P.BLOCK_N], ACC)
        for i_f in range(P.BLOCKS):
            o_i = i_f * P.BLOCK_F + o_f
            if P.BLOCKS > 1:
                b_w, b_wt, b_w_lo = load_projection(w_ptr, w_strides, o_i, P, T)
            b_a = project(b_x, b_wt, b_w_lo, P)
            b_e = tl.exp2(b_a - running_max[:, None]) if P.EXP else feature(b_a, P)
            if grad_x_ptr is None:
                b_phi = b_e * b_factor[:, None] + P.EPS * P.RATIO
                store_tokens(phi_ptr, phi_strides, o_n, m_n, b_phi, o_i, P.F)
            else:
                b_da = load_tokens(phi_ptr, phi_strides, o_n, m_n, o_i, P.F).to(ACC)
                b_da *= b_e if P.EXP else feature_grad(b_e, P)
                b_dx = tl.dot(b_da.to(T), b_w, b_dx, input_precision=P.PRECISION, out_dtype=ACC)
                b_da1 += tl.sum(b_da, 1)
        if grad_x_ptr is not None:
            if P.EXP:
                b_dx = 0.6931471805599453 * (b_dx - (2 * P.HALF * b_da1)[:, None] * b_x.to(ACC))
            store_tokens(grad_x_ptr, grad_x_strides, o_n, m_n, b_dx * b_factor[:, None], o_d, P.D)


def _plan(op: str, kernel: str, like: Tensor, value_dim: int, projection: Tensor, eps: float) -> LaunchPlan:
    feature_map = "favor_relu" if kernel == "relu" else "favor" if eps else "exact"
    return LaunchPlan(op, feature_map, like, value_dim, projection, eps)


def performer_attention_forward(q, k, v, projection, key_mask, kernel, eps):
    plan = _plan("performer_attention", kernel, q, v.shape[3], projection, eps)
    state, stat, key_max = plan.key_pass(k, v, key_mask)
    return plan.query_pass(q, state, stat), state, stat, key_max


def performer_attention_backward(
    grad_out, q, k, v, projection, key_mask, state, key_stat, key_max, kernel, eps, needed
):
    plan = _plan("performer_attention", kernel, q, v.shape[3], projection, eps)
    return plan.backward(grad_out, q, k, v, key_mask, state, key_stat, key_max, needed)


def _features(x: Tensor, phi: Tensor, projection: Tensor, key_max: Tensor | None, grad_x: Tensor | None, kernel, eps):
    """Write φ(x) to ``phi``, or read its gradient there and write that of x."""
    plan = _plan("performer_features", kernel, x, 0, projection, eps)
    params, sizes = plan.splits(features, x, partial=False)
    params |= {"RATIO": projection.shape[0] ** -0.5 if kernel == "softmax" else 1.0, "BLOCKS": plan.blocks(params)}
    params = {name: value for name, value in params.items() if name not in ("E", "BLOCK_E")}
    strides = (x.stride(), projection.stride(), phi.stride(), strides_of(grad_x))
    grid = (x.shape[0] * x.shape[1] * sizes[3],)
    plan.launch(features, grid, x, projection, key_max, phi, grad_x, strides, sizes, **params)


def performer_features_forward(x, projection, is_query, kernel, eps):
    phi = like_layout(x, (*x.shape[:3], projection.shape[0]))
    key_max = x.new_zeros(x.shape[:2], dtype=projection.dtype)
    by_head = kernel == "softmax" and not is_query
    if by_head and x.numel():
        _, stats, _ = _plan("performer_features", kernel, x, 0, projection, eps).key_sums(x, None, None)
        key_max = stats[:, :, 0, :-1].amax(dim=(1, 2)).view(x.shape[:2])
    _features(x, phi, projection, key_max if by_head else None, None, kernel, eps)
    return phi, key_max


def performer_features_backward(grad_phi, x, projection, key_max, is_query, kernel, eps):
    grad_x = like_layout(x, x.shape)
    by_head = kernel == "softmax" and not is_query
    _features(x, grad_phi, projection, key_max if by_head else None, grad_x, kernel, eps)
    return grad_x
