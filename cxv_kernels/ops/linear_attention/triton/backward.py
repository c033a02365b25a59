"""query_backward, with its sums and their reduction, and key_backward: the kernels of the backward pass.

Tensors, beside those of forward.py:

- rows (B·H, 3, N): of each query row_factor, the reciprocal denominator and δ.
- sums (B·H, SPLITS, F + 1, E): Σ p dO; Σ dO/den. stats (B·H, SPLITS, F + 1): Σ p δ; Σ δ/den.
- grad_state (B·H, F, E): R_m = Σ p dO. grad_stats (B·H, 3, F): ρ_m; the largest |R_m|; 1/z_m, unless EXP.
- packed_grad (B·H, F, 2 E + 32), where features come in several blocks: the matrices of
  gradient_operands. packed_rho (B·H, F + E): its ρ; EPS Σ R_m/z_m.
"""

import triton
import triton.language as tl

from .forward import (
    load_query_operands,
    load_weights,
    query_rows,
    query_scores,
    query_terms,
    state_unit,
    sweep_features,
    weight_factor,
)
from .primitives import (
    E_RANGE,
    HALF_RANGE,
    PACKED,
    block_index,
    exponent_grad,
    feature,
    feature_grad,
    half_norm,
    head_ptr,
    head_state,
    hi_lo_factors,
    load_channels,
    load_columns,
    load_projection,
    load_tokens,
    power_below,
    project,
    project_transposed,
    reciprocal,
    split_hi_lo,
    store_tokens,
    sum_columns,
    visible_keys,
)


@triton.jit
def query_backward(
    grad_out_ptr,  # (B, H, N, E)
    q_ptr,  # (B, H, N, D)
    w_ptr,  # (F, D) or None
    state_ptr,
    stat_ptr,
    packed_state_ptr,
    grad_q_ptr,  # (B, H, N, D), or None: not needed
    rows_ptr,  # input of query_backward_sums, or None
    sums_ptr,  # None: not needed, or left to query_backward_sums
    stats_ptr,
    strides,
    sizes,
    P: tl.constexpr,
):
    """The gradient of the queries of a split, and either the rows that query_backward_sums reads or, where all features
    fit one block, the split's sums for the state's gradient: half the traffic, but more registers.
    """
    grad_out_strides, q_strides, w_strides, grad_q_strides = strides
    H, N, TOKENS, SPLITS = sizes
    ACC: tl.constexpr = stat_ptr.dtype.element_ty
    T: tl.constexpr = q_ptr.dtype.element_ty
    i_bh, i_s = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    q_ptr, grad_out_ptr = head_ptr(q_ptr, q_strides, i_bh, H), head_ptr(grad_out_ptr, grad_out_strides, i_bh, H)
    if grad_q_ptr is not None:
        grad_q_ptr = head_ptr(grad_q_ptr, grad_q_strides, i_bh, H)
    state_ptr, stat_ptr = head_state(state_ptr, stat_ptr, i_bh, P)
    if packed_state_ptr is not None:
        packed_state_ptr += i_bh.to(tl.int64) * P.F * (P.E + PACKED)
    pointers = (q_ptr, q_strides, w_ptr, w_strides, state_ptr, stat_ptr, packed_state_ptr)
    o_d, o_e, o_f = tl.arange(0, P.BLOCK_D), tl.arange(0, P.BLOCK_E), tl.arange(0, P.BLOCK_F)
    b_c = tl.load(state_ptr + P.F * P.E + o_e, mask=o_e < P.E, other=0)
    unit = state_unit(state_ptr, P)
    operands = load_query_operands(pointers, o_f, unit, P, T)
    b_w, b_wt, b_w_lo, b_u, b_ut, b_weights, b_minus_w = operands
    sums = init_query_sums(P, T, ACC)
    end = tl.minimum((i_s + 1) * TOKENS, N)
    for i_n in range(i_s * TOKENS, end, P.BLOCK_N):
        o_n = i_n + tl.arange(0, P.BLOCK_N).to(tl.int64)
        m_n = o_n < end
        b_q = load_tokens(q_ptr, q_strides, o_n, m_n, o_d, P.D)
        b_do = load_tokens(grad_out_ptr, grad_out_strides, o_n, m_n, o_e, P.E)
        # |G − δ| ≤ 4 Σ|dO| in units of U: a row so divided fits float16
        b_bound = 4 * tl.sum(tl.abs(b_do.to(ACC)), 1)
        b_row = (b_do.to(ACC) * reciprocal(b_bound)[:, None]).to(T)
        b_z = load_weights(stat_ptr, o_f, P)  # before the stores: then the compiler loads them once
        tile = (o_n, m_n, b_q)
        running_max, b_den, b_o, b_e = sweep_features(pointers, tile, operands, unit, P, T)
        b_den1 = sum_columns(b_den)
        if b_den.shape[1] == 16 or P.BLOCKS > 1:  # Σ e G by the other association
            b_eg = tl.sum(b_o * b_row.to(ACC), 1)
        else:
            b_eg = tl.sum(b_e * tl.dot(b_row, b_ut, input_precision=P.PRECISION), 1)
        b_r, b_inverse, b_sum = query_rows(b_q, running_max, b_den1, stat_ptr, P)
        b_delta = b_eg * b_r  # in units of U and of the bound
        if P.MAP == "relu":
            b_delta += (b_sum - 1) / unit * tl.sum(b_row.to(ACC) * b_c[None, :], 1)
        if grad_q_ptr is not None:
            b_outer = (0.6931471805599453 if P.EXP else E_RANGE) * unit * b_bound * (b_r if P.EXP else b_inverse)
            rows = (running_max, b_row, b_delta, b_eg - b_delta * b_den1, b_outer)
            store_query_gradient(grad_q_ptr, grad_q_strides, pointers, tile, rows, operands, b_e, unit, P, T)
        b_delta *= b_bound
        if rows_ptr is not None:
            store_rows(rows_ptr + i_bh.to(tl.int64) * 3 * N + o_n, N, m_n, running_max, b_r, b_inverse, b_delta, P)
        if sums_ptr is not None:
            b_p = b_e * (b_r * HALF_RANGE)[:, None]
            if not P.LOG_WEIGHTS:
                b_p *= b_z[None, :]
            sums = add_query_sums(sums, tl.trans(b_p.to(T)), b_do, b_delta, b_inverse, m_n, P)
    if sums_ptr is not None:
        store_query_sums(sums_ptr, stats_ptr, tl.program_id(0), o_f, True, unit, sums, P)


@triton.jit
def store_query_gradient(
    grad_q_ptr, grad_q_strides, pointers, tile, rows, operands, b_e, unit, P: tl.constexpr, T: tl.constexpr
):
    """Store dq of a tile: the sum of da W over the features, or da itself without W.

    ``rows``: the maximum; dO divided by its bound; δ; Σ da; what multiplies the result. ``b_e``: e, unless the features
    come in several blocks.
    """
    q_ptr, q_strides, w_ptr, w_strides, state_ptr, stat_ptr, packed_state_ptr = pointers
    o_n, m_n, b_q = tile
    running_max, b_row, b_delta, b_da1, b_outer = rows
    ACC: tl.constexpr = stat_ptr.dtype.element_ty
    b_dq = tl.zeros([P.BLOCK_N, P.BLOCK_D], ACC)
    for i_f in range(P.BLOCKS):
        o_f = i_f * P.BLOCK_F + tl.arange(0, P.BLOCK_F)
        if P.BLOCKS > 1:
            operands = load_query_operands(pointers, o_f, unit, P, T)
        b_w, b_wt, b_w_lo, b_u, b_ut, b_weights, b_minus_w = operands
        b_z = load_weights(stat_ptr, o_f, P)
        b_x = load_channels(q_ptr, w_ptr, q_strides, tile, o_f, P)
        if P.BLOCKS > 1:
            b_term = query_terms(query_scores(b_x, b_wt, b_w_lo, b_z, P, ACC), running_max, P)
        else:
            b_term = b_e
        b_da = tl.dot(b_row, b_ut, input_precision=P.PRECISION)  # G [BN, BF]
        if T.primitive_bitwidth == 16 and w_ptr is not None:
            b_da = tl.dot(split_hi_lo(b_delta, T), b_minus_w, b_da)
        else:
            b_da -= b_delta[:, None] * weight_factor(b_z, P)[None, :]
        if P.EXP and w_ptr is not None:
            b_da = b_da.to(T) * b_term.to(T)
        elif P.EXP:
            b_da *= b_term * exponent_grad(b_x.to(ACC) * P.SCALE, P)
        else:  # e is φ times a row's factor
            b_da *= feature_grad(b_term, P)
        if w_ptr is not None:
            b_dq = tl.dot(b_da.to(T), b_w, b_dq, input_precision=P.PRECISION, out_dtype=ACC)
        else:
            store_tokens(grad_q_ptr, grad_q_strides, o_n, m_n, b_da * (b_outer * P.SCALE)[:, None], o_f, P.D)
    if w_ptr is not None:
        if P.MAP == "favor":  # less the sum of da; exact's is 0
            b_dq -= (2 * P.HALF * b_da1)[:, None] * b_q.to(ACC)
        store_tokens(grad_q_ptr, grad_q_strides, o_n, m_n, b_dq * b_outer[:, None], tl.arange(0, P.BLOCK_D), P.D)


@triton.jit
def store_rows(p, stride, m_n, running_max, b_r, b_inverse, b_delta, P: tl.constexpr):
    """Store what query_backward_sums reads of a tile. The factor of a row turns its φ into p·HALF_RANGE."""
    if P.EXP:  # an exponent to subtract
        b_base = tl.where(running_max == float("-inf"), 0, running_max) - 15  # log2 of HALF_RANGE
        b_factor = tl.where(b_r > 0, b_base - tl.log2(tl.where(b_r > 0, b_r, 1)), float("inf"))
    else:
        b_factor = reciprocal(running_max) * b_r * (HALF_RANGE * E_RANGE)
    tl.store(p, b_factor, mask=m_n)
    tl.store(p + stride, b_inverse, mask=m_n)
    tl.store(p + 2 * stride, b_delta, mask=m_n)


@triton.jit
def init_query_sums(P: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr):
    """The sums of no queries: Σ p dO, Σ p δ, Σ dO/den and Σ δ/den."""
    # relu's δ has a part of c̄ instead of U: no bound in units of U holds, and it stays in ACC
    COLUMNS: tl.constexpr = T.primitive_bitwidth == 16 and P.MAP != "relu"
    return (
        tl.zeros([P.BLOCK_F, P.BLOCK_E], ACC),
        tl.zeros([P.BLOCK_F, 16 if COLUMNS else 1], ACC),
        tl.zeros([P.BLOCK_N, P.BLOCK_E], ACC),
        tl.zeros([P.BLOCK_N], ACC),
    )


@triton.jit
def add_query_sums(sums, b_p, b_do, b_delta, b_inverse, m_n, P: tl.constexpr):
    """Add the sums of a tile, for PLUS_EPS also those of the constant; b_p [BLOCK_F, BLOCK_N]: p·HALF_RANGE."""
    b_r, b_rho, b_r1, b_rho1 = sums
    ACC: tl.constexpr = b_delta.dtype
    T: tl.constexpr = b_p.dtype
    b_r = tl.dot(b_p, b_do, b_r, input_precision=P.PRECISION, out_dtype=ACC)
    if P.MAP != "softmax":
        b_column = b_delta / (2 * b_do.shape[1])  # |δ| ≤ 2 E max|dO|
        if b_rho.shape[1] == 16:  # a product costs less than a sum
            b_rho = tl.dot(b_p, split_hi_lo(b_column, T), b_rho, input_precision=P.PRECISION, out_dtype=ACC)
        else:
            b_rho += tl.sum(b_p * b_column[None, :], 1)[:, None]
    if P.PLUS_EPS:
        b_inverse = tl.where(m_n, b_inverse, 0)
        b_r1 += b_do.to(ACC) * b_inverse[:, None]
        b_rho1 += b_delta * b_inverse
    return b_r, b_rho, b_r1, b_rho1


@triton.jit
def store_query_sums(sums_ptr, stats_ptr, i_split, o_f, first, unit, sums, P: tl.constexpr):
    """Store a split's sums; those of the constant only if ``first``, the first block of features."""
    b_r, b_rho, b_r1, b_rho1 = sums
    i_row = i_split.to(tl.int64) * (P.F + 1)
    o_e = tl.arange(0, P.BLOCK_E)
    m_e = o_e < P.E
    p = sums_ptr + i_row * P.E
    tl.store(p + o_f[:, None] * P.E + o_e[None, :], b_r / HALF_RANGE, mask=(o_f < P.F)[:, None] & m_e[None, :])
    if P.MAP != "softmax":
        tl.store(stats_ptr + i_row + o_f, sum_columns(b_rho) * (2 * P.BLOCK_E * unit / HALF_RANGE), mask=o_f < P.F)
    if P.PLUS_EPS and first:
        tl.store(p + P.F * P.E + o_e, tl.sum(b_r1, 0), mask=m_e)
        tl.store(stats_ptr + i_row + P.F, tl.sum(b_rho1, 0) * unit)


@triton.jit
def query_backward_sums(
    grad_out_ptr, q_ptr, w_ptr, state_ptr, stat_ptr, rows_ptr, sums_ptr, stats_ptr, strides, sizes, P: tl.constexpr
):
    """A split's sums for a block of features of the state's gradient."""
    grad_out_strides, q_strides, w_strides = strides
    H, N, TOKENS, SPLITS = sizes
    ACC: tl.constexpr = stat_ptr.dtype.element_ty
    T: tl.constexpr = q_ptr.dtype.element_ty
    i_split, i_f = block_index(P)
    i_bh, i_s = i_split // SPLITS, i_split % SPLITS
    q_ptr, grad_out_ptr = head_ptr(q_ptr, q_strides, i_bh, H), head_ptr(grad_out_ptr, grad_out_strides, i_bh, H)
    state_ptr, stat_ptr = head_state(state_ptr, stat_ptr, i_bh, P)
    rows_ptr += i_bh.to(tl.int64) * 3 * N
    o_f, o_e = i_f * P.BLOCK_F + tl.arange(0, P.BLOCK_F), tl.arange(0, P.BLOCK_E)
    o_d = o_f if w_ptr is None else tl.arange(0, P.BLOCK_D)
    unit = state_unit(state_ptr, P)
    b_z = load_weights(stat_ptr, o_f, P)
    if P.MAP == "favor":
        b_z = tl.maximum(tl.log2(b_z * E_RANGE), -1000.0)
    b_w, b_wt, b_w_lo = load_projection(w_ptr, w_strides, o_f, P, T)
    b_exponents = split_hi_lo(b_z, T)
    sums = init_query_sums(P, T, ACC)
    end = tl.minimum((i_s + 1) * TOKENS, N)
    for i_n in range(i_s * TOKENS, end, P.BLOCK_N):
        o_n = i_n + tl.arange(0, P.BLOCK_N).to(tl.int64)
        m_n = o_n < end
        b_q = load_tokens(q_ptr, q_strides, o_n, m_n, o_d, P.D)
        b_do = load_tokens(grad_out_ptr, grad_out_strides, o_n, m_n, o_e, P.E)
        b_row = tl.load(rows_ptr + o_n, mask=m_n, other=float("inf") if P.EXP else 0.0)
        b_inverse = tl.load(rows_ptr + N + o_n, mask=m_n, other=0)
        b_delta = tl.load(rows_ptr + 2 * N + o_n, mask=m_n, other=0)
        b_a = project_transposed(b_q, w_ptr, b_w, b_w_lo, P, ACC)
        if P.MAP == "favor" and T.primitive_bitwidth == 16:
            b_p = tl.exp2(tl.dot(b_exponents, tl.full([16, P.BLOCK_N], 1 / 8, T), b_a) - b_row[None, :])
        elif P.EXP:
            b_p = tl.exp2(feature(b_a, P) + b_z[:, None] - b_row[None, :])
        else:
            b_p = feature(b_a, P) * b_z[:, None] * b_row[None, :]
        sums = add_query_sums(sums, b_p.to(T), b_do, b_delta, b_inverse, m_n, P)
    store_query_sums(sums_ptr, stats_ptr, i_split, o_f, i_f == 0, unit, sums, P)


@triton.jit
def query_backward_reduce(
    sums_ptr, stats_ptr, state_ptr, stat_ptr, grad_state_ptr, grad_stats_ptr, SPLITS, P: tl.constexpr
):
    """Add the splits of a head in their order, for a block of features."""
    ACC: tl.constexpr = stats_ptr.dtype.element_ty
    i_bh = tl.program_id(0).to(tl.int64)
    o_f, o_e = tl.program_id(1) * P.BLOCK_F + tl.arange(0, P.BLOCK_F), tl.arange(0, P.BLOCK_E)
    m_f, m_e = o_f < P.F, o_e < P.E
    m_fe = m_f[:, None] & m_e[None, :]
    b_r = tl.zeros([P.BLOCK_F, P.BLOCK_E], ACC)
    b_rho = tl.zeros([P.BLOCK_F], ACC)
    if P.PLUS_EPS:
        b_z = P.EPS * E_RANGE * load_weights(stat_ptr + i_bh * (2 * P.F + 1), o_f, P)
    for i_s in range(SPLITS):
        i_row = (i_bh * SPLITS + i_s) * (P.F + 1)
        p = sums_ptr + i_row * P.E + o_e
        b_r += tl.load(p[None, :] + o_f[:, None] * P.E, mask=m_fe, other=0)
        if P.MAP != "softmax":
            b_rho -= tl.load(stats_ptr + i_row + o_f, mask=m_f, other=0)
        if P.PLUS_EPS:
            b_r += b_z[:, None] * tl.load(p + P.F * P.E, mask=m_e, other=0)[None, :]
            b_rho -= b_z * tl.load(stats_ptr + i_row + P.F)
    o_fe = o_f[:, None] * P.E + o_e[None, :]
    if P.MAP == "softmax":
        b_rho = -tl.sum(b_r * tl.load(state_ptr + i_bh * (P.F + 2) * P.E + o_fe, mask=m_fe, other=0), 1)
    tl.store(grad_state_ptr + i_bh * P.F * P.E + o_fe, b_r, mask=m_fe)
    grad_stats_ptr += i_bh * 3 * P.F + o_f
    tl.store(grad_stats_ptr, b_rho, mask=m_f)
    tl.store(grad_stats_ptr + P.F, tl.max(tl.abs(b_r), 1), mask=m_f)
    if not P.EXP:
        b_z = tl.load(stat_ptr + i_bh * (2 * P.F + 1) + o_f, mask=m_f, other=0)
        tl.store(grad_stats_ptr + 2 * P.F, reciprocal(b_z), mask=m_f)


@triton.jit
def gradient_units(grad_stats_ptr, stat_ptr, key_max_ptr, P: tl.constexpr, COLUMNS: tl.constexpr):
    """The divisor with which R fits T; the largest |ρ| / divisor; favor's maximum, 0, or the largest 1/z; and for
    exponents in COLUMNS of 16 bits the largest log2 z, else 0: float16 holds the differences from it.
    """
    o_f = tl.arange(0, P.BLOCK_ALL)
    unit = power_below(tl.max(tl.load(grad_stats_ptr + P.F + o_f, mask=o_f < P.F, other=0), 0))
    max_rho = tl.max(tl.abs(tl.load(grad_stats_ptr + o_f, mask=o_f < P.F, other=0)), 0) / unit
    if P.MAP == "favor":
        head_max = tl.load(key_max_ptr)
    elif P.EXP:
        head_max = unit * 0
    else:
        head_max = tl.max(tl.load(grad_stats_ptr + 2 * P.F + o_f, mask=o_f < P.F, other=0), 0)
    base = tl.full([], 0.0, stat_ptr.dtype.element_ty)
    if P.EXP and COLUMNS:
        base = tl.max(tl.load(stat_ptr + o_f, mask=o_f < P.F, other=float("-inf")), 0)
        base = tl.where(base == float("-inf"), 0, base)
    return unit, max_rho, head_max, base


@triton.jit
def gradient_operands(grad_state_ptr, grad_stats_ptr, stat_ptr, o_f, units, P: tl.constexpr, T: tl.constexpr):
    """Operands of a block of features: R / unit [BLOCK_F, BLOCK_E] in T; R as dφ needs it; EPS Σ R_m/z_m [BLOCK_E]; ρ
    [BLOCK_F] as dφ needs it; hi_lo_factors of ρ; columns [BLOCK_F, 16] that sum to 8 (base − log2 z).

    dφ needs R and ρ; for favor_relu, R/z and ρ/z in units of the largest 1/z.
    """
    unit, max_rho, head_max, base = units
    o_e, m_f = tl.arange(0, P.BLOCK_E), o_f < P.F
    p = grad_state_ptr + o_f[:, None] * P.E + o_e[None, :]
    b_r = tl.load(p, mask=m_f[:, None] & (o_e < P.E)[None, :], other=0) / unit
    b_rho = tl.load(grad_stats_ptr + o_f, mask=m_f, other=0)
    b_r1 = tl.zeros([P.BLOCK_E], b_r.dtype)
    if P.MAP == "favor":
        b_inverse = tl.exp2(head_max - tl.load(stat_ptr + o_f, mask=m_f, other=float("inf")))
    elif not P.EXP:
        b_inverse = tl.load(grad_stats_ptr + 2 * P.F + o_f, mask=m_f, other=0)
    if P.EPS != 0:
        b_r1 = tl.sum(b_r * (P.EPS * b_inverse)[:, None], 0)
    b_share = b_r
    if P.MAP == "favor_relu":
        b_inverse *= reciprocal(head_max)
        b_share, b_rho = b_r * b_inverse[:, None], b_rho * b_inverse
    b_stat = tl.load(stat_ptr + o_f, mask=m_f, other=float("inf")) - base  # past F the exponentials become 0
    b_log_z = split_hi_lo(-tl.minimum(tl.maximum(b_stat, -30000.0), 30000.0), T)
    return b_r.to(T), b_share.to(T), b_r1, b_rho, hi_lo_factors(b_rho * reciprocal(max_rho * unit), T), b_log_z


@triton.jit
def pack_gradient(
    grad_state_ptr, grad_stats_ptr, stat_ptr, key_max_ptr, packed_grad_ptr, packed_rho_ptr, stat_stride, P: tl.constexpr
):
    """Do the work of gradient_operands once: with several blocks of features, each tile of tokens would repeat it."""
    i_bh = tl.program_id(0).to(tl.int64)
    grad_state_ptr += i_bh * P.F * P.E
    grad_stats_ptr += i_bh * 3 * P.F
    stat_ptr += i_bh * stat_stride
    packed_grad_ptr += i_bh * P.F * (2 * P.E + PACKED)
    packed_rho_ptr += i_bh * (P.F + P.E)
    o_e, o_c = tl.arange(0, P.BLOCK_E), tl.arange(0, 16)
    T: tl.constexpr = packed_grad_ptr.dtype.element_ty
    units = gradient_units(grad_stats_ptr, stat_ptr, key_max_ptr + i_bh, P, T.primitive_bitwidth == 16)
    b_sum = tl.zeros([P.BLOCK_E], grad_state_ptr.dtype.element_ty)
    for i_f in range(P.BLOCKS):
        o_f = i_f * P.BLOCK_F + tl.arange(0, P.BLOCK_F)
        b_r, b_share, b_r1, b_rho, b_rho_factors, b_log_z = gradient_operands(
            grad_state_ptr, grad_stats_ptr, stat_ptr, o_f, units, P, T
        )
        b_sum += b_r1
        p = packed_grad_ptr + o_f[:, None] * (2 * P.E + PACKED)
        m_f = (o_f < P.F)[:, None]
        tl.store(p + o_e[None, :], b_r, mask=m_f & (o_e < P.E)[None, :])
        if P.MAP == "favor_relu":
            tl.store(p + P.E + o_e[None, :], b_share, mask=m_f & (o_e < P.E)[None, :])
        tl.store(packed_rho_ptr + o_f, b_rho, mask=o_f < P.F)
        if T.primitive_bitwidth == 16:
            if P.EXP:
                tl.store(p + 2 * P.E + o_c[None, :], b_log_z, mask=m_f)
            tl.store(p + 2 * P.E + 16 + o_c[None, :], b_rho_factors, mask=m_f)
    tl.store(packed_rho_ptr + P.F + o_e, b_sum, mask=o_e < P.E)


@triton.jit
def load_key_operands(pointers, o_f, units, P: tl.constexpr, T: tl.constexpr):
    """What the sweep over the features reads for a block: W, its transpose and lo; the results of gradient_operands.

    R for dφ, the factors of ρ and the columns are transposed.

    ``pointers`` of a head: w_ptr, w_strides, stat_ptr, grad_state_ptr, grad_stats_ptr, packed_grad_ptr, packed_rho_ptr.
    """
    w_ptr, w_strides, stat_ptr, grad_state_ptr, grad_stats_ptr, packed_grad_ptr, packed_rho_ptr = pointers
    b_w, b_wt, b_w_lo = load_projection(w_ptr, w_strides, o_f, P, T)
    if packed_grad_ptr is None:
        b_r, b_share, b_r1, b_rho, b_rho_factors, b_log_z = gradient_operands(
            grad_state_ptr, grad_stats_ptr, stat_ptr, o_f, units, P, T
        )
    else:
        STRIDE: tl.constexpr = 2 * P.E + PACKED
        o_e = tl.arange(0, P.BLOCK_E)
        p = packed_grad_ptr + o_f[:, None] * STRIDE + o_e[None, :]
        mask = (o_f < P.F)[:, None] & (o_e < P.E)[None, :]
        b_r = tl.load(p, mask=mask, other=0)
        b_share = tl.load(p + P.E, mask=mask, other=0) if P.MAP == "favor_relu" else b_r
        b_r1 = tl.load(packed_rho_ptr + P.F + o_e, mask=o_e < P.E, other=0)
        b_rho = tl.load(packed_rho_ptr + o_f, mask=o_f < P.F, other=0)
        b_rho_factors = load_columns(packed_grad_ptr + 2 * P.E + 16, o_f, STRIDE, P, 0)
        b_log_z = load_columns(packed_grad_ptr + 2 * P.E, o_f, STRIDE, P, -30000.0)
    return b_w, b_wt, b_w_lo, b_r, tl.trans(b_share), b_r1, b_rho, tl.trans(b_rho_factors), tl.trans(b_log_z)


@triton.jit
def key_terms(b_a, b_log_z, b_shift, pointers, gain, o_f, P: tl.constexpr, T: tl.constexpr):
    """gain·φ/z of a tile for a block of features [BLOCK_N, BLOCK_F]."""
    w_ptr, w_strides, stat_ptr, grad_state_ptr, grad_stats_ptr, packed_grad_ptr, packed_rho_ptr = pointers
    if P.EXP and T.primitive_bitwidth == 16 and w_ptr is not None:
        return tl.exp2(tl.dot(tl.full([P.BLOCK_N, 16], 1 / 8, T), b_log_z, b_a) - b_shift[:, None])
    elif P.EXP:
        b_stat = tl.load(stat_ptr + o_f, mask=o_f < P.F, other=float("inf"))
        if P.MAP == "elu_exact":  # φ of a feature may be 0 for all keys
            b_stat = tl.where(b_stat == float("-inf"), float("inf"), b_stat)
        return tl.exp2(feature(b_a, P) - b_stat[None, :] - b_shift[:, None])
    else:
        b_inverse = tl.load(grad_stats_ptr + 2 * P.F + o_f, mask=o_f < P.F, other=0)
        return feature(b_a, P) * (b_inverse * gain)[None, :]


@triton.jit
def store_key_gradient(keys, pointers, tile, rows, operands, units, P: tl.constexpr, T: tl.constexpr):
    """Store dk of a tile, if it is needed: the sum of da W over the features, or da itself without W. Return dv.

    ``keys``: k_ptr and grad_k_ptr of the head, each with its strides. ``rows``: which tokens are in bounds; v − c̄
    divided by its bound; the reciprocal of the bound; what multiplies da; what is subtracted from an exponent; gain.
    """
    k_ptr, k_strides, grad_k_ptr, grad_k_strides = keys
    w_ptr, w_strides, stat_ptr, grad_state_ptr, grad_stats_ptr, packed_grad_ptr, packed_rho_ptr = pointers
    unit, max_rho, head_max, base = units
    o_n, m_n, b_k = tile
    in_bounds, b_v, b_inner, b_outer, b_shift, gain = rows
    ACC: tl.constexpr = stat_ptr.dtype.element_ty
    b_dk = tl.zeros([P.BLOCK_N, P.BLOCK_D], ACC)
    b_dv = tl.zeros([P.BLOCK_N, P.BLOCK_E], ACC)
    b_da1 = tl.zeros([P.BLOCK_N, 16], ACC)
    for i_f in range(P.BLOCKS):
        o_f = i_f * P.BLOCK_F + tl.arange(0, P.BLOCK_F)
        if P.BLOCKS > 1:
            operands = load_key_operands(pointers, o_f, units, P, T)
        b_w, b_wt, b_w_lo, b_r, b_rt, b_r1, b_rho, b_rho_factors, b_log_z = operands
        b_x = load_channels(k_ptr, w_ptr, k_strides, tile, o_f, P)
        b_a = project(b_x, b_wt, b_w_lo, P) if w_ptr is not None else b_x.to(ACC) * P.SCALE
        b_t = key_terms(b_a, b_log_z, b_shift, pointers, gain, o_f, P, T)
        b_dv = tl.dot(b_t.to(T), b_r, b_dv, input_precision=P.PRECISION, out_dtype=ACC)
        b_da = tl.dot(b_v, b_rt, input_precision=P.PRECISION)
        if T.primitive_bitwidth == 16 and w_ptr is not None:
            b_da = tl.dot(split_hi_lo(b_inner * max_rho, T), b_rho_factors, b_da)
        else:
            b_da += b_rho[None, :] * (b_inner / unit)[:, None]
        if P.EXP and w_ptr is not None:
            b_da = b_da.to(T) * b_t.to(T)
            b_ones = tl.full([P.BLOCK_F, 16], 1.0, T)
            b_da1 = tl.dot(b_da, b_ones, b_da1, input_precision=P.PRECISION, out_dtype=ACC)
        elif P.EXP:
            b_da *= b_t * exponent_grad(b_a, P)
        elif P.MAP == "favor_relu":
            b_da = tl.where(b_a > 0, b_da, 0)
        else:
            b_inverse = tl.load(grad_stats_ptr + 2 * P.F + o_f, mask=o_f < P.F, other=0)
            b_da *= (b_inverse * reciprocal(head_max))[None, :] * feature_grad(feature(b_a, P), P)
        if w_ptr is not None:
            b_dk = tl.dot(b_da.to(T), b_w, b_dk, input_precision=P.PRECISION, out_dtype=ACC)
        elif grad_k_ptr is not None:
            b_da = tl.where(m_n[:, None], b_da * (b_outer * P.SCALE)[:, None], 0)
            store_tokens(grad_k_ptr, grad_k_strides, o_n, in_bounds, b_da, o_f, P.D)
    if w_ptr is not None and grad_k_ptr is not None:
        if P.MAP != "favor_relu":
            b_dk -= (2 * P.HALF / 16 * tl.sum(b_da1, 1))[:, None] * b_k.to(ACC)
        b_dk = tl.where(m_n[:, None], b_dk * b_outer[:, None], 0)
        store_tokens(grad_k_ptr, grad_k_strides, o_n, in_bounds, b_dk, tl.arange(0, P.BLOCK_D), P.D)
    return b_dv


@triton.jit
def key_backward(
    k_ptr,  # (B, H, N, D)
    v_ptr,  # (B, H, N, E)
    w_ptr,  # (F, D) or None
    mask_ptr,  # (B, N) or None
    mean_ptr,  # (B·H, …, E): c̄, mean_stride elements from head to head; None: 0
    stat_ptr,
    key_max_ptr,  # (B·H)
    grad_state_ptr,
    grad_stats_ptr,
    packed_grad_ptr,  # None: one block of features; so packed_rho_ptr
    packed_rho_ptr,
    grad_k_ptr,  # None: not needed; so grad_v_ptr
    grad_v_ptr,
    strides,
    sizes,
    P: tl.constexpr,
):
    """dφ_m = (R_m·(v − c̄) + ρ_m) / z_m and dv = Σ φ_m/z_m R_m for the keys of a split.

    The compiler removes the code of a gradient whose pointer is None.
    """
    k_strides, v_strides, w_strides, mask_strides, mean_stride, stat_stride, grad_k_strides, grad_v_strides = strides
    H, N, TOKENS, SPLITS = sizes
    ACC: tl.constexpr = stat_ptr.dtype.element_ty
    T: tl.constexpr = ACC if P.WIDE else k_ptr.dtype.element_ty
    i_bh, i_s = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    k_ptr, v_ptr = head_ptr(k_ptr, k_strides, i_bh, H), head_ptr(v_ptr, v_strides, i_bh, H)
    if grad_k_ptr is not None:
        grad_k_ptr = head_ptr(grad_k_ptr, grad_k_strides, i_bh, H)
    if grad_v_ptr is not None:
        grad_v_ptr = head_ptr(grad_v_ptr, grad_v_strides, i_bh, H)
    stat_ptr += i_bh.to(tl.int64) * stat_stride
    grad_state_ptr += i_bh.to(tl.int64) * P.F * P.E
    grad_stats_ptr += i_bh.to(tl.int64) * 3 * P.F
    if packed_grad_ptr is not None:
        packed_grad_ptr += i_bh.to(tl.int64) * P.F * (2 * P.E + PACKED)
        packed_rho_ptr += i_bh.to(tl.int64) * (P.F + P.E)
    pointers = (w_ptr, w_strides, stat_ptr, grad_state_ptr, grad_stats_ptr, packed_grad_ptr, packed_rho_ptr)
    o_d, o_e = tl.arange(0, P.BLOCK_D), tl.arange(0, P.BLOCK_E)
    b_c = tl.zeros([P.BLOCK_E], ACC)
    if mean_ptr is not None:
        b_c = tl.load(mean_ptr + i_bh.to(tl.int64) * mean_stride + o_e, mask=o_e < P.E, other=0)
    COLUMNS: tl.constexpr = T.primitive_bitwidth == 16 and w_ptr is not None
    units = gradient_units(grad_stats_ptr, stat_ptr, key_max_ptr + i_bh, P, COLUMNS)
    unit, max_rho, head_max, base = units
    gain = power_below(tl.cast(tl.minimum(N, 32768), ACC))  # by which float16 holds e/z
    operands = load_key_operands(pointers, tl.arange(0, P.BLOCK_F), units, P, T)
    b_w, b_wt, b_w_lo, b_r, b_rt, b_r1, b_rho, b_rho_factors, b_log_z = operands
    keys = (k_ptr, k_strides, grad_k_ptr, grad_k_strides)
    end = tl.minimum((i_s + 1) * TOKENS, N)
    for i_n in range(i_s * TOKENS, end, P.BLOCK_N):
        o_n = i_n + tl.arange(0, P.BLOCK_N).to(tl.int64)
        m_all = o_n < end
        m_n = visible_keys(mask_ptr, mask_strides, i_bh // H, o_n, m_all)
        b_k = load_tokens(k_ptr, k_strides, o_n, m_n, o_d, P.D)
        b_v = load_tokens(v_ptr, v_strides, o_n, m_n, o_e, P.E).to(ACC) - b_c[None, :]
        # |R·(v − c̄) + ρ| is at most this: a row so divided fits float16
        b_bound = 2 * tl.sum(tl.abs(b_v), 1) + max_rho
        b_inner = reciprocal(b_bound)
        b_outer = b_bound * (unit / gain * 0.6931471805599453 if P.EXP else unit * head_max)
        b_shift = tl.zeros([P.BLOCK_N], ACC) + (base - tl.log2(gain))
        if P.MINUS_NORM:
            b_shift += half_norm(b_k, P, ACC)
        rows = (m_all, (b_v * b_inner[:, None]).to(T), b_inner, b_outer, b_shift, gain)
        b_dv = store_key_gradient(keys, pointers, (o_n, m_n, b_k), rows, operands, units, P, T)
        if grad_v_ptr is not None:
            if P.EPS != 0:
                b_dv += b_r1[None, :] * gain
            b_dv = tl.where(m_n[:, None], b_dv * (unit / gain), 0)
            store_tokens(grad_v_ptr, grad_v_strides, o_n, m_all, b_dv, o_e, P.E)
