"""Every op, forward and backward, against the float64 reference on the same (rounded) inputs.

``python -m cxv_kernels`` runs them on this machine, and the tests use the same cases and the same error model.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from . import backends
from .conv_norm import conv_norm
from .dropout import dropout, gelu_dropout
from .linear_attention import kv_state, linear_attention
from .nystrom_attention import nystrom_attention
from .performer_attention import num_random_features, orthogonal_projection, performer_attention, performer_features
from .validation import FLOAT_DTYPES, accumulate_dtype


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """In the block float32 products on a GPU are that: TF32, cuDNN's default, rounds what they multiply to 10 bits."""
    flags = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [flag.fp32_precision for flag in flags]
    try:
        for flag in flags:
            flag.fp32_precision = "ieee"
        yield
    finally:
        for flag, precision in zip(flags, before, strict=True):
            flag.fp32_precision = precision


@dataclass(frozen=True)
class Case:
    """One way to call an op: ``function(*inputs, backend=…)``, its inputs' shapes, the depth of its sums."""

    op: str
    label: str
    function: Callable
    shapes: tuple[tuple[int, ...], ...]
    depth: int  # terms of the longest sum
    amplification: float = 1.0  # by how much the op enlarges a rounding of an intermediate result

    @property
    def dim(self) -> int:
        """The channels that a backend must serve, as `explain_backend` takes them: a head's, or those of conv_norm."""
        return self.shapes[1][0] if self.op == "conv_norm" else max(shape[-1] for shape in self.shapes[:3])


@dataclass(frozen=True)
class Result:
    """The error and the tolerance of the output or gradient that is the worst by their ratio."""

    case: Case
    backend: str
    dtype: torch.dtype
    error: float
    tolerance: float

    @property
    def ratio(self) -> float:
        return self.error / self.tolerance

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


def cases(
    batch: int = 2,
    heads: int = 2,
    tokens: int = 200,
    dim: int = 32,
    ragged: bool = True,
    device: str | torch.device = "cpu",
    features: int | None = None,
) -> list[Case]:
    """The ops in their variants, by default at a size that takes milliseconds and that divides by nothing.

    Args:
        ragged: False calls them as the models do, with as many keys as queries, E = D, and square images.
        device: where projection and seed are, which are copied to the inputs' device if that is another.
        features: M of the Performer's, or None for ⌊D ln D⌋.
    """
    generator = torch.Generator().manual_seed(0)
    features = features or num_random_features(dim)
    projection = orthogonal_projection(features, dim, generator=generator, dtype=torch.float64).to(device)
    wider = 3 if dim < 64 else -3  # of more than 64 only Triton serves Performers
    keys, value_dim = (tokens + 7, dim + wider) if ragged else (tokens, dim)
    query, key, value = (batch, heads, tokens, dim), (batch, heads, keys, dim), (batch, heads, keys, value_dim)

    def performer(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        return performer_attention(q, k, v, projection.to(q.device), **options)

    def performer_phi(x: Tensor, is_query: bool, **options) -> Tensor:
        return performer_features(x, projection.to(x.device), is_query, **options)

    def nystrom_residual(q: Tensor, k: Tensor, v: Tensor, weight: Tensor, **options) -> Tensor:
        return nystrom_attention(q, k, v, 16, residual_weight=weight, **options)

    attention = (query, key, value)
    found = [
        Case("linear_attention", m, partial(linear_attention, feature_map=m), attention, tokens)
        for m in ("softmax", "elu", "relu")
    ]
    found += [
        Case("kv_state", m, partial(kv_state, feature_map=m), (key, value), tokens) for m in ("softmax", "elu", "relu")
    ]
    found += [
        Case("performer_attention", "softmax", performer, attention, tokens, 2),
        Case(
            "performer_attention", "softmax, eps=0", partial(performer, kernel="softmax", eps=0), attention, tokens, 2
        ),
        Case("performer_attention", "relu", partial(performer, kernel="relu"), attention, tokens),
        Case("performer_features", "query", partial(performer_phi, is_query=True), (query,), dim, 2),
        Case("performer_features", "key", partial(performer_phi, is_query=False), (key,), dim, 2),
        # the pseudo-inverse enlarges the roundings of the landmarks' softmax
        Case("nystrom_attention", "16 landmarks", partial(nystrom_attention, num_landmarks=16), attention, tokens, 8),
        Case("nystrom_attention", "residual", nystrom_residual, (*(query,) * 3, (heads, 1, 33, 1)), tokens, 8),
    ]
    planes, side = (dim, (9, 11)) if ragged else (heads * dim, (math.isqrt(tokens),) * 2)
    image, channels = (batch, planes, *side), (planes + value_dim - dim,)
    weight = (*channels, planes, 3, 3)

    def channels_last(x: Tensor, *rest: Tensor, **options) -> Tensor:
        return conv_norm(x.contiguous(memory_format=torch.channels_last), *rest, **options)

    # the convolution is rounded to the dtype before the norm
    convolution = ((image, weight, channels, channels, channels), 9 * planes, 4)
    found += [
        Case("conv_norm", "NCHW", conv_norm, *convolution),
        Case("conv_norm", "channels_last", channels_last, *convolution),
    ]
    seed = torch.tensor(12345, device=device)
    drop = lambda x, residual, **options: dropout(x, 0.3, seed.to(x.device), residual=residual, **options)  # noqa: E731
    gelu = lambda x, **options: gelu_dropout(x, 0.3, seed.to(x.device), **options)  # noqa: E731
    found += [Case("dropout", "p=0.3", drop, (query, query), 1), Case("gelu_dropout", "p=0.3", gelu, (query,), 1)]
    return found


def tolerance(expected: Tensor, dtype: torch.dtype, depth: int, amplification: float = 1.0) -> float:
    """The error model: a result is rounded to ``dtype``, and its sums of ``depth`` terms of order 1 or of the result's
    size run in the accumulation dtype, so that what cancels leaves an absolute error of that dtype alone.
    """
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    summing = 2 * torch.finfo(accumulate_dtype(dtype)).eps * depth**0.5
    return amplification * (scale * torch.finfo(dtype).eps + max(scale, 1.0) * summing)


def outputs_and_gradients(case: Case, inputs: list[Tensor], backend: str, dtype: torch.dtype) -> list[Tensor]:
    """What the case returns, and the inputs' gradients for a random gradient of that (rounded to ``dtype``)."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = case.function(*inputs, backend=backend)
    outs = list(out) if isinstance(out, tuple) else [out]
    generator = torch.Generator().manual_seed(2)
    seeds = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(dtype).to(o) for o in outs]
    return outs + list(torch.autograd.grad(outs, inputs, seeds))


def run(
    case: Case, backend: str, device: str | torch.device, dtype: torch.dtype, exact_on: str | torch.device = "cpu"
) -> Result:
    """Check one case on one backend; ``exact_on``: where the float64 reference runs, which at large sizes takes long.

    Raises:
        RuntimeError: the backend does not support it.
    """
    generator = torch.Generator().manual_seed(1)
    inputs = [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device) for shape in case.shapes
    ]
    expected = outputs_and_gradients(case, [t.to(exact_on).double() for t in inputs], "reference", dtype)
    with without_tf32():
        found = outputs_and_gradients(case, inputs, backend, dtype)
    results = []
    for got, want in zip(found, expected, strict=True):
        worst = float((got.detach().to(want.device).to(want.dtype) - want.detach()).abs().max())
        bound = tolerance(want.detach(), dtype, case.depth, case.amplification)
        worst = worst if worst == worst else float("inf")
        results.append(Result(case, backend, dtype, worst, bound))
    return max(results, key=lambda result: result.ratio)


def run_all(device: str | torch.device = "cpu") -> list[Result | tuple[str, str, str]]:
    """Every case on every backend that serves ``device``; for the others (op, backend, reason)."""
    device = torch.device(device)
    found: list[Result | tuple[str, str, str]] = []
    for case in cases():
        for backend in backends.BACKENDS[1:]:
            for dtype in FLOAT_DTYPES:
                served = backends.explain_backend(case.op, device, dtype, case.dim)[backend]
                found.append(run(case, backend, device, dtype) if served == "serves" else (case.op, backend, served))
    return found
