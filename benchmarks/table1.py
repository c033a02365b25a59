"""The paper's Table 1 rebuilt: parameters, multiply-adds, memory, speed and accuracy of its models. See README.md."""

import argparse
import csv
import gc
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_all_start_methods, get_context
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

# Both are read when torch is imported: its profiler and its CPU allocator write a line or more per measurement.
os.environ["KINETO_LOG_LEVEL"] = os.environ.get("KINETO_LOG_LEVEL", "99")
os.environ["TORCH_CPP_LOG_LEVEL"] = os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")

import counting
import torch
from common import DTYPES, Parser, environment, name_of, positive, seconds, some_of, timing_json, verify, write_json
from memory import Timing, allocated, interleaved, out_of_memory, saved_for_backward
from table1_plot import draw
from table1_report import accuracy_table, counts_table, measures_table, report, spreadsheet
from torch import nn
from training import (
    CLASSES,
    IMAGE_SIZE,
    autocast,
    loss_of,
    random_batch,
    step,
    train_two_steps,
    use_plain_dropout,
)
from training_runs import Run, add_arguments, described, execute, read

import cxv
from cxv.models.registry import TABLE_1, has_fused_ops
from cxv.training import InputError
from cxv.training.summary import summarise_seeds

# How often torchsummary counted a parameter: the authors' channel norms call theirs g and b, which it does not see, and
# WaveMix calls one MLP at four levels.
TIMES = {
    "wavemix-5": {"blocks.*.mlp.*": 4},
    "hybrid-vilt-6/8": {"*.pre_norm.*": 0},
    **{name: {"*.conv_norm.norm.*": 0} for name in ("cnv-5/4", "cltv-5/4", "cpv-5/4")},
}

# What rows in one file share.
SAME = [("settings", key) for key in ("batch", "image_size", "classes")]
SAME += [("environment", key) for key in ("device_name", "threads", "dtype", "torch", "cxv", "build", "malloc")]


@dataclass
class Row:
    """One model in plain PyTorch or with the fused ops. Bytes; images per second; multiply-adds of one image."""

    name: str
    fused: bool
    status: str = "ok"
    parameters: int = 0
    torchsummary: int = 0
    macs: int = 0
    true_macs: int = 0
    # by dtype: "float32" as the authors ran it, or the 16-bit autocast
    kept: dict[str, int] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)
    train: dict[str, dict[str, Any]] = field(default_factory=dict)  # a step's time
    inference: dict[str, dict[str, Any]] = field(default_factory=dict)
    batch: int = 0


@dataclass
class Settings:
    """What to measure, where."""

    models: tuple[str, ...]
    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    batch: int
    budget: float
    repeats: int
    threads: int


def counted(name: str, fused: bool, batch: int) -> Row:
    """A row with what follows from the architecture alone."""
    model = cxv.create_model(name, num_classes=CLASSES)
    image = torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    return Row(
        name,
        fused,
        parameters=counting.parameters(model),
        torchsummary=counting.torchsummary_parameters(model, TIMES.get(name, {})),
        macs=counting.layer_macs(model, image),
        true_macs=counting.true_macs(model, image),
        batch=batch,
    )


def measure(row: Row, settings: Settings, dtype: torch.dtype) -> None:
    """Fill in bytes and times for a dtype; a model that does not fit says so."""
    make = partial(_build, row)
    key, device, batch = name_of(dtype), settings.device, settings.batch
    try:
        row.peak[key] = allocated(lambda: train_two_steps(make, batch, IMAGE_SIZE, device, dtype), device).peak
        torch.manual_seed(0)
        images, labels = random_batch(batch, IMAGE_SIZE, device, dtype)
        model = make().to(device, images.dtype).train()
        held = (*model.parameters(), *model.buffers(), images, labels)
        optimizer = torch.optim.AdamW(model.parameters())

        def first_step() -> None:
            losses: list[torch.Tensor] = []
            forward = lambda: losses.append(loss_of(model, images, labels, dtype))  # noqa: E731
            row.kept[key] = saved_for_backward(forward, held).beyond_inputs
            losses.pop().backward()
            optimizer.step()

        training = partial(step, model, optimizer, images, labels, dtype)
        row.train[key] = timing_json(_timed(training, settings, first_step))
        model.eval()
        row.inference[key] = timing_json(_timed(partial(_infer, model, images, dtype), settings))
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not out_of_memory(error):
            raise
        row.status = "out of memory"


def measured(row: Row, settings: Settings) -> Row:
    """The row with every dtype measured."""
    torch.set_num_threads(settings.threads)
    with _quiet():
        if row.fused:
            verify(settings.device, settings.dtypes)
        for dtype in settings.dtypes:
            measure(row, settings, dtype)
            gc.collect()
    return row


def _context() -> BaseContext:
    """How a row's process starts: as a copy of one that has imported all and computed nothing, where that exists."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["cxv.training", "matplotlib.pyplot", "timm", "torchvision"])
    return context


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():  # what serves an op is not this table's matter; ConvMixer's kernel is even
        warnings.filterwarnings("ignore", message=".*is served by the reference", category=UserWarning)
        warnings.filterwarnings("ignore", message="Using padding='same' with even kernel", category=UserWarning)
        yield


def _build(row: Row) -> nn.Module:
    model = cxv.create_model(row.name, num_classes=CLASSES, use_fused=row.fused)
    if not row.fused:
        use_plain_dropout(model)
    return model


def _timed(run: Callable[[], Any], settings: Settings, first_run: Callable[[], Any] | None = None) -> Timing:
    """Its time after a first run; that of the first where one takes very long."""
    start = time.perf_counter()
    (first_run or run)()
    first = time.perf_counter() - start
    if settings.device.type == "cpu" and first > 8 * settings.budget:
        return Timing((first,))
    (timing,) = interleaved(
        [run], settings.device, budget=settings.budget, min_repeats=settings.repeats, limit=4 * settings.budget
    )
    if timing is None:
        raise torch.OutOfMemoryError
    return timing


def _infer(model: nn.Module, images: torch.Tensor, dtype: torch.dtype) -> None:
    with torch.no_grad(), autocast(images.device, dtype):
        model(images)


def train(arguments: argparse.Namespace) -> None:
    """Train the models by the paper's recipe, seed after seed, but for those that the folder has lines of."""
    runs = [Run(name, seed=seed) for seed in arguments.seeds for name in arguments.models]
    path = arguments.out / f"table1-{arguments.dataset or arguments.data}.jsonl"
    execute(runs, arguments, path, log=partial(print, flush=True))
    torch.cuda.empty_cache()  # the rows' processes need the memory


def trained(folder: Path) -> dict[str, Any]:
    """By dataset, what the runs in the folder came to: the test top-1 (%) of each model over its seeds.

    Raises:
        InputError: a file of runs holds something else.
    """
    found = {}
    for path in sorted(folder.glob("table1-*.jsonl")):
        if not (lines := read(path)):
            continue
        models: dict[str, dict[int, dict[str, Any]]] = {}
        for line in lines:
            models.setdefault(line["run"]["model"], {})[line["run"]["seed"]] = line["summary"]
        found[path.stem.removeprefix("table1-")] = {
            "runs": described(lines),
            "settings": lines[0]["settings"],
            "models": {name: summarise_seeds(seeds) for name, seeds in models.items()},
        }
    return found


def empty(settings: Settings) -> dict[str, Any]:
    """The results before the first row."""
    return {
        "benchmark": "table1",
        "environment": environment(settings.device, settings.dtypes[0])
        | {"dtype": ", ".join(map(name_of, settings.dtypes))},
        "settings": {"batch": settings.batch, "image_size": IMAGE_SIZE, "classes": CLASSES},
        "trained": {},
        "rows": [],
        "wall_s": 0.0,
    }


def benchmark(settings: Settings, results: dict[str, Any], path: Path) -> None:
    """Measure the models that ``results`` does not have yet; the JSON is written after each row."""
    start = time.perf_counter() - results["wall_s"]
    have = {(row["name"], row["fused"]) for row in results["rows"]}
    order = list(TABLE_1)
    for name in settings.models:
        for fused in (False, True) if has_fused_ops(name) else (False,):
            if (name, fused) in have:
                continue
            row = counted(name, fused, settings.batch)
            # in a process of its own: what a row leaves in the allocator is not there for the next, and one that the
            # system kills for its memory costs no other
            with ProcessPoolExecutor(1, mp_context=_context()) as process:
                try:
                    row = process.submit(measured, row, settings).result()
                except BrokenProcessPool:
                    row.status = "killed"
            results["rows"].append(asdict(row))
            results["rows"].sort(key=lambda row: (order.index(row["name"]), row["fused"]))
            results["wall_s"] = round(time.perf_counter() - start, 1)
            write_json(path, results)
            print(f"{name}{' fused' if fused else ''}: {row.status}, {results['wall_s']:.0f} s so far", flush=True)
    write_json(path, results)  # with what was trained, even if all rows were there
    with path.with_suffix(".csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(spreadsheet(results))
    draw(results, path.with_suffix(".png"))
    tables = (counts_table(results), measures_table(results), accuracy_table(results))
    print("", *(table.text() for table in tables if table.rows), f"{path}, .csv and .png", sep="\n")


# --- the command line --------------------------------------------------------------------------------------------


def command_line() -> Parser:
    """What it understands."""
    parser = Parser("table1", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_shared("JSON, CSV and PNG", dtypes=("float32", "bfloat16"))
    parser.add_argument("--models", type=some_of(tuple(TABLE_1)), default=tuple(TABLE_1), help="comma-separated")
    parser.add_argument("--batch", type=positive, help="images of a step; unset: 32, as the paper's memory")
    parser.add_argument("--threads", type=positive, default=2, help="of the CPU")
    parser.add_argument("--budget", type=seconds, default=0.4, help="seconds of steps per number, at least 2 steps")
    parser.add_argument("--quick", action="store_true", help="a batch of 2, one step: a test")
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows that the JSON in --out has, measured alike on this machine"
    )
    parser.add_argument(
        "--train", action="store_true", help="first train the models (see training below), a JSON line each in --out"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.json", help="measure nothing: redraw FILE.png")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE.json", help="measure nothing: print FILE.json's tables as Markdown"
    )
    add_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train if wanted, measure, print, write JSON, CSV and PNG; exits with status 2 and one line on a bad value."""
    parser = command_line()
    arguments = parser.parse_args(argv)
    if arguments.plot:
        draw(parser.results("--plot", arguments.plot, "table1"), arguments.plot.with_suffix(".png"))
        return 0
    if arguments.markdown:
        print(report(parser.results("--markdown", arguments.markdown, "table1")))
        return 0
    parser.check_shared(arguments)
    torch.set_num_threads(arguments.threads)
    settings = Settings(
        models=arguments.models,
        device=torch.device(arguments.device),
        dtypes=tuple(DTYPES[name] for name in arguments.dtype),
        batch=arguments.batch or (2 if arguments.quick else 32),
        budget=0.001 if arguments.quick else arguments.budget,
        repeats=1 if arguments.quick else 2,
        threads=arguments.threads,
    )
    path, results = arguments.out / f"table1-{settings.device.type}.json", empty(settings)
    if arguments.resume and path.exists():
        found = parser.results("--resume", path, "table1")
        if any(found[part].get(key) != results[part].get(key) for part, key in SAME):
            parser.error(f"argument --resume: {path} was measured with other arguments, versions or on another machine")
        results = found
    with _quiet():
        try:
            if arguments.train:
                train(arguments)
            results["trained"] = trained(arguments.out)
        except InputError as error:
            parser.error(str(error))
        benchmark(settings, results, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
