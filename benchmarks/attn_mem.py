"""Memory and time of the attention mechanisms and of the three models, reference against fused. See README.md."""

import argparse
import gc
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# Both are read when torch is imported: its profiler and its CPU allocator write a line or more per measurement.
os.environ["KINETO_LOG_LEVEL"] = os.environ.get("KINETO_LOG_LEVEL", "99")
os.environ["TORCH_CPP_LOG_LEVEL"] = os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
import torch.nn.functional as F
from attn_mem_plot import draw
from common import (
    DTYPES,
    HEAD_DIM,
    HEADS,
    TOLERANCE,
    Parser,
    Row,
    Run,
    crossover,
    environment,
    in_float64,
    lengths_of,
    marking_out_of_memory,
    measure,
    name_of,
    positive,
    some_of,
    verify,
    write_json,
)
from memory import Timing, allocated
from torch import Tensor
from training import (
    IMAGE_SIZE,
    MODEL_TOLERANCE,
    TABLE1_GB,
    build,
    check_model,
    served_ops,
    train_two_steps,
)

import cxv_kernels
from cxv_kernels import backends

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
BATCH = {"cpu": 1, "cuda": 8}
MODEL_BATCH = 32
MECHANISMS = ("performer", "linear", "nystrom", "sdpa")

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Settings:
    """What to measure, where."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    lengths: tuple[int, ...]
    mechanisms: tuple[str, ...]
    models: tuple[str, ...]
    model_batch: int
    budget: float  # seconds per callable and length
    max_repeats: int


# --- attention ---------------------------------------------------------------------------------------------------


def attention(mechanism: str, backend: str | None, projection: Tensor) -> Attend:
    """The mechanism as a function of q, k and v, served by ``backend`` (None: the fastest that can)."""
    if mechanism == "performer":
        return lambda q, k, v: cxv_kernels.performer_attention(q, k, v, projection, backend=backend)
    if mechanism == "linear":
        return lambda q, k, v: cxv_kernels.linear_attention(q, k, v, backend=backend)
    return lambda q, k, v: cxv_kernels.nystrom_attention(q, k, v, backend=backend)


def sweep(settings: Settings) -> Iterator[list[Row]]:
    """Measure every mechanism at one length after the other; yields the rows of a length when they are complete."""
    device, dtype = settings.device, settings.dtype
    features = cxv_kernels.num_random_features(HEAD_DIM)
    projection = cxv_kernels.orthogonal_projection(
        features, HEAD_DIM, generator=torch.Generator().manual_seed(0), device=device
    )
    for tokens in settings.lengths:
        generator = torch.Generator().manual_seed(tokens)
        shape = (settings.batch, HEADS, tokens, HEAD_DIM)
        q, k, v, grad_out = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))
        inputs = tuple(x.requires_grad_() for x in (q, k, v))
        rows: list[Row] = []
        runs: list[Run] = []
        for mechanism in settings.mechanisms:
            for run in _implementations(mechanism, projection, inputs, grad_out):
                rows.append(run.row)
                if run.row.status == "ok":
                    runs.append(run)
        rounds = {"budget": settings.budget, "max_repeats": settings.max_repeats}
        measure(runs, TOLERANCE[dtype], device, **rounds)
        yield rows


def _implementations(mechanism: str, projection: Tensor, inputs: tuple[Tensor, ...], grad_out: Tensor) -> Iterator[Run]:
    tokens = grad_out.shape[2]
    if mechanism == "sdpa":
        yield Run(Row("sdpa", "torch", {}, tokens), F.scaled_dot_product_attention, inputs, grad_out)
        return
    op = f"{mechanism}_attention"
    exact = in_float64(attention(mechanism, "reference", projection.double()), inputs, grad_out)
    for implementation, backend in (("reference", "reference"), ("fused", None)):
        row = Row(mechanism, implementation, {op: backends.resolve(op, grad_out, backend)}, tokens)
        if implementation == "fused" and row.backends[op] == "reference":
            row.status = "= reference"
        yield Run(row, attention(mechanism, backend, projection), inputs, grad_out, (projection,), exact)


def crossovers(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each implementation and quantity the least N from which on it beats SDPA at every measured N, or None."""
    sdpa = {row.tokens: row for row in rows if row.name == "sdpa"}
    measured = {(r.name, r.implementation): r.backends for r in rows if r.name != "sdpa" and r.status != "= reference"}
    quantities: dict[str, Callable[[Row], float | None]] = {
        "time": lambda row: row.forward_backward and row.forward_backward.median,
        "peak": lambda row: row.peak,
    }
    found = []
    for name, implementation in measured if sdpa else ():
        mine = [row for row in rows if (row.name, row.implementation) == (name, implementation)]
        for quantity, value in quantities.items():
            pairs = {row.tokens: (value(row), value(sdpa[row.tokens])) for row in mine}
            least = crossover({n: a is not None and (b is None or a < b) for n, (a, b) in pairs.items()})
            found.append({"name": name, "implementation": implementation, "quantity": quantity, "tokens": least})
    return found


# --- models ------------------------------------------------------------------------------------------------------


def training_steps(settings: Settings) -> Iterator[list[Row]]:
    """Measure the models one after the other; yields the reference's and the fused row of each."""
    for name in settings.models:
        rows = []
        for implementation in ("reference", "fused"):
            row = Row(name, implementation, {})
            rows.append(row)
            with marking_out_of_memory(row):
                _measure_model(row, settings)
            gc.collect()
        yield rows


def _measure_model(row: Row, settings: Settings) -> None:
    """Fill in the row: for the fused model what serves it and the check, then the peak of training."""
    fused = row.implementation == "fused"
    if fused:
        row.backends, row.error = check_model(row.name, settings.device, settings.dtype)
        if row.error is None:
            row.status = "= reference"
            return
        row.tolerance = MODEL_TOLERANCE * TOLERANCE[settings.dtype]
        if not row.error <= row.tolerance:
            row.status = "failed"
            return

    def train() -> tuple[Any, ...]:
        make = partial(build, row.name, row.implementation)
        return train_two_steps(make, settings.model_batch, IMAGE_SIZE, settings.device, settings.dtype)

    with served_ops() as row.backends:
        row.peak = allocated(train, settings.device).peak


# --- the report --------------------------------------------------------------------------------------------------

ATTENTION_HEADER = (
    f"{'N':>6}  {'mechanism':<10} {'served by':<16} {'peak':>8} {'saved':>8}  "
    f"{'forward':>9} {'(iqr)':>8} {'ratio':>6}  {'fwd+bwd':>9} {'(iqr)':>8} {'ratio':>6}  {'error':>7}\n"
    f"{'':6}  {'':10} {'':16} {'MB':>8} {'MB':>8}  {'ms':>9} {'ms':>8} {'':>6}  {'ms':>9} {'ms':>8} {'':>6}"
)
MODEL_HEADER = (
    f"{'model':<10} {'implementation':<16} {'peak':>8} {'ratio':>6}  {'Table 1':>8}  {'error':>7}  served by\n"
    + (f"{'':10} {'':16} {'GB':>8} {'':>6}  {'GB':>8}")
)


def attention_line(row: Row, reference: Row | None) -> str:
    """One line of the sweep's table; ratios are to the mechanism's reference."""
    served = row.implementation
    if row.implementation == "fused" and row.status != "= reference":
        served = f"fused ({', '.join(row.backends.values())})"
    head = f"{row.tokens:>6,}  {row.name:<10} {served:<16} "
    if row.status != "ok":
        return head + _status(row)
    line = head + f"{row.peak / 1e6:8.2f} {row.saved.beyond_inputs / 1e6:8.3f}"
    for part in ("forward", "forward_backward"):
        timing: Timing = getattr(row, part)
        of = getattr(reference, part) if reference and reference is not row else None
        ratio = f"{timing.median / of.median:5.2f}x" if of else ""
        if of and (timing.noisy or of.noisy):
            ratio = "noisy"
        spread = f"({timing.spread * 1e3:.2f})" if len(timing.samples) > 1 else "(once)"
        line += f"  {timing.median * 1e3:9.2f} {spread:>8} {ratio:>6}"
    return line + (f"  {row.error:7.0e}" if row.error is not None else "")


def model_line(row: Row, reference: Row | None) -> str:
    """One line of the models' table."""
    head = f"{row.name:<10} {row.implementation:<16} "
    if row.status != "ok":
        return head + _status(row)
    ratio = f"{row.peak / reference.peak:5.2f}x" if reference and reference is not row and reference.peak else ""
    table1 = f"{TABLE1_GB[row.name]:8.1f}" if row.implementation == "reference" else " " * 8
    error = f"{row.error:7.0e}" if row.error is not None else " " * 7
    served = ", ".join(f"{op}: {backend}" for op, backend in row.backends.items()) if reference is not row else ""
    return f"{head}{row.peak / 1e9:8.3f} {ratio:>6}  {table1}  {error}  {served}".rstrip()


def _status(row: Row) -> str:
    if row.status == "= reference":
        return f"= reference (no fused kernel serves {', '.join(row.backends)} here)"
    if row.status == "failed":
        return f"FAILED: error {row.error:.1e} against float64, {row.tolerance:.0e} allowed"
    return row.status


def crossover_lines(found: Sequence[dict[str, Any]], longest: int) -> list[str]:
    """The crossovers in words, one line per implementation."""
    lines = []
    for name, implementation in dict.fromkeys((f["name"], f["implementation"]) for f in found):
        least = {
            f["quantity"]: f["tokens"] for f in found if (f["name"], f["implementation"]) == (name, implementation)
        }
        words = {q: f"from N = {n:,}" if n else f"none up to {longest:,}" for q, n in least.items()}
        lines.append(f"  {name:<10} {implementation:<10}  time {words['time']:<20}  peak {words['peak']}")
    return lines


def benchmark(settings: Settings, path: Path) -> tuple[dict[str, Any], bool]:
    """Run everything, print the tables as they grow, write ``path`` with each; the results, and whether every check
    held."""
    start, env = time.perf_counter(), environment(settings.device, settings.dtype)
    attention_rows: list[Row] = []
    model_rows: list[Row] = []
    results: dict[str, Any] = {
        "benchmark": "attn_mem",
        "environment": env,
        "settings": {
            "batch": settings.batch,
            "heads": HEADS,
            "head_dim": HEAD_DIM,
            "random_features": cxv_kernels.num_random_features(HEAD_DIM),
            "lengths": list(settings.lengths),
            "model_batch": settings.model_batch,
            "image_size": IMAGE_SIZE,
        },
    }

    def keep() -> None:
        results["attention"] = [row.to_json() for row in attention_rows]
        results["crossover_with_sdpa"] = crossovers(attention_rows)
        results["models"] = [row.to_json() | {"table1_gb": TABLE1_GB[row.name]} for row in model_rows]
        results["wall_s"] = round(time.perf_counter() - start, 1)
        write_json(path, results)

    print(f"{env['device_name']}, {env['threads']} threads, torch {env['torch']}, {env['dtype']}")
    verify(settings.device, [settings.dtype])
    if settings.mechanisms:
        print(f"\nAttention, batch {settings.batch}, {HEADS} heads of {HEAD_DIM}. Peak: forward + backward, above the")
        print("inputs. Saved: for backward, beyond the inputs. Ratio: to the mechanism's reference.\n")
        print(ATTENTION_HEADER)
    for rows in sweep(settings):
        references = {row.name: row for row in rows if row.implementation == "reference"}
        for row in rows:
            print(attention_line(row, references.get(row.name)))
        print(flush=True)
        attention_rows += rows
        keep()
    if found := crossovers(attention_rows):
        print("Beats softmax attention (F.scaled_dot_product_attention) in forward + backward:")
        print("\n".join(crossover_lines(found, max(settings.lengths))), flush=True)
    noisy = [row for row in attention_rows if row.noisy]
    if noisy:
        print(f"\nNoisy: in {len(noisy)} rows an interquartile range is over half its median: the machine was busy. Do")
        print("not trust those times, nor the crossovers in time: run again. Memory is not affected.", flush=True)
    if settings.models:
        print(f"\nTraining step with AdamW, batch {settings.model_batch}, 3×{IMAGE_SIZE}×{IMAGE_SIZE}. Peak: all that")
        print("the training holds. Table 1: the paper's GPU GB, float32, batch 32.\n")
        print(MODEL_HEADER)
    for rows in training_steps(settings):
        for row in rows:
            print(model_line(row, rows[0]), flush=True)
        model_rows += rows
        keep()
    if settings.dtype in (torch.float16, torch.bfloat16):
        print(
            f"\nIn {name_of(settings.dtype)} the performer's and linear attention's reference computes in float32: it"
        )
        print("is the oracle, not the fastest PyTorch. The models train under autocast, their weights in float32.")
    keep()
    return results, all(row.status != "failed" for row in attention_rows + model_rows)


# --- the command line --------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 and one line on a bad value."""
    parser = Parser("attn_mem", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_shared("JSON and PNG")
    parser.add_argument("--batch", type=positive, help=f"of the sweep; unset: {BATCH['cpu']} on cpu, 8 on cuda")
    parser.add_argument("--lengths", type=lengths_of, help="numbers of tokens, comma-separated; unset: 256 to 16384")
    parser.add_argument("--mechanisms", type=some_of(MECHANISMS), default=MECHANISMS, help="comma-separated")
    parser.add_argument("--no-models", action="store_true", help="leave out the training steps")
    parser.add_argument("--threads", type=positive, help="of the CPU; unset: PyTorch's choice")
    parser.add_argument("--quick", action="store_true", help="short lengths, small batch, few repetitions: a test")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.json", help="measure nothing: redraw FILE.png from FILE.json"
    )
    arguments = parser.parse_args(argv)
    if arguments.plot:
        arguments.results = parser.results("--plot", arguments.plot, "attn_mem")
    else:
        parser.check_shared(arguments)
    return arguments


def settings_of(arguments: argparse.Namespace) -> Settings:
    """What the flags ask for; ``--quick`` changes defaults, not what was given."""
    quick = arguments.quick
    kind = arguments.device
    return Settings(
        device=torch.device(kind),
        dtype=DTYPES[arguments.dtype],
        batch=arguments.batch or (1 if quick else BATCH[kind]),
        lengths=arguments.lengths or ((128, 256) if quick else LENGTHS),
        mechanisms=arguments.mechanisms,
        models=() if arguments.no_models else tuple(TABLE1_GB),
        model_batch=2 if quick else MODEL_BATCH,
        budget=0.01 if quick else 0.25,
        max_repeats=5 if quick else 100,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write JSON and PNG; 0, or 1 if a fused result is wrong."""
    arguments = parse(argv)
    if arguments.plot:
        draw(arguments.results, arguments.plot.with_suffix(".png"))
        return 0
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    settings = settings_of(arguments)
    path = arguments.out / f"attn_mem-{settings.device.type}.json"
    with warnings.catch_warnings():  # the table says what is served by the reference
        warnings.filterwarnings("ignore", message=".*is served by the reference", category=UserWarning)
        results, correct = benchmark(settings, path)
    draw(results, path.with_suffix(".png"))
    print(f"\n{path} and .png, {results['wall_s']:.0f} s")
    return 0 if correct else 1


if __name__ == "__main__":
    sys.exit(main())
