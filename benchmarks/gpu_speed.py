"""gpu_suite.py's ops: each against what else computes it, at the sizes that the targets name, and over N."""

import dataclasses
import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import peers
import torch
import torch.nn.functional as F
from attn_speed import last_head, plain_conv_norm
from common import (
    DTYPES,
    TOLERANCE,
    Row,
    Run,
    in_float64,
    relative_error,
    timing_json,
    with_gradients,
)
from floors import Work, conv_work, linear_work, performer_work, rates
from gpu_worker import Emit
from memory import Queue, Timing, interleaved, out_of_memory
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import cxv_kernels
from cxv_kernels import _triton, backends
from cxv_kernels.conv_norm.reference import conv_norm_reference

SHAPES = ((32, 4, 1024, 32), (32, 8, 1024, 32), (4, 8, 4096, 64), (1, 8, 65536, 64))
SWEEP = (1024, 4096, 16384, 65536, 262144, 1048576)
SDPA_LONGEST = 65536  # beyond, quadratic time is better computed than waited for
ROTATED = 4  # sets of inputs that take turns, so that none is found in a cache
ROTATED_BYTES = 256 << 20  # inputs beyond which one set is enough
WHOLLY_CHECKED = 1 << 18  # tokens × heads
IMPLICIT_GEMM = "triton, implicit GEMM"  # a backend with conv_norm's convolution as its own, too, in channels_last
NO_SPEED = "its check failed"


@dataclass(frozen=True)
class Settings:
    """What to measure, where."""

    device: str
    backends: tuple[str, ...]
    quick: bool = False
    barred: frozenset[tuple[str, str, str]] = field(default_factory=frozenset)  # (op, backend, dtype): check failed

    @property
    def where(self) -> torch.device:
        """The device."""
        return torch.device(self.device)

    @property
    def rounds(self) -> dict[str, Any]:
        """The arguments of `interleaved`."""
        if self.quick:
            return {"budget": 0.0, "min_repeats": 2, "max_repeats": 2}
        return {"budget": 0.15, "min_repeats": 7, "max_repeats": 60, "limit": 3.0}

    def compile(self, function: Callable[..., Any], fullgraph: bool = False) -> Callable[..., Any]:
        """torch.compile; in a quick run without code generation, which takes as long as all the rest."""
        backend = "aot_eager" if self.quick else "inductor"
        return torch.compile(function, fullgraph=fullgraph, dynamic=False, backend=backend)


@dataclass
class Entry:
    """An implementation with its input sets; the first is checked, all are timed."""

    runs: list[Run]
    note: str | None = None
    name: str = ""  # unset: the row's implementation, by which it is judged
    gpu: dict[str, Timing | None] = field(default_factory=dict)  # by pass: without the time to launch

    @property
    def row(self) -> Row:
        """All runs' row."""
        return self.runs[0].row

    def turns(self, method: str) -> Callable[[], Any]:
        """A call that takes the next input set each time."""
        endless = itertools.cycle([getattr(run, method) for run in self.runs])
        return lambda: next(endless)()


@contextmanager
def excused(entry: Entry, status: str = "fails") -> Iterator[None]:
    """What goes wrong in the block is this entry's affair: its row says so. Unless the GPU itself is lost."""
    try:
        yield
    except Exception as error:
        if isinstance(error, RuntimeError) and out_of_memory(error):
            entry.row.status = "out of memory"
        else:
            entry.row.status = status
            entry.note = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if entry.row.status != "ok" and entry.runs[0].grad_out.device.type == "cuda":
        torch.cuda.synchronize()  # raises where no later kernel would run
        torch.cuda.empty_cache()


def ceilings(settings: Settings, emit: Emit, dtype: str) -> None:
    """The rates that this card was seen to do."""
    found = rates(settings.where, DTYPES[dtype], 32 if settings.quick else 1, 0.01 if settings.quick else 0.3)
    emit({"dtype": dtype, **asdict(found)})


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention by FlashAttention, whatever PyTorch would choose."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v)


# --- attention ---------------------------------------------------------------------------------------------------


def attend(op: str, variant: str, projection: Tensor, backend: str | None) -> Callable[..., Tensor]:
    """The op as a function of q, k and v."""
    if op == "performer_attention":
        return lambda q, k, v: cxv_kernels.performer_attention(q, k, v, projection, variant, backend=backend)
    return lambda q, k, v: cxv_kernels.linear_attention(q, k, v, variant, backend=backend)


def attention(
    settings: Settings,
    emit: Emit,
    op: str,
    variant: str,
    shape: Sequence[int],
    dtype: str,
    rivals: Sequence[str] = ("reference", "torch.compile", "sdpa"),
) -> None:
    """One op at one size and dtype by every backend, against its rivals (the installed peer may be one)."""
    device, kind, (batch, heads, tokens, dim) = settings.where, DTYPES[dtype], shape
    generator = torch.Generator(device).manual_seed(tokens)
    features = cxv_kernels.num_random_features(dim)
    projection = cxv_kernels.orthogonal_projection(
        features, dim, generator=torch.Generator().manual_seed(0), device=device
    )

    def random() -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(kind)

    rotated = ROTATED if 4 * batch * heads * tokens * dim * kind.itemsize < ROTATED_BYTES else 1
    sets = [(tuple(random().requires_grad_() for _ in range(3)), random()) for _ in range(rotated)]
    # heads are independent: where all of them in float64 would take long, one is checked
    part = tuple if batch * heads * tokens <= WHOLLY_CHECKED else last_head
    inputs, grad_out = sets[0]
    truth = attend(op, variant, projection.double(), "reference")
    exact = in_float64(truth, tuple(part([x.detach() for x in inputs])), *part([grad_out]))

    def entry(name: str, function: Callable[..., Tensor], served: dict[str, str], judged: bool = True) -> Entry:
        row = Row(op, name, served, tokens)
        rest = {"held": (projection,), "exact": exact, "compare": part} if judged else {}
        return Entry([Run(row, function, inputs, grad_out, **rest) for inputs, grad_out in sets])

    entries = []
    for backend in settings.backends:
        mine = entry(backend, attend(op, variant, projection, backend), {op: backend})
        entries.append(mine)
        served = backends.explain_backend(op, device, kind, dim)[backend]
        if served != "serves":
            mine.row.status, mine.note = "not served", served
        elif (op, backend, dtype) in settings.barred:
            mine.row.status, mine.note = "failed", NO_SPEED
    reference = attend(op, variant, projection, "reference")
    if "reference" in rivals:
        entries.append(entry("reference", reference, {op: "reference"}))
    if "torch.compile" in rivals:
        entries.append(entry("torch.compile", settings.compile(reference), {}))
    if "sdpa" in rivals and tokens <= SDPA_LONGEST:
        entries.append(entry("sdpa", F.scaled_dot_product_attention, {}, judged=False))
        if device.type == "cuda" and kind != torch.float32:
            entries.append(entry("sdpa, flash", flash_attention, {}, judged=False))
    if "peer" in rivals:
        entries.append(_peer(op, variant, projection, sets))
    work = (
        performer_work(batch, heads, tokens, dim, features, kind.itemsize)
        if op == "performer_attention"
        else linear_work(batch, heads, tokens, dim, kind.itemsize)
    )
    measure(settings, entries, kind)
    report(emit, entries, {"op": op, "variant": variant, "shape": list(shape), "dtype": dtype}, work)


def _peer(op: str, variant: str, projection: Tensor, sets: Sequence[tuple[tuple[Tensor, ...], Tensor]]) -> Entry:
    """The package that does the same, if it is installed, and if it does: on one head in float32."""
    package, build = peers.GPU_PEERS[op, variant]
    (inputs, grad_out), heads = sets[0], sets[0][1].shape[1]
    mine = Entry([Run(Row(op, package, {}, grad_out.shape[2]), F.scaled_dot_product_attention, inputs, grad_out)])
    with excused(mine):
        try:
            peer, one_head = build(heads, projection), build(1, projection)
        except ImportError as error:
            mine.row.status, mine.note = "not installed", str(error)
            return mine
        head = tuple(x.detach()[:1, :1].float().requires_grad_() for x in inputs)
        exact = in_float64(attend(op, variant, projection.double(), "reference"), head, grad_out[:1, :1].float())
        mine.row.error = relative_error(with_gradients(one_head.as_ours, head, grad_out[:1, :1].float()), exact())
        mine.row.tolerance = peers.AGREEMENT
        if not mine.row.error <= peers.AGREEMENT:
            mine.row.status = "differs"
            return mine
        mine.runs = [
            Run(
                mine.row,
                peer.function,
                tuple(x.detach().requires_grad_() for x in peer.pack(*x)),
                peer.pack_grad(grad),
                (projection,),
            )
            for x, grad in sets
        ]
    return mine


# --- convolution + norm, dropout ---------------------------------------------------------------------------------


@contextmanager
def convolving(backend: str) -> Iterator[str]:
    """In the block Triton's forward convolves by its own kernel if ``backend`` says so; the backend's own name."""
    if backend != IMPLICIT_GEMM:
        yield backend
        return
    module = importlib.import_module("cxv_kernels.conv_norm.triton")
    before, module.implicit_gemm = module.implicit_gemm, True
    try:
        yield "triton"
    finally:
        module.implicit_gemm = before


def explain(op: str, backend: str, device: torch.device | str, dtype: torch.dtype, dim: int) -> str:
    """What `explain_backend` says of a backend, `IMPLICIT_GEMM` too, which multiplies matrices."""
    if backend != IMPLICIT_GEMM:
        return backends.explain_backend(op, device, dtype, dim)[backend]
    if dim > 256:
        return f"serves at most 256 channels, not {dim}"
    return _triton.serves_triton(torch.device(device), dtype, dim) or "serves"


def conv_norm_by(backend: str, *inputs: Tensor) -> Tensor:
    """conv_norm by a backend; `IMPLICIT_GEMM` is one."""
    with convolving(backend) as name:
        return cxv_kernels.conv_norm(*inputs, backend=name)


def convolution(settings: Settings, emit: Emit, shape: Sequence[int], layout: str, dtype: str, compiled: bool) -> None:
    """conv_norm of (B, C, H, W) → C channels by every backend, against PyTorch's two ops and the convolution alone."""
    device, kind, (batch, channels, *side) = settings.where, DTYPES[dtype], shape
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, generator=generator, device=device)).to(kind)

    def one_set() -> tuple[tuple[Tensor, ...], Tensor]:
        x, grad = (random(*shape).to(memory_format=memory_format) for _ in range(2))
        weight = random(channels, channels, 3, 3, scale=(9 * channels) ** -0.5).to(memory_format=memory_format)
        vectors = [random(channels, scale=0.1) + offset for offset in (0, 1, 0)]  # bias, γ, β
        return tuple(t.detach().requires_grad_() for t in (x, weight, *vectors)), grad

    nbytes = 2 * batch * channels * side[0] * side[1] * kind.itemsize
    sets = [one_set() for _ in range(ROTATED if nbytes < ROTATED_BYTES else 1)]
    exact = in_float64(conv_norm_reference, *sets[0])

    def entry(name: str, function: Callable[..., Tensor], served: dict[str, str], inputs: int | None = None) -> Entry:
        row = Row("conv_norm", name, served)
        rest = {} if inputs else {"exact": exact}
        return Entry([Run(row, function, given[:inputs], grad, **rest) for given, grad in sets])

    entries = []
    own = [IMPLICIT_GEMM] if "triton" in settings.backends and layout == "channels_last" else []
    for backend in (*settings.backends, *own):
        name = backend.partition(",")[0]
        mine = entry(name, partial(conv_norm_by, backend), {"conv_norm": name})
        mine.name = backend
        entries.append(mine)
        served = explain("conv_norm", backend, device, kind, channels)
        if served != "serves":
            mine.row.status, mine.note = "not served", served
        elif ("conv_norm", backend, dtype) in settings.barred:
            mine.row.status, mine.note = "failed", NO_SPEED
    entries.append(entry("conv2d, layer_norm", plain_conv_norm, {}))
    if compiled:
        entries.append(entry("torch.compile", settings.compile(plain_conv_norm), {}))
    entries.append(entry("conv2d alone", partial(F.conv2d, padding=1), {}, inputs=3))
    measure(settings, entries, kind)
    work = conv_work(batch * side[0] * side[1], channels, channels, kind.itemsize)
    report(emit, entries, {"op": "conv_norm", "variant": layout, "shape": list(shape), "dtype": dtype}, work)


# --- checking, timing --------------------------------------------------------------------------------------------


def measure(settings: Settings, entries: Sequence[Entry], dtype: torch.dtype) -> None:
    """Check each entry, measure its memory, then time all that are right, in turn: as called, then the GPU alone."""
    device = settings.where
    for entry in entries:
        if entry.row.status == "ok":
            with excused(entry):
                for run in entry.runs:  # compiles, tunes and warms whatever does so at its first call
                    run.forward()
                    run.forward_backward()
                if entry.runs[0].check(TOLERANCE[dtype]):
                    entry.runs[0].measure_memory()
    for entry in entries:
        entry.runs = [dataclasses.replace(run, exact=None) for run in entry.runs]  # float64 results go
    ready = [entry for entry in entries if entry.row.status == "ok"]
    queue = Queue(device) if device.type == "cuda" else None
    for method in ("forward", "forward_backward"):
        calls = [entry.turns(method) for entry in ready]
        for entry, timing in zip(ready, interleaved(calls, device, **settings.rounds), strict=True):
            setattr(entry.row, method, timing)
        if queue is not None:
            alone = interleaved(calls, device, **settings.rounds, calls=len(entries[0].runs), queue=queue)
            for entry, timing in zip(ready, alone, strict=True):
                entry.gpu[method] = timing
    for entry in ready:
        if None in (entry.row.forward, entry.row.forward_backward, *entry.gpu.values()):
            entry.row.status = "out of memory"


def report(emit: Emit, entries: Sequence[Entry], case: dict[str, Any], work: tuple[Work, Work]) -> None:
    """A row for each entry: what was measured, and the rates that its best time amounts to."""
    for entry in entries:
        row = {**case, **entry.row.to_json(), "note": entry.note}
        row["implementation"] = entry.name or row["implementation"]
        for method, least in zip(("forward", "forward_backward"), work, strict=True):
            timing = entry.gpu.get(method)
            row[f"gpu_{method}"] = timing_json(timing)
            best = timing or getattr(entry.row, method)
            row[f"{method}_work"] = asdict(least)
            row[f"{method}_bytes_per_s"] = best and least.nbytes / best.median
            row[f"{method}_flop_per_s"] = best and least.flop / best.median
        emit(row)
    for entry in entries:
        entry.runs.clear()
