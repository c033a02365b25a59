"""Measure a training step of the models: peak memory, saved activations, largest batch and time.

    python benchmarks/model_step.py --models cpv-5/4 --dtype bfloat16

Writes results/model_step-<device>.csv and .png.
"""

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import _harness as bench  # imported before torch: it sets log levels
from _report import BUDGET_BYTES, show, step_memory, step_times
from plots import draw_steps

from cxv_kernels.testing import peak_memory

# isort: split
import torch
from torch import nn

MODES = ("eager", "reference", "fused", "checkpointed")


def ready(name: str, mode: str, images: torch.Tensor) -> nn.Module:
    """A model in training mode on the device of the images."""
    torch.manual_seed(0)
    return bench.build(name, mode).to(images.device, images.dtype).train()


def memory_rows(
    name: str, mode: str, batch: int, side: int, device: torch.device, dtype: torch.dtype
) -> Iterator[bench.Row]:
    """Peaks at two batch sizes, saved bytes, the peak of inference and, on a GPU, the largest batch."""
    values = {"name": name, "implementation": mode, "dtype": bench.name_of(dtype), "size": side}
    for size in sorted({max(1, batch // 4), batch}):
        row = bench.Row("memory", **values, batch=size)
        with bench.marking_out_of_memory(row):
            if mode in ("fused", "checkpointed"):
                bench.check_model(row, device, dtype, side)
            if row.status == "ok":
                row.peak_bytes = bench.peak_of_training(name, mode, size, side, device, dtype)
                images, labels = bench.random_batch(size, side, device, dtype)
                model = ready(name, mode, images)
                bench.loss_of(model, images[:1], labels[:1], dtype)  # the first call allocates memory that stays
                row.saved_bytes = peak_memory(partial(bench.loss_of, model, images, labels, dtype), device).kept
        yield row
        if row.status != "ok":
            return
    if mode in ("eager", "fused"):
        row = bench.Row("inference", **values, batch=batch)
        model.eval()

        def infer() -> torch.Tensor:
            with torch.no_grad(), bench.autocast(device, dtype):
                return model(images)

        infer()
        row.peak_bytes = peak_memory(infer, device).peak
        yield row
    if device.type == "cuda":
        with within_budget(device):
            yield bench.Row(
                "largest batch", **values, batch=largest_batch(partial(fits, name, mode, side, device, dtype))
            )


@contextmanager
def within_budget(device: torch.device) -> Iterator[None]:
    """In the block, CUDA's allocator refuses more than 16 GB."""
    index = torch.cuda.current_device() if device.index is None else device.index
    total = torch.cuda.get_device_properties(index).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, BUDGET_BYTES / total), index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, index)


def fits(name: str, mode: str, side: int, device: torch.device, dtype: torch.dtype, batch: int) -> bool:
    """Whether a training step with this batch fits."""
    gc.collect()
    torch.cuda.empty_cache()
    try:
        bench.peak_of_training(name, mode, batch, side, device, dtype)
    except RuntimeError as error:
        if not bench.out_of_memory(error):
            raise
        return False
    return True


def largest_batch(fits: Callable[[int], bool], limit: int = 4096) -> int:
    """The largest batch up to ``limit`` that fits, by doubling and bisection; 0 if none does."""
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > max(1, low // 64):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def time_rows(
    name: str, modes: Sequence[str], batch: int, side: int, device: torch.device, dtype: torch.dtype, **rounds: Any
) -> list[bench.Row]:
    """A training step in each mode, in turn. A mode that does not compile gets a note."""
    images, labels = bench.random_batch(batch, side, device, dtype)
    rows, steps = [], []
    for mode in modes:
        row = bench.Row("time", name, mode, bench.name_of(dtype), batch=batch, size=side)
        rows.append(row)
        model = ready(name, "eager" if mode == "torch.compile" else mode, images)
        optimizer = torch.optim.AdamW(model.parameters())
        trained = torch.compile(model, dynamic=False) if mode == "torch.compile" else model
        step = partial(bench.training_step, trained, optimizer, images, labels, dtype)
        with (bench.noting_failures if mode == "torch.compile" else bench.marking_out_of_memory)(row):
            step()
            steps.append(step)
    timed = [row for row in rows if row.status == "ok"]
    for row, timing in zip(timed, bench.interleaved(steps, device, **rounds), strict=True):
        row.set_times(training=timing)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write CSV and picture; 1 if a fused result is wrong."""
    parser = bench.Parser(__doc__.partition("\n")[0], dtypes=("bfloat16", "float32"))
    parser.add_names("--models", bench.TABLE1_GB)
    parser.add_argument("--batch", type=bench.positive, help="images of a step; default: 32")
    parser.add_argument("--compile", action="store_true", help="time the compiled eager model, too")
    arguments = parser.parse(argv)
    device, quick = torch.device(arguments.device), arguments.quick
    batch, side = arguments.batch or (4 if quick else 32), 8 if quick else bench.IMAGE_SIZE
    rounds = {"budget": 0.1, "max_repeats": 3} if quick else {"budget": 6.0, "limit": 60.0}
    results = bench.Results("model_step", arguments)
    for dtype in arguments.dtype:
        for name in bench.progress(arguments.models):
            for mode in MODES:
                for row in memory_rows(name, mode, batch, side, device, dtype):
                    results.add(row)
                gc.collect()
            mine = [row for row in results.rows if row.name == name and row.dtype == bench.name_of(dtype)]
            failed = {row.implementation for row in mine if row.status not in ("ok", "= reference")}
            wanted = [*MODES, *(["torch.compile"] if arguments.compile else [])]
            modes = [mode for mode in wanted if mode not in failed]
            results.add(*time_rows(name, modes, batch, side, device, dtype, **rounds))
            torch.compiler.reset()
    draw_steps(results.rows, results.path.with_suffix(".png"))
    words = (
        f"Training step with AdamW, batch {batch}, 3×{side}×{side}. Peak: everything that the step holds.\n"
        "Saved: between forward and backward. Ratio: to eager, which uses PyTorch's dropout."
    )
    return show(results, words, step_memory(results.rows).text(), step_times(results.rows).text())


if __name__ == "__main__":
    sys.exit(main())
