"""What a training step of the models keeps, needs and takes, mode by mode. See README.md."""

import argparse
import gc
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

# Both are read when torch is imported: its profiler and its CPU allocator write a line or more per measurement.
os.environ["KINETO_LOG_LEVEL"] = os.environ.get("KINETO_LOG_LEVEL", "99")
os.environ["TORCH_CPP_LOG_LEVEL"] = os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")

import model_ledger
import torch
from common import (
    DTYPES,
    TOLERANCE,
    Parser,
    environment,
    marking_out_of_memory,
    name_of,
    positive,
    seconds,
    some_of,
    timing_json,
    verify,
    write_json,
)
from memory import allocated, interleaved, out_of_memory
from model_mem_plot import draw
from model_mem_report import ledger_table, memory_table, noise_lines, report, sizes_table, speed_table
from torch import nn
from training import (
    CLASSES,
    IMAGE_SIZE,
    LOW,
    MODEL_TOLERANCE,
    MODES,
    TABLE1_GB,
    autocast,
    build,
    check_model,
    loss_of,
    random_batch,
    step,
    train_two_steps,
)

BUDGET_BYTES = 16 * 10**9
OURS = ("fused", "checkpointed")
ORDER = (*MODES, "torch.compile")


@dataclass
class Settings:
    """What to measure, where."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    models: tuple[str, ...]
    batch: int
    side: int
    compile: bool
    budget: float  # seconds of training steps per mode
    repeats: int  # at least so many steps
    max_batch: int  # where the search for the largest ends

    @property
    def batches(self) -> tuple[int, ...]:
        """Of the peaks, ascending; the last is ``batch``."""
        return tuple(sorted({max(1, self.batch // 4), self.batch}))


@dataclass
class ModelRow:
    """One model in one mode and dtype: bytes, and what was foretold."""

    name: str
    dtype: str
    mode: str
    backends: dict[str, str] = field(default_factory=dict)  # what serves the fused model's ops
    status: str = "ok"  # or "failed" (the check), "out of memory"
    error: float | None = None  # of the fused logits against float64, relative to the largest; None: no fused kernel
    tolerance: float | None = None
    peaks: dict[str, int] = field(default_factory=dict)  # of a whole training step, by batch
    largest_batch: int | None = None  # within BUDGET_BYTES
    largest_batch_by: str | None = None  # "measured" or "predicted"
    line: tuple[float, float] | None = None  # bytes = line[0] + line[1]·batch, through the first and last peak
    kept: int | None = None  # after the forward pass, by the allocator
    ledger: dict[str, int] | None = None  # the same by kind
    predicted: dict[str, int] | None = None
    inference: int | None = None  # peak without grad, beyond weights and batch
    largest_activation: int | None = None  # bytes of (B, C, H, W)


def settle(mode: str, name: str, settings: Settings, dtype: torch.dtype) -> nn.Module:
    """A model in training mode, on the device."""
    torch.manual_seed(0)
    return build(name, mode).to(settings.device, torch.float32 if dtype in LOW else dtype).train()


# --- memory ------------------------------------------------------------------------------------------------------


def peak_of_step(row: ModelRow, batch: int, settings: Settings, dtype: torch.dtype) -> int:
    """Bytes of a whole training step: weights, gradients, AdamW's state and the batch count."""
    make = partial(build, row.name, row.mode)
    return allocated(lambda: train_two_steps(make, batch, settings.side, settings.device, dtype), settings.device).peak


def line_through(peaks: dict[str, int]) -> tuple[float, float] | None:
    """(a, b) of bytes = a + b·batch through the least and the largest batch; None for fewer than two."""
    if len(peaks) < 2:
        return None
    first, last = min(peaks, key=int), max(peaks, key=int)
    slope = (peaks[last] - peaks[first]) / (int(last) - int(first))
    return peaks[last] - slope * int(last), slope


@contextmanager
def capped(device: torch.device, limit: int) -> Iterator[None]:
    """In the block, CUDA's allocator refuses to hold more than ``limit`` bytes."""
    index = torch.cuda.current_device() if device.index is None else device.index  # "cuda" alone is refused
    total = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)


def largest_that(fits: Callable[[int], bool], most: int) -> int:
    """The largest n ≤ ``most`` that fits, by doubling and bisection; 0 if 1 does not."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def find_largest_batch(row: ModelRow, settings: Settings, dtype: torch.dtype) -> None:
    """Fill in the largest batch within the budget: tried on CUDA, elsewhere foretold by the line through the peaks."""
    row.line = line_through(row.peaks)
    if settings.device.type != "cuda":
        if row.line and row.line[1] > 0:
            row.largest_batch, row.largest_batch_by = int((BUDGET_BYTES - row.line[0]) // row.line[1]), "predicted"
        return

    def fits(batch: int) -> bool:
        gc.collect()
        torch.cuda.empty_cache()
        try:
            train_two_steps(partial(build, row.name, row.mode), batch, settings.side, settings.device, dtype)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return False
        return True

    with capped(settings.device, BUDGET_BYTES):
        row.largest_batch, row.largest_batch_by = largest_that(fits, settings.max_batch), "measured"
    gc.collect()
    torch.cuda.empty_cache()


def measure_memory(row: ModelRow, settings: Settings, dtype: torch.dtype) -> None:
    """Fill in the row's bytes."""
    device, side = settings.device, settings.side
    batches = settings.batches if row.mode != "reference" else (settings.batch,)  # eager's line is the baseline's
    for batch in batches:
        row.peaks[str(batch)] = peak_of_step(row, batch, settings, dtype)
    if row.mode != "reference":
        find_largest_batch(row, settings, dtype)
    model = settle(row.mode, row.name, settings, dtype)
    images, labels = random_batch(settings.batch, side, device, dtype)

    def infer(images: torch.Tensor = images) -> torch.Tensor:
        with torch.no_grad(), autocast(device, dtype):
            return model(images)

    if row.mode in ("eager", "fused"):  # without grad and dropout the others are the same
        model.eval()
        infer(images[:1])  # what the first call allocates for good is not the pass's
        row.inference = allocated(infer, device).peak
        model.train()
    else:
        loss_of(model, images[:1], labels[:1], dtype)
    ledger = model_ledger.measured(model, images, labels, dtype)
    row.kept, row.ledger = ledger.allocated, ledger.kinds
    if row.mode in OURS:
        row.predicted = model_ledger.predicted(model, images, dtype)
    row.largest_activation = settings.batch * model.embed_dim * side * side * dtype.itemsize


def memory_rows(name: str, settings: Settings, dtype: torch.dtype) -> list[ModelRow]:
    """The model's modes one after the other; a fused result that fails its check gets no number."""
    served, error = check_model(name, settings.device, dtype)
    rows = []
    for mode in MODES:
        row = ModelRow(name, name_of(dtype), mode)
        rows.append(row)
        if mode in OURS:
            row.backends, row.error, row.tolerance = served, error, MODEL_TOLERANCE * TOLERANCE[dtype]
            if error is not None and not error <= row.tolerance:
                row.status = "failed"
        if row.status == "ok":
            with marking_out_of_memory(row):
                measure_memory(row, settings, dtype)
        gc.collect()
    return rows


# --- time --------------------------------------------------------------------------------------------------------


def speed_rows(rows: Sequence[ModelRow], settings: Settings, dtype: torch.dtype) -> list[dict[str, Any]]:
    """A training step of every mode that could be measured, in turn; the first is what ratios are to."""
    name = rows[0].name
    images, labels = random_batch(settings.batch, settings.side, settings.device, dtype)
    steps: dict[str, Callable[[], None]] = {}
    notes: dict[str, str] = {}
    modes = [row.mode for row in rows if row.status == "ok"]
    for mode in [*modes, "torch.compile"] if settings.compile else modes:
        model = settle("eager" if mode == "torch.compile" else mode, name, settings, dtype)
        optimizer = torch.optim.AdamW(model.parameters())
        trained = torch.compile(model, dynamic=False) if mode == "torch.compile" else model
        run = partial(step, trained, optimizer, images, labels, dtype)
        start = time.perf_counter()
        try:
            if mode == "torch.compile":
                run()
            else:  # warm, at the price of one image: AdamW's state, the libraries' first calls
                step(model, optimizer, images[:1], labels[:1], dtype)
        except Exception as error:  # what the compiler raises is its own affair: the row says so
            if mode != "torch.compile" and not (isinstance(error, RuntimeError) and out_of_memory(error)):
                raise
            notes[mode] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"
            continue
        if mode == "torch.compile":
            notes[mode] = f"compiled in {time.perf_counter() - start:.0f} s"
        steps[mode] = run
    rounds = {"budget": settings.budget, "min_repeats": settings.repeats, "limit": float("inf")}
    once = {"reference": steps.pop("reference")} if "reference" in steps else {}  # the oracle is nobody's choice
    timings = interleaved(list(once.values()), settings.device, max_repeats=1)
    timings += interleaved(list(steps.values()), settings.device, **rounds)
    steps = once | steps
    found = dict(zip(steps, timings, strict=True))
    return [
        {
            "name": name,
            "dtype": name_of(dtype),
            "mode": mode,
            "status": "ok" if found.get(mode) else "out of memory" if mode in found else "fails",
            "note": notes.get(mode),
            "step": timing_json(found.get(mode)),
            "images_per_s": settings.batch / found[mode].median if found.get(mode) else None,
        }
        for mode in sorted(dict.fromkeys([*steps, *notes]), key=ORDER.index)
    ]


# --- other sizes -------------------------------------------------------------------------------------------------


def size_rows(rows: Sequence[ModelRow], settings: Settings, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Bytes kept at twice and four times the side, per pixel of the batch: linear where they are the same."""
    found = []
    for row in rows:
        if row.mode not in OURS or row.status != "ok":
            continue
        found.append(_size(row, settings.side, settings.batch, row.kept, row.predicted))
        model = settle(row.mode, row.name, settings, dtype)
        for times in (2, 4):
            side, batch = times * settings.side, max(1, settings.batch // (2 * times * times))
            images, labels = random_batch(batch, side, settings.device, dtype)
            kept = model_ledger.measured(model, images, labels, dtype).allocated
            found.append(_size(row, side, batch, kept, model_ledger.predicted(model, images, dtype)))
    return found


def _size(row: ModelRow, side: int, batch: int, kept: int, predicted: dict[str, int] | None) -> dict[str, Any]:
    return {
        "name": row.name,
        "dtype": row.dtype,
        "mode": row.mode,
        "side": side,
        "batch": batch,
        "kept_bytes": kept,
        "predicted_bytes": predicted and sum(predicted.values()),
        "per_pixel_bytes": kept / (batch * side * side),
    }


# --- all of it ---------------------------------------------------------------------------------------------------


def benchmark(settings: Settings, path: Path) -> bool:
    """Run everything, print the tables as they grow, write ``path`` after each; whether every check held."""
    start, env = time.perf_counter(), environment(settings.device, settings.dtypes[0])
    results: dict[str, Any] = {
        "benchmark": "model_mem",
        "environment": env | {"dtype": ", ".join(map(name_of, settings.dtypes))},
        "settings": {
            "batch": settings.batch,
            "batches": list(settings.batches),
            "image_size": settings.side,
            "classes": CLASSES,
            "budget_bytes": BUDGET_BYTES,
            "budget_s": settings.budget,
            "table1_gb": TABLE1_GB,
        },
        "memory": [],
        "speed": [],
        "sizes": [],
    }

    def keep(section: str, rows: list[dict[str, Any]], table: Callable[..., Any]) -> None:
        results[section] += rows
        results["wall_s"] = round(time.perf_counter() - start, 1)
        write_json(path, results)
        print(table(results | {section: rows}).text(), flush=True)
        gc.collect()

    threads = f"{env['threads']} threads, " if env["device"] == "cpu" else ""
    print(f"{env['device_name']}, {threads}torch {env['torch']}, {results['environment']['dtype']}\n", flush=True)
    verify(settings.device, settings.dtypes)
    for dtype in settings.dtypes:
        for name in settings.models:
            rows = memory_rows(name, settings, dtype)
            keep("memory", [asdict(row) for row in rows], memory_table)
            print(ledger_table(results | {"memory": results["memory"][-len(rows) :]}).text(), flush=True)
            keep("sizes", size_rows(rows, settings, dtype), sizes_table)
            keep("speed", speed_rows(rows, settings, dtype), speed_table)
            torch.compiler.reset()
    print("\n".join(noise_lines(results)))
    draw(results, path.with_suffix(".png"))
    print(f"{path} and .png, {results['wall_s']:.0f} s")
    return all(row["status"] != "failed" for row in results["memory"])


# --- the command line --------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 and one line on a bad value."""
    parser = Parser("model_mem", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_shared("JSON and PNG", dtypes=("bfloat16", "float32"))
    parser.add_argument("--models", type=some_of(tuple(TABLE1_GB)), default=tuple(TABLE1_GB), help="comma-separated")
    parser.add_argument("--batch", type=positive, help="images of a step; unset: 32")
    parser.add_argument("--threads", type=positive, default=2, help="of the CPU")
    parser.add_argument("--budget", type=seconds, help="seconds of steps per mode, at least 3 steps; unset: 1")
    parser.add_argument("--compile", action="store_true", help="time torch.compile of the eager model as well")
    parser.add_argument("--quick", action="store_true", help="one layer, small images, few repetitions: a test")
    parser.add_argument("--plot", type=Path, metavar="FILE.json", help="measure nothing: redraw FILE.png")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE.json", help="measure nothing: print FILE.json's tables as Markdown"
    )
    arguments = parser.parse_args(argv)
    for flag in ("plot", "markdown"):
        if getattr(arguments, flag):
            arguments.results = parser.results(f"--{flag}", getattr(arguments, flag), "model_mem")
            return arguments
    parser.check_shared(arguments)
    return arguments


def settings_of(arguments: argparse.Namespace) -> Settings:
    """What the flags ask for; ``--quick`` changes defaults, not what was given."""
    quick = arguments.quick
    return Settings(
        device=torch.device(arguments.device),
        dtypes=tuple(DTYPES[name] for name in arguments.dtype),
        models=tuple(name.replace("-5/", "-1/") if quick else name for name in arguments.models),
        batch=arguments.batch or (4 if quick else 32),
        side=8 if quick else IMAGE_SIZE,
        compile=arguments.compile,
        budget=arguments.budget or (0.01 if quick else 1.0),
        repeats=2 if quick else 3,
        max_batch=16 if quick else 1 << 20,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write JSON and PNG; 0, or 1 if a fused result is wrong."""
    arguments = parse(argv)
    if arguments.plot:
        draw(arguments.results, arguments.plot.with_suffix(".png"))
        return 0
    if arguments.markdown:
        print(report(arguments.results))
        return 0
    torch.set_num_threads(arguments.threads)
    settings = settings_of(arguments)
    with warnings.catch_warnings():  # the tables say what is served by the reference
        warnings.filterwarnings("ignore", message=".*is served by the reference", category=UserWarning)
        correct = benchmark(settings, arguments.out / f"model_mem-{settings.device.type}.json")
    return 0 if correct else 1


if __name__ == "__main__":
    sys.exit(main())
