"""The Triton kernel: a row of its tile is a block of the mask, so that a counter gives its eight draws."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import _triton
from .reference import BLOCK, keep_threshold

_RUN = 16  # neighbors that take the same half of the same word, of neighboring counters
_ROWS = 32


@triton.jit
def _normal_cdf(x):
    """Φ(x) of the standard normal distribution, and exp(-x²/2); README.md has the polynomial."""
    density = tl.exp(-0.5 * x * x)
    if x.dtype == tl.float64:
        return 0.5 * (1 + tl.erf(x * 0.7071067811865476)), density
    t = 1 / (1 + 0.35355339 * tl.abs(x))
    poly = ((-0.0588472039 * t + 0.283488095) * t - 0.484937847) * t + 0.275464058
    poly = ((poly * t - 0.0248202737) * t + 0.201916993) * t + 0.243300125
    tail = 0.5 * density * t * ((poly * t + 0.282348037) * t + 0.282087982)
    return tl.where(x < 0, tail, 1 - tail), density


@triton.jit(do_not_specialize=["threshold"])
def _dropout(
    x_ptr,
    activated_ptr,  # or None: then x is the gradient of GELU(activated)
    residual_ptr,  # or None
    out_ptr,
    seed_ptr,  # one int64
    count,
    offset,
    threshold,
    ROWS: tl.constexpr,
    RUN: tl.constexpr,
    BLOCK: tl.constexpr,
    GELU: tl.constexpr,  # of x, which is dropped
):
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    block = offset // BLOCK + tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tl.arange(0, RUN)[None, :]
    counter = block * RUN + lane
    zero = tl.zeros((ROWS, RUN), tl.uint32)
    words = tl.philox(tl.load(seed_ptr), counter.to(tl.uint32), (counter >> 32).to(tl.uint32), zero, zero)
    scale = tl.div_rn(65536.0, threshold.to(ACC)) if ACC == tl.float32 else 65536 / threshold.to(ACC)
    for half in range(2):  # not unrolled: GELU would fill the cubin
        for word in tl.static_range(4):
            index = block * BLOCK + (half * 4 + word) * RUN + lane - offset
            inside = (index >= 0) & (index < count)
            draw = ((words[word] >> (16 * half)) & 0xFFFF).to(tl.int32)
            y = tl.load(x_ptr + index, mask=inside, other=0).to(ACC)
            if GELU:
                cdf, _ = _normal_cdf(y)
                y *= cdf
            if activated_ptr is not None:
                a = tl.load(activated_ptr + index, mask=inside, other=0).to(ACC)
                cdf, density = _normal_cdf(a)
                y *= cdf + a * density * 0.3989422804014327
            y *= tl.where(draw < threshold, scale, 0)
            if residual_ptr is not None:
                y += tl.load(residual_ptr + index, mask=inside, other=0).to(ACC)
            tl.store(out_ptr + index, y, mask=inside)


def dropout(x: Tensor, residual: Tensor | None, seed: Tensor, p: float, offset: int) -> Tensor:
    """``cxv_kernels_triton::dropout``, see csrc/ops.cpp."""
    return _run("dropout", x, seed, p, offset, residual=residual)


def gelu_dropout_forward(x: Tensor, seed: Tensor, p: float, offset: int) -> Tensor:
    """``cxv_kernels_triton::gelu_dropout_forward``, see csrc/ops.cpp."""
    return _run("gelu_dropout", x, seed, p, offset, gelu=True)


def gelu_dropout_backward(grad_out: Tensor, x: Tensor, seed: Tensor, p: float, offset: int) -> Tensor:
    """``cxv_kernels_triton::gelu_dropout_backward``, see csrc/ops.cpp."""
    return _run("gelu_dropout", grad_out, seed, p, offset, activated=x)


def _run(op: str, x: Tensor, seed: Tensor, p: float, offset: int, *, activated=None, residual=None, gelu=False):
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    rows = (offset + x.numel() - 1) // BLOCK - offset // BLOCK + 1
    _triton.launch(
        op,
        _dropout,
        (triton.cdiv(rows, _ROWS),),
        *(x, activated, residual, out, seed, x.numel(), offset, keep_threshold(p)),
        ROWS=_ROWS,
        RUN=_RUN,
        BLOCK=BLOCK,
        GELU=gelu,
        num_warps=max(x.element_size(), 1),  # 16 bytes a thread and run
        enable_fp_fusion=False,  # the product is rounded before the sum, as the reference's
    )
    return out
