"""Counter-based dropout in plain PyTorch, with exactly the same mask as the fused kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...validation import accumulate_dtype

BLOCK = 128  # elements that get their bits from 16 counters
_LOW = 0xFFFFFFFF
_CHUNK = 4096  # blocks whose integers stay in a CPU's cache


def keep_threshold(p: float) -> int:
    """Return the threshold for p, rounded to a multiple of 2^-16: an element is kept if its 16 bits are below it."""
    return int(65536 * (1 - p) + 0.5)


def philox(counter: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011) of int64 counters (n,) ≥ 0 and one int64 key: four words of 32 bits, (n,)."""
    c0, c1 = counter & _LOW, counter >> 32
    c2 = c3 = torch.zeros_like(counter)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        # int64 wraps, and the mask removes copies of the sign: the result is the high half of the unsigned product
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW
        c2, c3 = ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def _keep_blocks(seed: Tensor, first: int, last: int, threshold: int) -> Tensor:
    """Return the blocks [first, last) of the mask as a flat bool tensor. README.md has the order of the bits."""
    counter = torch.arange(first * 16, last * 16, device=seed.device)
    words = torch.stack(philox(counter, seed)).view(4, last - first, 16)
    bits = torch.stack([words & 0xFFFF, words >> 16])  # (half, word, block, lane)
    return (bits < threshold).permute(2, 0, 1, 3).reshape(-1)


def keep_mask(seed: Tensor, count: int, p: float, offset: int = 0) -> Tensor:
    """Return the mask of the elements offset to offset + count − 1: bool (count,), on the device of the seed."""
    first, last = offset // BLOCK, -(-(offset + count) // BLOCK)
    step = _CHUNK if seed.device.type == "cpu" and not torch.compiler.is_compiling() else max(last - first, 1)
    blocks = [
        _keep_blocks(seed, start, min(start + step, last), keep_threshold(p)) for start in range(first, last, step)
    ]
    mask = torch.cat(blocks) if blocks else torch.empty(0, dtype=torch.bool, device=seed.device)
    return mask[offset - first * BLOCK :][:count]


def dropout_reference(x: Tensor, p: float, seed: Tensor, residual: Tensor | None = None, offset: int = 0) -> Tensor:
    """See :func:`cxv_kernels.dropout`. Computes in float32 (float64 for float64 inputs)."""
    y = x.to(accumulate_dtype(x.dtype)) * _scaled_mask(x, p, seed, offset)
    return (y if residual is None else y + residual).to(x.dtype)


def gelu_dropout_reference(x: Tensor, p: float, seed: Tensor, offset: int = 0) -> Tensor:
    """See :func:`cxv_kernels.gelu_dropout`. Computes in float32 (float64 for float64 inputs)."""
    return (F.gelu(x.to(accumulate_dtype(x.dtype))) * _scaled_mask(x, p, seed, offset)).to(x.dtype)


def _scaled_mask(x: Tensor, p: float, seed: Tensor, offset: int) -> Tensor:
    """Return keep / P(keep) for x, in the dtype of the computation."""
    keep = keep_mask(seed.reshape(()), x.numel(), p, offset).view(x.shape)
    return keep.to(accumulate_dtype(x.dtype)) * (65536 / keep_threshold(p))
