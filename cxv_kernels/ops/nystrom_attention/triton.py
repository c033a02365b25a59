"""The Triton kernels of what Nyström attention has beyond scaled-dot-product attention. README.md has the math."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._triton import launch
from ...autograd import like_layout, new_gradients
from ...validation import accumulate_dtype


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
    grad_v_ptr,  # None: not needed; so partial_ptr
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
        if partial_ptr is not None:
            tl.store(partial_ptr + item.to(tl.int64) * taps + tap, tl.sum(tl.sum(grad * v, 1), 0))
    if grad_v_ptr is not None:
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
    return _like(summary).copy_((z @ summary.flatten(0, 1).to(z.dtype)).view(summary.shape))


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


def _residual_tiles(v: Tensor, weight: Tensor) -> tuple[int, int, dict[str, Any]]:
    """Tiles of a head, programs, and the kernels' arguments."""
    batch, heads, tokens, dim = v.shape
    size = triton.next_power_of_2(dim)
    run = min(max(4096 // size, 16), max(triton.next_power_of_2(tokens), 16))
    tiles = triton.cdiv(tokens, run)
    sizes = {"heads": heads, "tokens": tokens, "dim": dim, "tiles": tiles, "taps": weight.shape[2]}
    shape = {"ACC": _acc(v), "TOKENS": run, "DIM": size, "num_warps": 4}
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


def nystrom_residual_backward(grad_out: Tensor, v: Tensor, weight: Tensor, needed: list[bool]) -> tuple[Tensor, ...]:
    grad_v, grad_weight = grads = new_gradients((v, weight), needed)
    tiles, programs, arguments = _residual_tiles(v, weight)
    partial = None
    if needed[1]:
        partial = v.new_empty((*v.shape[:2], tiles, weight.shape[2]), dtype=accumulate_dtype(v.dtype))
    tensors = (grad_out, v, weight.contiguous(), grad_v if needed[0] else None, partial)
    strides = _strides(g=grad_out, v=v, o=grad_v if needed[0] else v)
    launch("nystrom_attention", _residual_backward, (programs,), *tensors, **arguments, **strides)
    if needed[1]:
        grad_weight.copy_(partial.sum((0, 2)).view(weight.shape))
    return grads
