"""The Triton kernels of what Nyström attention has beyond scaled-dot-product attention. README.md has the math."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import launch
from ..autograd import like_layout
from ..validation import accumulate_dtype


@triton.jit
def _segment(item, tokens, landmarks):
    """First token and size of a landmark's run: the first ``tokens mod landmarks`` have one more."""
    i, size, longer = item % landmarks, tokens // landmarks, tokens % landmarks
    return i * size + tl.minimum(i, longer), size + (i < longer).to(tl.int32)


@triton.jit
def _means(
    x_ptr,  # (B, H, N, D), any strides
    means_ptr,  # (B, H, m, D), dense
    heads,
    tokens,
    landmarks,
    dim,
    x_batch,
    x_head,
    x_token,
    x_dim,
    SPREAD: tl.constexpr,  # backward: from the gradient of the means to that of x
    ACC: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
):
    item = tl.program_id(0)
    head = (item // landmarks).to(tl.int64)
    first, size = _segment(item, tokens, landmarks)
    d = tl.arange(0, DIM).to(tl.int64)
    x_ptr += head // heads * x_batch + head % heads * x_head
    means_ptr += item.to(tl.int64) * dim + d
    mean = tl.zeros((DIM,), ACC)
    if SPREAD:
        mean = tl.load(means_ptr, mask=d < dim, other=0) / size
    for start in range(0, size, TOKENS):
        n = start + tl.arange(0, TOKENS)
        at = (first + n).to(tl.int64)[:, None] * x_token + (d * x_dim)[None, :]
        inside = (n < size)[:, None] & (d < dim)[None, :]
        if SPREAD:
            tl.store(x_ptr + at, tl.broadcast_to(mean[None, :], (TOKENS, DIM)), mask=inside)
        else:
            mean += tl.sum(tl.load(x_ptr + at, mask=inside, other=0).to(ACC), 0)
    if not SPREAD:
        tl.store(means_ptr, mean / size, mask=d < dim)


@triton.jit
def _dot(a, b):
    return tl.dot(a, b, input_precision="tf32x3", out_dtype=a.dtype)


@triton.jit
def _load(ptr, head, rows, columns, ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A head's tile of a dense (B, H, rows, columns), zeros beyond it."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    at = head * rows * columns + row * columns + column
    return tl.load(ptr + at, mask=(row < rows) & (column < columns), other=0).to(ACC)


@triton.jit
def _store(ptr, tile, head, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    at = head * rows * columns + row * columns + column
    tl.store(ptr + at, tile, mask=(row < rows) & (column < columns))


@triton.jit
def _softmax(q, k, landmarks, scale, LANDMARKS: tl.constexpr):
    """A, zero beyond the landmarks; its largest column sum and, per column, whether it is that column's."""
    row, column = tl.arange(0, LANDMARKS)[:, None], tl.arange(0, LANDMARKS)[None, :]
    scores = tl.where(column < landmarks, _dot(q, tl.trans(k)) * scale, float("-inf"))
    weights = tl.exp(scores - tl.max(scores, 1)[:, None])
    a = tl.where(row < landmarks, weights / tl.sum(weights, 1)[:, None], 0)
    sums = tl.sum(a, 0)
    top = tl.max(sums, 0)
    return a, top, sums == top


@triton.jit
def _iteration(a, z, LANDMARKS: tl.constexpr):
    """W = AZ, U = 15 − W(7 − W) and T = ¼(13 − WU) of an iteration Z ← ZT."""
    i = tl.arange(0, LANDMARKS)
    one = (i[:, None] == i[None, :]).to(a.dtype)
    w = _dot(a, z)
    u = 15 * one - 7 * w + _dot(w, w)
    return w, u, 0.25 * (13 * one - _dot(w, u))


@triton.jit
def _inverse(a, top, iterations, LANDMARKS: tl.constexpr):
    z = tl.trans(a) / top
    for _ in range(iterations):
        _, _, t = _iteration(a, z, LANDMARKS)
        z = _dot(z, t)
    return z


@triton.jit
def _mix(
    q_ptr,  # (B, H, m, D)
    k_ptr,  # (B, H, m, D)
    summary_ptr,  # (B, H, m, E)
    mixed_ptr,  # (B, H, m, E)
    landmarks,
    dim,
    value_dim,
    scale,
    ACC: tl.constexpr,
    LANDMARKS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    q = _load(q_ptr, head, landmarks, dim, ACC, LANDMARKS, DIM)
    k = _load(k_ptr, head, landmarks, dim, ACC, LANDMARKS, DIM)
    a, top, _ = _softmax(q, k, landmarks, scale, LANDMARKS)
    z = _inverse(a, top, 6, LANDMARKS)
    y = _load(summary_ptr, head, landmarks, value_dim, ACC, LANDMARKS, VALUE_DIM)
    _store(mixed_ptr, _dot(z, y), head, landmarks, value_dim, LANDMARKS, VALUE_DIM)


@triton.jit
def _mix_backward(
    grad_ptr,  # (B, H, m, E)
    q_ptr,
    k_ptr,
    summary_ptr,
    grad_q_ptr,
    grad_k_ptr,
    grad_summary_ptr,
    landmarks,
    dim,
    value_dim,
    scale,
    ACC: tl.constexpr,
    LANDMARKS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
):
    head = tl.program_id(0).to(tl.int64)
    q = _load(q_ptr, head, landmarks, dim, ACC, LANDMARKS, DIM)
    k = _load(k_ptr, head, landmarks, dim, ACC, LANDMARKS, DIM)
    a, top, is_top = _softmax(q, k, landmarks, scale, LANDMARKS)
    grad = _load(grad_ptr, head, landmarks, value_dim, ACC, LANDMARKS, VALUE_DIM)
    z = _inverse(a, top, 6, LANDMARKS)
    _store(grad_summary_ptr, _dot(tl.trans(z), grad), head, landmarks, value_dim, LANDMARKS, VALUE_DIM)
    y = _load(summary_ptr, head, landmarks, value_dim, ACC, LANDMARKS, VALUE_DIM)
    grad_z = _dot(grad, tl.trans(y))
    grad_a = tl.zeros((LANDMARKS, LANDMARKS), ACC)
    for done in range(6):
        z = _inverse(a, top, 5 - done, LANDMARKS)  # again from the start: cheaper than to keep six of them
        w, u, t = _iteration(a, z, LANDMARKS)
        r = -0.25 * _dot(tl.trans(z), grad_z)  # of WU
        s = _dot(tl.trans(w), r)  # of U
        grad_w = _dot(r, tl.trans(u)) + _dot(s, tl.trans(w)) + _dot(tl.trans(w), s) - 7 * s
        grad_a += _dot(grad_w, tl.trans(z))
        grad_z = _dot(grad_z, tl.trans(t)) + _dot(tl.trans(a), grad_w)
    # Z₀ = Aᵀ / the largest column sum; columns that tie share its gradient.
    of_top = -tl.sum(tl.sum(tl.trans(grad_z) * a, 1), 0) / (top * top * tl.sum(is_top.to(ACC), 0))
    grad_a += tl.trans(grad_z) / top + tl.where(is_top, of_top, 0)[None, :]
    scores = scale * a * (grad_a - tl.sum(a * grad_a, 1)[:, None])
    k = _load(k_ptr, head, landmarks, dim, ACC, LANDMARKS, DIM)
    _store(grad_q_ptr, _dot(scores, k), head, landmarks, dim, LANDMARKS, DIM)
    q = _load(q_ptr, head, landmarks, dim, ACC, LANDMARKS, DIM)
    _store(grad_k_ptr, _dot(tl.trans(scores), q), head, landmarks, dim, LANDMARKS, DIM)


@triton.jit
def _residual(
    attention_ptr,  # (B, H, N, E), any strides, as all of this size
    v_ptr,
    weight_ptr,  # (H, K), dense
    out_ptr,
    heads,
    tokens,
    dim,
    tiles,
    taps,
    a_batch,
    a_head,
    a_token,
    a_dim,
    v_batch,
    v_head,
    v_token,
    v_dim,
    o_batch,
    o_head,
    o_token,
    o_dim,
    ACC: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
):
    item = tl.program_id(0)
    image, head = (item // tiles // heads).to(tl.int64), (item // tiles % heads).to(tl.int64)
    n = (item % tiles).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, DIM).to(tl.int64)[None, :]
    inside = (n < tokens)[:, None] & (d < dim)
    a_at = image * a_batch + head * a_head + n[:, None] * a_token + d * a_dim
    out = tl.load(attention_ptr + a_at, mask=inside, other=0).to(ACC)
    v_ptr += image * v_batch + head * v_head
    for tap in range(taps):
        near = n + (tap - taps // 2)
        near_inside = ((near >= 0) & (near < tokens))[:, None] & (d < dim)
        v = tl.load(v_ptr + near[:, None] * v_token + d * v_dim, mask=near_inside, other=0).to(ACC)
        out += tl.load(weight_ptr + head * taps + tap).to(ACC) * v
    tl.store(out_ptr + image * o_batch + head * o_head + n[:, None] * o_token + d * o_dim, out, mask=inside)


@triton.jit
def _residual_backward(
    grad_ptr,  # (B, H, N, E)
    v_ptr,
    weight_ptr,  # (H, K), dense
    grad_v_ptr,
    partial_ptr,  # (B, H, tiles, K): the tiles' shares of the weight's gradient
    heads,
    tokens,
    dim,
    tiles,
    taps,
    g_batch,
    g_head,
    g_token,
    g_dim,
    v_batch,
    v_head,
    v_token,
    v_dim,
    o_batch,
    o_head,
    o_token,
    o_dim,
    ACC: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
):
    item = tl.program_id(0)
    image, head = (item // tiles // heads).to(tl.int64), (item // tiles % heads).to(tl.int64)
    n = (item % tiles).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, DIM).to(tl.int64)[None, :]
    inside = (n < tokens)[:, None] & (d < dim)
    grad_ptr += image * g_batch + head * g_head
    v_ptr += image * v_batch + head * v_head
    grad = tl.load(grad_ptr + n[:, None] * g_token + d * g_dim, mask=inside, other=0).to(ACC)
    grad_v = tl.zeros((TOKENS, DIM), ACC)
    for tap in range(taps):
        far = n - (tap - taps // 2)
        far_inside = ((far >= 0) & (far < tokens))[:, None] & (d < dim)
        from_far = tl.load(grad_ptr + far[:, None] * g_token + d * g_dim, mask=far_inside, other=0).to(ACC)
        grad_v += tl.load(weight_ptr + head * taps + tap).to(ACC) * from_far
        near = n + (tap - taps // 2)
        near_inside = ((near >= 0) & (near < tokens))[:, None] & (d < dim)
        v = tl.load(v_ptr + near[:, None] * v_token + d * v_dim, mask=near_inside, other=0).to(ACC)
        tl.store(partial_ptr + item.to(tl.int64) * taps + tap, tl.sum(tl.sum(grad * v, 1), 0))
    tl.store(grad_v_ptr + image * o_batch + head * o_head + n[:, None] * o_token + d * o_dim, grad_v, mask=inside)


def _acc(x: Tensor) -> Any:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _like(x: Tensor) -> Tensor:
    return like_layout(x, tuple(x.shape))


def _launch_means(x: Tensor, means: Tensor, spread: bool) -> None:
    batch, heads, tokens, dim = x.shape
    landmarks = means.shape[2]
    run = min(triton.next_power_of_2(triton.cdiv(tokens, landmarks)), 64)
    launch(
        "nystrom_attention",
        _means,
        (batch * heads * landmarks,),
        *(x, means, heads, tokens, landmarks, dim, *x.stride()),
        SPREAD=spread,
        ACC=_acc(x),
        TOKENS=run,
        DIM=triton.next_power_of_2(dim),
        num_warps=1 if run * dim <= 1024 else 4,
        enable_fp_fusion=True,
    )


def nystrom_means(x: Tensor, landmarks: int) -> Tensor:
    """``cxv_kernels_triton::nystrom_means``, see csrc/ops.cpp; so the others."""
    means = x.new_empty((*x.shape[:2], landmarks, x.shape[3]), dtype=accumulate_dtype(x.dtype))
    _launch_means(x, means, False)
    return means


def nystrom_means_backward(grad_means: Tensor, x: Tensor) -> Tensor:
    grad_x = _like(x)
    _launch_means(grad_x, grad_means.contiguous(), True)
    return grad_x


def _mix_options(q_means: Tensor, summary: Tensor) -> dict[str, Any]:
    landmarks, dim, value_dim = *q_means.shape[2:], summary.shape[3]
    sizes = (max(triton.next_power_of_2(n), 16) for n in (landmarks, dim, value_dim))
    return {
        "landmarks": landmarks,
        "dim": dim,
        "value_dim": value_dim,
        "scale": dim**-0.5,
        "ACC": _acc(q_means),
        **dict(zip(("LANDMARKS", "DIM", "VALUE_DIM"), sizes, strict=True)),
        "num_warps": 8,
        "enable_fp_fusion": True,
    }


def _laid_out_as(x: Tensor, dense: Tensor) -> Tensor:
    like = _like(x)
    return dense if like.stride() == dense.stride() else like.copy_(dense)


def nystrom_mix(q_means: Tensor, k_means: Tensor, summary: Tensor) -> Tensor:
    inputs = [t.contiguous() for t in (q_means, k_means, summary)]
    mixed = torch.empty_like(inputs[2])
    grid = (q_means.shape[0] * q_means.shape[1],)
    launch("nystrom_attention", _mix, grid, *inputs, mixed, **_mix_options(q_means, summary))
    return _laid_out_as(summary, mixed)


def nystrom_mix_backward(
    grad_mixed: Tensor, q_means: Tensor, k_means: Tensor, summary: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = [t.contiguous() for t in (grad_mixed, q_means, k_means, summary)]
    grads = [torch.empty_like(t) for t in inputs[1:]]
    grid = (q_means.shape[0] * q_means.shape[1],)
    launch("nystrom_attention", _mix_backward, grid, *inputs, *grads, **_mix_options(q_means, summary))
    return tuple(map(_laid_out_as, (q_means, k_means, summary), grads))


def _residual_tiles(v: Tensor, weight: Tensor) -> tuple[int, int, dict[str, Any]]:
    """Tiles of a head, programs, and the kernels' arguments."""
    batch, heads, tokens, dim = v.shape
    size = triton.next_power_of_2(dim)
    run = min(max(4096 // size, 16), max(triton.next_power_of_2(tokens), 16))
    tiles = triton.cdiv(tokens, run)
    sizes = {"heads": heads, "tokens": tokens, "dim": dim, "tiles": tiles, "taps": weight.shape[2]}
    shape = {"ACC": _acc(v), "TOKENS": run, "DIM": size, "num_warps": 4, "enable_fp_fusion": True}
    return tiles, batch * heads * tiles, sizes | shape


def _strides(**tensors: Tensor) -> dict[str, int]:
    names = ("batch", "head", "token", "dim")
    return {f"{t}_{n}": s for t, x in tensors.items() for n, s in zip(names, x.stride(), strict=True)}


def nystrom_residual(attention: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    out = _like(attention)
    _, programs, arguments = _residual_tiles(v, weight)
    tensors = (attention, v, weight.contiguous(), out)
    launch("nystrom_attention", _residual, (programs,), *tensors, **arguments, **_strides(a=attention, v=v, o=out))
    return out


def nystrom_residual_backward(grad_out: Tensor, v: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    grad_v, grad_weight = _like(v), _like(weight)
    tiles, programs, arguments = _residual_tiles(v, weight)
    partial = v.new_empty((*v.shape[:2], tiles, weight.shape[2]), dtype=accumulate_dtype(v.dtype))
    tensors = (grad_out, v, weight.contiguous(), grad_v, partial)
    strides = _strides(g=grad_out, v=v, o=grad_v)
    launch("nystrom_attention", _residual_backward, (programs,), *tensors, **arguments, **strides)
    return grad_v, grad_weight.copy_(partial.sum((0, 2)).view(weight.shape))
