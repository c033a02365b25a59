"""The Triton kernels: the norm, in place over the convolution's result, its backward, and a convolution of their own.

README.md has the math. A tile is (pixels, channels), whichever of them is dense in memory, with a pixel's channels all.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _triton
from ...testing import tolerance
from ...validation import accumulate_dtype
from .op import convolution, convolution_backward

_MAX_GEMM_CHANNELS = 256  # of the output, which one program of the implicit GEMM holds in registers
_gemm_is_faster: dict[tuple, bool] = {}  # of a shape, once it has been timed

_MAX_SPLITS = 512  # programs of backward, each with sums of its own: fixed, so that their order depends on shapes alone


@triton.jit
def _load_parameters(bias_ptr, gamma_ptr, beta_ptr, channels, CHANNELS: tl.constexpr):
    """bias, or zeros; gamma and beta, 1 and 0 beyond the channels."""
    c = tl.arange(0, CHANNELS)
    inside = c < channels
    bias = tl.zeros((CHANNELS,), gamma_ptr.dtype.element_ty)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=inside, other=0).to(bias.dtype)
    return bias, tl.load(gamma_ptr + c, mask=inside, other=1), tl.load(beta_ptr + c, mask=inside, other=0)


@triton.jit
def _locate(tile, shape, strides, INDEX: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Of a tile (PIXELS, CHANNELS): its begin, offsets, mask; the pixels' indices and mask.

    ``shape``: channels, pixels and tiles of an image. ``strides``: of images, pixels and channels.
    """
    channels, pixels, tiles = shape
    image, first = (tile // tiles).to(tl.int64), (tile % tiles).to(tl.int64) * PIXELS
    n, c = tl.arange(0, PIXELS).to(INDEX), tl.arange(0, CHANNELS).to(INDEX)
    inside = n < pixels - first
    at = n[:, None] * strides[1] + c[None, :] * strides[2]
    start = image * strides[0] + first * strides[1]
    return start, at, inside[:, None] & (c < channels)[None, :], image * pixels + first + n, inside


@triton.jit
def _normalize(u, channels, eps, CHANNELS: tl.constexpr):
    """x̂ and 1/σ of the rows of u, 0 beyond its channels; in two passes, so that a large mean costs no digits."""
    deviation = tl.where((tl.arange(0, CHANNELS) < channels)[None, :], u - (tl.sum(u, 1) / channels)[:, None], 0)
    rstd = tl.rsqrt(tl.sum(deviation * deviation, 1) / channels + eps)
    return deviation * rstd[:, None], rstd


@triton.jit
def _tells_xhat(gamma, beta, channels, DTYPE: tl.constexpr):
    """Whether a result of dtype DTYPE gives x̂ = (y − β)/γ, by README.md's bounds; γ, β = 1, 0 beyond the channels."""
    ratio: tl.constexpr = 4.0 if DTYPE.primitive_bitwidth == 16 else 32.0
    smallest: tl.constexpr = 2.0**-14 if DTYPE == tl.float16 else 2.0**-126
    largest: tl.constexpr = 65504.0 if DTYPE == tl.float16 else 2.0**127
    gain, offset = tl.abs(gamma), tl.abs(beta)
    good = (gain >= smallest) & (offset <= ratio * gain)
    good = good & (tl.sqrt(tl.full((), 1, gamma.dtype) * channels) * gain + offset <= largest)
    return (tl.min(good.to(tl.int32), 0) > 0) & (channels > 2)


@triton.jit
def _norm(
    y_ptr,  # (B, C, H, W): the convolution, overwritten by the result
    bias_ptr,  # (C) or None
    gamma_ptr,  # (C)
    beta_ptr,  # (C)
    rstd_ptr,  # (B, H, W)
    eps,
    shape,  # see _locate
    strides,
    INDEX: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    channels = shape[0]
    bias, gamma, beta = _load_parameters(bias_ptr, gamma_ptr, beta_ptr, channels, CHANNELS)
    start, at, inside, pixel, inside_pixel = _locate(tl.program_id(0), shape, strides, INDEX, PIXELS, CHANNELS)
    u = tl.load(y_ptr + start + at, mask=inside, other=0).to(gamma.dtype) + bias[None, :]
    xhat, rstd = _normalize(u, channels, eps, CHANNELS)
    tl.store(rstd_ptr + pixel, rstd, mask=inside_pixel)
    tl.store(y_ptr + start + at, xhat * gamma[None, :] + beta[None, :], mask=inside)


@triton.jit
def _norm_backward(
    grad_ptr,  # (B, C, H, W)
    y_ptr,  # (B, C, H, W)
    conv_ptr,  # (B, C, H, W): the convolution, where y does not tell x̂; overwritten by its gradient
    rstd_ptr,  # (B, H, W)
    bias_ptr,  # (C) or None
    gamma_ptr,  # (C)
    beta_ptr,  # (C)
    partial_ptr,  # (3, programs, C): sums of dγ, dβ, dbias
    eps,
    all_tiles,
    shape,  # see _locate
    strides,
    INDEX: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    channels = shape[0]
    ACC: tl.constexpr = gamma_ptr.dtype.element_ty
    bias, gamma, beta = _load_parameters(bias_ptr, gamma_ptr, beta_ptr, channels, CHANNELS)
    told = _tells_xhat(gamma, beta, channels, y_ptr.dtype.element_ty)
    inverse = 1 / gamma
    grad_gamma = tl.zeros((PIXELS, CHANNELS), ACC)
    grad_beta = tl.zeros((PIXELS, CHANNELS), ACC)
    grad_bias = tl.zeros((PIXELS, CHANNELS), ACC)
    for tile in range(tl.program_id(0), all_tiles, tl.num_programs(0)):
        start, at, inside, pixel, inside_pixel = _locate(tile, shape, strides, INDEX, PIXELS, CHANNELS)
        grad = tl.load(grad_ptr + start + at, mask=inside, other=0).to(ACC)
        rstd = tl.load(rstd_ptr + pixel, mask=inside_pixel, other=0)
        if told:
            xhat = (tl.load(y_ptr + start + at, mask=inside, other=0).to(ACC) - beta[None, :]) * inverse[None, :]
        else:
            u = tl.load(conv_ptr + start + at, mask=inside, other=0).to(ACC) + bias[None, :]
            xhat, rstd = _normalize(u, channels, eps, CHANNELS)  # its own 1/σ: another convolution's roundings
        a = grad * gamma[None, :]
        mean_a = (tl.sum(a, 1) / channels)[:, None]
        mean_ax = (tl.sum(a * xhat, 1) / channels)[:, None]
        grad_u = rstd[:, None] * (a - mean_a - xhat * mean_ax)
        tl.store(conv_ptr + start + at, grad_u, mask=inside)
        grad_gamma += tl.where(inside, grad * xhat, 0)  # with eps = 0, x̂ is NaN beyond the pixels
        grad_beta += grad
        grad_bias += tl.where(inside, grad_u, 0)
    c = tl.arange(0, CHANNELS)
    row = partial_ptr + tl.program_id(0).to(tl.int64) * channels + c
    step = tl.num_programs(0).to(tl.int64) * channels
    tl.store(row, tl.sum(grad_gamma, 0), mask=c < channels)
    tl.store(row + step, tl.sum(grad_beta, 0), mask=c < channels)
    tl.store(row + 2 * step, tl.sum(grad_bias, 0), mask=c < channels)


@triton.jit
def _convolve(
    x_ptr,  # (B, C_in, H, W)
    weight_ptr,  # (C, C_in, 3, 3)
    bias_ptr,  # (C) or None
    gamma_ptr,  # (C)
    beta_ptr,  # (C)
    out_ptr,  # (B, C, H, W)
    rstd_ptr,  # (B, H, W), written if NORMALIZE
    eps,
    all_tiles,
    shape,
    x_strides,
    w_strides,
    strides,  # of out: images, pixels, channels
    INDEX: tl.constexpr,
    NORMALIZE: tl.constexpr,  # the whole forward pass; else the convolution alone, where y does not tell x̂
    PRECISION: tl.constexpr,
    CHANNELS: tl.constexpr,
    PIXELS: tl.constexpr,
    OUT: tl.constexpr,  # NORMALIZE: CHANNELS
    IN: tl.constexpr,
):
    channels_in, channels, height, width, tiles = shape
    x_image, x_channel, x_row, x_column = x_strides
    w_out, w_in, w_row, w_column = w_strides
    ACC: tl.constexpr = gamma_ptr.dtype.element_ty
    pixels = height * width
    bias, gamma, beta = _load_parameters(bias_ptr, gamma_ptr, beta_ptr, channels, CHANNELS)
    if not NORMALIZE:
        all_tiles = tl.where(_tells_xhat(gamma, beta, channels, out_ptr.dtype.element_ty), 0, all_tiles)
    runs = tl.cdiv(channels, OUT)
    blocks = tl.cdiv(channels_in, IN)
    for tile in range(tl.program_id(0), all_tiles, tl.num_programs(0)):
        image = (tile // runs // tiles).to(tl.int64)
        n = tile // runs % tiles * PIXELS + tl.arange(0, PIXELS)
        row, column = n // width, n % width
        c = (tile % runs * OUT + tl.arange(0, OUT)).to(INDEX)
        x_at = (row.to(INDEX) * x_row + column.to(INDEX) * x_column)[:, None]
        w_at = (c * w_out)[None, :]
        acc = tl.zeros((PIXELS, OUT), ACC)
        for step in range(9 * blocks):
            tap = step // blocks
            down, right = tap // 3, tap % 3
            i = (step % blocks * IN + tl.arange(0, IN)).to(INDEX)
            near_row, near_column = row + down - 1, column + right - 1
            inside = (near_row >= 0) & (near_row < height) & (near_column >= 0) & (near_column < width)
            inside = inside[:, None] & (i < channels_in)[None, :]
            near = x_ptr + image * x_image + (down - 1) * x_row + (right - 1) * x_column
            a = tl.load(near + x_at + (i * x_channel)[None, :], mask=inside, other=0)
            inside = (i < channels_in)[:, None] & (c < channels)[None, :]
            b = tl.load(weight_ptr + down * w_row + right * w_column + w_at + (i * w_in)[:, None], mask=inside, other=0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=ACC)
        if NORMALIZE:
            xhat, rstd = _normalize(acc + bias[None, :], channels, eps, CHANNELS)
            tl.store(rstd_ptr + image * pixels + n, rstd, mask=n < pixels)
            acc = xhat * gamma[None, :] + beta[None, :]
        at = (n.to(INDEX) * strides[1])[:, None] + (c * strides[2])[None, :]
        tl.store(out_ptr + image * strides[0] + at, acc, mask=(n < pixels)[:, None] & (c < channels)[None, :])


def _strides(t: Tensor) -> tuple[int, int, int]:
    """Of the images, pixels and channels of t (B, C, H, W), which is dense in memory."""
    _, channels, height, width = t.shape
    pixels = height * width
    # Where both formats fit, tiles run along what there is more of.
    nchw = t.is_contiguous() and (pixels > 1 or not t.is_contiguous(memory_format=torch.channels_last))
    return pixels * channels, *((1, pixels) if nchw else (channels, 1))


def _index(*tensors: Tensor) -> Any:
    """The dtype of offsets within an image."""
    far = max(sum((n - 1) * s for n, s in zip(t.shape[1:], t.stride()[1:], strict=True)) for t in tensors)
    return tl.int32 if far < 2**31 else tl.int64


def _tiles(t: Tensor, per_thread: int) -> tuple[int, dict[str, Any]]:
    """The tiles of a pass over t, and its arguments: in channels_last the pixels of all images are one row.

    A tile has 4 warps, or 8 where NCHW needs them for runs of 16 pixels (32 bytes in 16 bit).
    """
    batch, channels, height, width = t.shape
    strides = _strides(t)
    nhwc = strides[2] == 1
    images, pixels = (1, batch * height * width) if nhwc else (batch, height * width)
    size = triton.next_power_of_2(channels)
    run = max(128 * per_thread // size, 1 if nhwc else min(256 * per_thread // size, 16), 1)
    run = min(run, triton.next_power_of_2(max(pixels, 1)))
    tiles = triton.cdiv(pixels, run)
    params = {"INDEX": _index(t), "CHANNELS": size, "PIXELS": run}
    warps = min(max(size * run // (32 * per_thread), 1), 8)
    return tiles * images, {"shape": (channels, pixels, tiles), "strides": strides, "num_warps": warps} | params


def _dense(t: Tensor) -> Tensor:
    either = t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last)
    return t if either else t.contiguous()


def _launch_convolution(x: Tensor, weight: Tensor, *rest: Any, out: Tensor, rstd: Tensor, normalize: bool) -> None:
    *vectors, eps = rest  # bias, gamma and beta
    batch, channels, height, width = out.shape
    full, run = triton.next_power_of_2(channels), 64
    out_run = max(full, 16) if normalize else min(max(full, 16), 64)
    tiles = triton.cdiv(height * width, run)
    all_tiles = batch * tiles * triton.cdiv(channels, out_run)
    tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"
    _triton.launch(
        "conv_norm",
        _convolve,
        (all_tiles if normalize else min(all_tiles, _MAX_SPLITS),),
        *(x, weight, *vectors, out, rstd, eps, all_tiles, (x.shape[1], channels, height, width, tiles)),
        *(x.stride(), weight.stride(), _strides(out)),
        INDEX=_index(x, weight, out),
        NORMALIZE=normalize,
        PRECISION="tf32" if tf32 else "tf32x3",
        CHANNELS=out_run if normalize else full,
        PIXELS=run,
        OUT=out_run,
        IN=32,
        num_warps=8,
        num_stages=3,
    )


def _norm_after_cudnn(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The default: PyTorch's convolution, then the norm in place over its result."""
    *vectors, eps = rest  # bias, gamma and beta
    rstd = x.new_empty((x.shape[0], *x.shape[2:]), dtype=accumulate_dtype(x.dtype))
    out = _dense(convolution(x, weight))
    tiles, arguments = _tiles(out, 32)
    _triton.launch("conv_norm", _norm, (tiles,), out, *vectors, rstd, eps, **arguments)
    return out, rstd


def _implicit_gemm(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """A convolution of channels_last images in a kernel of its own, whose epilogue normalizes in registers."""
    rstd = x.new_empty((x.shape[0], *x.shape[2:]), dtype=accumulate_dtype(x.dtype))
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    weight = weight.contiguous(memory_format=torch.channels_last)  # 16 bytes of it along C_in
    _launch_convolution(x, weight, *rest, out=out, rstd=rstd, normalize=True)
    return out, rstd


def prefers_implicit_gemm(x: Tensor, weight: Tensor, *rest: Any) -> bool:
    """Return whether the implicit GEMM is faster here. It is timed with ``torch.backends.cudnn.benchmark`` alone, once.

    The default stays where the two results differ by more than their roundings, and where the kernel cannot run.
    """
    if not (torch.backends.cudnn.benchmark and x.numel() and _can_time(x.device)):
        return False
    precision = torch.backends.cudnn.conv.fp32_precision
    key = (x.device, x.dtype, x.shape, x.stride(), weight.shape, weight.stride(), rest[0] is None, precision)
    if key not in _gemm_is_faster:
        _gemm_is_faster[key] = _time_implicit_gemm(x, weight, *rest)
    return _gemm_is_faster[key]


def _can_time(device: torch.device) -> bool:
    if device.type != "cuda" or torch.compiler.is_compiling() or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    with torch.cuda.device(device):
        return not torch.cuda.is_current_stream_capturing()


def _time_implicit_gemm(x: Tensor, weight: Tensor, *rest: Any) -> bool:
    default, candidate = (lambda: _norm_after_cudnn(x, weight, *rest)), (lambda: _implicit_gemm(x, weight, *rest))
    try:
        (expected, _), (found, _) = default(), candidate()
    except RuntimeError:  # the kernel does not compile, or needs more than the GPU has
        return False
    depth, amplification = 9 * x.shape[1], 2 * 4  # of two results whose convolution is rounded before the norm
    bound = tolerance(expected, x.dtype, depth, amplification)
    if not float((found - expected).abs().max()) <= bound:  # nor with a NaN
        return False
    return _milliseconds(candidate, x.device) < _milliseconds(default, x.device)


def _milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    """The median of five calls."""
    times = []
    with torch.cuda.device(device):
        for _ in range(5):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return sorted(times)[2]


@torch.no_grad()
def conv_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor, beta: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``cxv_kernels_triton::conv_norm_forward``, see csrc/ops.cpp."""
    arguments = (x, weight, None if bias is None else bias.contiguous(), gamma.contiguous(), beta.contiguous(), eps)
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    if channels_last and weight.shape[0] <= _MAX_GEMM_CHANNELS and prefers_implicit_gemm(*arguments):
        return _implicit_gemm(*arguments)
    return _norm_after_cudnn(*arguments)


@torch.no_grad()
def conv_norm_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    rstd: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    needed: list[bool],
) -> tuple[Tensor, ...]:
    """``cxv_kernels_triton::conv_norm_backward``, see csrc/ops.cpp."""
    gamma, beta, bias = gamma.contiguous(), beta.contiguous(), None if bias is None else bias.contiguous()
    out, rstd = _dense(out), rstd.contiguous()
    grad_conv = torch.empty_like(out)
    if grad_out.stride() != out.stride():
        grad_out = torch.empty_like(out).copy_(grad_out)
    _launch_convolution(x, weight, bias, gamma, beta, eps, out=grad_conv, rstd=rstd, normalize=False)

    tiles, arguments = _tiles(out, 16)
    splits = min(tiles, _MAX_SPLITS)
    partial = gamma.new_empty((3, splits, gamma.shape[0]))
    _triton.launch(
        "conv_norm",
        _norm_backward,
        (splits,),
        *(grad_out, out, grad_conv, rstd, bias, gamma, beta, partial, eps, tiles),
        **arguments,
    )
    grads = convolution_backward(grad_conv, x, weight, needed)
    wanted = zip(partial, needed[3:] + needed[2:3], strict=True)
    grad_gamma, grad_beta, grad_bias = (p.sum(0) if need else p.new_empty(0) for p, need in wanted)
    return *grads, grad_bias.to(x.dtype), grad_gamma, grad_beta
