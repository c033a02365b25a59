"""Cases of each op, the error model and memory probes, shared by tests, benchmarks and the self-check.

``python -m cxv_kernels`` runs every op on this machine, forward and backward, and compares it with the float64
reference on the same (rounded) inputs.
"""

import contextlib
import gc
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from . import dispatch
from .ops.conv_norm.functional import conv_norm
from .ops.dropout.functional import dropout, gelu_dropout
from .ops.linear_attention.functional import kv_state, linear_attention
from .ops.nystrom_attention.functional import nystrom_attention
from .ops.performer_attention.functional import (
    num_random_features,
    orthogonal_projection,
    performer_attention,
    performer_features,
)
from .validation import FLOAT_DTYPES, accumulate_dtype

# --- cases and the error model ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Disable TF32 in the block, because TF32 (the default of cuDNN) rounds the factors of a product to 10 bits."""
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
    """A way to call an op, ``function(*inputs, backend=…)``, with the shapes of its inputs and its error model."""

    op: str
    label: str
    function: Callable
    shapes: tuple[tuple[int, ...], ...]
    depth: int  # number of terms in the longest sum
    amplification: float = 1.0  # factor by which the op enlarges the rounding error of an intermediate result

    @property
    def dim(self) -> int:
        """The channels of a head, or of the output of conv_norm, that a backend must support (`explain_backend`)."""
        return self.shapes[1][0] if self.op == "conv_norm" else max(shape[-1] for shape in self.shapes[:3])


@dataclass(frozen=True)
class Result:
    """Error and tolerance of the output or gradient with the largest ratio of the two."""

    case: Case
    backend: str
    dtype: torch.dtype
    error: float
    tolerance: float
    exception: str = ""  # with its class, if the backend has raised one; the error is infinite

    @property
    def ratio(self) -> float:
        return self.error / self.tolerance

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Sizes:
    """Sizes of a call; every op uses those that it has. ``image`` is (H, W) of conv_norm."""

    batch: int = 2
    heads: int = 2
    queries: int = 65
    keys: int = 63
    dim: int = 17
    value_dim: int = 5
    image: tuple[int, int] = (6, 9)
    taps: int = 5  # of the residual of nystrom_attention


Shapes = Sequence[tuple[int, ...]]


def attention_shapes(sizes: Sizes) -> Shapes:
    """Return the shapes of q, k and v."""
    (batch, heads, queries, keys), dim = (sizes.batch, sizes.heads, sizes.queries, sizes.keys), sizes.dim
    return (batch, heads, queries, dim), (batch, heads, keys, dim), (batch, heads, keys, sizes.value_dim)


def residual_shapes(sizes: Sizes) -> Shapes:
    """Return the shapes of q, k, v with as many keys as queries, and of the weight of the residual."""
    query, _, (*_, value_dim) = attention_shapes(sizes)
    return query, query, (*query[:3], value_dim), (sizes.heads, 1, sizes.taps, 1)


def image_shapes(sizes: Sizes) -> Shapes:
    """Return the shapes of the inputs of conv_norm."""
    image, vector = (sizes.batch, sizes.dim, *sizes.image), (sizes.value_dim,)
    return image, (sizes.value_dim, sizes.dim, 3, 3), vector, vector, vector


def _channels_last(x: Tensor, *rest: Tensor, **options) -> Tensor:
    return conv_norm(x.contiguous(memory_format=torch.channels_last), *rest, **options)


class Call(NamedTuple):
    """A way to call an op, ``function(*inputs, **constants, backend=…)``, and the shapes of its inputs."""

    op: str
    label: str
    function: Callable
    shapes: Callable[[Sizes], Shapes]


_MAPS = ("softmax", "elu", "relu")
_KERNELS = {"softmax": {}, "exact": {"eps": 0.0}, "relu": {"kernel": "relu"}}  # exact: eps = 0, the original FAVOR+
CALLS = (
    *(Call("linear_attention", m, partial(linear_attention, feature_map=m), attention_shapes) for m in _MAPS),
    *(Call("kv_state", m, partial(kv_state, feature_map=m), lambda s: attention_shapes(s)[1:]) for m in _MAPS),
    *(
        Call("performer_attention", name, partial(performer_attention, **options), attention_shapes)
        for name, options in _KERNELS.items()
    ),
    *(
        Call("performer_features", f"{name}-{x}", partial(performer_features, is_query=x == "query", **options), shapes)
        for name, options in _KERNELS.items()
        for x, shapes in (("query", lambda s: attention_shapes(s)[:1]), ("key", lambda s: attention_shapes(s)[1:2]))
    ),
    Call("nystrom_attention", "plain", nystrom_attention, attention_shapes),
    Call(
        "nystrom_attention",
        "residual",
        lambda q, k, v, weight, **options: nystrom_attention(q, k, v, residual_weight=weight, **options),
        residual_shapes,
    ),
    Call("conv_norm", "NCHW", conv_norm, image_shapes),
    Call("conv_norm", "channels_last", _channels_last, image_shapes),
    Call(
        "conv_norm",
        "no-bias",
        lambda x, weight, *norm, **options: conv_norm(x, weight, None, *norm, **options),
        lambda s: (*image_shapes(s)[:2], *image_shapes(s)[3:]),
    ),
    Call("dropout", "no-residual", partial(dropout, p=0.3), lambda s: attention_shapes(s)[:1]),
    Call(
        "dropout",
        "residual",
        lambda x, residual, **options: dropout(x, 0.3, residual=residual, **options),
        lambda s: attention_shapes(s)[:1] * 2,
    ),
    Call("gelu_dropout", "plain", partial(gelu_dropout, p=0.3), lambda s: attention_shapes(s)[:1]),
)
_ONLY_IN_TESTS = ("exact-query", "exact-key", "relu-query", "relu-key", "no-bias", "no-residual")
# The pseudo-inverse enlarges the roundings of the landmarks' softmax, and a convolution is rounded before its norm.
_AMPLIFICATION = {"performer_attention": 2, "performer_features": 2, "nystrom_attention": 8, "conv_norm": 4}


def cases(
    batch: int = 2,
    heads: int = 2,
    tokens: int = 200,
    dim: int = 32,
    ragged: bool = True,
    device: str | torch.device = "cpu",
    features: int | None = None,
) -> list[Case]:
    """Return the cases of all ops, by default with small odd sizes that run in milliseconds.

    Args:
        batch: Batch size.
        heads: Attention heads.
        tokens: Tokens, or pixels of an image.
        dim: Channels of a head.
        ragged: If False, use the shapes of the models: as many keys as queries, E = D, and square images.
        device: Device of the projection and the seed. They are copied to the device of the inputs if it differs.
        features: M, the number of random features. Default: ⌊D ln D⌋.
    """
    features, generator = features or num_random_features(dim), torch.Generator().manual_seed(0)
    projection = orthogonal_projection(features, dim, generator=generator, dtype=torch.float64).to(device)
    seed = torch.tensor(12345, device=device)
    constants = {"performer_attention": {"projection": projection}, "performer_features": {"projection": projection}}
    constants |= {"nystrom_attention": {"num_landmarks": 16}, "dropout": {"seed": seed}, "gelu_dropout": {"seed": seed}}
    wider = (3 if dim < 64 else -3) if ragged else 0  # the CUDA kernels support at most 64
    sizes = Sizes(batch, heads, tokens, tokens + 7 * ragged, dim, dim + wider, taps=33)
    planes, image = (dim, (9, 11)) if ragged else (heads * dim, (math.isqrt(tokens),) * 2)
    of_images = replace(sizes, dim=planes, value_dim=planes + wider, image=image)
    depths = {"performer_features": dim, "conv_norm": 9 * planes, "dropout": 1, "gelu_dropout": 1}
    return [
        Case(
            call.op,
            call.label,
            partial(_with_constants, call.function, constants.get(call.op, {})),
            tuple(call.shapes(of_images if call.op == "conv_norm" else sizes)),
            depths.get(call.op, tokens),
            1 if call.label == "relu" else _AMPLIFICATION.get(call.op, 1),
        )
        for call in CALLS
        if call.label not in _ONLY_IN_TESTS
    ]


def _with_constants(function: Callable, constants: dict[str, Any], *inputs: Tensor, **options: Any) -> Any:
    placed = {name: c.to(inputs[0].device) if isinstance(c, Tensor) else c for name, c in constants.items()}
    return function(*inputs, **placed, **options)


def tolerance(expected: Tensor, dtype: torch.dtype, depth: int, amplification: float = 1.0) -> float:
    """Return the largest error that the error model allows.

    The result is rounded to ``dtype``. Its sums have ``depth`` terms, of order 1 or of the size of the result, and are
    computed in the accumulation dtype. So a sum whose terms cancel has an absolute error of that dtype only.
    """
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    summing = 2 * torch.finfo(accumulate_dtype(dtype)).eps * depth**0.5
    return amplification * (scale * torch.finfo(dtype).eps + max(scale, 1.0) * summing)


def outputs_and_gradients(case: Case, inputs: list[Tensor], backend: str, dtype: torch.dtype) -> list[Tensor]:
    """Return the outputs of a case and its input gradients for random output gradients (rounded to ``dtype``)."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = case.function(*inputs, backend=backend)
    outs = list(out) if isinstance(out, tuple) else [out]
    generator = torch.Generator().manual_seed(2)
    seeds = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(dtype).to(o) for o in outs]
    return outs + list(torch.autograd.grad(outs, inputs, seeds))


def run(
    case: Case, backend: str, device: str | torch.device, dtype: torch.dtype, exact_on: str | torch.device = "cpu"
) -> Result:
    """Check a case on a backend.

    Args:
        case: The case.
        backend: Name of the backend.
        device: Device of the inputs.
        dtype: Dtype of the inputs.
        exact_on: Device of the float64 reference, which takes long at large sizes.

    Raises:
        RuntimeError: If the backend does not support the case.
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


def run_all(device: str | torch.device = "cpu", ops: Sequence[str] = dispatch.registered_ops()) -> Iterator[Result]:
    """Check every case of these ops on every backend that supports it, in every dtype.

    A backend that raises an exception has failed, and the other checks run.
    """
    device, checked = torch.device(device), [case for case in cases() if case.op in ops]
    for case, backend, dtype in itertools.product(checked, dispatch.BACKENDS[1:], FLOAT_DTYPES):
        if backend != "reference" and dispatch.unsupported_reason(case.op, backend, device, dtype, case.dim):
            continue
        try:
            yield run(case, backend, device, dtype)
        except Exception as error:  # Triton's compiler and launcher raise classes of their own
            yield Result(case, backend, dtype, math.inf, 1.0, f"{type(error).__name__}: {error}")


# --- memory -----------------------------------------------------------------------------------------------------------


class PeakMemory(NamedTuple):
    """Bytes above the allocation at the start: the highest value, and the value at the end while the result exists."""

    peak: int
    kept: int


class SavedBytes(NamedTuple):
    """Bytes of the distinct storages saved for backward: without the storages of the inputs, and with them."""

    beyond_inputs: int
    total: int


def peak_memory(run: Callable[[], Any], device: str | torch.device = "cpu") -> PeakMemory:
    """Call ``run()`` once and measure the memory that PyTorch's allocator provides, also inside C++ ops.

    Args:
        run: The computation. Its result exists until the end of the measurement.
        device: On CUDA the counters of the caching allocator are read. On the CPU ``torch.profiler`` records the
            allocations of this thread; memory that a library takes from malloc directly is not measured.

    Returns:
        Bytes above the start. Memory allocated before the start and freed by ``run`` does not lower the peak.
    """
    device = torch.device(device)
    return _peak_memory_cuda(run, device) if device.type == "cuda" else _peak_memory_cpu(run)


def _peak_memory_cuda(run: Callable[[], Any], device: torch.device) -> PeakMemory:
    gc.collect()  # garbage that is freed during the run would reduce the measured peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    result = run()
    torch.cuda.synchronize(device)
    peak, kept = torch.cuda.max_memory_allocated(device) - start, torch.cuda.memory_allocated(device) - start
    del result
    return PeakMemory(peak, kept)


def _peak_memory_cpu(run: Callable[[], Any]) -> PeakMemory:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()
    del result
    live: dict[int, int] = {}
    peak = current = 0
    for address, size in _allocations(recorded.profiler.kineto_results.experimental_event_tree()):
        if size > 0:
            live[address] = size
            current += size
            peak = max(peak, current)
        else:
            current -= live.pop(address, 0)  # memory allocated before the start is not counted
    return PeakMemory(peak, current)


def _allocations(roots: Iterable[Any]) -> list[tuple[int, int]]:
    """Return (address, bytes) of the CPU allocations in the order of time; a free has negative bytes."""
    allocations, pending = [], list(roots)
    while pending:
        node = pending.pop()
        pending.extend(node.children)
        if node.tag.name == "Allocation" and node.extra_fields.device.type == "cpu":
            allocations.append((node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size))
    return [(address, size) for _, address, size in sorted(allocations, key=lambda event: event[0])]


def saved_bytes(run: Callable[[], Any], inputs: Iterable[Tensor] = ()) -> SavedBytes:
    """Count the bytes that autograd saves between the forward and the backward pass of ``run``.

    Each storage counts once with all its bytes, even if several views of it are saved. The tensors of
    ``save_for_backward`` in custom Functions are included.

    Args:
        run: The forward pass. It must not call backward.
        inputs: Tensors that exist before the call (inputs, parameters, buffers).
    """
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> None:
        # Keeps the memory, so that no address is used twice, but not the graph: it keeps this function, so that neither
        # would ever be freed.
        saved[tensor.untyped_storage().data_ptr()] = tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    sizes = {address: tensor.untyped_storage().nbytes() for address, tensor in saved.items()}
    del result
    return SavedBytes(sum(size for address, size in sizes.items() if address not in known), sum(sizes.values()))
