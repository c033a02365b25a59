"""key_pass, reduce and query_pass: the kernels of the forward pass.

Tensors, beside state and stat (primitives.py):

- q, k (B, H, N, D), v, out (B, H, N, E), w (F, D) or None, mask (B, N) or None.
- sums (B·H, SPLITS, F + 1, E): Σ e v; Σ v. stats (B·H, SPLITS, 2, F + 1): the maximum; Σ e, and the number of tokens.
- key_max (B·H): favor's maximum, in base 2.
- packed_state (B·H, F, E + 32), where features come in several blocks, or None: the results of state_operands.
"""

import triton
import triton.language as tl

from .primitives import (
    E_RANGE,
    HALF_RANGE,
    PACKED,
    W_RANGE,
    block_index,
    feature,
    half_norm,
    head_ptr,
    head_state,
    hi_lo_factors,
    init_max,
    load_channels,
    load_columns,
    load_projection,
    load_tokens,
    power_below,
    project,
    project_transposed,
    reciprocal,
    rescale,
    split_hi_lo,
    store_tokens,
    sum_columns,
    visible_keys,
)


@triton.jit
def key_pass(k_ptr, v_ptr, w_ptr, mask_ptr, sums_ptr, stats_ptr, strides, sizes, P: tl.constexpr):
    """Sum the keys of a split for a block of features, each relative to its own maximum. No v: maxima alone."""
    k_strides, v_strides, w_strides, mask_strides = strides
    H, N, TOKENS, SPLITS = sizes
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    T: tl.constexpr = ACC if P.WIDE else k_ptr.dtype.element_ty
    i_split, i_f = block_index(P)
    i_bh, i_s = i_split // SPLITS, i_split % SPLITS
    o_f = i_f * P.BLOCK_F + tl.arange(0, P.BLOCK_F)
    o_d, o_e = o_f if w_ptr is None else tl.arange(0, P.BLOCK_D), tl.arange(0, P.BLOCK_E)
    k_ptr = head_ptr(k_ptr, k_strides, i_bh, H)
    if v_ptr is not None:
        v_ptr = head_ptr(v_ptr, v_strides, i_bh, H)
    b_w, b_wt, b_w_lo = load_projection(w_ptr, w_strides, o_f, P, T)
    WIDTH: tl.constexpr = 16 if T.primitive_bitwidth == 16 and w_ptr is not None else 1
    running_max = init_max(P.BLOCK_F, P, ACC)
    b_z = tl.zeros([P.BLOCK_F, WIDTH], ACC)
    b_s = tl.zeros([P.BLOCK_F, P.BLOCK_E], ACC)
    b_v1 = tl.zeros([P.BLOCK_N, P.BLOCK_E], ACC)
    b_n = tl.zeros([P.BLOCK_N], ACC)
    end = tl.minimum((i_s + 1) * TOKENS, N)
    for i_n in range(i_s * TOKENS, end, P.BLOCK_N):
        o_n = i_n + tl.arange(0, P.BLOCK_N).to(tl.int64)
        m_n = visible_keys(mask_ptr, mask_strides, i_bh // H, o_n, o_n < end)
        if mask_ptr is not None:
            b_k = load_tokens(k_ptr, k_strides, o_n, m_n, o_d, P.D)  # [BN, BD]
        else:  # past the end the last token again, which moves no maximum
            b_k = load_tokens(k_ptr, k_strides, tl.minimum(o_n, end - 1), o_n >= 0, o_d, P.D)
        b_a = project_transposed(b_k, w_ptr, b_w, b_w_lo, P, ACC)  # [BF, BN]
        if P.MINUS_NORM:
            b_h = tl.where(m_n, half_norm(b_k, P, ACC), float("inf"))  # [BN]
        if P.MAP == "exact":
            b_a -= b_h[None, :]
        b_x = feature(b_a, P)
        if mask_ptr is not None and P.MAP != "exact":
            b_x = tl.where(m_n[None, :], b_x, float("-inf") if P.EXP else 0.0)
        new_max = tl.maximum(running_max, tl.max(b_x, 1))
        b_correction = rescale(running_max, new_max, P)
        if P.MAP == "favor":
            b_x -= b_h[None, :]
        if v_ptr is not None:
            b_e = rescale(b_x, new_max[:, None], P)
            b_v = load_tokens(v_ptr, v_strides, o_n, m_n, o_e, P.E).to(T)  # [BN, BE]
            if not P.MINUS_NORM and mask_ptr is None:  # past the end: elsewhere their values are zeros
                b_one = m_n.to(ACC)
            else:
                b_one = tl.full([P.BLOCK_N], 1.0, ACC)
            b_z, b_s = add_key_sums(b_z, b_s, b_e, b_one, b_v, b_correction[:, None], P)
            if P.EPS != 0:
                b_v1 += b_v.to(ACC)
                b_n += m_n.to(ACC)
        running_max = new_max
    i_row = i_split.to(tl.int64) * (P.F + 1)
    tl.store(stats_ptr + i_row * 2 + o_f, running_max, mask=o_f < P.F)
    if v_ptr is not None:
        m_e = o_e < P.E
        tl.store(stats_ptr + i_row * 2 + P.F + 1 + o_f, tl.sum(b_z, 1) / WIDTH, mask=o_f < P.F)
        p = sums_ptr + i_row * P.E
        tl.store(p + o_f[:, None] * P.E + o_e[None, :], b_s, mask=(o_f < P.F)[:, None] & m_e[None, :])
        if P.EPS != 0 and i_f == 0:
            tl.store(p + P.F * P.E + o_e, tl.sum(b_v1, 0), mask=m_e)
            tl.store(stats_ptr + i_row * 2 + 2 * P.F + 1, tl.sum(b_n, 0))


@triton.jit
def add_key_sums(b_z, b_s, b_e, b_one, b_v, b_correction, P: tl.constexpr):
    """Add Σ e and Σ e v of a tile to z and S, which are multiplied by the correction [BLOCK_F, 1] of their maximum."""
    ACC: tl.constexpr = b_s.dtype
    T: tl.constexpr = b_v.dtype
    if b_z.shape[1] == 16:  # Hopper's products of a stage wait for one another if one adds to what was scaled in it
        b_add = tl.dot(b_e.to(T), tl.broadcast_to(b_one.to(T)[:, None], [P.BLOCK_N, 16]))
        b_z = tl.fma(b_z, tl.broadcast_to(b_correction, b_z.shape), b_add)
        b_s = tl.fma(b_s, tl.broadcast_to(b_correction, b_s.shape), tl.dot(b_e.to(T), b_v))
    else:
        b_z = b_z * b_correction + tl.sum(b_e * b_one[None, :], 1)[:, None]
        b_s = tl.dot(b_e.to(T), b_v, b_s * b_correction, input_precision=P.PRECISION, out_dtype=ACC)
    return b_z, b_s


@triton.jit
def add_splits(sums_ptr, stats_ptr, i_bh, o_f, o_e, SPLITS, P: tl.constexpr):
    """The maximum, z, S, Σ v and the number of tokens of a head: its splits, added in their order."""
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    m_f, m_e = o_f < P.F, o_e < P.E
    m_fe = m_f[:, None] & m_e[None, :]
    running_max = init_max(P.BLOCK_F, P, ACC)
    b_z = tl.zeros([P.BLOCK_F], ACC)
    b_s = tl.zeros([P.BLOCK_F, P.BLOCK_E], ACC)
    b_v1 = tl.zeros([P.BLOCK_E], ACC)
    b_n = tl.sum(tl.zeros([P.BLOCK_E], ACC), 0)
    for i_s in range(SPLITS):
        i_row = (i_bh * SPLITS + i_s) * (P.F + 1)
        b_split = tl.load(stats_ptr + i_row * 2 + o_f, mask=m_f, other=float("-inf") if P.EXP else 0.0)
        new_max = tl.maximum(running_max, b_split)
        b_old, b_add = rescale(running_max, new_max, P), rescale(b_split, new_max, P)
        b_z = b_z * b_old + tl.load(stats_ptr + i_row * 2 + P.F + 1 + o_f, mask=m_f, other=0) * b_add
        p = sums_ptr + i_row * P.E + o_e
        b_split = tl.load(p[None, :] + o_f[:, None] * P.E, mask=m_fe, other=0)
        b_s = b_s * b_old[:, None] + b_split * b_add[:, None]
        if P.EPS != 0:
            b_v1 += tl.load(p + P.F * P.E, mask=m_e, other=0)
            b_n += tl.load(stats_ptr + i_row * 2 + 2 * P.F + 1)
        running_max = new_max
    return running_max, b_z, b_s, b_v1, b_n


@triton.jit
def reduce(sums_ptr, stats_ptr, state_ptr, stat_ptr, key_max_ptr, SPLITS, P: tl.constexpr):
    """Turn the sums of a head's splits into its state and stat, for a block of columns.

    RAW: state (B·H, F, E) and stat (B·H, F) are S and z themselves, for softmax S/z and log2 z.
    """
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    i_bh, i_e = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_f, o_e = tl.arange(0, P.BLOCK_F), i_e * P.BLOCK_E + tl.arange(0, P.BLOCK_E)
    m_f, m_e = o_f < P.F, o_e < P.E
    m_fe = m_f[:, None] & m_e[None, :]
    running_max, b_z, b_s, b_v1, b_n = add_splits(sums_ptr, stats_ptr, i_bh, o_f, o_e, SPLITS, P)
    if P.MAP == "favor":
        head_max = tl.max(running_max, 0)
        head_max = tl.where(head_max == float("-inf"), 0, head_max)
        b_scale = tl.exp2(running_max - head_max)
        running_max = tl.zeros([P.BLOCK_F], ACC) + head_max
        if i_e == 0:
            tl.store(key_max_ptr + i_bh, head_max)
    elif P.EXP:
        b_scale = tl.full([P.BLOCK_F], 1.0, ACC)
    else:
        b_scale = running_max
    b_z, b_s = b_z * b_scale, b_s * b_scale[:, None]
    if P.EPS != 0:
        b_z += P.EPS * b_n
        b_s += (P.EPS * b_v1)[None, :]
    b_mean = b_s * reciprocal(b_z)[:, None]
    if P.EXP:
        b_log = tl.where(m_f, running_max + tl.log2(b_z), float("-inf"))
        if P.RAW:
            b_s = b_mean
        head_max = tl.max(b_log, 0)
        b_z = rescale(b_log, head_max, P)
    else:
        b_log = tl.where(m_f, b_z, 0)
        b_z = b_log
    if P.RAW:
        tl.store(state_ptr + i_bh * P.F * P.E + o_f[:, None] * P.E + o_e[None, :], b_s, mask=m_fe)
        if i_e == 0:
            tl.store(stat_ptr + i_bh * P.F + o_f, b_log, mask=m_f)
    else:
        total = tl.sum(b_z, 0)
        b_c = tl.sum(b_mean * b_z[:, None], 0) * reciprocal(total)  # [BE]
        # z of an exponential, relative to the largest, may underflow: the feature counts nevertheless
        b_any = b_log > float("-inf") if P.EXP else b_z > 0
        b_u = tl.where((b_any | (b_log != b_log))[:, None], b_mean - b_c[None, :], 0)
        p = state_ptr + i_bh * (P.F + 2) * P.E + o_e
        tl.store(p[None, :] + o_f[:, None] * P.E, b_u, mask=m_fe)
        tl.store(p + P.F * P.E, b_c, mask=m_e)
        tl.store(p + (P.F + 1) * P.E, tl.max(tl.abs(b_u), 0), mask=m_e)
        if i_e == 0:
            stat_ptr += i_bh * (2 * P.F + 1)
            b_weight = b_z * (W_RANGE * reciprocal(total))
            if P.MAP == "exact" or P.MAP == "elu_exact":
                b_weight = b_log
            elif P.MAP == "softmax":
                b_weight = tl.zeros([P.BLOCK_F], ACC)
            tl.store(stat_ptr + o_f, b_log, mask=m_f)
            tl.store(stat_ptr + P.F, head_max + tl.log2(total) if P.EXP else total)
            tl.store(stat_ptr + P.F + 1 + o_f, b_weight, mask=m_f)


@triton.jit
def load_weights(stat_ptr, o_f, P: tl.constexpr):
    """Load the features' weights for a query [BLOCK_F]. Load them at each use: over a loop, they cost registers."""
    none = float("-inf") if P.LOG_WEIGHTS else 0.0
    return tl.load(stat_ptr + P.F + 1 + o_f, mask=o_f < P.F, other=none)


@triton.jit
def weight_factor(b_z, P: tl.constexpr):
    """The factor of e in a result of load_weights."""
    if P.LOG_WEIGHTS:
        return tl.full(b_z.shape, 1.0, b_z.dtype)
    else:
        return b_z


@triton.jit
def state_unit(state_ptr, P: tl.constexpr):
    """The power of two by which U is divided to fit T."""
    o_e = tl.arange(0, P.BLOCK_E)
    return power_below(tl.max(tl.load(state_ptr + (P.F + 1) * P.E + o_e, mask=o_e < P.E, other=0), 0))


@triton.jit
def state_operands(state_ptr, stat_ptr, o_f, unit, P: tl.constexpr, T: tl.constexpr):
    """Operands of a block of features in T: U / unit [BLOCK_F, BLOCK_E], times the weights of the features if they are
    factors; split_hi_lo of the weights; hi_lo_factors of the negative weights.
    """
    o_e = tl.arange(0, P.BLOCK_E)
    mask = (o_f < P.F)[:, None] & (o_e < P.E)[None, :]
    b_u = tl.load(state_ptr + o_f[:, None] * P.E + o_e[None, :], mask=mask, other=0) / unit
    b_z = load_weights(stat_ptr, o_f, P)
    if not P.LOG_WEIGHTS:
        b_u *= b_z[:, None]
    b_z = weight_factor(b_z, P)
    return b_u.to(T), split_hi_lo(b_z, T), hi_lo_factors(-b_z, T)


@triton.jit
def pack_state(state_ptr, stat_ptr, packed_state_ptr, P: tl.constexpr):
    """Do the work of state_operands once: with several blocks of features, each tile of tokens would repeat it."""
    i_bh = tl.program_id(0)
    packed_state_ptr += i_bh.to(tl.int64) * P.F * (P.E + PACKED)
    state_ptr, stat_ptr = head_state(state_ptr, stat_ptr, i_bh, P)
    o_f, o_e, o_c = tl.program_id(1) * P.BLOCK_F + tl.arange(0, P.BLOCK_F), tl.arange(0, P.BLOCK_E), tl.arange(0, 16)
    m_f = (o_f < P.F)[:, None]
    T: tl.constexpr = packed_state_ptr.dtype.element_ty
    b_u, b_weights, b_minus_w = state_operands(state_ptr, stat_ptr, o_f, state_unit(state_ptr, P), P, T)
    p = packed_state_ptr + o_f[:, None] * (P.E + PACKED)
    tl.store(p + o_e[None, :], b_u, mask=m_f & (o_e < P.E)[None, :])
    if not P.LOG_WEIGHTS:
        tl.store(p + P.E + o_c[None, :], b_weights, mask=m_f)
        tl.store(p + P.E + 16 + o_c[None, :], b_minus_w, mask=m_f)


@triton.jit
def query_scores(b_q, b_wt, b_w_lo, b_z, P: tl.constexpr, ACC: tl.constexpr):
    """φ without its constant, for an exponential the exponent [BLOCK_N, BLOCK_F]: the row's maximum is taken of it."""
    if P.MAP == "softmax" or P.MAP == "elu_exact" or P.MAP == "relu":
        b_a = b_q.to(ACC) * P.SCALE
    else:
        b_a = project(b_q, b_wt, b_w_lo, P)
    if P.LOG_WEIGHTS:
        return feature(b_a, P) + b_z[None, :]
    else:
        return feature(b_a, P)


@triton.jit
def query_terms(b_x, running_max, P: tl.constexpr):
    """e, relative to the row's maximum."""
    if P.LOG_WEIGHTS:
        return rescale(b_x, running_max[:, None], P)
    elif P.EXP:
        b_base = tl.where(running_max == float("-inf"), 0, running_max) - 7  # log2 of E_RANGE
        return tl.exp2(b_x - b_base[:, None])
    else:
        return b_x * (reciprocal(running_max) * E_RANGE)[:, None]


@triton.jit
def add_denominator(b_den, b_e, b_z, b_weights, P: tl.constexpr):
    """Add a block of features to b_den: 8 Σ e w by a product [BLOCK_N, 16], or Σ e w [BLOCK_N, 1]."""
    if b_den.shape[1] == 16:
        return tl.dot(b_e.to(b_weights.dtype), b_weights, b_den)
    else:
        return b_den + tl.sum(b_e * weight_factor(b_z, P)[None, :], 1)[:, None]


@triton.jit
def query_rows(b_q, running_max, b_den, stat_ptr, P: tl.constexpr):
    """(r, the reciprocal denominator) with p = e·r, and Σ p over the features with their constants. [BLOCK_N]"""
    ACC: tl.constexpr = b_den.dtype
    if P.MAP == "favor":
        b_factor = tl.exp2(-half_norm(b_q, P, ACC))
    elif P.LOG_WEIGHTS:
        b_factor = tl.full(b_den.shape, 1.0, ACC)
    else:
        b_factor = running_max
    b_floor = tl.full(b_den.shape, P.EPS, ACC) * HALF_RANGE
    if P.MAP == "relu":
        b_floor *= reciprocal(tl.load(stat_ptr + P.F))
    elif not P.PLUS_EPS:
        b_floor = tl.zeros(b_den.shape, ACC)
    b_inverse = reciprocal(b_factor * b_den + b_floor)
    b_r = b_factor * b_inverse
    if P.PLUS_EPS and P.EPS != 0:
        return b_r, b_inverse, tl.full(b_den.shape, 1.0, ACC)
    else:
        return b_r, b_inverse, b_r * b_den


@triton.jit
def load_query_operands(pointers, o_f, unit, P: tl.constexpr, T: tl.constexpr):
    """What the sweeps over the features read for a block: W, its transpose and lo; U / unit and its transpose; the
    columns of the weights; the factors of the negative weights, transposed.

    ``pointers`` of a head: q_ptr, q_strides, w_ptr, w_strides, state_ptr, stat_ptr, packed_state_ptr.
    """
    q_ptr, q_strides, w_ptr, w_strides, state_ptr, stat_ptr, packed_state_ptr = pointers
    b_w, b_wt, b_w_lo = load_projection(w_ptr, w_strides, o_f, P, T)
    b_u, b_weights, b_minus_w = state_operands(state_ptr, stat_ptr, o_f, unit, P, T)
    if packed_state_ptr is not None:  # the compiler removes what is loaded twice
        STRIDE: tl.constexpr = P.E + PACKED
        o_e = tl.arange(0, P.BLOCK_E)
        mask = (o_f < P.F)[:, None] & (o_e < P.E)[None, :]
        b_u = tl.load(packed_state_ptr + o_f[:, None] * STRIDE + o_e[None, :], mask=mask, other=0)
        if not P.LOG_WEIGHTS:
            b_weights = load_columns(packed_state_ptr + P.E, o_f, STRIDE, P, 0)
            b_minus_w = load_columns(packed_state_ptr + P.E + 16, o_f, STRIDE, P, 0)
    return b_w, b_wt, b_w_lo, b_u, tl.trans(b_u), b_weights, tl.trans(b_minus_w)


@triton.jit
def sweep_features(pointers, tile, operands, unit, P: tl.constexpr, T: tl.constexpr):
    """Sum over the features for a tile of queries (o_n, m_n, b_q), relative to the running maximum of each row.

    Returns the maximum [BLOCK_N], b_den of add_denominator, Σ e U / unit [BLOCK_N, BLOCK_E], and e of the last block.
    """
    q_ptr, q_strides, w_ptr, w_strides, state_ptr, stat_ptr, packed_state_ptr = pointers
    ACC: tl.constexpr = stat_ptr.dtype.element_ty
    WIDTH: tl.constexpr = 16 if T.primitive_bitwidth == 16 and w_ptr is not None else 1
    running_max = init_max(P.BLOCK_N, P, ACC)
    b_den = tl.zeros([P.BLOCK_N, WIDTH], ACC)
    b_o = tl.zeros([P.BLOCK_N, P.BLOCK_E], ACC)
    b_e = tl.zeros([P.BLOCK_N, P.BLOCK_F], T if WIDTH == 16 else ACC)
    for i_f in range(P.BLOCKS):
        o_f = i_f * P.BLOCK_F + tl.arange(0, P.BLOCK_F)
        if P.BLOCKS > 1:
            operands = load_query_operands(pointers, o_f, unit, P, T)
        b_w, b_wt, b_w_lo, b_u, b_ut, b_weights, b_minus_w = operands
        b_z = load_weights(stat_ptr, o_f, P)
        b_x = query_scores(load_channels(q_ptr, w_ptr, q_strides, tile, o_f, P), b_wt, b_w_lo, b_z, P, ACC)
        new_max = tl.maximum(running_max, tl.max(b_x, 1))
        b_e = query_terms(b_x, new_max, P)
        if WIDTH == 16:
            b_e = b_e.to(T)
        if P.BLOCKS > 1:
            b_correction = rescale(running_max, new_max, P)[:, None]
            b_den *= b_correction
            b_o *= b_correction
        b_den = add_denominator(b_den, b_e, b_z, b_weights, P)
        b_o = tl.dot(b_e.to(T), b_u, b_o, input_precision=P.PRECISION, out_dtype=ACC)
        running_max = new_max
    return running_max, b_den, b_o, b_e


@triton.jit
def query_pass(q_ptr, w_ptr, state_ptr, stat_ptr, packed_state_ptr, out_ptr, strides, sizes, P: tl.constexpr):
    """out = c̄·Σp + p·U for the queries of a split."""
    q_strides, w_strides, out_strides = strides
    H, N, TOKENS, SPLITS = sizes
    T: tl.constexpr = q_ptr.dtype.element_ty
    i_bh, i_s = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    q_ptr, out_ptr = head_ptr(q_ptr, q_strides, i_bh, H), head_ptr(out_ptr, out_strides, i_bh, H)
    state_ptr, stat_ptr = head_state(state_ptr, stat_ptr, i_bh, P)
    if packed_state_ptr is not None:
        packed_state_ptr += i_bh.to(tl.int64) * P.F * (P.E + PACKED)
    pointers = (q_ptr, q_strides, w_ptr, w_strides, state_ptr, stat_ptr, packed_state_ptr)
    o_d, o_e = tl.arange(0, P.BLOCK_D), tl.arange(0, P.BLOCK_E)
    b_c = tl.load(state_ptr + P.F * P.E + o_e, mask=o_e < P.E, other=0)
    unit = state_unit(state_ptr, P)
    operands = load_query_operands(pointers, tl.arange(0, P.BLOCK_F), unit, P, T)
    end = tl.minimum((i_s + 1) * TOKENS, N)
    for i_n in range(i_s * TOKENS, end, P.BLOCK_N):
        o_n = i_n + tl.arange(0, P.BLOCK_N).to(tl.int64)
        m_n = o_n < end
        b_q = load_tokens(q_ptr, q_strides, o_n, m_n, o_d, P.D)
        running_max, b_den, b_o, b_e = sweep_features(pointers, (o_n, m_n, b_q), operands, unit, P, T)
        b_r, b_inverse, b_sum = query_rows(b_q, running_max, sum_columns(b_den), stat_ptr, P)
        b_o = b_c[None, :] * b_sum[:, None] + b_o * (b_r * unit)[:, None]
        store_tokens(out_ptr, out_strides, o_n, m_n, b_o, o_e, P.E)
