"""How fast an op could be: the arithmetic and the bytes that it cannot avoid, and what this machine can do of each."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from memory import interleaved


@dataclass(frozen=True)
class Work:
    """Floating-point operations (a multiply-add is two) and bytes."""

    flop: float
    nbytes: float

    def seconds(self, peak_flops: float, bandwidth: float) -> float:
        """The least time on a machine with these rates, arithmetic and memory overlapping perfectly."""
        return max(self.flop / peak_flops, self.nbytes / bandwidth)


# (forward, forward + backward) of each op. Counted: matrix products and convolutions as the algorithm has them, with
# what its backward must recompute because only O(M·E) is saved. Left out, so the floor is a little low: exponentials,
# divisions, sums, norms. Bytes: every input read and every output written once per pass; backward reads the inputs and
# the output's gradient and writes the inputs' gradients. What fits a cache can be faster than the DRAM's floor.


def _attention_bytes(tokens: int, dim: int, size: int) -> tuple[float, float]:
    tensor = tokens * dim * size
    return 4 * tensor, 11 * tensor  # q, k, v → out; then q, k, v, dout → dq, dk, dv


def performer_work(batch: int, heads: int, tokens: int, dim: int, features: int, size: int) -> tuple[Work, Work]:
    """With n = B·H·N and E = D, each product is 2nMD. Forward, four: project keys, S = φ(k)ᵀv, project queries, φ(q)S.

    Backward, eight: project q again, dO·Sᵀ, dS = φ(q)ᵀdO, dφ·W; project k again, v·dSᵀ, φ(k)·dS, dφ·W.
    """
    n = batch * heads * tokens
    product = 2 * n * features * dim
    moved = _attention_bytes(n, dim, size)
    return Work(4 * product, moved[0]), Work(12 * product, moved[1])


def linear_work(batch: int, heads: int, tokens: int, dim: int, size: int) -> tuple[Work, Work]:
    """Each product is 2nD². Forward, two: S, φ(q)S. Backward, four: dO·Sᵀ, φ(q)ᵀdO; v·dSᵀ, φ(k)·dS."""
    n = batch * heads * tokens
    product = 2 * n * dim * dim
    moved = _attention_bytes(n, dim, size)
    return Work(2 * product, moved[0]), Work(6 * product, moved[1])


def nystrom_work(batch: int, heads: int, tokens: int, dim: int, landmarks: int, size: int) -> tuple[Work, Work]:
    """Two attentions between n tokens and m landmarks, and m × m matrices per head.

    Forward: two products of 2nmD each for both attentions; A 2m²D, six iterations of four 2m³, A⁺·summary 2m²D.
    Backward: five products per attention (scores again, dP, dV, dQ, dK); twice the forward's for the rest.
    """
    n, h, m = batch * heads * tokens, batch * heads, landmarks
    product = 2 * n * m * dim
    small = h * (4 * m * m * dim + 48 * m**3)
    moved = _attention_bytes(n, dim, size)
    return Work(4 * product + small, moved[0]), Work(14 * product + 3 * small, moved[1])


def conv_work(pixels: int, channels_in: int, channels_out: int, size: int) -> tuple[Work, Work]:
    """The direct convolution, 2·9·C_in·C_out per pixel; backward has two as large. Bytes: x, y; then x, y, dy, dx and
    the weight and its gradient."""
    product = 2 * 9 * channels_in * channels_out * pixels
    x, y, w = pixels * channels_in * size, pixels * channels_out * size, 9 * channels_in * channels_out * size
    return Work(product, x + y + w), Work(3 * product, 3 * x + 3 * y + 3 * w)


@dataclass(frozen=True)
class Rates:
    """The best that this machine was seen to do."""

    flops: float  # per second
    flops_by: str
    bandwidth: float  # bytes per second
    bandwidth_by: str

    def best(self, other: "Rates") -> "Rates":
        """The higher of each rate."""
        a, b = max(self, other, key=lambda r: r.flops), max(self, other, key=lambda r: r.bandwidth)
        return Rates(a.flops, a.flops_by, b.bandwidth, b.bandwidth_by)


def rates(device: torch.device, dtype: torch.dtype, scale: int = 1, budget: float = 0.5) -> Rates:
    """Measure them: the fastest single call of matrix products and a convolution, large and cache-resident, and of a
    copy and a triad of arrays that no cache holds.

    Args:
        scale: divides the sizes; for tests. budget: seconds per candidate.
    """
    cuda = device.type == "cuda"
    large, small, count = (8192, 1024, 132) if cuda else (2048, 256, torch.get_num_threads())
    large, small, pixels = large // scale, small // scale, 32 // scale

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype)

    a, b, c = random(large, large), random(large, large), random(large, large)
    d, e, f = random(count, small, small), random(count, small, small), random(count, small, small)
    x, w = (random(8, 256, pixels, pixels), random(256, 256, 3, 3))
    x, w = x.to(memory_format=torch.channels_last), w.to(memory_format=torch.channels_last)
    # 256 MB an array on a CPU, 2 GB on a GPU
    length = (2**31 if cuda else 2**28) // dtype.itemsize // scale**2
    p, q, r = (torch.ones(length, device=device, dtype=dtype) for _ in range(3))
    arithmetic = {
        f"matmul {large}": (2 * large**3, lambda: torch.mm(a, b, out=c)),
        f"{count} matmuls of {small}": (2 * count * small**3, lambda: torch.bmm(d, e, out=f)),
        "3×3 convolution, 256 channels": (18 * 256 * 256 * 8 * pixels**2, lambda: F.conv2d(x, w, padding=1)),
    }
    movement = {
        "copy": (2 * p.nbytes, lambda: q.copy_(p)),
        "triad": (3 * p.nbytes, lambda: torch.add(p, q, alpha=0.5, out=r)),
    }

    def best(candidates: dict[str, tuple[float, object]]) -> tuple[float, str]:
        with torch.no_grad():
            for _, call in candidates.values():
                call()
            timings = interleaved([call for _, call in candidates.values()], device, budget=budget, max_repeats=1000)
        amounts = [(name, amount) for name, (amount, _) in candidates.items()]
        return max((n / min(t.samples), name) for (name, n), t in zip(amounts, timings, strict=True) if t)

    return Rates(*best(arithmetic), *best(movement))
