"""Device functions that the passes of all feature maps share.

A head has F features: the rows of the projection W, or without one the D channels. ``P`` is the kernel's
:class:`~.launch.Params`: its compile-time parameters in one argument. ``P.MAP`` is one of

- ``favor``: exp(a − h − s) + EPS with a = D^-¼·x·Wᵀ, h = ‖x‖²/(2√D) and one maximum s of all keys' a;
- ``exact``: the same with EPS = 0 and a maximum per feature; ``favor_relu``: relu(a) + EPS;
- ``softmax``: over the channels of D^-¼·q, over the tokens of D^-¼·k; ``elu`` and ``relu`` of the channels;
- ``elu_exact``: elu by its logarithm, which underflows as little as exact does; elu itself is for kv_state.

``favor``, ``exact``, ``softmax`` and ``elu_exact`` are exponentials (``P.EXP``), computed in base 2. The tensors of a
head (README.md):

- state (F + 2, E): U_m = S_m/z_m − c̄; c̄; the largest |U| of each column.
- stat (2 F + 1): log2 z_m (EXP) or z_m, and that of Σ z_m; how a query weighs the features: log2 z_m (exact
  and elu_exact), 0 (softmax), else z_m/Σ z·W_RANGE.

Names: ``x_ptr`` and ``x_strides`` belong to a tensor x; ``b_x`` holds the values of a tile, ``o_x`` offsets, ``m_x``
masks, ``i_x`` an index. A tile is what one iteration holds, a split the tokens of one program.
"""

import triton
import triton.language as tl

HALF_RANGE = tl.constexpr(32768.0)  # scales weights of at most 1: float16 holds the small ones, too
E_RANGE = tl.constexpr(128.0)  # the part of HALF_RANGE that scales e
W_RANGE = tl.constexpr(256.0)  # the part that scales a feature's weight, a factor of U
PACKED = tl.constexpr(32)  # columns of a packed row beside U or R: two operands of 16
TINY = tl.constexpr(1.2e-38)  # the reciprocal of less overflows float32


@triton.jit
def reciprocal(x):
    return tl.where(x > TINY, 1 / tl.where(x > TINY, x, 1), 0)


@triton.jit
def power_below(x):
    """The largest power of two up to x; 1 for 0 and for what a GPU's exp2 has no power of two of."""
    return tl.exp2(tl.floor(tl.log2(tl.where(x > TINY, x, 1))))


@triton.jit
def rescale(x, running_max, P: tl.constexpr):
    """x relative to the maximum: in [0, 1]."""
    if P.EXP:
        return tl.exp2(x - tl.where(running_max == float("-inf"), 0, running_max))
    else:
        return x * reciprocal(running_max)


@triton.jit
def init_max(SIZE: tl.constexpr, P: tl.constexpr, ACC: tl.constexpr):
    """The maximum of no tokens."""
    return tl.full([SIZE], float("-inf") if P.EXP else 0.0, ACC)


@triton.jit
def head_ptr(p, s, i_bh, H):
    return p + (i_bh // H).to(tl.int64) * s[0] + (i_bh % H).to(tl.int64) * s[1]


@triton.jit
def head_state(state_ptr, stat_ptr, i_bh, P: tl.constexpr):
    """The pointers to the state and the stat of a head."""
    i_bh = i_bh.to(tl.int64)
    return state_ptr + i_bh * (P.F + 2) * P.E, stat_ptr + i_bh * (2 * P.F + 1)


@triton.jit
def visible_keys(mask_ptr, s, i_b, o_n, in_bounds):
    """Which of the keys o_n are in bounds and not hidden by the mask (B, N), if there is one."""
    if mask_ptr is None:
        return in_bounds
    else:
        return tl.load(mask_ptr + i_b.to(tl.int64) * s[0] + o_n * s[1], mask=in_bounds, other=0) != 0


@triton.jit
def load_tokens(p, s, o_n, m_n, o_c, WIDTH: tl.constexpr):
    """The channels o_c of the tokens o_n, zeros where masked and past WIDTH."""
    o_c = o_c.to(tl.int64)
    mask = m_n[:, None] & (o_c < WIDTH)[None, :]
    return tl.load(p + o_n[:, None] * s[2] + o_c[None, :] * s[3], mask=mask, other=0)


@triton.jit
def load_channels(x_ptr, w_ptr, s, tile, o_f, P: tl.constexpr):
    """What a block of features needs of a tile (o_n, m_n, b_x): all channels, or without W those of the block."""
    o_n, m_n, b_x = tile
    if w_ptr is not None or P.BLOCKS == 1:
        return b_x
    else:
        return load_tokens(x_ptr, s, o_n, m_n, o_f, P.D)


@triton.jit
def store_tokens(p, s, o_n, m_n, b, o_c, WIDTH: tl.constexpr):
    o_c = o_c.to(tl.int64)
    mask = m_n[:, None] & (o_c < WIDTH)[None, :]
    tl.store(p + o_n[:, None] * s[2] + o_c[None, :] * s[3], b.to(p.dtype.element_ty), mask=mask)


@triton.jit
def load_projection(w_ptr, w_strides, o_f, P: tl.constexpr, T: tl.constexpr):
    """Load SCALE·W [BLOCK_F, BLOCK_D] in T, its transpose, and the transpose of lo, the rest of the rounding to T.

    ``w_ptr`` may be the output of split_projection. Without W the results are placeholders: Triton 3.6 returns no None
    in a tuple.

    Rows past F repeat the last, which moves no maximum. The transposes are made here, outside the loop over tokens, so
    that the operand stays in shared memory.
    """
    if w_ptr is None:
        return o_f, o_f, o_f
    else:
        o_d = tl.arange(0, P.BLOCK_D)
        p = w_ptr + tl.minimum(o_f, P.F - 1)[:, None] * w_strides[0] + o_d[None, :] * w_strides[1]
        mask = (o_d < P.D)[None, :]
        if w_ptr.dtype.element_ty.primitive_bitwidth == 16:
            b_w = tl.load(p, mask=mask, other=0)
            return b_w, tl.trans(b_w), tl.trans(tl.load(p + P.F * P.D, mask=mask, other=0))
        else:
            b_exact = tl.load(p, mask=mask, other=0) * P.SCALE
            b_w = b_exact.to(T)
            return b_w, tl.trans(b_w), tl.trans((b_exact - b_w.to(b_exact.dtype)).to(T))


@triton.jit
def split_projection(w_ptr, split_ptr, w_strides, P: tl.constexpr):
    """Do the work of load_projection once: with several blocks of features, each tile of tokens would repeat it."""
    i = tl.program_id(0) * P.BLOCK + tl.arange(0, P.BLOCK)
    in_bounds = i < P.F * P.D
    b_exact = tl.load(w_ptr + i // P.D * w_strides[0] + i % P.D * w_strides[1], mask=in_bounds, other=0) * P.SCALE
    b_w = b_exact.to(split_ptr.dtype.element_ty)
    tl.store(split_ptr + i, b_w, mask=in_bounds)
    tl.store(split_ptr + P.F * P.D + i, b_exact - b_w.to(b_exact.dtype), mask=in_bounds)


@triton.jit
def split_hi_lo(b, T: tl.constexpr):
    """b in 16 columns of T: eight times hi, b rounded to T, and eight times lo, the rest. Σ 8 x b is the sum of
    x·split_hi_lo(b): tensor cores compute this product in less time than the other units the sum."""
    b_hi = b.to(T)
    b_lo = (b - b_hi.to(b.dtype)).to(T)
    return tl.where(tl.arange(0, 16)[None, :] < 8, b_hi[:, None], b_lo[:, None])


@triton.jit
def hi_lo_factors(b, T: tl.constexpr):
    """b in 16 columns of T, such that split_hi_lo(a)·hi_lo_factors(b)ᵀ is a bᵀ without the product of both lo."""
    b_hi = b.to(T)
    b_lo = (b - b_hi.to(b.dtype)).to(T)
    i_c = tl.arange(0, 16)[None, :]
    b_zero = tl.full([1, 1], 0.0, T)
    return tl.where(i_c % 8 == 0, b_hi[:, None], tl.where(i_c == 1, b_lo[:, None], b_zero))


@triton.jit
def sum_columns(b_sum):
    """The sum in [size, 1], or in the 16 columns of a product with split_hi_lo."""
    return tl.sum(b_sum, 1) / (8 if b_sum.shape[1] == 16 else 1)


@triton.jit
def half_norm(b_x, P: tl.constexpr, ACC: tl.constexpr):
    b_x = b_x.to(ACC)
    return tl.sum(b_x * b_x, 1) * P.HALF


@triton.jit
def project(b_x, b_wt, b_w_lo, P: tl.constexpr):
    """SCALE·x·Wᵀ; lo exists only for 16-bit inputs."""
    b_a = tl.dot(b_x, b_wt, input_precision=P.PRECISION)
    if b_x.dtype.primitive_bitwidth == 16:
        b_a = tl.dot(b_x, b_w_lo, b_a)
    return b_a


@triton.jit
def project_transposed(b_x, w_ptr, b_w, b_w_lo, P: tl.constexpr, ACC: tl.constexpr):
    """SCALE·W·xᵀ [BLOCK_F, BLOCK_N], without W SCALE·xᵀ."""
    if w_ptr is None:
        return tl.trans(b_x).to(ACC) * P.SCALE
    else:
        b_a = tl.dot(b_w, tl.trans(b_x), input_precision=P.PRECISION)
        if b_x.dtype.primitive_bitwidth == 16:
            b_a = tl.dot(tl.trans(b_w_lo), tl.trans(b_x), b_a)
        return b_a


@triton.jit
def feature(b_a, P: tl.constexpr):
    """φ without its constant; for an exponential, the exponent."""
    if P.MAP == "elu":
        return tl.where(b_a > 0, b_a + 1, tl.exp(tl.minimum(b_a, 0, propagate_nan=tl.PropagateNan.ALL)))
    elif P.MAP == "elu_exact":  # b_a is log2(e)·x
        return tl.where(b_a > 0, tl.log2(1 + 0.6931471805599453 * tl.where(b_a > 0, b_a, 0)), b_a)
    elif P.MAP == "relu" or P.MAP == "favor_relu":
        return tl.maximum(b_a, 0, propagate_nan=tl.PropagateNan.ALL)
    else:
        return b_a


@triton.jit
def exponent_grad(b_a, P: tl.constexpr):
    """The derivative of the exponent feature(b_a)."""
    if P.MAP == "elu_exact":
        return 1 / (1 + 0.6931471805599453 * tl.where(b_a > 0, b_a, 0))
    else:
        return tl.full(b_a.shape, 1.0, b_a.dtype)


@triton.jit
def feature_grad(b_x, P: tl.constexpr):
    """dφ/da of a map that is no exponential, computed from φ."""
    if P.MAP == "elu":
        return tl.minimum(b_x, 1)
    else:
        return tl.where(b_x > 0, 1.0, 0.0)


@triton.jit
def block_index(P: tl.constexpr):
    """This program's split and block of features. The blocks of one split run one after another: they share its tokens
    in the cache."""
    BLOCKS: tl.constexpr = (P.F + P.BLOCK_F - 1) // P.BLOCK_F
    return tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS


@triton.jit
def load_columns(p, o_f, stride, P: tl.constexpr, other):
    """Load 16 columns of packed rows [BLOCK_F, 16]."""
    return tl.load(p + o_f[:, None] * stride + tl.arange(0, 16)[None, :], mask=(o_f < P.F)[:, None], other=other)
