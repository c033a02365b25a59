"""The Triton kernels of what Nyström attention has beyond scaled-dot-product attention. README.md has the math."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _triton
from ...autograd import like_layout, new_gradients
from ...validation import accumulate_dtype
from ..linear_attention.triton.primitives import head_ptr, load_tokens, store_tokens


@triton.jit
def _means(
    x_ptr,
    means_ptr,
    strides,
    shape,
    SPREAD: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The means (B, H, m, D) of the segments of x (B, H, N, D), or if SPREAD the gradient of x from that of the means.

    The first N mod m segments have one token more.
    """
    H, N, LANDMARKS = shape
    item = tl.program_id(0)
    i, size, longer = item % LANDMARKS, N // LANDMARKS, N % LANDMARKS
    first, size = i * size + tl.minimum(i, longer), size + (i < longer).to(tl.int32)
    x_ptr = head_ptr(x_ptr, strides, item // LANDMARKS, H)
    o_d = tl.arange(0, BLOCK_D)
    means_ptr += item.to(tl.int64) * D + o_d
    mean = tl.zeros((BLOCK_D,), means_ptr.dtype.element_ty)
    if SPREAD:
        mean = tl.load(means_ptr, mask=o_d < D, other=0) / size
    for start in range(0, size, BLOCK_N):
        i_n = start + tl.arange(0, BLOCK_N)
        o_n = (first + i_n).to(tl.int64)
        if SPREAD:
            store_tokens(x_ptr, strides, o_n, i_n < size, tl.broadcast_to(mean[None, :], (BLOCK_N, BLOCK_D)), o_d, D)
        else:
            mean += tl.sum(load_tokens(x_ptr, strides, o_n, i_n < size, o_d, D).to(mean.dtype), 0)
    if not SPREAD:
        tl.store(means_ptr, mean / size, mask=o_d < D)


@triton.jit
def _residual(
    attention_ptr,
    v_ptr,
    weight_ptr,
    out_ptr,
    strides,
    shape,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """attention (B, H, N, E) + the convolution of v along its tokens with weight (H, K)."""
    a_strides, v_strides, out_strides = strides
    H, N, TILES, TAPS = shape
    ACC: tl.constexpr = tl.float64 if v_ptr.dtype.element_ty == tl.float64 else tl.float32
    i_bh, i_tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    o_n, o_d = i_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    v_ptr, weight_ptr = head_ptr(v_ptr, v_strides, i_bh, H), weight_ptr + i_bh % H * TAPS
    b_out = load_tokens(head_ptr(attention_ptr, a_strides, i_bh, H), a_strides, o_n, o_n < N, o_d, D).to(ACC)
    for tap in range(TAPS):
        o_near = o_n + (tap - TAPS // 2)
        b_v = load_tokens(v_ptr, v_strides, o_near, (o_near >= 0) & (o_near < N), o_d, D).to(ACC)
        b_out += tl.load(weight_ptr + tap).to(ACC) * b_v
    store_tokens(head_ptr(out_ptr, out_strides, i_bh, H), out_strides, o_n, o_n < N, b_out, o_d, D)


@triton.jit
def _residual_backward(
    grad_ptr,  # (B, H, N, E)
    v_ptr,
    weight_ptr,  # (H, K)
    grad_v_ptr,  # None: not needed; so partial_ptr
    partial_ptr,  # (B, H, tiles, K): the tiles' shares of the weight's gradient
    strides,
    shape,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    grad_strides, v_strides, grad_v_strides = strides
    H, N, TILES, TAPS = shape
    ACC: tl.constexpr = tl.float64 if v_ptr.dtype.element_ty == tl.float64 else tl.float32
    i_bh, i_tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    o_n, o_d = i_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    grad_ptr, v_ptr = head_ptr(grad_ptr, grad_strides, i_bh, H), head_ptr(v_ptr, v_strides, i_bh, H)
    weight_ptr += i_bh % H * TAPS
    b_grad = load_tokens(grad_ptr, grad_strides, o_n, o_n < N, o_d, D).to(ACC)
    b_grad_v = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    for tap in range(TAPS):
        o_far, o_near = o_n - (tap - TAPS // 2), o_n + (tap - TAPS // 2)
        b_far = load_tokens(grad_ptr, grad_strides, o_far, (o_far >= 0) & (o_far < N), o_d, D).to(ACC)
        b_grad_v += tl.load(weight_ptr + tap).to(ACC) * b_far
        b_v = load_tokens(v_ptr, v_strides, o_near, (o_near >= 0) & (o_near < N), o_d, D).to(ACC)
        if partial_ptr is not None:
            p = partial_ptr + tl.program_id(0).to(tl.int64) * TAPS + tap
            tl.store(p, tl.sum(tl.sum(b_grad * b_v, 1), 0))
    if grad_v_ptr is not None:
        grad_v_ptr = head_ptr(grad_v_ptr, grad_v_strides, i_bh, H)
        store_tokens(grad_v_ptr, grad_v_strides, o_n, o_n < N, b_grad_v, o_d, D)


def _launch_means(x: Tensor, means: Tensor, spread: bool) -> None:
    batch, heads, tokens, dim = x.shape
    landmarks = means.shape[2]
    run = min(triton.next_power_of_2(triton.cdiv(tokens, landmarks)), 64)
    params = {"SPREAD": spread, "D": dim, "BLOCK_D": triton.next_power_of_2(dim), "BLOCK_N": run}
    arguments, warps = (x, means, x.stride(), (heads, tokens, landmarks)), 1 if run * dim <= 1024 else 4
    _triton.launch("nystrom_attention", _means, (batch * heads * landmarks,), *arguments, **params, num_warps=warps)


def nystrom_means(x: Tensor, landmarks: int) -> Tensor:
    """``cxv_kernels_triton::nystrom_means``, see csrc/ops.cpp; so the others."""
    means = x.new_empty((*x.shape[:2], landmarks, x.shape[3]), dtype=accumulate_dtype(x.dtype))
    _launch_means(x, means, False)
    return means


def nystrom_means_backward(grad_means: Tensor, x: Tensor) -> Tensor:
    grad_x = like_layout(x, x.shape)
    _launch_means(grad_x, grad_means.contiguous(), True)
    return grad_x


def _inverse(q_means: Tensor, k_means: Tensor) -> tuple[Tensor, Tensor, list[tuple[Tensor, ...]], Tensor]:
    """A (B·H, m, m), its column sums, of every iteration Z, W, P = 7W − W² and Q = WU = 15W − WP, and the last Z.

    What is added to a product goes with it, a launch for each.
    """
    a = (q_means * q_means.shape[2] ** -0.5 @ k_means.mT).softmax(-1)
    sums = a.sum(-2, keepdim=True)
    z, steps = a.mT / sums.amax(-1, keepdim=True), []
    for _ in range(6):
        w = a @ z
        p = torch.baddbmm(w, w, w, beta=7, alpha=-1)
        q = torch.baddbmm(w, w, p, beta=15, alpha=-1)
        steps.append((z, w, p, q))
        z = torch.baddbmm(z, z, q, beta=13 / 4, alpha=-1 / 4)
    return a, sums, steps, z


def nystrom_mix(q_means: Tensor, k_means: Tensor, summary: Tensor) -> Tensor:
    *_, z = _inverse(q_means.flatten(0, 1), k_means.flatten(0, 1))
    return like_layout(summary, summary.shape).copy_((z @ summary.flatten(0, 1).to(z.dtype)).view(summary.shape))


def nystrom_mix_backward(
    grad_mixed: Tensor, q_means: Tensor, k_means: Tensor, summary: Tensor, needed: list[bool]
) -> tuple[Tensor, ...]:
    q_rows, k_rows, y = (t.flatten(0, 1) for t in (q_means, k_means, summary))
    a, sums, steps, z = _inverse(q_rows, k_rows)
    grad = grad_mixed.flatten(0, 1).to(z.dtype)
    grad_q, grad_k, grad_summary = grads = new_gradients((q_means, k_means, summary), needed)
    if needed[2]:
        grad_summary.copy_((z.mT @ grad).view(summary.shape))
    if not any(needed[:2]):
        return grads
    grad_z, grad_a = grad @ y.to(z.dtype).mT, torch.zeros_like(a)
    for z, w, p, q in reversed(steps):
        r = torch.baddbmm(z, z.mT, grad_z, beta=0, alpha=-1 / 4)  # of Q
        s = w.mT @ r  # of U
        grad_w = torch.baddbmm(r, r, p.mT, beta=15, alpha=-1).baddbmm_(s, w.mT)
        grad_w += torch.baddbmm(s, w.mT, s, beta=-7)
        grad_a.baddbmm_(grad_w, z.mT)
        grad_z = torch.baddbmm(grad_z, grad_z, q.mT, beta=13 / 4, alpha=-1 / 4).baddbmm_(a.mT, grad_w)
    # Z₀ = Aᵀ / the largest column sum; columns that tie share its gradient.
    top = sums.amax(-1, keepdim=True)
    is_top = (sums == top).to(a.dtype)
    of_top = -(grad_z.mT * a).sum((-2, -1), keepdim=True) / (top * top * is_top.sum(-1, keepdim=True))
    grad_a += grad_z.mT / top + of_top * is_top
    scores = q_rows.shape[2] ** -0.5 * a * (grad_a - (a * grad_a).sum(-1, keepdim=True))
    if needed[0]:
        grad_q.copy_((scores @ k_rows).view(q_means.shape))
    if needed[1]:
        grad_k.copy_((scores.mT @ q_rows).view(k_means.shape))
    return grads


def _tile(v: Tensor) -> tuple[int, int, int]:
    """(BLOCK_D, BLOCK_N, tiles of a head) of the residual's kernels."""
    size = triton.next_power_of_2(v.shape[3])
    run = min(max(4096 // size, 16), max(triton.next_power_of_2(v.shape[2]), 16))
    return size, run, triton.cdiv(v.shape[2], run)


def _launch_residual(kernel, first: Tensor, v: Tensor, weight: Tensor, result: Tensor | None, *rest) -> None:
    (batch, heads, tokens, dim), (size, run, tiles) = v.shape, _tile(v)
    strides = (first.stride(), v.stride(), (v if result is None else result).stride())
    arguments = (first, v, weight.contiguous(), result, *rest, strides, (heads, tokens, tiles, weight.shape[2]))
    params = {"D": dim, "BLOCK_D": size, "BLOCK_N": run}
    _triton.launch("nystrom_attention", kernel, (batch * heads * tiles,), *arguments, **params, num_warps=4)


def nystrom_residual(attention: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    out = like_layout(attention, attention.shape)
    _launch_residual(_residual, attention, v, weight, out)
    return out


def nystrom_residual_backward(grad_out: Tensor, v: Tensor, weight: Tensor, needed: list[bool]) -> tuple[Tensor, ...]:
    grad_v, grad_weight = grads = new_gradients((v, weight), needed)
    shares, taps = (*v.shape[:2], _tile(v)[2]), weight.shape[2]
    partial = v.new_empty((*shares, taps), dtype=accumulate_dtype(v.dtype)) if needed[1] else None
    _launch_residual(_residual_backward, grad_out, v, weight, grad_v if needed[0] else None, partial)
    if needed[1]:
        grad_weight.copy_(partial.sum((0, 2)).view(weight.shape))
    return grads
