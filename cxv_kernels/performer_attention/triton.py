"""FAVOR+ in Triton: the skeleton of linear_attention with a projection; performer_features has kernels of its own."""

import triton
import triton.language as tl
from torch import Tensor

from .._triton import launch
from ..autograd import like_layout
from ..linear_attention.triton import (
    Skeleton,
    feature,
    half_norm,
    load_projection,
    load_tokens,
    nothing,
    of_head,
    project,
    slope,
    store_tokens,
)


@triton.jit
def features_kernel(
    p_x,  # (B, H, N, D)
    p_w,  # (F, D)
    p_top,  # (B·H): the keys' maximum; None: a query's is its own
    p_phi,  # (B, H, N, F): φ, or what its gradient is read from
    p_dx,  # (B, H, N, D), or None: forward
    s_x,
    s_w,
    s_phi,
    s_dx,
    H,
    N,
    TOKENS,
    SPLITS,
    D: tl.constexpr,
    F: tl.constexpr,
    MAP: tl.constexpr,
    EXP: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    HALF: tl.constexpr,
    RATIO: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """φ(x) of a run of tokens, or the gradient of x."""
    ACC: tl.constexpr = p_w.dtype.element_ty
    T: tl.constexpr = p_x.dtype.element_ty
    i_bh, i_s = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    p_x, p_phi = of_head(p_x, s_x, i_bh, H), of_head(p_phi, s_phi, i_bh, H)
    if p_dx is not None:
        p_dx = of_head(p_dx, s_dx, i_bh, H)
    o_d, o_f = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_F)
    if BLOCKS == 1:
        b_w, b_wt, b_rest = load_projection(p_w, s_w, o_f, D, F, SCALE, BLOCK_D, T)
    last = tl.minimum((i_s + 1) * TOKENS, N)
    for i_n in range(i_s * TOKENS, last, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N).to(tl.int64)
        m_n = o_n < last
        b_x = load_tokens(p_x, s_x, o_n, m_n, o_d, D)
        b_top = nothing(BLOCK_N, EXP, ACC)
        b_factor = tl.full([BLOCK_N], RATIO, ACC)
        if EXP:
            for i_f in range(BLOCKS):
                if BLOCKS > 1:
                    b_w, b_wt, b_rest = load_projection(p_w, s_w, i_f * BLOCK_F + o_f, D, F, SCALE, BLOCK_D, T)
                b_top = tl.maximum(b_top, tl.max(project(b_x, b_wt, b_rest, PRECISION), 1))
            if p_top is not None:
                b_factor *= tl.exp2(b_top - half_norm(b_x, HALF, ACC) - tl.load(p_top + i_bh))
            elif EPS != 0:
                b_factor *= tl.exp2(-half_norm(b_x, HALF, ACC))
        b_dx = tl.zeros([BLOCK_N, BLOCK_D], ACC)
        b_da1 = tl.zeros([BLOCK_N], ACC)
        for i_f in range(BLOCKS):
            o_i = i_f * BLOCK_F + o_f
            if BLOCKS > 1:
                b_w, b_wt, b_rest = load_projection(p_w, s_w, o_i, D, F, SCALE, BLOCK_D, T)
            b_a = project(b_x, b_wt, b_rest, PRECISION)
            b_e = tl.exp2(b_a - b_top[:, None]) if EXP else feature(b_a, MAP)
            if p_dx is None:
                b_phi = b_e * b_factor[:, None] + EPS * RATIO
                store_tokens(p_phi, s_phi, o_n, m_n, b_phi, o_i, F)
            else:
                b_da = load_tokens(p_phi, s_phi, o_n, m_n, o_i, F).to(ACC)
                b_da *= b_e if EXP else slope(b_e, MAP)
                b_dx = tl.dot(b_da.to(T), b_w, b_dx, input_precision=PRECISION, out_dtype=ACC)
                b_da1 += tl.sum(b_da, 1)
        if p_dx is not None:
            if EXP:
                b_dx = 0.6931471805599453 * (b_dx - (2 * HALF * b_da1)[:, None] * b_x.to(ACC))
            store_tokens(p_dx, s_dx, o_n, m_n, b_dx * b_factor[:, None], o_d, D)


def _skeleton(op: str, kernel: str, like: Tensor, value_dim: int, projection: Tensor, eps: float) -> Skeleton:
    feature_map = "favor_relu" if kernel == "relu" else "favor" if eps else "exact"
    return Skeleton(op, feature_map, like, value_dim, projection, eps)


def performer_attention_forward(q, k, v, projection, key_mask, kernel, eps):
    skeleton = _skeleton("performer_attention", kernel, q, v.shape[3], projection, eps)
    state, stat, top = skeleton.key_pass(k, v, key_mask)
    return skeleton.query_pass(q, state, stat), state, stat, top


def performer_attention_backward(
    grad_out, q, k, v, projection, key_mask, state, key_stat, key_max, kernel, eps, needed
):
    skeleton = _skeleton("performer_attention", kernel, q, v.shape[3], projection, eps)
    return skeleton.backward(grad_out, q, k, v, key_mask, state, key_stat, key_max, needed)


def _features(x: Tensor, phi: Tensor, projection: Tensor, key_max: Tensor | None, grad_x: Tensor | None, kernel, eps):
    """Write φ(x) to ``phi``, or read its gradient there and write that of x."""
    skeleton = _skeleton("performer_features", kernel, x, 0, projection, eps)
    options, run, runs = skeleton.tiles(features_kernel, x.shape[2], partial=False)
    launch(
        skeleton.op,
        features_kernel,
        (x.shape[0] * x.shape[1] * runs,),
        x,
        projection,
        key_max,
        phi,
        grad_x,
        x.stride(),
        projection.stride(),
        phi.stride(),
        (0,) * 4 if grad_x is None else grad_x.stride(),
        x.shape[1],
        x.shape[2],
        run,
        runs,
        RATIO=projection.shape[0] ** -0.5 if kernel == "softmax" else 1.0,
        BLOCKS=skeleton.blocks(options),
        **{name: value for name, value in options.items() if name not in ("E", "BLOCK_E")},
    )


def performer_features_forward(x, projection, is_query, kernel, eps):
    phi = like_layout(x, (*x.shape[:3], projection.shape[0]))
    top = x.new_zeros(x.shape[:2], dtype=projection.dtype)
    by_head = kernel == "softmax" and not is_query
    if by_head and x.numel():
        _, stats, _ = _skeleton("performer_features", kernel, x, 0, projection, eps).key_sums(x, None, None)
        top = stats[:, :, 0, :-1].amax(dim=(1, 2)).view(x.shape[:2])
    _features(x, phi, projection, top if by_head else None, None, kernel, eps)
    return phi, top


def performer_features_backward(grad_phi, x, projection, key_max, is_query, kernel, eps):
    grad_x = like_layout(x, tuple(x.shape))
    by_head = kernel == "softmax" and not is_query
    _features(x, grad_phi, projection, key_max if by_head else None, grad_x, kernel, eps)
    return grad_x
