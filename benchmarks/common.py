"""What the benchmarks share: rows and how they are filled, the facts about the machine, files, the command line."""

import argparse
import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch
from memory import Saved, Timing, allocated, interleaved, out_of_memory, saved_for_backward
from torch import Tensor

import cxv
import cxv_kernels
from cxv_kernels import _extension, checks

HEADS, HEAD_DIM = 4, 32  # the paper's models
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Rows of these are judged by their error; "fused" is what "auto" chose.
FUSED = ("fused", "cpp", "cuda", "triton")

# Largest error allowed against float64, relative to the largest entry: a few roundings of the result in 16 bits; in 32
# and 64 bits, where sums and exponents lose more than the result's own rounding, about 170 and 4,500 roundings.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


# --- rows --------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One measurement, of an implementation at one size or of a model; bytes above the baseline, times in seconds."""

    name: str
    implementation: str  # "reference", "fused", a backend, or what else computes it
    backends: dict[str, str]  # which backend served each op
    tokens: int | None = None
    status: str = "ok"  # or "failed" (the check), "out of memory", "= reference" (no fused kernel, not measured again)
    error: float | None = None  # against float64, relative to the largest entry
    tolerance: float | None = None
    peak: int | None = None
    saved: Saved | None = None
    forward: Timing | None = None  # without grad
    forward_backward: Timing | None = None

    @property
    def noisy(self) -> bool:
        """Whether one of its times is."""
        return any(timing is not None and timing.noisy for timing in (self.forward, self.forward_backward))

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
            "forward": timing_json(self.forward),
            "forward_backward": timing_json(self.forward_backward),
        }


def timing_json(timing: Timing | None) -> dict[str, Any] | None:
    """Median, quartiles and every sample, in seconds."""
    if timing is None:
        return None
    first, third = timing.quartiles
    samples = [round(sample, 9) for sample in timing.samples]
    return {"median_s": timing.median, "q1_s": first, "q3_s": third, "samples_s": samples}


@contextmanager
def marking_out_of_memory(row: Row) -> Iterator[None]:
    """A block that runs out of memory says so in ``row``, and the run goes on."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        row.status = "out of memory"


def relative_error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest |got − exact| / max|exact| over the tensors; NaN where one is not finite."""
    pairs = zip(got, exact, strict=True)
    errors = [((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-300)).item() for a, b in pairs]
    return float("nan") if any(e != e for e in errors) else max(errors)


def with_gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad_out: Tensor) -> tuple[Tensor, ...]:
    """The output and the inputs' gradients."""
    out = function(*inputs)
    return (out, *torch.autograd.grad(out, inputs, grad_out))


def in_float64(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad_out: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    """``with_gradients`` of the same numbers in float64, when it is asked for and then once."""
    return cache(
        lambda: with_gradients(function, tuple(x.detach().double().requires_grad_() for x in inputs), grad_out.double())
    )


@dataclass
class Run:
    """One implementation on its inputs, which others may share."""

    row: Row
    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    grad_out: Tensor
    held: tuple[Tensor, ...] = ()  # exist anyway, as the inputs do: not counted as saved
    exact: Callable[[], Sequence[Tensor]] | None = None  # output and gradients in float64
    compare: Callable[[Sequence[Tensor]], Sequence[Tensor]] = tuple  # which part of them ``exact`` has

    @torch.no_grad()
    def forward(self) -> Tensor:
        """The output, without what backward would need."""
        return self.function(*self.inputs)

    def forward_backward(self) -> tuple[Tensor, ...]:
        """The output and the inputs' gradients."""
        return with_gradients(self.function, self.inputs, self.grad_out)

    def check(self, tolerance: float) -> bool:
        """Compare with float64, if there is something to compare with; False refuses everything else.

        Only a fused result (``FUSED``) is judged; the reference's error is reported: in float64 it is the yardstick.
        """
        row = self.row
        if self.exact is not None:
            with checks.without_tf32():
                row.error = relative_error(self.compare(self.forward_backward()), self.exact())
        if row.implementation in FUSED:
            row.tolerance = tolerance
            if row.error is None or not row.error <= tolerance:
                row.status = "failed"
        return row.status == "ok"

    def measure_memory(self) -> None:
        """Fill in the row's peak and saved bytes."""
        self.row.peak = allocated(self.forward_backward, self.grad_out.device).peak
        self.row.saved = saved_for_backward(lambda: self.function(*self.inputs), (*self.inputs, *self.held))


def measure(runs: Sequence[Run], tolerance: float, device: torch.device, **rounds: Any) -> None:
    """Fill in the rows: check and memory one by one, then the times of all in turn (``rounds`` as `interleaved`'s).

    A failed check leaves a row empty; one that runs out of memory, here or there, is marked and the others go on.
    """
    for run in runs:
        with marking_out_of_memory(run.row):
            if run.check(tolerance):
                run.measure_memory()
    for run in runs:
        run.exact = None  # and its float64 results, before the clock runs
    timed = [run for run in runs if run.row.status == "ok"]
    timings = interleaved([call for run in timed for call in (run.forward, run.forward_backward)], device, **rounds)
    for run, forward, forward_backward in zip(timed, timings[::2], timings[1::2], strict=True):
        if forward is None or forward_backward is None:
            run.row.status = "out of memory"
        else:
            run.row.forward, run.row.forward_backward = forward, forward_backward


# --- what the numbers say ----------------------------------------------------------------------------------------


def crossover(wins: Mapping[int, bool]) -> int | None:
    """The least N from which on it wins at every measured N, or None."""
    least = None
    for tokens in sorted(wins, reverse=True):
        if not wins[tokens]:
            break
        least = tokens
    return least


def exponent(times: Mapping[int, float]) -> float | None:
    """p of time = c·N^p by least squares in log-log; None for fewer than two lengths."""
    if len(times) < 2:
        return None
    xs, ys = [math.log(n) for n in times], [math.log(t) for t in times.values()]
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / sum((x - x_mean) ** 2 for x in xs)


# --- the machine, the files --------------------------------------------------------------------------------------


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Where and with what this was measured."""
    cuda = device.type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "cpu_name": cpu_name(),
        "threads": torch.get_num_threads(),
        "dtype": name_of(dtype),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "cxv": cxv.__version__,
        "build": _extension.build_info(),
        # whether freed memory stays in the process decides how often large results are paged in again
        "malloc": {name: value for name, value in os.environ.items() if name.startswith(("MALLOC_", "LD_PRELOAD"))},
    }


def gpu_facts(device: torch.device) -> dict[str, Any]:
    """The card and its driver; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    properties = torch.cuda.get_device_properties(device)
    return {
        "capability": list(torch.cuda.get_device_capability(device)),
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": first_line("nvcc", "--version", like="release"),
    }


def first_line(*command: str, like: str = "") -> str | None:
    """Of what a command prints, the first line with ``like`` in it; None if there is none."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return next((line.strip() for line in answer.splitlines() if like in line), None)


def version_of(package: str) -> str | None:
    """The installed version; None if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def name_of(dtype: torch.dtype) -> str:
    """``"float32"`` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Whole or not at all, so that a killed run leaves what it had written before."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(part, path)


def verify(device: torch.device, dtypes: Sequence[torch.dtype]) -> None:
    """Before anything fused is measured on a GPU: let what is right there serve, and say what."""
    if device.type == "cuda":
        print(checks.summary(cxv_kernels.verify(device, {*dtypes, torch.float32}, (HEAD_DIM,))), flush=True)


# --- the command line --------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """One line per mistake, exit status 2; the flags that all benchmarks have."""

    def error(self, message: str) -> NoReturn:
        """One line, exit status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def add_shared(self, outputs: str, dtypes: tuple[str, ...] | None = None) -> None:
        """--device, --dtype (several, of this default, if ``dtypes``) and --out, which becomes a folder that exists."""
        self.add_argument(
            "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one"
        )
        if dtypes:
            self.add_argument("--dtype", type=some_of(tuple(DTYPES)), default=dtypes, help="comma-separated")
        else:
            self.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of the inputs")
        self.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help=f"folder of {outputs}")

    def check_shared(self, arguments: argparse.Namespace) -> None:
        """Refuse a device that is not there, make the folder."""
        cuda = torch.cuda.is_available()
        if arguments.device == "cuda" and not cuda:
            self.error("argument --device: cuda is not available (no GPU, or a CPU build of PyTorch)")
        if arguments.device == "auto":
            arguments.device = "cuda" if cuda else "cpu"
        try:
            arguments.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self.error(f"argument --out: cannot make {arguments.out}: {error.strerror}")

    def results(self, flag: str, path: Path, benchmark: str) -> dict[str, Any]:
        """The content of a benchmark's own JSON."""
        if not path.is_file():
            self.error(f"argument {flag}: no such file: {path}")
        try:
            results = json.loads(path.read_text())
            if results["benchmark"] == benchmark:
                return results
        except (ValueError, KeyError, TypeError):
            pass
        self.error(f"argument {flag}: {path} is not a JSON of this benchmark")


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """A positive number of seconds."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text!r}")
    return value


def lengths_of(text: str) -> tuple[int, ...]:
    """``"256,1024"`` → (256, 1024), ascending."""
    return tuple(sorted({positive(part) for part in text.split(",")}))


def some_of(choices: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Reads ``"b,a"`` as ("a", "b"), in the order of ``choices``."""

    def read(text: str) -> tuple[str, ...]:
        names = text.split(",")
        for name in names:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"must be some of {', '.join(choices)}, got {name!r}")
        return tuple(name for name in choices if name in names)

    return read
