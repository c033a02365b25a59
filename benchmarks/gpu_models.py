"""gpu_suite.py's models: a training step's and inference's time and peak memory, and the largest batch in 16 GB."""

import contextlib
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import model_mem
import torch
from common import DTYPES, TOLERANCE, relative_error, timing_json
from gpu_speed import Settings
from gpu_worker import Emit
from memory import Timing, allocated, interleaved, out_of_memory
from torch import nn
from training import (
    LOW,
    MODEL_TOLERANCE,
    autocast,
    build,
    check_model,
    random_batch,
    step,
    train_two_steps,
)

from cxv_kernels import backends

MODELS = ("cpv-5/4", "cnv-5/4", "cltv-5/4")
STEPS = 3  # of one repetition: a training loop does not wait for each


def parts_of(mode: str) -> tuple[str, bool, str | None]:
    """(mode for `build`, whether it is compiled, the backend).

    "eager" is the model as one writes it without this package, "triton" the fused one by that backend; "… + compile" is
    compiled, "… + checkpoints" recomputes its layers.
    """
    name, _, extra = mode.partition(" + ")
    if name == "eager":
        return "eager", extra == "compile", None
    return "checkpointed" if extra == "checkpoints" else "fused", extra == "compile", name


def served_by(backend: str | None) -> AbstractContextManager:
    """The ops by this backend, what it lacks by another; None: whatever the model itself says.

    No kernel is chosen for having passed its check: the rows say what served, and are refused where that has failed.
    """
    others = [name for name in backends.BACKENDS[2:] if name != backend]
    return backends.use_backend(",".join([backend, *others, "reference"])) if backend else contextlib.nullcontext()


def models(
    settings: Settings, emit: Emit, model: str, dtype: str, batch: int, modes: Sequence[str], side: int = 32
) -> None:
    """Train and apply a model in these modes at one batch, in turn; a fused one that fails its check gets no number.

    A speedup is over the first mode, with which it took turns.
    """
    device, kind = settings.where, DTYPES[dtype]
    images, labels = random_batch(batch, side, device, kind)
    modes = [mode for mode in modes if parts_of(mode)[2] in (None, *settings.backends)]
    rows: list[dict[str, Any]] = []
    training: dict[int, Callable[[], Any]] = {}
    inference: dict[int, Callable[[], Any]] = {}
    for mode in modes:
        row: dict[str, Any] = {"model": model, "dtype": dtype, "batch": batch, "side": side, "mode": mode}
        row |= {"status": "ok", "note": None, "served": {}, "train": None, "infer": None}
        rows.append(row)
        try:
            train, infer = _prepare(row, settings, kind, images, labels)
        except Exception as error:
            short = isinstance(error, RuntimeError) and out_of_memory(error)
            row["status"] = "out of memory" if short else "fails"
            row["note"] = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        else:
            if row["status"] == "ok":
                training[len(rows) - 1], inference[len(rows) - 1] = train, infer
        if device.type == "cuda" and row["status"] != "ok":
            torch.cuda.synchronize()  # raises where no later kernel would run
            torch.cuda.empty_cache()
    rounds = settings.rounds | {"budget": 0.0 if settings.quick else 0.5}
    for what, calls in (("train", training), ("infer", inference)):
        found = interleaved(list(calls.values()), device, **rounds, calls=1 if settings.quick else STEPS)
        timings = dict(zip(calls, found, strict=True))
        for index, timing in timings.items():
            _fill(rows[index], what, timing, batch, timings.get(0))
    for row in rows:
        emit(row)


def _fill(row: dict[str, Any], what: str, timing: Timing | None, batch: int, first: Timing | None) -> None:
    row[what] = timing_json(timing)
    row[f"{what}_images_per_s"] = timing and batch / timing.median
    row[f"{what}_speedup"] = timing and first and first.median / timing.median
    if timing is None:
        row["status"] = "out of memory"


def _prepare(
    row: dict[str, Any], settings: Settings, dtype: torch.dtype, images: torch.Tensor, labels: torch.Tensor
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Check the mode and measure its memory; what trains and what applies a model that is warm."""
    mode, compiled, backend = parts_of(row["mode"])
    device, name, side = settings.where, row["model"], row["side"]
    nothing = (lambda: None, lambda: None)
    with served_by(backend):
        if mode != "eager":
            row["served"], row["error"] = check_model(name, device, dtype, side)
            row["tolerance"] = MODEL_TOLERANCE * TOLERANCE[dtype]
            given = [(name, backend), *row["served"].items()]  # the model's own gradients, its ops
            barred = [what for what, by in given if (what, by, row["dtype"]) in settings.barred]
            if backend not in row["served"].values():
                row["status"] = "not served"
                return nothing
            if barred or not row["error"] <= row["tolerance"]:
                row["status"], row["note"] = "failed", f"a check failed: {', '.join(barred)}" if barred else None
                return nothing
        made = partial(build, name, mode)
        if not compiled:
            run = partial(train_two_steps, made, len(images), side, device, dtype)
            row["train_peak_bytes"] = allocated(run, device).peak
    torch.manual_seed(0)
    model = made().to(device, images.dtype).train()
    optimizer = torch.optim.AdamW(model.parameters())
    whole = mode != "eager"  # a graph that breaks is no step that a user of fused ops was promised
    trained: nn.Module = settings.compile(model, whole) if compiled else model
    torch.manual_seed(0)
    applied = made().to(device, images.dtype).eval() if compiled else model  # another, or eval() would compile it again
    inferred = settings.compile(applied, whole) if compiled else None

    def train() -> None:
        with served_by(backend):
            model.train()
            step(trained, optimizer, images, labels, dtype)

    def infer() -> torch.Tensor:
        with served_by(backend), torch.no_grad(), autocast(device, dtype):
            return (model.eval() if inferred is None else inferred)(images)

    start = time.perf_counter()
    train()
    if compiled:
        row["compile_s"] = round(time.perf_counter() - start, 1)
        row["train_peak_bytes"] = allocated(train, device).peak + _held(model, optimizer, images, labels)
        row["compiled_error"] = _error(infer()[:2], name, applied, images[:2])
        if not row["compiled_error"] <= MODEL_TOLERANCE * TOLERANCE[dtype]:
            row["status"], row["note"] = "failed" if whole else "differs", "compiled, it gives other logits"
            return nothing
    infer()
    row["infer_peak_bytes"] = allocated(infer, device).peak
    return train, infer


def _error(logits: torch.Tensor, name: str, model: nn.Module, images: torch.Tensor) -> float:
    """Of the logits against those of the reference with the model's weights in float64."""
    exact = build(name, "reference").to(images.device, torch.float64).eval()
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        return relative_error([logits], [exact(images.double())])


def _held(model: nn.Module, optimizer: torch.optim.Optimizer, *batch: torch.Tensor) -> int:
    """Bytes that a training loop holds between two steps."""
    state = [t for values in optimizer.state.values() for t in values.values() if isinstance(t, torch.Tensor)]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    held = (*model.parameters(), *model.buffers(), *gradients, *state, *batch)
    return sum(t.nbytes for t in held if t.device == batch[0].device)


def largest_batch(settings: Settings, emit: Emit, model: str, dtype: str, mode: str, side: int = 32) -> None:
    """The largest batch that trains in 16 GB: tried under a cap of the allocator, on a CPU foretold from two peaks."""
    name, _, backend = parts_of(mode)
    kind = DTYPES[dtype]
    row = model_mem.ModelRow(model, dtype, name)
    found = model_mem.Settings(settings.where, (kind,), (model,), 2, side, False, 0.01, 1, 1 << 20)
    with served_by(backend):
        if settings.device == "cpu":
            row.peaks = {str(batch): model_mem.peak_of_step(row, batch, found, kind) for batch in (1, 2)}
        model_mem.find_largest_batch(row, found, kind)
    emit(
        {"model": model, "dtype": dtype, "side": side, "mode": mode, "budget_bytes": model_mem.BUDGET_BYTES}
        | {
            "largest_batch": row.largest_batch,
            "by": row.largest_batch_by,
            "weights": "float32" if kind in LOW else dtype,
        }
    )
