"""Counter-based dropout in plain PyTorch: the same mask as the fused kernels, bit for bit."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...validation import accumulate_dtype

BLOCK = 128  # elements that 16 counters give bits to
_LOW = 0xFFFFFFFF
_CHUNK = 4096  # blocks whose integers stay in a CPU's cache


def keep_threshold(p: float) -> int:
    """An element is kept if its 16 random bits are below this: p to the nearest multiple of 2^-16."""
    return int(65536 * (1 - p) + 0.5)


def philox(counter: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011) of int64 counters (n,) ≥ 0 and one int64 key: four words of 32 bits, (n,)."""
    c0, c1 = counter & _LOW, counter >> 32
    c2 = c3 = torch.zeros_like(counter)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        # int64 wraps, and the mask takes the sign's copies away: the high half of the unsigned product
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW
        c2, c3 = ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def _keep_blocks(seed: Tensor, first: int, last: int, threshold: int) -> Tensor:
    """The mask's blocks [first, last) as a flat bool tensor; README.md has the order of an element's bits."""
    counter = torch.arange(first * 16, last * 16, device=seed.device)
    words = torch.stack(philox(counter, seed)).view(4, last - first, 16)
    bits = torch.stack([words & 0xFFFF, words >> 16])  # (half, word, block, lane)
    return (bits < threshold).permute(2, 0, 1, 3).reshape(-1)


def keep_mask(seed: Tensor, count: int, p: float, offset: int = 0) -> Tensor:
    """Which of the elements offset … offset + count − 1 are kept: bool (count,), on seed's device."""
    first, last = offset // BLOCK, -(-(offset + count) // BLOCK)
    step = _CHUNK if seed.device.type == "cpu" and not torch.compiler.is_compiling() else max(last - first, 1)
    blocks = [
        _keep_blocks(seed, start, min(start + step, last), keep_threshold(p)) for start in range(first, last, step)
    ]
    mask = torch.cat(blocks) if blocks else torch.empty(0, dtype=torch.bool, device=seed.device)
    return mask[offset - first * BLOCK :][:count]


def dropout_reference(x: Tensor, p: float, seed: Tensor, residual: Tensor | None = None, offset: int = 0) -> Tensor:
    """See :func:`cxv_kernels.dropout`; computed in float32 (float64 for float64), rounded once to x's dtype."""
    y = x.to(accumulate_dtype(x.dtype)) * _scaled_mask(x, p, seed, offset)
    return (y if residual is None else y + residual).to(x.dtype)


def gelu_dropout_reference(x: Tensor, p: float, seed: Tensor, offset: int = 0) -> Tensor:
    """See :func:`cxv_kernels.gelu_dropout`; computed in float32 (float64 for float64), rounded once to x's dtype."""
    return (F.gelu(x.to(accumulate_dtype(x.dtype))) * _scaled_mask(x, p, seed, offset)).to(x.dtype)


def _scaled_mask(x: Tensor, p: float, seed: Tensor, offset: int) -> Tensor:
    """keep / P(keep) for x, in the dtype that it is computed in."""
    keep = keep_mask(seed.reshape(()), x.numel(), p, offset).view(x.shape)
    return keep.to(accumulate_dtype(x.dtype)) * (65536 / keep_threshold(p))
