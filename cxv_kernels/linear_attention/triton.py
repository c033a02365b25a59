"""Fused attention with feature maps in Triton: one skeleton, the map its parameter. README.md has the algorithm.

A head has F features: the rows of the projection W, or without one the D channels. ``MAP`` is one of

- ``favor``: exp(a − h − s) + EPS with a = D^-¼·x·Wᵀ, h = ‖x‖²/(2√D) and one maximum s of all keys' a;
- ``exact``: the same with EPS = 0 and a maximum per feature; ``favor_relu``: relu(a) + EPS;
- ``softmax``: over the channels of D^-¼·q, over the tokens of D^-¼·k; ``elu`` and ``relu`` of the channels;
- ``elu_exact``: elu by its logarithm, as exact is, which nothing underflows; elu itself is for kv_state.

``favor``, ``exact``, ``softmax`` and ``elu_exact`` are exponentials (``EXP``), computed in base 2. What is kept of a
head (README.md):

- state (F + 2, E): U_m = S_m/z_m − c̄; c̄; the largest |U| of each column.
- stat (2 F + 1): log2 z_m (EXP) or z_m, and that of Σ z_m; how a query weighs the features: log2 z_m (exact
  and elu_exact), 0 (softmax), else z_m/Σ z·W_RANGE.

``p_`` is a pointer, ``s_`` its strides, ``b_`` a tile's values, ``o_`` offsets, ``m_`` masks, ``i_`` an index.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from .._triton import launch
from ..autograd import like_layout, new_gradients
from ..validation import accumulate_dtype
from .op import triton_state

HALF_RANGE = tl.constexpr(32768.0)  # scales weights of at most 1, so that float16 holds the small ones
E_RANGE = tl.constexpr(128.0)  # the share of it that e has
W_RANGE = tl.constexpr(256.0)  # and that of a feature's weight, which U carries
PACKED = tl.constexpr(32)  # columns of a packed row beside U or R: of two operands, 16 each
TINY = tl.constexpr(1.2e-38)  # the reciprocal of less overflows float32


@triton.jit
def reciprocal(x):
    return tl.where(x > TINY, 1 / tl.where(x > TINY, x, 1), 0)


@triton.jit
def power_below(x):
    """The largest power of two up to x; 1 for 0 and for what a GPU's exp2 has no power of two of."""
    return tl.exp2(tl.floor(tl.log2(tl.where(x > TINY, x, 1))))


@triton.jit
def relative(x, top, EXP: tl.constexpr):
    """What x is of the largest: in [0, 1]."""
    if EXP:
        return tl.exp2(x - tl.where(top == float("-inf"), 0, top))
    else:
        return x * reciprocal(top)


@triton.jit
def nothing(SIZE: tl.constexpr, EXP: tl.constexpr, ACC: tl.constexpr):
    """The maximum of no tokens."""
    return tl.full([SIZE], float("-inf") if EXP else 0.0, ACC)


@triton.jit
def of_head(p, s, i_bh, H):
    return p + (i_bh // H).to(tl.int64) * s[0] + (i_bh % H).to(tl.int64) * s[1]


@triton.jit
def load_tokens(p, s, o_n, m_n, o_c, WIDTH: tl.constexpr):
    """The channels o_c of the tokens o_n, zeros where masked and past WIDTH."""
    o_c = o_c.to(tl.int64)
    mask = m_n[:, None] & (o_c < WIDTH)[None, :]
    return tl.load(p + o_n[:, None] * s[2] + o_c[None, :] * s[3], mask=mask, other=0)


@triton.jit
def store_tokens(p, s, o_n, m_n, b, o_c, WIDTH: tl.constexpr):
    o_c = o_c.to(tl.int64)
    mask = m_n[:, None] & (o_c < WIDTH)[None, :]
    tl.store(p + o_n[:, None] * s[2] + o_c[None, :] * s[3], b.to(p.dtype.element_ty), mask=mask)


@triton.jit
def load_projection(
    p_w,
    s_w,
    o_f,
    D: tl.constexpr,
    F: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    T: tl.constexpr,
):
    """SCALE·W [BLOCK_F, BLOCK_D] in T, its transpose, and that of what the rounding to T leaves; without W nothing of
    use (Triton 3.6 returns no None in a tuple). ``p_w`` may be what split_kernel wrote.

    Rows past F repeat the last, which moves no maximum. The transposes are made here, outside the loop over tokens, so
    that the operand stays in shared memory.
    """
    if p_w is None:
        return o_f, o_f, o_f
    else:
        o_d = tl.arange(0, BLOCK_D)
        p = p_w + tl.minimum(o_f, F - 1)[:, None] * s_w[0] + o_d[None, :] * s_w[1]
        mask = (o_d < D)[None, :]
        if p_w.dtype.element_ty.primitive_bitwidth == 16:
            b_w = tl.load(p, mask=mask, other=0)
            return b_w, tl.trans(b_w), tl.trans(tl.load(p + F * D, mask=mask, other=0))
        else:
            b_exact = tl.load(p, mask=mask, other=0) * SCALE
            b_w = b_exact.to(T)
            return b_w, tl.trans(b_w), tl.trans((b_exact - b_w.to(b_exact.dtype)).to(T))


@triton.jit
def split_kernel(
    p_w,  # (F, D)
    p_split,  # (2, F, D): SCALE·W rounded, and what that leaves
    s_w,
    D: tl.constexpr,
    F: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What load_projection makes of W, once: where features come in blocks, each tile of tokens would do it again."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < F * D
    b_exact = tl.load(p_w + i // D * s_w[0] + i % D * s_w[1], mask=inside, other=0) * SCALE
    b_w = b_exact.to(p_split.dtype.element_ty)
    tl.store(p_split + i, b_w, mask=inside)
    tl.store(p_split + F * D + i, b_exact - b_w.to(b_exact.dtype), mask=inside)


@triton.jit
def halves(b, T: tl.constexpr):
    """b in 16 columns of T: eight as T rounds it, eight with what that leaves. Σ 8 x b is the sum of x·halves(b): a
    product, which costs a tensor core less than a sum costs the others."""
    b_high = b.to(T)
    b_low = (b - b_high.to(b.dtype)).to(T)
    return tl.where(tl.arange(0, 16)[None, :] < 8, b_high[:, None], b_low[:, None])


@triton.jit
def factors(b, T: tl.constexpr):
    """16 columns of T: halves(a)·factors(b)ᵀ is a bᵀ but for the product of the rests."""
    b_high = b.to(T)
    b_low = (b - b_high.to(b.dtype)).to(T)
    i_c = tl.arange(0, 16)[None, :]
    b_zero = tl.full([1, 1], 0.0, T)
    return tl.where(i_c % 8 == 0, b_high[:, None], tl.where(i_c == 1, b_low[:, None], b_zero))


@triton.jit
def half_norm(b_x, HALF: tl.constexpr, ACC: tl.constexpr):
    b_x = b_x.to(ACC)
    return tl.sum(b_x * b_x, 1) * HALF


@triton.jit
def project(b_x, b_wt, b_rest, PRECISION: tl.constexpr):
    """SCALE·x·Wᵀ; there is no rest where W is in x's own dtype."""
    b_a = tl.dot(b_x, b_wt, input_precision=PRECISION)
    if b_x.dtype.primitive_bitwidth == 16:
        b_a = tl.dot(b_x, b_rest, b_a)
    return b_a


@triton.jit
def project_transposed(b_x, b_w, b_rest, PRECISION: tl.constexpr):
    """SCALE·W·xᵀ [BLOCK_F, BLOCK_N]."""
    b_a = tl.dot(b_w, tl.trans(b_x), input_precision=PRECISION)
    if b_x.dtype.primitive_bitwidth == 16:
        b_a = tl.dot(b_rest, tl.trans(b_x), b_a)
    return b_a


@triton.jit
def feature(b_a, MAP: tl.constexpr):
    """φ without its constant; of an exponential the exponent."""
    if MAP == "elu":
        return tl.where(b_a > 0, b_a + 1, tl.exp(tl.minimum(b_a, 0, propagate_nan=tl.PropagateNan.ALL)))
    elif MAP == "elu_exact":  # b_a is log2(e)·x
        return tl.where(b_a > 0, tl.log2(1 + 0.6931471805599453 * tl.where(b_a > 0, b_a, 0)), b_a)
    elif MAP == "relu" or MAP == "favor_relu":
        return tl.maximum(b_a, 0, propagate_nan=tl.PropagateNan.ALL)
    else:
        return b_a


@triton.jit
def exponent_slope(b_a, MAP: tl.constexpr):
    """The derivative of an exponent that feature() makes of b_a."""
    if MAP == "elu_exact":
        return 1 / (1 + 0.6931471805599453 * tl.where(b_a > 0, b_a, 0))
    else:
        return tl.full(b_a.shape, 1.0, b_a.dtype)


@triton.jit
def slope(b_x, MAP: tl.constexpr):
    """dφ/da of a map that is no exponential, by φ."""
    if MAP == "elu":
        return tl.minimum(b_x, 1)
    else:
        return tl.where(b_x > 0, 1.0, 0.0)


@triton.jit
def of_block(F: tl.constexpr, BLOCK_F: tl.constexpr):
    """The part of the tokens that this program has, and its block of features: one after another, so that they find the
    tokens in the cache."""
    BLOCKS: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    return tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS


@triton.jit
def key_kernel(
    p_k,  # (B, H, N, D)
    p_v,  # (B, H, N, E), or None: the maxima alone
    p_w,  # (F, D) or None
    p_mask,  # (B, N) or None
    p_sums,  # (B·H, SPLITS, F + 1, E): Σ e v; Σ v
    p_stats,  # (B·H, SPLITS, 2, F + 1): the maximum; Σ e, and the number of tokens
    s_k,
    s_v,
    s_w,
    s_mask,
    H,
    N,
    TOKENS,
    SPLITS,
    D: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    MAP: tl.constexpr,
    EXP: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Fold a run of tokens into the sums of a block of features, each relative to its own maximum."""
    ACC: tl.constexpr = p_stats.dtype.element_ty
    T: tl.constexpr = p_k.dtype.element_ty
    i_part, i_f = of_block(F, BLOCK_F)
    i_bh, i_s = i_part // SPLITS, i_part % SPLITS
    o_f = i_f * BLOCK_F + tl.arange(0, BLOCK_F)
    o_d, o_e = o_f if p_w is None else tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    p_k = of_head(p_k, s_k, i_bh, H)
    if p_v is not None:
        p_v = of_head(p_v, s_v, i_bh, H)
    if p_w is not None:
        b_w, _, b_rest = load_projection(p_w, s_w, o_f, D, F, SCALE, BLOCK_D, T)
        b_rest = tl.trans(b_rest)
    WIDTH: tl.constexpr = 16 if T.primitive_bitwidth == 16 and p_w is not None else 1
    b_top = nothing(BLOCK_F, EXP, ACC)
    b_z = tl.zeros([BLOCK_F, WIDTH], ACC)
    b_s = tl.zeros([BLOCK_F, BLOCK_E], ACC)
    b_v1 = tl.zeros([BLOCK_N, BLOCK_E], ACC)
    b_n = tl.zeros([BLOCK_N], ACC)
    last = tl.minimum((i_s + 1) * TOKENS, N)
    for i_n in range(i_s * TOKENS, last, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N).to(tl.int64)
        m_n = o_n < last
        if p_mask is not None:
            p = p_mask + (i_bh // H).to(tl.int64) * s_mask[0] + o_n * s_mask[1]
            m_n = tl.load(p, mask=m_n, other=0) != 0
            b_k = load_tokens(p_k, s_k, o_n, m_n, o_d, D)  # [BN, BD]
        else:  # past the end the last token again, which moves no maximum
            b_k = load_tokens(p_k, s_k, tl.minimum(o_n, last - 1), o_n >= 0, o_d, D)
        if p_w is not None:
            b_a = project_transposed(b_k, b_w, b_rest, PRECISION)  # [BF, BN]
        else:
            b_a = tl.trans(b_k).to(ACC) * SCALE
        if MAP == "favor" or MAP == "exact":
            b_h = tl.where(m_n, half_norm(b_k, HALF, ACC), float("inf"))  # [BN]
        if MAP == "exact":
            b_a -= b_h[None, :]
        b_x = feature(b_a, MAP)
        if p_mask is not None and MAP != "exact":
            b_x = tl.where(m_n[None, :], b_x, float("-inf") if EXP else 0.0)
        b_new = tl.maximum(b_top, tl.max(b_x, 1))
        b_shrink = relative(b_top, b_new, EXP)
        if MAP == "favor":
            b_x -= b_h[None, :]
        if p_v is not None:
            b_e = relative(b_x, b_new[:, None], EXP)
            b_v = load_tokens(p_v, s_v, o_n, m_n, o_e, E)  # [BN, BE]
            b_shrink = b_shrink[:, None]
            if MAP != "favor" and MAP != "exact" and p_mask is None:  # past the end: elsewhere their values are zeros
                b_one = m_n.to(ACC)
            else:
                b_one = tl.full([BLOCK_N], 1.0, ACC)
            if WIDTH == 16:  # Hopper's products of a stage wait for one another if one adds to what was scaled in it
                b_add = tl.dot(b_e.to(T), tl.broadcast_to(b_one.to(T)[:, None], [BLOCK_N, 16]))
                b_z = tl.fma(b_z, tl.broadcast_to(b_shrink, b_z.shape), b_add)
                b_s = tl.fma(b_s, tl.broadcast_to(b_shrink, b_s.shape), tl.dot(b_e.to(T), b_v))
            else:
                b_z = b_z * b_shrink + tl.sum(b_e * b_one[None, :], 1)[:, None]
                b_s = tl.dot(b_e.to(T), b_v, b_s * b_shrink, input_precision=PRECISION, out_dtype=ACC)
            if EPS != 0:
                b_v1 += b_v.to(ACC)
                b_n += m_n.to(ACC)
        b_top = b_new
    i_part = i_part.to(tl.int64) * (F + 1)
    tl.store(p_stats + i_part * 2 + o_f, b_top, mask=o_f < F)
    if p_v is not None:
        m_e = o_e < E
        tl.store(p_stats + i_part * 2 + F + 1 + o_f, tl.sum(b_z, 1) / WIDTH, mask=o_f < F)
        p = p_sums + i_part * E
        tl.store(p + o_f[:, None] * E + o_e[None, :], b_s, mask=(o_f < F)[:, None] & m_e[None, :])
        if EPS != 0 and i_f == 0:
            tl.store(p + F * E + o_e, tl.sum(b_v1, 0), mask=m_e)
            tl.store(p_stats + i_part * 2 + 2 * F + 1, tl.sum(b_n, 0))


@triton.jit
def state_kernel(
    p_sums,  # as key_kernel left them
    p_stats,
    p_state,  # (B·H, F + 2, E), or (B·H, F, E) if RAW
    p_stat,  # (B·H, 2 F + 1), or (B·H, F) if RAW
    p_top,  # (B·H): log2 of favor's maximum
    SPLITS,
    E: tl.constexpr,
    F: tl.constexpr,
    MAP: tl.constexpr,
    EXP: tl.constexpr,
    EPS: tl.constexpr,
    RAW: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Fold the runs of a head in their order, for a block of columns. RAW: S and z themselves; softmax: S/z, log2 z."""
    ACC: tl.constexpr = p_stats.dtype.element_ty
    i_bh, i_e = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_f, o_e = tl.arange(0, BLOCK_F), i_e * BLOCK_E + tl.arange(0, BLOCK_E)
    m_f, m_e = o_f < F, o_e < E
    m_fe = m_f[:, None] & m_e[None, :]
    b_top = nothing(BLOCK_F, EXP, ACC)
    b_z = tl.zeros([BLOCK_F], ACC)
    b_s = tl.zeros([BLOCK_F, BLOCK_E], ACC)
    b_v1 = tl.zeros([BLOCK_E], ACC)
    b_n = tl.sum(tl.zeros([BLOCK_E], ACC), 0)
    for i_s in range(SPLITS):
        i_part = (i_bh * SPLITS + i_s) * (F + 1)
        b_part = tl.load(p_stats + i_part * 2 + o_f, mask=m_f, other=float("-inf") if EXP else 0.0)
        b_new = tl.maximum(b_top, b_part)
        b_old, b_add = relative(b_top, b_new, EXP), relative(b_part, b_new, EXP)
        b_z = b_z * b_old + tl.load(p_stats + i_part * 2 + F + 1 + o_f, mask=m_f, other=0) * b_add
        p = p_sums + i_part * E + o_e
        b_part = tl.load(p[None, :] + o_f[:, None] * E, mask=m_fe, other=0)
        b_s = b_s * b_old[:, None] + b_part * b_add[:, None]
        if EPS != 0:
            b_v1 += tl.load(p + F * E, mask=m_e, other=0)
            b_n += tl.load(p_stats + i_part * 2 + 2 * F + 1)
        b_top = b_new
    if MAP == "favor":
        top = tl.max(b_top, 0)
        top = tl.where(top == float("-inf"), 0, top)
        b_scale = tl.exp2(b_top - top)
        b_top = tl.zeros([BLOCK_F], ACC) + top
        if i_e == 0:
            tl.store(p_top + i_bh, top)
    elif EXP:
        b_scale = tl.full([BLOCK_F], 1.0, ACC)
    else:
        b_scale = b_top
    b_z, b_s = b_z * b_scale, b_s * b_scale[:, None]
    if EPS != 0:
        b_z += EPS * b_n
        b_s += (EPS * b_v1)[None, :]
    b_mean = b_s * reciprocal(b_z)[:, None]
    if EXP:
        b_log = tl.where(m_f, b_top + tl.log2(b_z), float("-inf"))
        if RAW:
            b_s = b_mean
        top = tl.max(b_log, 0)
        b_z = relative(b_log, top, EXP)
    else:
        b_log = tl.where(m_f, b_z, 0)
        b_z = b_log
    if RAW:
        tl.store(p_state + i_bh * F * E + o_f[:, None] * E + o_e[None, :], b_s, mask=m_fe)
        if i_e == 0:
            tl.store(p_stat + i_bh * F + o_f, b_log, mask=m_f)
    else:
        total = tl.sum(b_z, 0)
        b_c = tl.sum(b_mean * b_z[:, None], 0) * reciprocal(total)  # [BE]
        # of an exponential z relative to the largest may underflow, and the feature count all the same
        b_any = b_log > float("-inf") if EXP else b_z > 0
        b_u = tl.where((b_any | (b_log != b_log))[:, None], b_mean - b_c[None, :], 0)
        p = p_state + i_bh * (F + 2) * E + o_e
        tl.store(p[None, :] + o_f[:, None] * E, b_u, mask=m_fe)
        tl.store(p + F * E, b_c, mask=m_e)
        tl.store(p + (F + 1) * E, tl.max(tl.abs(b_u), 0), mask=m_e)
        if i_e == 0:
            p_stat += i_bh * (2 * F + 1)
            b_weight = b_z * (W_RANGE * reciprocal(total))
            if MAP == "exact" or MAP == "elu_exact":
                b_weight = b_log
            elif MAP == "softmax":
                b_weight = tl.zeros([BLOCK_F], ACC)
            tl.store(p_stat + o_f, b_log, mask=m_f)
            tl.store(p_stat + F, top + tl.log2(total) if EXP else total)
            tl.store(p_stat + F + 1 + o_f, b_weight, mask=m_f)


@triton.jit
def load_weights(p_stat, o_f, F: tl.constexpr, MAP: tl.constexpr):
    """How a query weighs the features [BLOCK_F]. Read where they are used: held over the loop, they cost registers."""
    none = float("-inf") if MAP == "exact" or MAP == "elu_exact" or MAP == "softmax" else 0.0
    return tl.load(p_stat + F + 1 + o_f, mask=o_f < F, other=none)


@triton.jit
def state_unit(p_state, E: tl.constexpr, F: tl.constexpr, BLOCK_E: tl.constexpr):
    """What U is divided by, to fit T."""
    o_e = tl.arange(0, BLOCK_E)
    return power_below(tl.max(tl.load(p_state + (F + 1) * E + o_e, mask=o_e < E, other=0), 0))


@triton.jit
def load_state(
    p_state,
    p_stat,
    p_u,
    o_f,
    unit,
    E: tl.constexpr,
    F: tl.constexpr,
    MAP: tl.constexpr,
    BLOCK_E: tl.constexpr,
    T: tl.constexpr,
):
    """U / unit [BLOCK_F, BLOCK_E] in T, with a feature's weight where that is a factor; as pack_state_kernel has it."""
    o_e = tl.arange(0, BLOCK_E)
    mask = (o_f < F)[:, None] & (o_e < E)[None, :]
    if p_u is not None:
        return tl.load(p_u + o_f[:, None] * (E + PACKED) + o_e[None, :], mask=mask, other=0)
    else:
        b_u = tl.load(p_state + o_f[:, None] * E + o_e[None, :], mask=mask, other=0) / unit
        if MAP != "exact" and MAP != "elu_exact" and MAP != "softmax":
            b_u *= load_weights(p_stat, o_f, F, MAP)[:, None]
        return b_u.to(T)


@triton.jit
def load_columns(p, o_f, stride, F: tl.constexpr, other):
    """16 columns of packed rows [BLOCK_F, 16]."""
    return tl.load(p + o_f[:, None] * stride + tl.arange(0, 16)[None, :], mask=(o_f < F)[:, None], other=other)


@triton.jit
def load_sum_columns(p_stat, p_u, o_f, E: tl.constexpr, F: tl.constexpr, MAP: tl.constexpr, T: tl.constexpr):
    """halves of how a query weighs the features."""
    if p_u is not None and MAP != "exact" and MAP != "elu_exact" and MAP != "softmax":
        return load_columns(p_u + E, o_f, E + PACKED, F, 0)
    else:
        return halves(as_factor(load_weights(p_stat, o_f, F, MAP), MAP), T)


@triton.jit
def load_minus_columns(p_stat, p_u, o_f, E: tl.constexpr, F: tl.constexpr, MAP: tl.constexpr, T: tl.constexpr):
    """factors of how a query weighs the features, negative."""
    if p_u is not None and MAP != "exact" and MAP != "elu_exact" and MAP != "softmax":
        return load_columns(p_u + E + 16, o_f, E + PACKED, F, 0)
    else:
        return factors(-as_factor(load_weights(p_stat, o_f, F, MAP), MAP), T)


@triton.jit
def pack_state_kernel(
    p_state,
    p_stat,
    p_u,  # (B·H, F, E + 32): U, load_sum_columns, load_minus_columns
    E: tl.constexpr,
    F: tl.constexpr,
    MAP: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """What load_state makes of U, once: where features come in blocks, each tile of tokens would do it again."""
    i_bh = tl.program_id(0).to(tl.int64)
    p_state, p_stat = p_state + i_bh * (F + 2) * E, p_stat + i_bh * (2 * F + 1)
    o_f, o_e, o_c = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_E), tl.arange(0, 16)
    m_f = (o_f < F)[:, None]
    unit = state_unit(p_state, E, F, BLOCK_E)
    T: tl.constexpr = p_u.dtype.element_ty
    p = p_u + i_bh * F * (E + PACKED) + o_f[:, None] * (E + PACKED)
    b_u = load_state(p_state, p_stat, None, o_f, unit, E, F, MAP, BLOCK_E, T)
    tl.store(p + o_e[None, :], b_u, mask=m_f & (o_e < E)[None, :])
    if MAP != "exact" and MAP != "elu_exact" and MAP != "softmax":
        tl.store(p + E + o_c[None, :], load_sum_columns(p_stat, None, o_f, E, F, MAP, T), mask=m_f)
        tl.store(p + E + 16 + o_c[None, :], load_minus_columns(p_stat, None, o_f, E, F, MAP, T), mask=m_f)


@triton.jit
def query_scores(
    b_q, b_wt, b_rest, b_z, MAP: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr
):
    """φ without its constant, of an exponential the exponent [BLOCK_N, BLOCK_F]: what the row's maximum is taken of."""
    if MAP == "softmax" or MAP == "elu_exact" or MAP == "relu":
        b_a = b_q.to(ACC) * SCALE
    else:
        b_a = project(b_q, b_wt, b_rest, PRECISION)
    if MAP == "softmax" or MAP == "exact" or MAP == "elu_exact":
        return feature(b_a, MAP) + b_z[None, :]
    else:
        return feature(b_a, MAP)


@triton.jit
def query_terms(b_x, b_top, MAP: tl.constexpr, EXP: tl.constexpr):
    """e, relative to the row's maximum."""
    if MAP == "softmax" or MAP == "exact" or MAP == "elu_exact":
        return relative(b_x, b_top[:, None], EXP)
    elif EXP:
        b_base = tl.where(b_top == float("-inf"), 0, b_top) - 7  # log2 of E_RANGE
        return tl.exp2(b_x - b_base[:, None])
    else:
        return b_x * (reciprocal(b_top) * E_RANGE)[:, None]


@triton.jit
def total(b_sum):
    """What a sum [size, 16 or 1] came to that in 16 columns is of halves."""
    return tl.sum(b_sum, 1) / (8 if b_sum.shape[1] == 16 else 1)


@triton.jit
def as_factor(b_z, MAP: tl.constexpr):
    """What load_weights gives as the factor of e that it is."""
    if MAP == "softmax" or MAP == "exact" or MAP == "elu_exact":
        return tl.full(b_z.shape, 1.0, b_z.dtype)
    else:
        return b_z


@triton.jit
def add_weighed(b_den, b_e, b_z, b_weights, MAP: tl.constexpr):
    """b_den [BLOCK_N, 16 or 1] and a block of features: its sum becomes 8 Σ e w by a product, or Σ e w."""
    if b_den.shape[1] == 16:
        return tl.dot(b_e.to(b_weights.dtype), b_weights, b_den)
    else:
        return b_den + tl.sum(b_e * as_factor(b_z, MAP)[None, :], 1)[:, None]


@triton.jit
def query_rows(b_q, b_top, b_den, p_stat, F: tl.constexpr, MAP: tl.constexpr, EPS: tl.constexpr, HALF: tl.constexpr):
    """(r, the reciprocal denominator) with p = e·r, and Σ p over the features with their constants. [BLOCK_N]"""
    ACC: tl.constexpr = b_den.dtype
    if MAP == "favor":
        b_factor = tl.exp2(-half_norm(b_q, HALF, ACC))
    elif MAP == "exact" or MAP == "elu_exact" or MAP == "softmax":
        b_factor = tl.full(b_den.shape, 1.0, ACC)
    else:
        b_factor = b_top
    b_floor = tl.full(b_den.shape, EPS, ACC) * HALF_RANGE
    if MAP == "relu":
        b_floor *= reciprocal(tl.load(p_stat + F))
    elif MAP != "favor" and MAP != "favor_relu":
        b_floor = tl.zeros(b_den.shape, ACC)
    b_inverse = reciprocal(b_factor * b_den + b_floor)
    b_r = b_factor * b_inverse
    if (MAP == "favor" or MAP == "favor_relu") and EPS != 0:
        return b_r, b_inverse, tl.full(b_den.shape, 1.0, ACC)
    else:
        return b_r, b_inverse, b_r * b_den


@triton.jit
def query_kernel(
    p_q,  # (B, H, N, D)
    p_w,  # (F, D) or None
    p_state,
    p_stat,
    p_u,  # pack_state_kernel's, if there are several blocks of features, or None
    p_out,  # (B, H, N, E)
    s_q,
    s_w,
    s_out,
    H,
    N,
    TOKENS,
    SPLITS,
    D: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    MAP: tl.constexpr,
    EXP: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Read out a run of queries: out = c̄·Σp + p·U."""
    ACC: tl.constexpr = p_stat.dtype.element_ty
    T: tl.constexpr = p_q.dtype.element_ty
    i_bh, i_s = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    p_q, p_out = of_head(p_q, s_q, i_bh, H), of_head(p_out, s_out, i_bh, H)
    p_state += i_bh.to(tl.int64) * (F + 2) * E
    p_stat += i_bh.to(tl.int64) * (2 * F + 1)
    if p_u is not None:
        p_u += i_bh.to(tl.int64) * F * (E + PACKED)
    o_d, o_e, o_f = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_F)
    b_c = tl.load(p_state + F * E + o_e, mask=o_e < E, other=0)
    unit = state_unit(p_state, E, F, BLOCK_E)
    WIDTH: tl.constexpr = 16 if T.primitive_bitwidth == 16 and p_w is not None else 1
    if BLOCKS == 1:
        b_w, b_wt, b_rest = load_projection(p_w, s_w, o_f, D, F, SCALE, BLOCK_D, T)
        b_u = load_state(p_state, p_stat, None, o_f, unit, E, F, MAP, BLOCK_E, T)
        b_weights = load_sum_columns(p_stat, None, o_f, E, F, MAP, T)
    last = tl.minimum((i_s + 1) * TOKENS, N)
    for i_n in range(i_s * TOKENS, last, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N).to(tl.int64)
        m_n = o_n < last
        b_q = load_tokens(p_q, s_q, o_n, m_n, o_d, D)
        b_top = nothing(BLOCK_N, EXP, ACC)
        b_den = tl.zeros([BLOCK_N, WIDTH], ACC)
        b_o = tl.zeros([BLOCK_N, BLOCK_E], ACC)
        for i_f in range(BLOCKS):
            o_i = i_f * BLOCK_F + o_f
            if BLOCKS > 1:
                b_w, b_wt, b_rest = load_projection(p_w, s_w, o_i, D, F, SCALE, BLOCK_D, T)
                b_u = load_state(p_state, p_stat, p_u, o_i, unit, E, F, MAP, BLOCK_E, T)
                b_weights = load_sum_columns(p_stat, p_u, o_i, E, F, MAP, T)
            b_z = load_weights(p_stat, o_i, F, MAP)
            b_x = b_q if p_w is not None or BLOCKS == 1 else load_tokens(p_q, s_q, o_n, m_n, o_i, D)
            b_x = query_scores(b_x, b_wt, b_rest, b_z, MAP, SCALE, PRECISION, ACC)
            b_new = tl.maximum(b_top, tl.max(b_x, 1))
            b_e = query_terms(b_x, b_new, MAP, EXP)
            if BLOCKS > 1:
                b_shrink = relative(b_top, b_new, EXP)
                b_den *= b_shrink[:, None]
                b_o *= b_shrink[:, None]
            b_den = add_weighed(b_den, b_e, b_z, b_weights, MAP)
            b_o = tl.dot(b_e.to(T), b_u, b_o, input_precision=PRECISION, out_dtype=ACC)
            b_top = b_new
        b_r, b_inverse, b_sum = query_rows(b_q, b_top, total(b_den), p_stat, F, MAP, EPS, HALF)
        b_o = b_c[None, :] * b_sum[:, None] + b_o * (b_r * unit)[:, None]
        store_tokens(p_out, s_out, o_n, m_n, b_o, o_e, E)


@triton.jit
def query_backward_kernel(
    p_do,  # (B, H, N, E)
    p_q,  # (B, H, N, D)
    p_w,  # (F, D) or None
    p_state,
    p_stat,
    p_u,  # as query_kernel's
    p_dq,  # (B, H, N, D), or None: not needed
    p_rows,  # (B·H, 3, N): what query_state_kernel reads, or None
    p_sums,  # (B·H, SPLITS, F + 1, E): Σ p dO; Σ dO/den. None: query_state_kernel makes them, or nobody needs them
    p_stats,  # (B·H, SPLITS, F + 1): Σ p δ; Σ δ/den
    s_do,
    s_q,
    s_w,
    s_dq,
    H,
    N,
    TOKENS,
    SPLITS,
    D: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    MAP: tl.constexpr,
    EXP: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """A run of queries: their gradient, and either what query_state_kernel needs of a row or, where all features fit
    one block, what the run adds to the state's gradient: half the traffic, but more registers.

    The compiler removes what only a gradient without a pointer would read.
    """
    ACC: tl.constexpr = p_stat.dtype.element_ty
    T: tl.constexpr = p_q.dtype.element_ty
    i_bh, i_s = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    p_q, p_do = of_head(p_q, s_q, i_bh, H), of_head(p_do, s_do, i_bh, H)
    if p_dq is not None:
        p_dq = of_head(p_dq, s_dq, i_bh, H)
    p_state += i_bh.to(tl.int64) * (F + 2) * E
    p_stat += i_bh.to(tl.int64) * (2 * F + 1)
    if p_u is not None:
        p_u += i_bh.to(tl.int64) * F * (E + PACKED)
    o_f, o_e = tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_E)
    o_d = o_f if p_w is None else tl.arange(0, BLOCK_D)
    b_c = tl.load(p_state + F * E + o_e, mask=o_e < E, other=0)
    unit = state_unit(p_state, E, F, BLOCK_E)
    WIDTH: tl.constexpr = 16 if T.primitive_bitwidth == 16 and p_w is not None else 1
    if p_sums is not None:
        # relu's δ has a part of c̄ instead of U: no bound in units of U holds, and it stays in ACC
        COLUMNS: tl.constexpr = T.primitive_bitwidth == 16 and MAP != "relu"
        b_r_sum, b_rho, b_r1, b_rho1 = no_sums(BLOCK_N, BLOCK_E, BLOCK_F, COLUMNS, ACC)
    if BLOCKS == 1:
        b_w, b_wt, b_rest = load_projection(p_w, s_w, o_f, D, F, SCALE, BLOCK_D, T)
        b_u = load_state(p_state, p_stat, None, o_f, unit, E, F, MAP, BLOCK_E, T)
        b_ut = tl.trans(b_u)
        b_z = load_weights(p_stat, o_f, F, MAP)
        b_weights = load_sum_columns(p_stat, None, o_f, E, F, MAP, T)
        b_minus = tl.trans(load_minus_columns(p_stat, None, o_f, E, F, MAP, T))
    last = tl.minimum((i_s + 1) * TOKENS, N)
    for i_n in range(i_s * TOKENS, last, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N).to(tl.int64)
        m_n = o_n < last
        b_q = load_tokens(p_q, s_q, o_n, m_n, o_d, D)
        b_do = load_tokens(p_do, s_do, o_n, m_n, o_e, E)
        # |G − δ| ≤ 4 Σ|dO| in units of U: a row so divided fits float16
        b_bound = 4 * tl.sum(tl.abs(b_do.to(ACC)), 1)
        b_inner = reciprocal(b_bound)
        b_row = (b_do.to(ACC) * b_inner[:, None]).to(T)
        b_top = nothing(BLOCK_N, EXP, ACC)
        b_den = tl.zeros([BLOCK_N, WIDTH], ACC)
        b_o = tl.zeros([BLOCK_N, BLOCK_E], ACC)
        if BLOCKS == 1:  # kept for the second sweep
            b_z = load_weights(p_stat, o_f, F, MAP)
            b_e = tl.zeros([BLOCK_N, BLOCK_F], T if WIDTH == 16 else ACC)
            b_g = tl.zeros([BLOCK_N, BLOCK_F], ACC)
            b_eg = tl.zeros([BLOCK_N], ACC)
        for i_f in range(BLOCKS):
            if BLOCKS > 1:
                o_i = i_f * BLOCK_F + o_f
                b_w, b_wt, b_rest = load_projection(p_w, s_w, o_i, D, F, SCALE, BLOCK_D, T)
                b_u = load_state(p_state, p_stat, p_u, o_i, unit, E, F, MAP, BLOCK_E, T)
                b_z = load_weights(p_stat, o_i, F, MAP)
                b_weights = load_sum_columns(p_stat, p_u, o_i, E, F, MAP, T)
            b_x = b_q if p_w is not None or BLOCKS == 1 else load_tokens(p_q, s_q, o_n, m_n, o_i, D)
            b_x = query_scores(b_x, b_wt, b_rest, b_z, MAP, SCALE, PRECISION, ACC)
            b_new = tl.maximum(b_top, tl.max(b_x, 1))
            b_e = query_terms(b_x, b_new, MAP, EXP)
            if WIDTH == 16:
                b_e = b_e.to(T)
            if BLOCKS > 1:
                b_shrink = relative(b_top, b_new, EXP)[:, None]
                b_den *= b_shrink
                b_o *= b_shrink
            b_den = add_weighed(b_den, b_e, b_z, b_weights, MAP)
            if WIDTH == 1 and BLOCKS == 1:
                b_g = tl.dot(b_row, b_ut, input_precision=PRECISION)  # [BN, BF]
                b_eg = tl.sum(b_e * b_g, 1)
            else:
                b_o = tl.dot(b_e.to(T), b_u, b_o, input_precision=PRECISION, out_dtype=ACC)
            b_top = b_new
        b_den1 = total(b_den)
        if WIDTH == 16 or BLOCKS > 1:  # Σ e G by the other association
            b_eg = tl.sum(b_o * b_row.to(ACC), 1)
        b_r, b_inverse, b_sum = query_rows(b_q, b_top, b_den1, p_stat, F, MAP, EPS, HALF)
        b_delta = b_eg * b_r  # in units of U and of the bound
        if MAP == "relu":
            b_delta += (b_sum - 1) / unit * tl.sum(b_row.to(ACC) * b_c[None, :], 1)
        if EXP:
            b_outer = 0.6931471805599453 * unit * b_bound * b_r
        else:
            b_outer = E_RANGE * unit * b_bound * b_inverse
        b_dq = tl.zeros([BLOCK_N, BLOCK_D], ACC)
        for i_f in range(BLOCKS):
            o_i = i_f * BLOCK_F + o_f
            if BLOCKS > 1:
                b_w, b_wt, b_rest = load_projection(p_w, s_w, o_i, D, F, SCALE, BLOCK_D, T)
                b_ut = tl.trans(load_state(p_state, p_stat, p_u, o_i, unit, E, F, MAP, BLOCK_E, T))
                b_z = load_weights(p_stat, o_i, F, MAP)
                b_minus = tl.trans(load_minus_columns(p_stat, p_u, o_i, E, F, MAP, T))
                b_in = b_q if p_w is not None else load_tokens(p_q, s_q, o_n, m_n, o_i, D)
                b_x = query_scores(b_in, b_wt, b_rest, b_z, MAP, SCALE, PRECISION, ACC)
                b_e = query_terms(b_x, b_top, MAP, EXP)
            if WIDTH == 16 or BLOCKS > 1:
                b_g = tl.dot(b_row, b_ut, input_precision=PRECISION)  # [BN, BF]
            if WIDTH == 16:
                b_da = tl.dot(halves(b_delta, T), b_minus, b_g)
            else:
                b_da = b_g - b_delta[:, None] * as_factor(b_z, MAP)[None, :]
            if EXP and p_w is not None:
                b_da = b_da.to(T) * b_e.to(T)
            elif EXP:
                b_da *= b_e * exponent_slope((b_in if BLOCKS > 1 else b_q).to(ACC) * SCALE, MAP)
            else:  # e is φ times a row's factor
                b_da *= slope(b_e, MAP)
            if p_w is not None:
                b_dq = tl.dot(b_da.to(T), b_w, b_dq, input_precision=PRECISION, out_dtype=ACC)
            elif p_dq is not None:
                store_tokens(p_dq, s_dq, o_n, m_n, b_da * (b_outer * SCALE)[:, None], o_i, D)
        if p_w is not None and p_dq is not None:
            if MAP == "favor":  # less the sum of da; exact's is 0
                b_dq -= (2 * HALF * (b_eg - b_delta * b_den1))[:, None] * b_q.to(ACC)
            store_tokens(p_dq, s_dq, o_n, m_n, b_dq * b_outer[:, None], o_d, D)
        b_delta *= b_bound
        if p_rows is not None:
            p_row = p_rows + i_bh.to(tl.int64) * 3 * N + o_n
            tl.store(p_row, row_of_state(b_top, b_r, EXP), mask=m_n)
            tl.store(p_row + N, b_inverse, mask=m_n)
            tl.store(p_row + 2 * N, b_delta, mask=m_n)
        if p_sums is not None:
            b_p = b_e * (b_r * HALF_RANGE)[:, None]
            if MAP != "exact" and MAP != "elu_exact" and MAP != "softmax":
                b_p *= b_z[None, :]
            b_p = tl.trans(b_p.to(T))
            b_r_sum, b_rho, b_r1, b_rho1 = add_queries(
                b_r_sum, b_rho, b_r1, b_rho1, b_p, b_do, b_delta, b_inverse, m_n, MAP, PRECISION
            )
    if p_sums is not None:
        i_part = tl.program_id(0).to(tl.int64) * (F + 1)
        store_sums(p_sums, p_stats, i_part, o_f, True, unit, b_r_sum, b_rho, b_r1, b_rho1, E, F, MAP)


@triton.jit
def row_of_state(b_top, b_r, EXP: tl.constexpr):
    """What turns a row's features, relative to nothing, into p·HALF_RANGE: an exponent to subtract, or a factor."""
    if EXP:
        b_base = tl.where(b_top == float("-inf"), 0, b_top) - 15  # log2 of HALF_RANGE
        return tl.where(b_r > 0, b_base - tl.log2(tl.where(b_r > 0, b_r, 1)), float("inf"))
    else:
        return reciprocal(b_top) * b_r * (HALF_RANGE * E_RANGE)


@triton.jit
def no_sums(BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr, COLUMNS: tl.constexpr, ACC):
    """Of no queries: what add_queries adds to."""
    return (
        tl.zeros([BLOCK_F, BLOCK_E], ACC),
        tl.zeros([BLOCK_F, 16 if COLUMNS else 1], ACC),
        tl.zeros([BLOCK_N, BLOCK_E], ACC),
        tl.zeros([BLOCK_N], ACC),
    )


@triton.jit
def add_queries(
    b_r, b_rho, b_r1, b_rho1, b_p, b_do, b_delta, b_inverse, m_n, MAP: tl.constexpr, PRECISION: tl.constexpr
):
    """A tile's Σ p dO and Σ p δ, and for the constant Σ dO/den and Σ δ/den; b_p [BLOCK_F, BLOCK_N] is p·HALF_RANGE."""
    ACC: tl.constexpr = b_delta.dtype
    T: tl.constexpr = b_p.dtype
    b_r = tl.dot(b_p, b_do, b_r, input_precision=PRECISION, out_dtype=ACC)
    if MAP != "softmax":
        b_column = b_delta / (2 * b_do.shape[1])  # |δ| ≤ 2 E max|dO|
        if b_rho.shape[1] == 16:  # a product costs less than a sum
            b_rho = tl.dot(b_p, halves(b_column, T), b_rho, input_precision=PRECISION, out_dtype=ACC)
        else:
            b_rho += tl.sum(b_p * b_column[None, :], 1)[:, None]
    if MAP == "favor" or MAP == "favor_relu":
        b_inverse = tl.where(m_n, b_inverse, 0)
        b_r1 += b_do.to(ACC) * b_inverse[:, None]
        b_rho1 += b_delta * b_inverse
    return b_r, b_rho, b_r1, b_rho1


@triton.jit
def store_sums(
    p_sums,
    p_stats,
    i_part,
    o_f,
    first,
    unit,
    b_r,
    b_rho,
    b_r1,
    b_rho1,
    E: tl.constexpr,
    F: tl.constexpr,
    MAP: tl.constexpr,
):
    """What a run of queries came to, in records from i_part on; the constant's from the first block of features."""
    BLOCK_E: tl.constexpr = b_r.shape[1]
    o_e = tl.arange(0, BLOCK_E)
    m_e = o_e < E
    p = p_sums + i_part * E
    tl.store(p + o_f[:, None] * E + o_e[None, :], b_r / HALF_RANGE, mask=(o_f < F)[:, None] & m_e[None, :])
    if MAP != "softmax":
        tl.store(p_stats + i_part + o_f, total(b_rho) * (2 * BLOCK_E * unit / HALF_RANGE), mask=o_f < F)
    if (MAP == "favor" or MAP == "favor_relu") and first:
        tl.store(p + F * E + o_e, tl.sum(b_r1, 0), mask=m_e)
        tl.store(p_stats + i_part + F, tl.sum(b_rho1, 0) * unit)


@triton.jit
def query_state_kernel(
    p_do,  # (B, H, N, E)
    p_q,  # (B, H, N, D)
    p_w,  # (F, D) or None
    p_state,
    p_stat,
    p_rows,  # (B·H, 3, N): row_of_state, reciprocal denominator, δ
    p_sums,  # as query_backward_kernel's
    p_stats,
    s_do,
    s_q,
    s_w,
    H,
    N,
    TOKENS,
    SPLITS,
    D: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    MAP: tl.constexpr,
    EXP: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """What a run of queries adds to a block of features of the state's gradient."""
    ACC: tl.constexpr = p_stat.dtype.element_ty
    T: tl.constexpr = p_q.dtype.element_ty
    # relu's δ has a part of c̄ instead of U: no bound in units of U holds, and it stays in ACC
    COLUMNS: tl.constexpr = T.primitive_bitwidth == 16 and MAP != "relu"
    i_part, i_f = of_block(F, BLOCK_F)
    i_bh, i_s = i_part // SPLITS, i_part % SPLITS
    p_q, p_do = of_head(p_q, s_q, i_bh, H), of_head(p_do, s_do, i_bh, H)
    p_state += i_bh.to(tl.int64) * (F + 2) * E
    p_stat += i_bh.to(tl.int64) * (2 * F + 1)
    p_rows += i_bh.to(tl.int64) * 3 * N
    o_f, o_e = i_f * BLOCK_F + tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_E)
    o_d = o_f if p_w is None else tl.arange(0, BLOCK_D)
    unit = state_unit(p_state, E, F, BLOCK_E)
    b_z = load_weights(p_stat, o_f, F, MAP)
    if MAP == "favor":
        b_z = tl.maximum(tl.log2(b_z * E_RANGE), -1000.0)
    if p_w is not None:
        b_w, _, b_rest = load_projection(p_w, s_w, o_f, D, F, SCALE, BLOCK_D, T)
        b_rest = tl.trans(b_rest)
        b_exponents = halves(b_z, T)
    b_r, b_rho, b_r1, b_rho1 = no_sums(BLOCK_N, BLOCK_E, BLOCK_F, COLUMNS, ACC)
    last = tl.minimum((i_s + 1) * TOKENS, N)
    for i_n in range(i_s * TOKENS, last, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N).to(tl.int64)
        m_n = o_n < last
        b_q = load_tokens(p_q, s_q, o_n, m_n, o_d, D)
        b_do = load_tokens(p_do, s_do, o_n, m_n, o_e, E)
        b_row = tl.load(p_rows + o_n, mask=m_n, other=float("inf") if EXP else 0.0)
        b_inverse = tl.load(p_rows + N + o_n, mask=m_n, other=0)
        b_delta = tl.load(p_rows + 2 * N + o_n, mask=m_n, other=0)
        b_a = project_transposed(b_q, b_w, b_rest, PRECISION) if p_w is not None else tl.trans(b_q).to(ACC) * SCALE
        if MAP == "favor" and T.primitive_bitwidth == 16:
            b_p = tl.exp2(tl.dot(b_exponents, tl.full([16, BLOCK_N], 1 / 8, T), b_a) - b_row[None, :])
        elif EXP:
            b_p = tl.exp2(feature(b_a, MAP) + b_z[:, None] - b_row[None, :])
        else:
            b_p = feature(b_a, MAP) * b_z[:, None] * b_row[None, :]
        b_r, b_rho, b_r1, b_rho1 = add_queries(
            b_r, b_rho, b_r1, b_rho1, b_p.to(T), b_do, b_delta, b_inverse, m_n, MAP, PRECISION
        )
    i_part = i_part.to(tl.int64) * (F + 1)
    store_sums(p_sums, p_stats, i_part, o_f, i_f == 0, unit, b_r, b_rho, b_r1, b_rho1, E, F, MAP)


@triton.jit
def state_backward_kernel(
    p_sums,  # as query_backward_kernel left them
    p_stats,
    p_state,
    p_stat,
    p_grad,  # (B·H, F, E): R_m = Σ p dO
    p_grads,  # (B·H, 3, F): ρ_m; the largest |R_m|; 1/z_m, unless EXP
    SPLITS,
    E: tl.constexpr,
    F: tl.constexpr,
    MAP: tl.constexpr,
    EXP: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """Fold the runs of a head in their order, for a block of features."""
    ACC: tl.constexpr = p_stats.dtype.element_ty
    i_bh = tl.program_id(0).to(tl.int64)
    o_f, o_e = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F), tl.arange(0, BLOCK_E)
    m_f, m_e = o_f < F, o_e < E
    m_fe = m_f[:, None] & m_e[None, :]
    b_r = tl.zeros([BLOCK_F, BLOCK_E], ACC)
    b_rho = tl.zeros([BLOCK_F], ACC)
    if MAP == "favor" or MAP == "favor_relu":
        b_z = EPS * E_RANGE * load_weights(p_stat + i_bh * (2 * F + 1), o_f, F, MAP)
    for i_s in range(SPLITS):
        i_part = (i_bh * SPLITS + i_s) * (F + 1)
        p = p_sums + i_part * E + o_e
        b_r += tl.load(p[None, :] + o_f[:, None] * E, mask=m_fe, other=0)
        if MAP != "softmax":
            b_rho -= tl.load(p_stats + i_part + o_f, mask=m_f, other=0)
        if MAP == "favor" or MAP == "favor_relu":
            b_r += b_z[:, None] * tl.load(p + F * E, mask=m_e, other=0)[None, :]
            b_rho -= b_z * tl.load(p_stats + i_part + F)
    o_fe = o_f[:, None] * E + o_e[None, :]
    if MAP == "softmax":
        b_rho = -tl.sum(b_r * tl.load(p_state + i_bh * (F + 2) * E + o_fe, mask=m_fe, other=0), 1)
    tl.store(p_grad + i_bh * F * E + o_fe, b_r, mask=m_fe)
    p_grads += i_bh * 3 * F + o_f
    tl.store(p_grads, b_rho, mask=m_f)
    tl.store(p_grads + F, tl.max(tl.abs(b_r), 1), mask=m_f)
    if not EXP:
        b_z = tl.load(p_stat + i_bh * (2 * F + 1) + o_f, mask=m_f, other=0)
        tl.store(p_grads + 2 * F, reciprocal(b_z), mask=m_f)


@triton.jit
def load_gradient(
    p_grad,
    p_grads,
    p_stat,
    o_f,
    unit,
    top,
    E: tl.constexpr,
    F: tl.constexpr,
    MAP: tl.constexpr,
    EXP: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    T: tl.constexpr,
):
    """Of R / unit [BLOCK_F, BLOCK_E] in T itself, what dφ needs, and EPS Σ R_m/z_m [BLOCK_E]; and ρ [BLOCK_F].

    What dφ needs are R and ρ, but of favor_relu R/z and ρ/z, in units of ``top``, the largest 1/z.
    """
    o_e, m_f = tl.arange(0, BLOCK_E), o_f < F
    p = p_grad + o_f[:, None] * E + o_e[None, :]
    b_r = tl.load(p, mask=m_f[:, None] & (o_e < E)[None, :], other=0) / unit
    b_rho = tl.load(p_grads + o_f, mask=m_f, other=0)
    b_r1 = tl.zeros([BLOCK_E], b_r.dtype)
    if MAP == "favor":
        b_inverse = tl.exp2(top - tl.load(p_stat + o_f, mask=m_f, other=float("inf")))
    elif not EXP:
        b_inverse = tl.load(p_grads + 2 * F + o_f, mask=m_f, other=0)
    if EPS != 0:
        b_r1 = tl.sum(b_r * (EPS * b_inverse)[:, None], 0)
    if MAP == "favor_relu":
        b_share = b_inverse * reciprocal(top)
        return b_r.to(T), (b_r * b_share[:, None]).to(T), b_r1, b_rho * b_share
    else:
        return b_r.to(T), b_r.to(T), b_r1, b_rho


@triton.jit
def gradient_units(p_grads, p_top, F: tl.constexpr, MAP: tl.constexpr, EXP: tl.constexpr, BLOCK_ALL: tl.constexpr):
    """What R is divided by to fit T; the largest |ρ|, so divided; favor's maximum, 0, or the largest 1/z."""
    o_f = tl.arange(0, BLOCK_ALL)
    unit = power_below(tl.max(tl.load(p_grads + F + o_f, mask=o_f < F, other=0), 0))
    widest = tl.max(tl.abs(tl.load(p_grads + o_f, mask=o_f < F, other=0)), 0) / unit
    if MAP == "favor":
        top = tl.load(p_top)
    elif EXP:
        top = unit * 0
    else:
        top = tl.max(tl.load(p_grads + 2 * F + o_f, mask=o_f < F, other=0), 0)
    return unit, widest, top


@triton.jit
def exponent_base(p_stat, F: tl.constexpr, BLOCK_ALL: tl.constexpr):
    """The largest exponent z: float16 holds what the others are less it."""
    o_f = tl.arange(0, BLOCK_ALL)
    base = tl.max(tl.load(p_stat + o_f, mask=o_f < F, other=float("-inf")), 0)
    return tl.where(base == float("-inf"), 0, base)


@triton.jit
def pack_gradient_kernel(
    p_grad,
    p_grads,
    p_stat,
    p_top,
    p_packed,  # (B·H, F, 2 E + 32): R, favor_relu's for dφ; for 16 bits load_exponents and factors of ρ
    p_rho,  # (B·H, F + E): its ρ; EPS Σ R_m/z_m
    s_stat,
    E: tl.constexpr,
    F: tl.constexpr,
    MAP: tl.constexpr,
    EXP: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_ALL: tl.constexpr,
):
    """What load_gradient makes of R, once: where features come in blocks, each tile of tokens would do it again."""
    i_bh = tl.program_id(0).to(tl.int64)
    p_grad, p_grads, p_stat = p_grad + i_bh * F * E, p_grads + i_bh * 3 * F, p_stat + i_bh * s_stat
    p_packed, p_rho = p_packed + i_bh * F * (2 * E + PACKED), p_rho + i_bh * (F + E)
    unit, widest, top = gradient_units(p_grads, p_top + i_bh, F, MAP, EXP, BLOCK_ALL)
    o_e, o_c = tl.arange(0, BLOCK_E), tl.arange(0, 16)
    T: tl.constexpr = p_packed.dtype.element_ty
    b_sum = tl.zeros([BLOCK_E], p_grad.dtype.element_ty)
    if EXP:
        base = exponent_base(p_stat, F, BLOCK_ALL)
    for i_f in range(BLOCKS):
        o_f = i_f * BLOCK_F + tl.arange(0, BLOCK_F)
        b_r, b_share, b_r1, b_rho = load_gradient(
            p_grad, p_grads, p_stat, o_f, unit, top, E, F, MAP, EXP, EPS, BLOCK_E, T
        )
        b_sum += b_r1
        p = p_packed + o_f[:, None] * (2 * E + PACKED)
        m_f = (o_f < F)[:, None]
        tl.store(p + o_e[None, :], b_r, mask=m_f & (o_e < E)[None, :])
        if MAP == "favor_relu":
            tl.store(p + E + o_e[None, :], b_share, mask=m_f & (o_e < E)[None, :])
        tl.store(p_rho + o_f, b_rho, mask=o_f < F)
        if T.primitive_bitwidth == 16:
            if EXP:
                b_minus = load_exponents(p_stat, o_f, base, F, T)
                tl.store(p + 2 * E + o_c[None, :], b_minus, mask=m_f)
            b_least = factors(b_rho * reciprocal(widest * unit), T)
            tl.store(p + 2 * E + 16 + o_c[None, :], b_least, mask=m_f)
    tl.store(p_rho + F + o_e, b_sum, mask=o_e < E)


@triton.jit
def load_packed(p_packed, p_rho, o_f, E: tl.constexpr, F: tl.constexpr, MAP: tl.constexpr, BLOCK_E: tl.constexpr):
    """What load_gradient returns, but for EPS Σ R_m/z_m, as pack_gradient_kernel has it."""
    o_e = tl.arange(0, BLOCK_E)
    p = p_packed + o_f[:, None] * (2 * E + PACKED) + o_e[None, :]
    mask = (o_f < F)[:, None] & (o_e < E)[None, :]
    b_r = tl.load(p, mask=mask, other=0)
    b_rho = tl.load(p_rho + o_f, mask=o_f < F, other=0)
    if MAP == "favor_relu":
        return b_r, tl.load(p + E, mask=mask, other=0), b_rho
    else:
        return b_r, b_r, b_rho


@triton.jit
def load_exponents(p_stat, o_f, base, F: tl.constexpr, T: tl.constexpr):
    """Columns [BLOCK_F, 16] that sum to 8 (base − log2 z); past F what makes every exponential 0."""
    b_stat = tl.load(p_stat + o_f, mask=o_f < F, other=float("inf")) - base
    return halves(-tl.minimum(tl.maximum(b_stat, -30000.0), 30000.0), T)


@triton.jit
def key_backward_kernel(
    p_k,  # (B, H, N, D)
    p_v,  # (B, H, N, E)
    p_w,  # (F, D) or None
    p_mask,  # (B, N) or None
    p_mean,  # (B·H, …, E): c̄, s_mean elements from head to head; None: 0
    p_stat,
    p_top,  # (B·H)
    p_grad,
    p_grads,
    p_packed,  # pack_gradient_kernel's, if there are several blocks of features, or None
    p_rho,
    p_dk,  # None: not needed; so p_dv
    p_dv,
    s_k,
    s_v,
    s_w,
    s_mask,
    s_mean,
    s_stat,
    s_dk,
    s_dv,
    H,
    N,
    TOKENS,
    SPLITS,
    D: tl.constexpr,
    E: tl.constexpr,
    F: tl.constexpr,
    MAP: tl.constexpr,
    EXP: tl.constexpr,
    EPS: tl.constexpr,
    SCALE: tl.constexpr,
    HALF: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_ALL: tl.constexpr,
):
    """dφ_m = (R_m·(v − c̄) + ρ_m) / z_m and dv = Σ φ_m/z_m R_m for a run of keys.

    The compiler removes what only a gradient without a pointer would read.
    """
    ACC: tl.constexpr = p_stat.dtype.element_ty
    T: tl.constexpr = p_k.dtype.element_ty
    i_bh, i_s = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    p_k, p_v = of_head(p_k, s_k, i_bh, H), of_head(p_v, s_v, i_bh, H)
    if p_dk is not None:
        p_dk = of_head(p_dk, s_dk, i_bh, H)
    if p_dv is not None:
        p_dv = of_head(p_dv, s_dv, i_bh, H)
    p_stat += i_bh.to(tl.int64) * s_stat
    p_grad += i_bh.to(tl.int64) * F * E
    p_grads += i_bh.to(tl.int64) * 3 * F
    o_d, o_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    if p_packed is not None:
        p_packed, p_rho = p_packed + i_bh.to(tl.int64) * F * (2 * E + PACKED), p_rho + i_bh.to(tl.int64) * (F + E)
    o_f = tl.arange(0, BLOCK_F)
    b_c = tl.zeros([BLOCK_E], ACC)
    if p_mean is not None:
        b_c = tl.load(p_mean + i_bh.to(tl.int64) * s_mean + o_e, mask=o_e < E, other=0)
    unit, widest, top = gradient_units(p_grads, p_top + i_bh, F, MAP, EXP, BLOCK_ALL)
    least = reciprocal(widest * unit)
    WIDTH: tl.constexpr = 16 if T.primitive_bitwidth == 16 and p_w is not None else 1
    base = 0.0  # float16 holds what an exponent z is less the largest
    if EXP and WIDTH == 16:
        base = exponent_base(p_stat, F, BLOCK_ALL)
    gain = power_below(tl.cast(tl.minimum(N, 32768), ACC))  # by which float16 holds e/z
    if BLOCKS == 1:
        b_w, b_wt, b_rest = load_projection(p_w, s_w, o_f, D, F, SCALE, BLOCK_D, T)
        b_r, b_rt, b_r1, b_rho = load_gradient(p_grad, p_grads, p_stat, o_f, unit, top, E, F, MAP, EXP, EPS, BLOCK_E, T)
        b_rt = tl.trans(b_rt)
        b_least = tl.trans(factors(b_rho * least, T))
        b_minus = tl.trans(load_exponents(p_stat, o_f, base, F, T))
    elif EPS != 0:
        b_r1 = tl.load(p_rho + F + o_e, mask=o_e < E, other=0)
    last = tl.minimum((i_s + 1) * TOKENS, N)
    for i_n in range(i_s * TOKENS, last, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N).to(tl.int64)
        m_all = o_n < last
        m_n = m_all
        if p_mask is not None:
            p = p_mask + (i_bh // H).to(tl.int64) * s_mask[0] + o_n * s_mask[1]
            m_n = tl.load(p, mask=m_n, other=0) != 0
        b_k = load_tokens(p_k, s_k, o_n, m_n, o_d, D)
        b_v = load_tokens(p_v, s_v, o_n, m_n, o_e, E).to(ACC) - b_c[None, :]
        # |R·(v − c̄) + ρ| is at most this: a row so divided fits float16
        b_bound = 2 * tl.sum(tl.abs(b_v), 1) + widest
        b_inner = reciprocal(b_bound)
        b_v = (b_v * b_inner[:, None]).to(T)
        if EXP:
            b_outer = b_bound * (unit / gain * 0.6931471805599453)
        else:
            b_outer = b_bound * (unit * top)
        b_shift = tl.zeros([BLOCK_N], ACC) + (base - tl.log2(gain))
        if MAP == "favor" or MAP == "exact":
            b_shift += half_norm(b_k, HALF, ACC)
        b_dk = tl.zeros([BLOCK_N, BLOCK_D], ACC)
        b_dv = tl.zeros([BLOCK_N, BLOCK_E], ACC)
        b_da1 = tl.zeros([BLOCK_N, 16], ACC)
        for i_f in range(BLOCKS):
            o_i = i_f * BLOCK_F + o_f
            if BLOCKS > 1:
                b_w, b_wt, b_rest = load_projection(p_w, s_w, o_i, D, F, SCALE, BLOCK_D, T)
                b_r, b_rt, b_rho = load_packed(p_packed, p_rho, o_i, E, F, MAP, BLOCK_E)
                b_rt = tl.trans(b_rt)
            if p_w is not None:
                b_a = project(b_k, b_wt, b_rest, PRECISION)
            elif BLOCKS == 1:
                b_a = b_k.to(ACC) * SCALE
            else:
                b_a = load_tokens(p_k, s_k, o_n, m_n, o_i, D).to(ACC) * SCALE
            if EXP and WIDTH == 16:
                if BLOCKS > 1:
                    b_minus = tl.trans(load_columns(p_packed + 2 * E, o_i, 2 * E + PACKED, F, -30000.0))
                b_t = tl.exp2(tl.dot(tl.full([BLOCK_N, 16], 1 / 8, T), b_minus, b_a) - b_shift[:, None])
            elif EXP:
                b_stat = tl.load(p_stat + o_i, mask=o_i < F, other=float("inf"))
                if MAP == "elu_exact":  # φ of a feature may be 0 for all keys
                    b_stat = tl.where(b_stat == float("-inf"), float("inf"), b_stat)
                b_t = tl.exp2(feature(b_a, MAP) - b_stat[None, :] - b_shift[:, None])
            else:
                b_x, b_inverse = feature(b_a, MAP), tl.load(p_grads + 2 * F + o_i, mask=o_i < F, other=0)
                b_t = b_x * (b_inverse * gain)[None, :]
            b_dv = tl.dot(b_t.to(T), b_r, b_dv, input_precision=PRECISION, out_dtype=ACC)
            b_da = tl.dot(b_v, b_rt, input_precision=PRECISION)
            if WIDTH == 16:
                if BLOCKS > 1:
                    b_least = tl.trans(load_columns(p_packed + 2 * E + 16, o_i, 2 * E + PACKED, F, 0))
                b_da = tl.dot(halves(b_inner * widest, T), b_least, b_da)
            else:
                b_da += b_rho[None, :] * (b_inner / unit)[:, None]
            if EXP and p_w is not None:
                b_da = b_da.to(T) * b_t.to(T)
                b_da1 = tl.dot(b_da, tl.full([BLOCK_F, 16], 1.0, T), b_da1, input_precision=PRECISION, out_dtype=ACC)
            elif EXP:
                b_da *= b_t * exponent_slope(b_a, MAP)
            elif MAP == "favor_relu":
                b_da = tl.where(b_a > 0, b_da, 0)
            else:
                b_da *= (b_inverse * reciprocal(top))[None, :] * slope(b_x, MAP)
            if p_w is not None:
                b_dk = tl.dot(b_da.to(T), b_w, b_dk, input_precision=PRECISION, out_dtype=ACC)
            elif p_dk is not None:
                b_da = tl.where(m_n[:, None], b_da * (b_outer * SCALE)[:, None], 0)
                store_tokens(p_dk, s_dk, o_n, m_all, b_da, o_i, D)
        if p_w is not None and p_dk is not None:
            if MAP != "favor_relu":
                b_dk -= (2 * HALF / 16 * tl.sum(b_da1, 1))[:, None] * b_k.to(ACC)
            store_tokens(p_dk, s_dk, o_n, m_all, tl.where(m_n[:, None], b_dk * b_outer[:, None], 0), o_d, D)
        if p_dv is not None:
            if EPS != 0:
                b_dv += b_r1[None, :] * gain
            b_dv = tl.where(m_n[:, None], b_dv * (unit / gain), 0)
            store_tokens(p_dv, s_dv, o_n, m_all, b_dv, o_e, E)


MAX_SPLITS = 128  # of a head's tokens: the second stage folds them one after another


def _width(size: int) -> int:
    """What a tile's dimension of this size takes: a power of two, at least tl.dot's 16."""
    return max(16, triton.next_power_of_2(size))


def _precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: float32 in one TF32 product only where the user's settings have PyTorch do so."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


class Skeleton:
    """The passes for one feature map and one size of head; each launches its kernels and returns what they write.

    Args:
        op: whose name errors have. feature_map: ``MAP`` of the module's docstring.
        like: an input: its dtype, device and channels D. value_dim: E.
        projection: W (F, D) in the accumulation dtype, or None.
        eps: favor's and favor_relu's constant, relu's share of the denominator; the other maps do not read it.
    """

    def __init__(
        self,
        op: str,
        feature_map: str,
        like: Tensor,
        value_dim: int,
        projection: Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        dim, exponential = like.shape[3], feature_map in ("favor", "exact", "softmax", "elu_exact")
        self.op, self.projection, self.acc = op, projection, accumulate_dtype(like.dtype)
        self.split: Tensor | None = None  # split_kernel's
        self.dtype, self.dim, self.value_dim, self.eps = like.dtype, dim, value_dim, eps
        self.features = dim if projection is None else projection.shape[0]
        self.arch = configs.architecture(like.device)
        scale = 1.0 if feature_map in ("elu", "elu_exact", "relu") else dim**-0.25
        log2e = math.log2(math.e)
        self.state_constants = {
            "E": value_dim,
            "F": self.features,
            "MAP": feature_map,
            "EXP": exponential,
            "EPS": eps if feature_map.startswith("favor") else 0.0,
        }
        self.constants = self.state_constants | {
            "D": dim,
            "SCALE": scale * log2e if exponential else scale,
            "HALF": log2e / (2 * math.sqrt(dim)),
            "PRECISION": _precision(like.dtype),
            "BLOCK_D": _width(dim),
            "BLOCK_E": _width(value_dim),
        }

    def _options(self, kernel: Any) -> dict[str, Any]:
        features = None if self.projection is None else self.features
        return configs.lookup(kernel.__name__, self.arch, max(self.dim, self.value_dim), features, self.dtype)

    def tiles(self, kernel: Any, tokens: int, partial: bool) -> tuple[dict[str, Any], int, int]:
        """(launch options, tokens of a run, runs). A run that leaves a state behind has at least as many bytes itself.

        They depend on the number of tokens and the table, not on the batch: the same bits alone or in any batch.
        """
        options = self._options(kernel)
        run = options.pop("TOKENS")
        if partial:
            state = self.features * self.value_dim * self.acc.itemsize
            run = max(run, -(-state // (max(self.dim, 1) * self.dtype.itemsize)), -(-tokens // MAX_SPLITS))
        run = -(-run // options["BLOCK_N"]) * options["BLOCK_N"]
        options["BLOCK_F"] = min(options["BLOCK_F"], _width(self.features))
        if self.projection is None:  # a block of features is one of channels
            options["BLOCK_D"] = options["BLOCK_F"]
        return self.constants | options, run, -(-tokens // run)

    def blocks(self, options: dict[str, Any]) -> int:
        return -(-self.features // options["BLOCK_F"])

    def _projection(self) -> tuple[int, int]:
        return (0, 0) if self.projection is None else self.projection.stride()

    def _split(self, blocks: int) -> tuple[Tensor | None, tuple[int, int]]:
        """W and its strides for a kernel that reads it in so many blocks for each tile of tokens."""
        if self.projection is None or blocks == 1 or self.dtype.itemsize != 2:
            return self.projection, self._projection()
        if self.split is None:
            self.split = self.projection.new_empty((2, *self.projection.shape), dtype=self.dtype)
            launch(
                self.op,
                split_kernel,
                (-(-self.projection.numel() // 1024),),
                self.projection,
                self.split,
                self._projection(),
                D=self.dim,
                F=self.features,
                SCALE=self.constants["SCALE"],
                BLOCK=1024,
                num_warps=4,
            )
        return self.split, (self.dim, 1)

    def _pack_state(self, state: Tensor, stat: Tensor, blocks: int) -> Tensor | None:
        """U for a kernel that reads it in so many blocks for each tile of tokens."""
        if blocks == 1:
            return None
        packed = state.new_empty((*state.shape[:2], self.features, self.value_dim + PACKED.value), dtype=self.dtype)
        launch(
            self.op,
            pack_state_kernel,
            (state.shape[0] * state.shape[1], -(-self.features // 16)),
            state,
            stat,
            packed,
            E=self.value_dim,
            F=self.features,
            MAP=self.constants["MAP"],
            BLOCK_E=self.constants["BLOCK_E"],
            BLOCK_F=16,
            num_warps=4,
        )
        return packed

    def key_sums(self, k: Tensor, v: Tensor | None, key_mask: Tensor | None) -> tuple[Tensor, Tensor, int]:
        """The first stage of the key pass: (sums (B·H, runs, F + 1, E), stats (B·H, runs, 2, F + 1), runs)."""
        options, run, runs = self.tiles(key_kernel, k.shape[2], partial=True)
        heads, rows = k.shape[0] * k.shape[1], self.features + 1
        sums = k.new_empty((heads, runs, rows, self.value_dim), dtype=self.acc)
        stats = sums.new_empty((heads, runs, 2, rows))
        launch(
            self.op,
            key_kernel,
            (heads * runs * self.blocks(options),),
            k,
            v,
            self.projection,
            key_mask,
            sums,
            stats,
            k.stride(),
            (0,) * 4 if v is None else v.stride(),
            self._projection(),
            (0, 0) if key_mask is None else key_mask.stride(),
            k.shape[1],
            k.shape[2],
            run,
            runs,
            **options,
        )
        return sums, stats, runs

    def key_pass(
        self, k: Tensor, v: Tensor, key_mask: Tensor | None, raw: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(state (B, H, F + 2, E), stat (B, H, 2 F + 1), favor's maximum (B, H)), or if raw kv_state's S and stat."""
        sums, stats, runs = self.key_sums(k, v, key_mask)
        heads = tuple(k.shape[:2])
        if raw:
            state = sums.new_empty((*heads, self.features, self.value_dim))
            stat = state.new_empty((*heads, self.features))
        else:
            state, stat = triton_state(k, self.features, self.value_dim)
        top = state.new_zeros(heads)
        options = self._options(state_kernel)
        width = min(options.pop("BLOCK_E"), _width(self.value_dim))
        launch(
            self.op,
            state_kernel,
            (heads[0] * heads[1], -(-self.value_dim // width)),
            sums,
            stats,
            state,
            stat,
            top,
            runs,
            RAW=raw,
            BLOCK_E=width,
            BLOCK_F=_width(self.features),
            **self.state_constants,
            **options,
        )
        return state, stat, top

    def query_pass(self, q: Tensor, state: Tensor, stat: Tensor) -> Tensor:
        """out (B, H, N, E)."""
        options, run, runs = self.tiles(query_kernel, q.shape[2], partial=False)
        out = like_layout(q, (*q.shape[:3], self.value_dim))
        blocks = self.blocks(options)
        projection, strides = self._split(blocks)
        launch(
            self.op,
            query_kernel,
            (q.shape[0] * q.shape[1] * runs,),
            q,
            projection,
            state,
            stat,
            self._pack_state(state, stat, blocks),
            out,
            q.stride(),
            strides,
            out.stride(),
            q.shape[1],
            q.shape[2],
            run,
            runs,
            BLOCKS=blocks,
            **(options | {"EPS": self.eps}),
        )
        return out

    def backward(
        self,
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        state: Tensor,
        stat: Tensor,
        top: Tensor,
        needed: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and dv as far as needed, else empty (0)."""
        grad_q, *grad = self.query_backward(grad_out, q, state, stat, needed[0], any(needed[1:]))
        if not any(needed[1:]):
            return grad_q, *new_gradients((k, v), needed[1:])
        return grad_q, *self.key_backward(k, v, key_mask, state[:, :, -2], stat, top, *grad, needed[1:])

    def query_backward(
        self, grad_out: Tensor, q: Tensor, state: Tensor, stat: Tensor, of_queries: bool, of_keys: bool
    ) -> tuple[Tensor, ...]:
        """dq if needed, else empty (0); and where the keys need it the state's gradient: R (B, H, F, E), and ρ, the
        largest |R| and 1/z of the features (B, H, 3, F)."""
        options, run, runs = self.tiles(query_backward_kernel, q.shape[2], partial=True)
        blocks, heads = self.blocks(options), q.shape[0] * q.shape[1]
        separate = options["SEPARATE"] or blocks > 1
        if separate or not of_keys:
            options, run, runs = self.tiles(query_backward_kernel, q.shape[2], partial=False)
        del options["SEPARATE"]
        [grad_q] = new_gradients((q,), [of_queries])
        rows = state.new_empty((heads, 3, q.shape[2])) if separate and of_keys else None
        sums, stats = self._query_sums(state, heads, runs) if of_keys and not separate else (None, None)
        projection, strides = self._split(blocks)
        sizes = (q.shape[1], q.shape[2])
        launch(
            self.op,
            query_backward_kernel,
            (heads * runs,),
            grad_out,
            q,
            projection,
            state,
            stat,
            self._pack_state(state, stat, blocks),
            grad_q if of_queries else None,
            rows,
            sums,
            stats,
            grad_out.stride(),
            q.stride(),
            strides,
            grad_q.stride() if of_queries else (0,) * 4,
            *sizes,
            run,
            runs,
            BLOCKS=blocks,
            **(options | {"EPS": self.eps}),
        )
        if not of_keys:
            return (grad_q,)
        if separate:
            options, run, runs = self.tiles(query_state_kernel, q.shape[2], partial=True)
            sums, stats = self._query_sums(state, heads, runs)
            launch(
                self.op,
                query_state_kernel,
                (heads * runs * self.blocks(options),),
                grad_out,
                q,
                self.projection,
                state,
                stat,
                rows,
                sums,
                stats,
                grad_out.stride(),
                q.stride(),
                self._projection(),
                *sizes,
                run,
                runs,
                **options,
            )
        return grad_q, *self._state_backward(sums, stats, runs, state, stat)

    def _query_sums(self, like: Tensor, heads: int, runs: int) -> tuple[Tensor, Tensor]:
        return (
            like.new_empty((heads, runs, self.features + 1, self.value_dim)),
            like.new_empty((heads, runs, self.features + 1)),
        )

    def _state_backward(
        self, sums: Tensor, stats: Tensor, runs: int, state: Tensor, stat: Tensor
    ) -> tuple[Tensor, Tensor]:
        grad = state.new_empty((*state.shape[:2], self.features, self.value_dim))
        grads = state.new_empty((*state.shape[:2], 3, self.features))
        options = self._options(state_backward_kernel)
        height = min(options.pop("BLOCK_F"), _width(self.features))
        launch(
            self.op,
            state_backward_kernel,
            (state.shape[0] * state.shape[1], -(-self.features // height)),
            sums,
            stats,
            state,
            stat,
            grad,
            grads,
            runs,
            BLOCK_E=_width(self.value_dim),
            BLOCK_F=height,
            **self.state_constants,
            **options,
        )
        return grad, grads

    def _pack_gradient(
        self, grad: Tensor, grads: Tensor, stat: Tensor, top: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """R and ρ for a kernel that reads them in several blocks for each tile of tokens."""
        packed = grad.new_empty((*grad.shape[:2], self.features, 2 * self.value_dim + PACKED.value), dtype=self.dtype)
        rho = grad.new_empty((*grad.shape[:2], self.features + self.value_dim))
        height = min(32, options["BLOCK_F"])
        launch(
            self.op,
            pack_gradient_kernel,
            (grad.shape[0] * grad.shape[1],),
            grad,
            grads,
            stat,
            top,
            packed,
            rho,
            stat.stride(1),
            BLOCK_E=options["BLOCK_E"],
            BLOCK_F=height,
            BLOCKS=-(-self.features // height),
            BLOCK_ALL=_width(self.features),
            **self.state_constants,
            num_warps=4,
        )
        return packed, rho

    def key_backward(
        self,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        mean: Tensor | None,
        stat: Tensor,
        top: Tensor,
        grad: Tensor,
        grads: Tensor,
        needed: list[bool],
    ) -> tuple[Tensor, Tensor]:
        """dk and dv as far as needed, else empty (0). ``mean``: c̄ (B, H, E), or None for 0."""
        options, run, runs = self.tiles(key_backward_kernel, k.shape[2], partial=False)
        grad_k, grad_v = new_gradients((k, v), needed)
        of_keys, of_values = needed
        blocks = self.blocks(options)
        projection, strides = self._split(blocks)
        packed, rho = self._pack_gradient(grad, grads, stat, top, options) if blocks > 1 else (None, None)
        launch(
            self.op,
            key_backward_kernel,
            (k.shape[0] * k.shape[1] * runs,),
            k,
            v,
            projection,
            key_mask,
            mean,
            stat,
            top,
            grad,
            grads,
            packed,
            rho,
            grad_k if of_keys else None,
            grad_v if of_values else None,
            k.stride(),
            v.stride(),
            strides,
            (0, 0) if key_mask is None else key_mask.stride(),
            0 if mean is None else mean.stride(1),
            stat.stride(1),
            grad_k.stride() if of_keys else (0,) * 4,
            grad_v.stride() if of_values else (0,) * 4,
            k.shape[1],
            k.shape[2],
            run,
            runs,
            BLOCKS=blocks,
            BLOCK_ALL=_width(self.features),
            **options,
        )
        return grad_k, grad_v


def _skeleton(feature_map, q, v, eps):
    return Skeleton("linear_attention", "elu_exact" if feature_map == "elu" else feature_map, q, v.shape[3], eps=eps)


def linear_attention_forward(q, k, v, key_mask, feature_map, eps):
    skeleton = _skeleton(feature_map, q, v, eps)
    state, stat, _ = skeleton.key_pass(k, v, key_mask)
    return skeleton.query_pass(q, state, stat), state, stat


def linear_attention_backward(grad_out, q, k, v, key_mask, state, key_stat, feature_map, eps, needed):
    skeleton = _skeleton(feature_map, q, v, eps)
    return skeleton.backward(grad_out, q, k, v, key_mask, state, key_stat, key_stat, needed)


def kv_state_forward(k, v, key_mask, feature_map):
    return Skeleton("kv_state", feature_map, k, v.shape[3]).key_pass(k, v, key_mask, raw=True)[:2]


def kv_state_backward(grad_state, grad_z, k, v, key_mask, key_stat, feature_map, needed):
    if feature_map != "softmax":  # the kernel divides by z, so that its weights are at most 1
        grad_state, grad_z = grad_state * key_stat[..., None], grad_z * key_stat
    inverse = torch.where(key_stat > TINY.value, key_stat.reciprocal(), 0)
    grads = torch.stack([grad_z, grad_state.abs().amax(dim=-1), inverse], dim=2)
    skeleton = Skeleton("kv_state", feature_map, k, v.shape[3])
    return skeleton.key_backward(k, v, key_mask, None, key_stat, key_stat, grad_state.contiguous(), grads, needed)
