"""Shared by the benchmarks: interleaved timing, checks against float64, result rows, CSV files, the command line."""

import argparse
import csv
import datetime
import importlib.metadata
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn

# PyTorch's profiler and CPU allocator read these at import; without them they print a line for each measurement.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import cxv
import cxv_kernels
from cxv.errors import out_of_memory
from cxv.models.blocks import ResidualBranch
from cxv_kernels import dispatch, testing
from cxv_kernels.testing import peak_memory, saved_bytes

RESULTS = Path(__file__).parent / "results"
HEADS, HEAD_DIM, CLASSES, IMAGE_SIZE = 4, 32, 10, 32  # the paper's models
LANDMARKS = 64
DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LOW_PRECISION = (torch.float16, torch.bfloat16)
TABLE1_GB = {"cpv-5/4": 3.2, "cnv-5/4": 3.1, "cltv-5/4": 1.8}  # "GPU GB" in Table 1 of the paper: float32, batch 32

# The largest error allowed, relative to the largest entry of the float64 result. In 16 bits this is a few roundings of
# the result; in 32 and 64 bits it also covers sums and exponents.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
MODEL_TOLERANCE = 10  # times the tolerance of an op: the models are five layers deep


# --- rows and files ----------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One measurement. Times are medians in milliseconds, with the interquartile range; memory is in bytes."""

    section: str  # which table of the benchmark
    name: str  # op or model
    implementation: str
    dtype: str = ""
    variant: str = ""  # feature map, or memory layout
    backend: str = ""  # the backend that the dispatcher selected
    batch: int | None = None
    size: int | None = None  # tokens, or pixels along one side of the image
    status: str = "ok"  # or "failed", "out of memory", "not available", "= reference"
    note: str = ""
    error: float | None = None  # against float64, relative to the largest entry
    tolerance: float | None = None
    forward_ms: float | None = None  # without grad
    forward_iqr_ms: float | None = None
    training_ms: float | None = None  # forward + backward, or a training step of a model
    training_iqr_ms: float | None = None
    repeats: int | None = None
    peak_bytes: int | None = None  # of forward + backward beyond the inputs, or of a whole training step
    saved_bytes: int | None = None  # between forward and backward, beyond the inputs
    environment: dict[str, Any] = field(default_factory=dict, repr=False)

    def set_times(self, **timings: "Timing | None") -> None:
        """Store the ``forward`` and ``training`` medians and ranges; None marks the row as out of memory."""
        for name, timing in timings.items():
            if timing is None:
                self.status = "out of memory"
            else:
                setattr(self, f"{name}_ms", _ms(timing.median))
                setattr(self, f"{name}_iqr_ms", _ms(timing.iqr))
                self.repeats = len(timing.samples)

    def measured(self) -> tuple[Any, ...]:
        """What the row measures, and on which machine."""
        names = ("section", "name", "implementation", "dtype", "variant", "batch", "size")
        return *(getattr(self, name) for name in names), self.environment["device_name"]

    def noisy(self) -> bool:
        """Whether an interquartile range exceeds half of its median: the machine was busy."""
        pairs = ((self.forward_ms, self.forward_iqr_ms), (self.training_ms, self.training_iqr_ms))
        return any(median is not None and iqr > median / 2 for median, iqr in pairs)


def _ms(seconds: float) -> float:
    return float(f"{1e3 * seconds:.4g}")


def environment(device: torch.device) -> dict[str, Any]:
    """The machine and the versions, as columns of the CSV."""
    cuda = device.type == "cuda"
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "cxv": cxv.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def cpu_name() -> str:
    """The name of the processor and its number of cores, as the system reports them."""
    cpuinfo, name = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def version_of(package: str) -> str:
    """The installed version; "" if the package is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a CSV atomically, so that a run that is killed leaves the previous file."""
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, path)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV; none if there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows, with their environment in the last columns."""
    lines = [asdict(row) | {"error": None if row.error is None else f"{row.error:.2g}"} for row in rows]
    write_csv(path, [line | line.pop("environment") for line in lines])


def read_rows(path: Path) -> list[Row]:
    """Read a CSV written by :func:`write_rows`."""
    types = {f.name: f.type for f in fields(Row) if f.name != "environment"}
    rows = []
    for line in read_csv(path):
        values: dict[str, Any] = {name: line.pop(name) for name in types}
        for name, text in values.items():
            if types[name] is not str:
                number = int if types[name] == int | None else float
                values[name] = number(text) if text else None
        rows.append(Row(**values, environment=line))
    return rows


class Results:
    """The rows of one run, written to ``<output>/<benchmark>-<device>.csv`` after every measurement.

    Rows of other machines and dates that the file already has are kept, so that tables can compare hosts. With
    ``in_parts``, a row is replaced only if this machine measures the same thing again, on any date.
    """

    def __init__(self, benchmark: str, arguments: argparse.Namespace, *, in_parts: bool = False):
        self.path = arguments.output / f"{benchmark}-{arguments.device}.csv"
        self.environment = environment(torch.device(arguments.device))
        mine = [str(self.environment[name]) for name in ("device_name", "date")]
        earlier = read_rows(self.path)
        others = [row for row in earlier if [row.environment[name] for name in ("device_name", "date")] != mine]
        self.earlier = earlier if in_parts else others
        self.in_parts = in_parts
        self.rows: list[Row] = []

    def add(self, *rows: Row) -> None:
        """Append rows and write the file."""
        for row in rows:
            row.environment = self.environment
        self.rows += rows
        again = {row.measured() for row in self.rows} if self.in_parts else set()
        write_rows(self.path, [*(row for row in self.earlier if row.measured() not in again), *self.rows])

    def failed(self) -> bool:
        """Whether a fused result was outside its tolerance."""
        return any(row.status == "failed" for row in self.rows)


# --- time --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Seconds of each repetition."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.samples)

    @property
    def iqr(self) -> float:
        """Interquartile range, seconds; 0 for a single repetition."""
        if len(self.samples) == 1:
            return 0.0
        first, _, third = statistics.quantiles(self.samples, n=4, method="inclusive")
        return third - first


def interleaved(
    runs: Sequence[Callable[[], Any]],
    device: torch.device,
    *,
    budget: float = 0.25,
    min_repeats: int = 3,
    max_repeats: int = 100,
    limit: float = 4.0,
) -> list[Timing | None]:
    """Time each of ``runs`` in turn, round after round, so that other load on the machine affects all of them alike.

    A callable leaves the rounds after ``min_repeats`` calls and ``budget`` seconds, after ``max_repeats`` calls, or
    after ``limit`` seconds. There is no warm-up: call each once before.

    Returns:
        A Timing for each; None for a callable that ran out of memory.
    """
    samples: list[list[float] | None] = [[] for _ in runs]

    def continues(times: list[float] | None) -> bool:
        if times is None or len(times) >= max_repeats or sum(times) >= limit:
            return False
        return len(times) < min_repeats or sum(times) < budget

    while any(map(continues, samples)):
        for i, run in enumerate(runs):
            if continues(samples[i]):
                try:
                    samples[i].append(_seconds(run, device))
                except RuntimeError as error:
                    if not out_of_memory(error):
                        raise
                    samples[i] = None
    return [None if times is None else Timing(tuple(times)) for times in samples]


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


# --- checks ------------------------------------------------------------------------------------------------------


def relative_error(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest |result − exact| / max|exact| over the tensors; NaN if a result is not finite."""
    pairs = zip(results, exact, strict=True)
    errors = [((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-300)).item() for a, b in pairs]
    return float("nan") if any(e != e for e in errors) else max(errors)


@dataclass
class Run:
    """One implementation of an op on its inputs, and the row for its measurements.

    ``exact()`` returns output and gradients in float64; ``select`` picks the part of ours that they correspond to.
    """

    row: Row
    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    grad_out: Tensor
    held: tuple[Tensor, ...] = ()  # exist anyway, as the inputs do: not counted as saved
    exact: Callable[[], Sequence[Tensor]] | None = None
    select: Callable[[Sequence[Tensor]], Sequence[Tensor]] = tuple

    @torch.no_grad()
    def forward(self) -> Tensor:
        """The output, without state for backward."""
        return self.function(*self.inputs)

    def forward_backward(self) -> tuple[Tensor, ...]:
        """The output and the gradients of the inputs."""
        return with_gradients(self.function, self.inputs, self.grad_out)

    def check(self, tolerance: float) -> bool:
        """Compare with float64. Only fused results must be within the tolerance."""
        if self.exact is not None:
            with testing.without_tf32():
                self.row.error = relative_error(self.select(self.forward_backward()), self.exact())
        if self.row.implementation == "fused":
            self.row.tolerance = tolerance
            if self.row.error is None or not self.row.error <= tolerance:
                self.row.status = "failed"
        return self.row.status == "ok"

    def measure_memory(self) -> None:
        """Fill in peak and saved bytes."""
        self.row.peak_bytes = peak_memory(self.forward_backward, self.grad_out.device).peak
        self.row.saved_bytes = saved_bytes(
            lambda: self.function(*self.inputs), (*self.inputs, *self.held)
        ).beyond_inputs


def with_gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad_out: Tensor) -> tuple[Tensor, ...]:
    """The output and the gradients of the inputs."""
    out = function(*inputs)
    return (out, *torch.autograd.grad(out, inputs, grad_out))


def in_float64(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad_out: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    """``with_gradients`` of the same values in float64, computed once, on demand."""
    return cache(
        lambda: with_gradients(function, tuple(x.detach().double().requires_grad_() for x in inputs), grad_out.double())
    )


@contextmanager
def marking_out_of_memory(row: Row) -> Iterator[None]:
    """If the block runs out of memory, store that in ``row`` and continue."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        row.status = "out of memory"


@contextmanager
def noting_failures(row: Row) -> Iterator[None]:
    """Store any exception of other people's code in the row, and continue."""
    try:
        with marking_out_of_memory(row):
            yield
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0][:80]
        row.status, row.note = "not available", f"{type(error).__name__}: {first_line}"


def measure(runs: Sequence[Run], tolerance: float, **rounds: Any) -> None:
    """Check each run and measure its memory, then time all of them in turn. A run whose check fails is not timed."""
    for run in runs:
        with marking_out_of_memory(run.row):
            if run.row.status == "ok" and run.check(tolerance):
                run.measure_memory()
        run.exact = None  # free the float64 results before the timing
    timed = [run for run in runs if run.row.status == "ok"]
    if timed:
        calls = [call for run in timed for call in (run.forward, run.forward_backward)]
        timings = interleaved(calls, timed[0].grad_out.device, **rounds)
        for run, forward, training in zip(timed, timings[::2], timings[1::2], strict=True):
            run.row.set_times(forward=forward, training=training)


# --- ops and models ----------------------------------------------------------------------------------------------


def projection_on(device: torch.device) -> Tensor:
    """The random features that all Performer measurements share."""
    features = cxv_kernels.num_random_features(HEAD_DIM)
    generator = torch.Generator().manual_seed(0)
    return cxv_kernels.orthogonal_projection(features, HEAD_DIM, generator=generator, device=device)


def attention(name: str, backend: str | None, projection: Tensor, variant: str = "softmax") -> Callable[..., Tensor]:
    """``"performer"``, ``"linear"`` or ``"nystrom"`` attention as a function of q, k and v."""
    if name == "performer":
        return lambda q, k, v: cxv_kernels.performer_attention(q, k, v, projection, backend=backend)
    if name == "linear":
        return lambda q, k, v: cxv_kernels.linear_attention(q, k, v, variant, backend=backend)
    return lambda q, k, v: cxv_kernels.nystrom_attention(q, k, v, LANDMARKS, backend=backend)


def name_of(dtype: torch.dtype) -> str:
    """``"float32"`` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def random_qkv(batch: int, tokens: int, device: torch.device, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Tensor]:
    """Random q, k, v (batch, HEADS, tokens, HEAD_DIM) that require grad, and a gradient of the output."""
    generator = torch.Generator().manual_seed(tokens)
    shape = (batch, HEADS, tokens, HEAD_DIM)
    *inputs, grad_out = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))
    return tuple(x.requires_grad_() for x in inputs), grad_out


def fused_row(section: str, op: str, like: Tensor, **values: Any) -> Row:
    """Return a row for the implementation that the dispatcher selects, marked if it is the reference."""
    row = Row(section, implementation="fused", backend=dispatch.resolve(op, like), **values)
    if row.backend == "reference":
        row.status = "= reference"
    return row


def build(name: str, mode: str) -> nn.Module:
    """A model in mode ``"eager"``, ``"reference"``, ``"fused"`` or ``"checkpointed"``.

    ``"eager"`` is the reference with PyTorch's dropout, which stores its masks, in place of ours.
    """
    model = cxv.create_model(name, num_classes=CLASSES, use_fused=mode in ("fused", "checkpointed"))
    if mode == "eager":
        for branch in model.modules():
            if isinstance(branch, ResidualBranch):
                branch._run = partial(_run_eagerly, branch, branch._run)
    if mode == "checkpointed":
        model.set_grad_checkpointing()
    return model


class _EagerDropout:
    """PyTorch's in place of cxv.models.blocks.DropoutFn."""

    def __init__(self, rate: float):
        self.rate = rate

    def __call__(self, x: Tensor, residual: Tensor) -> Tensor:
        return F.dropout(x, self.rate) + residual

    def gelu(self, x: Tensor) -> Tensor:
        return F.dropout(F.gelu(x), self.rate)


def _run_eagerly(
    branch: ResidualBranch, ours: Callable[..., Tensor], x: Tensor, first_image: int, rate: float, *noise: Any
) -> Tensor:
    if not rate:
        return ours(x, first_image, rate, *noise)
    return branch.forward_chunk(x, *(_EagerDropout(rate) for _ in range(branch.num_dropouts)))


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast to ``dtype`` if it has 16 bits."""
    return torch.autocast(device.type, dtype, enabled=dtype in LOW_PRECISION)


def random_batch(batch: int, side: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Images (batch, 3, side, side), in float32 where ``dtype`` has 16 bits, and labels."""
    generator = torch.Generator().manual_seed(0)
    stored = torch.float32 if dtype in LOW_PRECISION else dtype
    images = torch.randn(batch, 3, side, side, generator=generator).to(device, stored)
    return images, torch.randint(CLASSES, (batch,), generator=generator).to(device)


def loss_of(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """The forward pass of a training step."""
    with autocast(images.device, dtype):
        return F.cross_entropy(model(images), labels)


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, dtype: torch.dtype
) -> None:
    """Forward, backward, update."""
    optimizer.zero_grad()
    loss_of(model, images, labels, dtype).backward()
    optimizer.step()


def peak_of_training(name: str, mode: str, batch: int, side: int, device: torch.device, dtype: torch.dtype) -> int:
    """Peak bytes of a training step with AdamW: weights, gradients, optimizer state, images and activations."""

    def train() -> tuple[Any, ...]:
        torch.manual_seed(0)
        images, labels = random_batch(batch, side, device, dtype)
        model = build(name, mode).to(device, images.dtype).train()
        optimizer = torch.optim.AdamW(model.parameters())
        for count in (1, batch):  # AdamW allocates its state in its first step
            training_step(model, optimizer, images[:count], labels[:count], dtype)
        return model, optimizer, images, labels

    return peak_memory(train, device).peak


def check_model(row: Row, device: torch.device, dtype: torch.dtype, side: int = IMAGE_SIZE) -> None:
    """Compare the fused logits of two images with the float64 reference; fill in backend, error and status."""
    images, _ = random_batch(2, side, device, torch.float32)

    def model(use_fused: bool, dtype: torch.dtype) -> nn.Module:
        torch.manual_seed(0)
        return cxv.create_model(row.name, use_fused=use_fused).to(device, dtype).eval()

    stored = torch.float32 if dtype in LOW_PRECISION else dtype
    attn = model(True, stored).layers[0].attn
    row.backend = dispatch.resolve(attn.op, images.to(dtype))
    if row.backend == "reference":
        row.status = "= reference"
        return
    with torch.no_grad(), testing.without_tf32():
        with autocast(device, dtype):
            logits = model(True, stored)(images.to(stored))
        row.error = relative_error([logits], [model(False, torch.float64)(images.double())])
    row.tolerance = MODEL_TOLERANCE * TOLERANCE[dtype]
    if not row.error <= row.tolerance:
        row.status = "failed"


# --- the command line --------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """The flags that every benchmark has. A mistake gives one line and exit status 2."""

    def __init__(self, description: str, dtypes: Sequence[str] = ("float32",)):
        super().__init__(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        self.add_argument(
            "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes cuda if there is a GPU"
        )
        self.add_argument("--dtype", type=some_of(DTYPES), default=",".join(dtypes), help="comma-separated")
        self.add_argument("--threads", type=positive, help="CPU threads; default: PyTorch's choice")
        self.add_argument("--quick", action="store_true", help="small sizes and few repetitions, to try the script")
        self.add_argument("--output", type=Path, default=RESULTS, help="folder of the CSV file and the picture")

    def add_names(self, flag: str, choices: Iterable[str]) -> None:
        """Add a flag for comma-separated names, all of them by default."""
        self.add_argument(flag, type=some_of(tuple(choices)), default=",".join(choices), help="comma-separated")

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parse, check the device, create the output folder, set the number of threads."""
        arguments = self.parse_args(argv)
        cuda = torch.cuda.is_available()
        if arguments.device == "cuda" and not cuda:
            self.error("argument --device: cuda is not available (no GPU, or a CPU build of PyTorch)")
        if arguments.device == "auto":
            arguments.device = "cuda" if cuda else "cpu"
        try:
            arguments.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self.error(f"argument --output: cannot create {arguments.output}: {error.strerror}")
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        if arguments.device == "cpu" and platform.system() == "Linux":
            limit_memory()
        # the tables show where the reference runs
        warnings.filterwarnings("ignore", message=".*using the plain PyTorch implementation", category=UserWarning)
        return arguments


def limit_memory() -> None:
    """Limit this process to 90 % of the memory, so that PyTorch raises an error before the system kills us."""
    import resource  # not on Windows

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    resource.setrlimit(resource.RLIMIT_DATA, (memory * 9 // 10, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def progress(items: Iterable[Any], quiet: bool = False) -> Iterable[Any]:
    """A progress bar on stderr, if that is a terminal."""
    return tqdm(items, disable=None if not quiet else True, leave=False)


def positive(text: str) -> int:
    """An integer of at least 1."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def positives(text: str) -> tuple[int, ...]:
    """``"256,1024"`` → (256, 1024), ascending."""
    return tuple(sorted({positive(part) for part in text.split(",")}))


def some_of(choices: Any) -> Callable[[str], tuple[Any, ...]]:
    """A parser of comma-separated names; a mapping gives its values."""

    def read(text: str) -> tuple[Any, ...]:
        names = text.split(",")
        for name in names:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"must be some of {', '.join(choices)}, got {name!r}")
        return tuple(choices[name] if isinstance(choices, dict) else name for name in choices if name in names)

    return read
