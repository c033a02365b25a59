"""Memory and time of the attention mechanisms and of the three models, reference against fused. See README.md."""

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

# Both are read when torch is imported: its profiler and its CPU allocator write a line or more per measurement.
os.environ["KINETO_LOG_LEVEL"] = os.environ.get("KINETO_LOG_LEVEL", "99")
os.environ["TORCH_CPP_LOG_LEVEL"] = os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
import torch.nn.functional as F
from attn_mem_plot import draw
from memory import Saved, Timing, allocated, interleaved, saved_for_backward
from torch import Tensor

import cxv
import cxv_kernels
from cxv_kernels import _extension, backends

HEADS, HEAD_DIM = 4, 32  # the paper's models
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
BATCH = {"cpu": 1, "cuda": 8}
MODEL_BATCH, IMAGE_SIZE = 32, 32
TABLE1_GB = {"cpv-5/4": 3.2, "cnv-5/4": 3.1, "cltv-5/4": 1.8}  # "GPU GB" of the paper's Table 1
MECHANISMS = ("performer", "linear", "nystrom", "sdpa")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Largest error allowed against float64, relative to the largest entry: a few roundings of the result in 16 bits; in 32
# and 64 bits, where sums and exponents lose more than the result's own rounding, about 170 and 4,500 roundings.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
MODEL_TOLERANCE = 10  # times the op's: five layers deep

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class Row:
    """One measurement, of a mechanism at one length or of a model; bytes above the baseline, times in seconds."""

    name: str
    implementation: str  # "reference", "fused", or "torch" for SDPA
    backends: dict[str, str]  # which backend served each op
    tokens: int | None = None
    status: str = "ok"  # or "failed" (the check), "out of memory", "= reference" (no fused kernel, not measured again)
    error: float | None = None  # against float64, relative to the largest entry
    tolerance: float | None = None
    peak: int | None = None
    saved: Saved | None = None
    forward: Timing | None = None  # without grad
    forward_backward: Timing | None = None

    def to_json(self) -> dict[str, Any]:
        """The row's raw numbers under names that tell their units."""
        return {
            "name": self.name,
            "implementation": self.implementation,
            "backends": self.backends,
            "tokens": self.tokens,
            "status": self.status,
            "max_relative_error": self.error,
            "tolerance": self.tolerance,
            "peak_bytes": self.peak,
            "saved_bytes": self.saved and self.saved.beyond_inputs,
            "saved_bytes_with_inputs": self.saved and self.saved.total,
            "forward": _timing_json(self.forward),
            "forward_backward": _timing_json(self.forward_backward),
        }


def _timing_json(timing: Timing | None) -> dict[str, Any] | None:
    if timing is None:
        return None
    first, third = timing.quartiles
    return {"median_s": timing.median, "q1_s": first, "q3_s": third, "samples_s": list(timing.samples)}


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

    @property
    def dtype_name(self) -> str:
        """``"float32"`` for torch.float32."""
        return str(self.dtype).removeprefix("torch.")


@contextmanager
def served_ops() -> Iterator[dict[str, str]]:
    """In the block, fill a dict with the backend that serves each op called."""
    served: dict[str, str] = {}
    resolve = backends.resolve

    def record(op: str, *arguments: Any) -> str:
        served[op] = resolve(op, *arguments)
        return served[op]

    backends.resolve = record
    try:
        yield served
    finally:
        backends.resolve = resolve


def out_of_memory(error: RuntimeError) -> bool:
    """Whether it is CUDA's or the CPU allocator's way of saying so."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def relative_error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest |got − exact| / max|exact| over the tensors; NaN where one is not finite."""
    pairs = zip(got, exact, strict=True)
    errors = [((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-300)).item() for a, b in pairs]
    return float("nan") if any(e != e for e in errors) else max(errors)


# --- attention ---------------------------------------------------------------------------------------------------


def attention(mechanism: str, backend: str | None, projection: Tensor) -> Attend:
    """The mechanism as a function of q, k and v, served by ``backend`` (None: the fastest that can)."""
    if mechanism == "performer":
        return lambda q, k, v: cxv_kernels.performer_attention(q, k, v, projection, backend=backend)
    if mechanism == "linear":
        return lambda q, k, v: cxv_kernels.linear_attention(q, k, v, backend=backend)
    return lambda q, k, v: cxv_kernels.nystrom_attention(q, k, v, backend=backend)


@dataclass
class AttentionRun:
    """One mechanism, one implementation, on the inputs that all of a length share."""

    row: Row
    attend: Attend
    inputs: tuple[Tensor, ...]  # q, k, v
    grad_out: Tensor

    @torch.no_grad()
    def forward(self) -> Tensor:
        """The output, without what backward would need."""
        return self.attend(*self.inputs)

    def forward_backward(self) -> tuple[Tensor, ...]:
        """The output and the gradients of q, k and v."""
        out = self.attend(*self.inputs)
        return (out, *torch.autograd.grad(out, self.inputs, self.grad_out))

    def measure_memory(self, exact: Sequence[Tensor] | None, tolerance: float, projection: Tensor) -> None:
        """Check against ``exact``, then fill in the row's memory; a failed check leaves it empty.

        The reference's error is reported, not judged: in float64 it is the yardstick itself.
        """
        row = self.row
        if exact is not None:
            row.error = relative_error(self.forward_backward(), exact)
        if row.implementation == "fused":
            row.tolerance = tolerance
            if not row.error <= tolerance:
                row.status = "failed"
                return
        row.peak = allocated(self.forward_backward, self.grad_out.device).peak
        row.saved = saved_for_backward(lambda: self.attend(*self.inputs), (*self.inputs, projection))


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
        runs: list[AttentionRun] = []
        for mechanism in settings.mechanisms:
            for run in _implementations(mechanism, projection, inputs, grad_out):
                rows.append(run.row)
                if run.row.status == "ok":
                    runs.append(run)
        _measure(runs, settings, projection)
        yield rows


def _implementations(
    mechanism: str, projection: Tensor, inputs: tuple[Tensor, ...], grad_out: Tensor
) -> Iterator[AttentionRun]:
    tokens = grad_out.shape[2]
    if mechanism == "sdpa":
        yield AttentionRun(Row("sdpa", "torch", {}, tokens), F.scaled_dot_product_attention, inputs, grad_out)
        return
    op = f"{mechanism}_attention"
    for implementation, backend in (("reference", "reference"), ("fused", None)):
        row = Row(mechanism, implementation, {op: backends.resolve(op, grad_out, backend)}, tokens)
        if implementation == "fused" and row.backends[op] == "reference":
            row.status = "= reference"
        yield AttentionRun(row, attention(mechanism, backend, projection), inputs, grad_out)


def _measure(runs: list[AttentionRun], settings: Settings, projection: Tensor) -> None:
    """Fill in the rows of ``runs``: check and memory one by one, then the times of all in turn."""
    exact: dict[str, Sequence[Tensor] | None] = {"sdpa": None}
    for run in runs:
        try:
            if run.row.name not in exact:
                exact[run.row.name] = _in_float64(run, projection)
            run.measure_memory(exact[run.row.name], TOLERANCE[settings.dtype], projection)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            run.row.status = "out of memory"
    del exact
    timed = [run for run in runs if run.row.status == "ok"]
    calls = [call for run in timed for call in (run.forward, run.forward_backward)]
    timings = interleaved(calls, settings.device, budget=settings.budget, max_repeats=settings.max_repeats)
    for run, forward, forward_backward in zip(timed, timings[::2], timings[1::2], strict=True):
        run.row.forward, run.row.forward_backward = forward, forward_backward


def _in_float64(run: AttentionRun, projection: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients of the reference in float64 on the same inputs."""
    inputs = tuple(x.detach().double().requires_grad_() for x in run.inputs)
    attend = attention(run.row.name, "reference", projection.double())
    return AttentionRun(run.row, attend, inputs, run.grad_out.double()).forward_backward()


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
            least = None
            for row in sorted(mine, key=lambda row: -row.tokens):
                a, b = value(row), value(sdpa[row.tokens])
                if a is None or (b is not None and a >= b):
                    break
                least = row.tokens
            found.append({"name": name, "implementation": implementation, "quantity": quantity, "tokens": least})
    return found


# --- models ------------------------------------------------------------------------------------------------------


def train_two_steps(name: str, use_fused: bool, settings: Settings) -> tuple[Any, ...]:
    """Build a model and take two steps with AdamW; what is alive after a step is returned.

    AdamW allocates its state at the end of the first step, so that one gets a single image, and the second, of the
    whole batch, holds all that every later step does. In 16 bits the weights stay float32, and autocast is on.
    """
    device, dtype, batch = settings.device, settings.dtype, settings.model_batch
    low = dtype in (torch.float16, torch.bfloat16)
    torch.manual_seed(0)
    images = torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, device=device, dtype=torch.float32 if low else dtype)
    labels = torch.randint(10, (batch,), device=device)
    model = cxv.create_model(name, num_classes=10, use_fused=use_fused).to(device, images.dtype).train()
    optimizer = torch.optim.AdamW(model.parameters())
    for size in (1, batch):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype, enabled=low):
            loss = F.cross_entropy(model(images[:size]), labels[:size])
        loss.backward()
        optimizer.step()
    return model, optimizer, images, labels


def check_model(name: str, settings: Settings) -> tuple[dict[str, str], float | None]:
    """What serves the fused model's ops, and the error of its logits, for two images, against the reference in float64.

    No error where the reference serves them all.
    """
    device, dtype = settings.device, settings.dtype
    low = dtype in (torch.float16, torch.bfloat16)
    images = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0)).to(device)

    def model(use_fused: bool, dtype: torch.dtype) -> torch.nn.Module:
        torch.manual_seed(0)
        return cxv.create_model(name, use_fused=use_fused).to(device, dtype).eval()

    with torch.no_grad():
        with served_ops() as served, torch.autocast(device.type, dtype, enabled=low):
            logits = model(True, torch.float32 if low else dtype)(images.to(torch.float32 if low else dtype))
        if set(served.values()) == {"reference"}:
            return served, None
        return served, relative_error([logits], [model(False, torch.float64)(images.double())])


def training_steps(settings: Settings) -> Iterator[list[Row]]:
    """Measure the models one after the other; yields the reference's and the fused row of each."""
    for name in settings.models:
        rows = []
        for implementation in ("reference", "fused"):
            row = Row(name, implementation, {})
            rows.append(row)
            try:
                _measure_model(row, settings)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                row.status = "out of memory"
            gc.collect()
        yield rows


def _measure_model(row: Row, settings: Settings) -> None:
    """Fill in the row: for the fused model what serves it and the check, then the peak of training."""
    fused = row.implementation == "fused"
    if fused:
        row.backends, row.error = check_model(row.name, settings)
        if row.error is None:
            row.status = "= reference"
            return
        row.tolerance = MODEL_TOLERANCE * TOLERANCE[settings.dtype]
        if not row.error <= row.tolerance:
            row.status = "failed"
            return
    with served_ops() as row.backends:
        row.peak = allocated(lambda: train_two_steps(row.name, fused, settings), settings.device).peak


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


def environment(settings: Settings) -> dict[str, Any]:
    """Where and with what this was measured."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    cuda = settings.device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": settings.device.type,
        "device_name": torch.cuda.get_device_name(settings.device) if cuda else cpu_name(),
        "cpu_name": cpu_name(),
        "threads": torch.get_num_threads(),
        "dtype": settings.dtype_name,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton,
        "cxv": cxv.__version__,
        "build": _extension.build_info(),
    }


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measure(settings: Settings) -> tuple[dict[str, Any], bool]:
    """Run everything, print the tables as they grow; returns the results for the JSON and whether every check held."""
    start, env = time.perf_counter(), environment(settings)
    print(f"{env['device_name']}, {env['threads']} threads, torch {env['torch']}, {env['dtype']}")
    attention_rows: list[Row] = []
    model_rows: list[Row] = []
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
    found = crossovers(attention_rows)
    if found:
        print("Beats softmax attention (F.scaled_dot_product_attention) in forward + backward:")
        print("\n".join(crossover_lines(found, max(settings.lengths))), flush=True)
    noisy = [
        row for row in attention_rows if row.forward_backward and (row.forward.noisy or row.forward_backward.noisy)
    ]
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
    if settings.dtype in (torch.float16, torch.bfloat16):
        print(f"\nIn {settings.dtype_name} the performer's and linear attention's reference computes in float32: it is")
        print("the oracle, not the fastest plain PyTorch. The models train under autocast, their weights in float32.")
    results = {
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
        "attention": [row.to_json() for row in attention_rows],
        "crossover_with_sdpa": found,
        "models": [row.to_json() | {"table1_gb": TABLE1_GB[row.name]} for row in model_rows],
        "wall_s": round(time.perf_counter() - start, 1),
    }
    return results, all(row.status != "failed" for row in attention_rows + model_rows)


# --- the command line --------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, exit status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def lengths_of(text: str) -> tuple[int, ...]:
    """``"256,1024"`` → (256, 1024), ascending."""
    return tuple(sorted({positive(part) for part in text.split(",")}))


def mechanisms_of(text: str) -> tuple[str, ...]:
    """``"linear,sdpa"`` → ("linear", "sdpa"), in the table's order."""
    names = text.split(",")
    for name in names:
        if name not in MECHANISMS:
            raise argparse.ArgumentTypeError(f"must be some of {', '.join(MECHANISMS)}, got {name!r}")
    return tuple(name for name in MECHANISMS if name in names)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 and one line on a bad value."""
    parser = _Parser("attn_mem", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of the inputs; 16 bits: autocast")
    parser.add_argument("--batch", type=positive, help=f"of the sweep; unset: {BATCH['cpu']} on cpu, 8 on cuda")
    parser.add_argument("--lengths", type=lengths_of, help="numbers of tokens, comma-separated; unset: 256 to 16384")
    parser.add_argument("--mechanisms", type=mechanisms_of, default=MECHANISMS, help="comma-separated")
    parser.add_argument("--no-models", action="store_true", help="leave out the training steps")
    parser.add_argument("--threads", type=positive, help="of the CPU; unset: PyTorch's choice")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of JSON and PNG")
    parser.add_argument("--quick", action="store_true", help="short lengths, small batch, few repetitions: a test")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.json", help="measure nothing: redraw FILE.png from FILE.json"
    )
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: cuda is not available (no GPU, or a CPU build of PyTorch)")
    if arguments.plot:
        arguments.results = _read_results(arguments.plot, parser)
    else:
        try:
            arguments.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"argument --out: cannot make {arguments.out}: {error.strerror}")
    return arguments


def _read_results(path: Path, parser: _Parser) -> dict[str, Any]:
    if not path.is_file():
        parser.error(f"argument --plot: no such file: {path}")
    try:
        results = json.loads(path.read_text())
        if results["benchmark"] == "attn_mem":
            return results
    except (ValueError, KeyError, TypeError):
        pass
    parser.error(f"argument --plot: {path} is not a JSON of this benchmark")


def settings_of(arguments: argparse.Namespace) -> Settings:
    """What the flags ask for; ``--quick`` changes defaults, not what was given."""
    quick = arguments.quick
    kind = arguments.device if arguments.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
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
    with warnings.catch_warnings():  # the table says what is served by the reference
        warnings.filterwarnings("ignore", message=".*is served by the reference", category=UserWarning)
        results, correct = measure(settings)
    path = arguments.out / f"attn_mem-{settings.device.type}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    draw(results, path.with_suffix(".png"))
    print(f"\n{path} and .png, {results['wall_s']:.0f} s")
    return 0 if correct else 1


if __name__ == "__main__":
    sys.exit(main())
