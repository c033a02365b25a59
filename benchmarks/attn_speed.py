"""Time and memory of the fused ops against eager, compiled and softmax PyTorch and against peers. See README.md."""

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

import peers
import torch
import torch.nn.functional as F
from attn_speed_report import crossover_table, floor_table, noise_lines, op_table, report, scaling_table
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
    exponent,
    in_float64,
    lengths_of,
    marking_out_of_memory,
    measure,
    positive,
    relative_error,
    seconds,
    some_of,
    verify,
    with_gradients,
    write_json,
)
from floors import Rates, Work, conv_work, linear_work, nystrom_work, performer_work, rates
from torch import Tensor

import cxv_kernels
from cxv_kernels import backends
from cxv_kernels.conv_norm.reference import conv_norm_reference

OPS = ("performer", "linear", "nystrom", "conv_norm")
LANDMARKS = 64
FEATURE_MAPS = ("softmax", "elu", "relu")
LAYOUTS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}
SCALING_LENGTHS = (1024, 4096, 16384, 65536, 262144)
CROSSOVER_LENGTHS = {1: (64, 128, 256, 512, 1024, 2048, 4096), 32: (64, 128, 256, 512, 1024)}  # by batch
SCALING_OPS = ("performer", "linear")


@dataclass
class Settings:
    """What to measure, where."""

    device: torch.device
    dtype: torch.dtype
    ops: tuple[str, ...]
    batch: int
    tokens: int  # of the attention ops' tables
    channels: int  # of the convolution, in and out
    side: int  # of the convolution's image
    scaling_lengths: tuple[int, ...]
    crossover_lengths: dict[int, tuple[int, ...]]
    compile: bool
    budget: float  # seconds per callable
    min_repeats: int
    max_repeats: int
    rates_scale: int

    def rounds(self, share: float = 1.0) -> dict[str, Any]:
        """The arguments of `interleaved`, with this share of the budget."""
        return {"budget": self.budget * share, "min_repeats": self.min_repeats, "max_repeats": self.max_repeats}


@dataclass
class Case:
    """One op at one size: what computes it, and the work that nobody can avoid."""

    op: str
    variant: str  # feature map, or memory layout
    shape: str
    baseline: str  # the implementation that the ratios are to
    input_bytes: int  # of q or x
    work: tuple[Work, Work]
    runs: list[Run] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)  # implementation: why there is no number


# --- the ops and their rivals ------------------------------------------------------------------------------------


def projection_on(device: torch.device) -> Tensor:
    """The random features that every Performer here shares."""
    features = cxv_kernels.num_random_features(HEAD_DIM)
    generator = torch.Generator().manual_seed(0)
    return cxv_kernels.orthogonal_projection(features, HEAD_DIM, generator=generator, device=device)


def attention(
    op: str, variant: str, projection: Tensor, backend: str | None
) -> Callable[[Tensor, Tensor, Tensor], Any]:
    """The op as a function of q, k and v, served by ``backend`` (None: the fastest that can)."""
    if op == "performer_attention":
        return lambda q, k, v: cxv_kernels.performer_attention(q, k, v, projection, backend=backend)
    if op == "linear_attention":
        return lambda q, k, v: cxv_kernels.linear_attention(q, k, v, variant, backend=backend)
    return lambda q, k, v: cxv_kernels.nystrom_attention(q, k, v, LANDMARKS, backend=backend)


def qkv(settings: Settings, batch: int, tokens: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Random q, k, v that want a gradient, and the output's gradient."""
    generator = torch.Generator().manual_seed(tokens)
    shape = (batch, HEADS, tokens, HEAD_DIM)
    *inputs, grad_out = (torch.randn(shape, generator=generator).to(settings.device, settings.dtype) for _ in range(4))
    return tuple(x.requires_grad_() for x in inputs), grad_out


def fused_run(
    name: str,
    op: str,
    function: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    grad_out: Tensor,
    tokens: int | None,
    **rest: Any,
) -> Run:
    """The run of what serves the op here, marked where that is the reference, which is not measured again."""
    row = Row(name, "fused", {op: backends.resolve(op, inputs[0])}, tokens)
    if row.backends[op] == "reference":
        row.status = "= reference"
    return Run(row, function, inputs, grad_out, **rest)


def attention_work(op: str, settings: Settings, batch: int, tokens: int) -> tuple[Work, Work]:
    """What the op cannot avoid, forward and forward + backward."""
    size, shape = settings.dtype.itemsize, (batch, HEADS, tokens, HEAD_DIM)
    if op == "performer_attention":
        return performer_work(*shape, cxv_kernels.num_random_features(HEAD_DIM), size)
    if op == "linear_attention":
        return linear_work(*shape, size)
    return nystrom_work(*shape, min(LANDMARKS, tokens), size)


def attention_case(name: str, variant: str, settings: Settings) -> Case:
    """An attention op with all its rivals; the side variants only against their reference."""
    op, main = f"{name}_attention", variant in ("", "softmax")
    projection = projection_on(settings.device)
    inputs, grad_out = qkv(settings, settings.batch, settings.tokens)
    shape = f"(B, H, N, D) = {tuple(grad_out.shape)}"
    if name == "performer":
        shape += f", M = {projection.shape[0]}"
    if name == "nystrom":
        shape += f", {LANDMARKS} landmarks"
    work = attention_work(op, settings, settings.batch, settings.tokens)
    case = Case(op, variant, shape, "reference", grad_out.nbytes, work)
    exact = in_float64(attention(op, variant, projection.double(), "reference"), inputs, grad_out)
    reference = attention(op, variant, projection, "reference")
    shared = {"held": (projection,), "exact": exact}
    case.runs = [
        Run(Row(name, "reference", {op: "reference"}, settings.tokens), reference, inputs, grad_out, **shared),
        fused_run(name, op, attention(op, variant, projection, None), inputs, grad_out, settings.tokens, **shared),
    ]
    if main:
        _add_compiled(case, reference, inputs, grad_out, settings, **shared)
        _add_peer(case, name, projection, inputs, grad_out)
        sdpa = Row(name, "sdpa", {}, settings.tokens)
        case.runs.append(Run(sdpa, F.scaled_dot_product_attention, inputs, grad_out))
    return case


def _add_compiled(
    case: Case,
    function: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    grad_out: Tensor,
    settings: Settings,
    **rest: Any,
) -> None:
    """``torch.compile(function)``, compiled here for both passes; a note where that fails."""
    row = Row(case.runs[0].row.name, "torch.compile", {}, case.runs[0].row.tokens)
    run = Run(row, torch.compile(function, dynamic=False), inputs, grad_out, **rest)
    case.runs.append(run)
    if not settings.compile:
        row.status, case.notes[row.implementation] = "left out", "--no-compile"
        return
    with _excusing(run, case, "does not compile"):
        run.forward()
        run.forward_backward()


@contextmanager
def _excusing(run: Run, case: Case, status: str) -> Iterator[None]:
    """What is not ours may raise whatever it likes: the row says so, and the run goes on."""
    try:
        with marking_out_of_memory(run.row):
            yield
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0][:120]
        run.row.status, case.notes[run.row.implementation] = status, f"{type(error).__name__}: {first_line}"


def _add_peer(case: Case, name: str, projection: Tensor, inputs: tuple[Tensor, ...], grad_out: Tensor) -> None:
    """The package that does the same, if it is installed, and if it does the same: a note where not."""
    package, build = peers.PEERS[case.op]
    run = Run(Row(name, package, {}, grad_out.shape[2]), F.scaled_dot_product_attention, inputs, grad_out)
    case.runs.append(run)
    with _excusing(run, case, "fails"):
        try:
            peer, one_head = build(HEADS, projection), build(1, projection)
        except ImportError as error:
            run.row.status, case.notes[package] = "not installed", str(error)
            return
        # One head of one sample: there what packages let a batch share (a stabiliser, a scale) is as ours.
        head, head_grad = tuple(x.detach()[:1, :1].float().requires_grad_() for x in inputs), grad_out[:1, :1].float()
        exact = in_float64(attention(case.op, "softmax", projection.double(), "reference"), head, head_grad)
        run.row.error = relative_error(with_gradients(one_head.as_ours, head, head_grad), exact())
        run.row.tolerance = peers.AGREEMENT
        if not run.row.error <= peers.AGREEMENT:
            run.row.status = "differs"
            return
        run.function, run.grad_out, run.held = peer.function, peer.pack_grad(grad_out), (projection,)
        run.inputs = tuple(x.detach().requires_grad_() for x in peer.pack(*inputs))
        run.forward_backward()


def plain_conv_norm(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """What one writes without this package."""
    y = F.conv2d(x, weight, bias, padding=1).permute(0, 2, 3, 1)
    return F.layer_norm(y, gamma.shape, gamma, beta).permute(0, 3, 1, 2)


def conv_case(layout: str, settings: Settings) -> Case:
    """conv_norm in a memory layout against F.conv2d and F.layer_norm, with the convolution alone as the floor."""
    channels, side, memory_format = settings.channels, settings.side, LAYOUTS[layout]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(settings.device, settings.dtype)

    x, y = (random(settings.batch, channels, side, side) for _ in range(2))
    weight = random(channels, channels, 3, 3) * (9 * channels) ** -0.5
    # near a norm's initial values: where γ vanishes the fused backward convolves again (its README has the cost)
    others = [random(channels) * 0.1 + (name == "gamma") for name in ("bias", "gamma", "beta")]
    inputs = (x.to(memory_format=memory_format), weight.to(memory_format=memory_format), *others)
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    # each gradient in the layout of its output, which F.layer_norm leaves channels_last in either case
    after_norm, grad = y.to(memory_format=torch.channels_last), y.to(memory_format=memory_format)
    shape = f"x {tuple(x.shape)} → {channels} channels, {layout}"
    work = conv_work(settings.batch * side * side, channels, channels, settings.dtype.itemsize)
    case = Case("conv_norm", layout, shape, "conv2d, layer_norm", x.nbytes, work)
    exact = in_float64(conv_norm_reference, inputs, after_norm)
    plain = Run(Row("conv_norm", case.baseline, {}), plain_conv_norm, inputs, after_norm, exact=exact)
    fused = fused_run("conv_norm", "conv_norm", cxv_kernels.conv_norm, inputs, grad, None, exact=exact)
    case.runs = [plain, fused]
    _add_compiled(case, plain_conv_norm, inputs, after_norm, settings, exact=exact)
    convolution = partial(F.conv2d, padding=1)
    case.runs.append(Run(Row("conv_norm", "conv2d alone", {}), convolution, inputs[:3], grad))
    return case


def cases(settings: Settings) -> Iterator[Callable[[], Case]]:
    """The cases asked for; a case's tensors exist only once it is called."""
    for name in settings.ops:
        if name == "conv_norm":
            yield from (partial(conv_case, layout, settings) for layout in LAYOUTS)
        else:
            for variant in FEATURE_MAPS if name == "linear" else ("",):
                yield partial(attention_case, name, variant, settings)


def compare(case: Case, settings: Settings) -> dict[str, Any]:
    """Check and measure a case; its numbers for the JSON."""
    ready = [run for run in case.runs if run.row.status == "ok"]
    measure(ready, TOLERANCE[settings.dtype], settings.device, **settings.rounds())
    return {
        "op": case.op,
        "variant": case.variant,
        "shape": case.shape,
        "baseline": case.baseline,
        "input_bytes": case.input_bytes,
        "work": {part: asdict(work) for part, work in zip(("forward", "forward_backward"), case.work, strict=True)},
        "rows": [run.row.to_json() | {"note": case.notes.get(run.row.implementation)} for run in case.runs],
    }


# --- growth with N -----------------------------------------------------------------------------------------------


def last_head(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Of the last sample: at many tokens float64 is affordable for one head, and the heads are independent."""
    return [t[-1:, -1:] for t in tensors]


def long_run(name: str, settings: Settings, batch: int, tokens: int, projection: Tensor) -> Run:
    """What serves the op at this size, to be checked on one head."""
    op = f"{name}_attention"
    inputs, grad_out = qkv(settings, batch, tokens)
    exact = in_float64(
        attention(op, "softmax", projection.double(), "reference"),
        tuple(last_head([x.detach() for x in inputs])),
        *last_head([grad_out]),
    )
    function, rest = attention(op, "softmax", projection, None), {"held": (projection,), "compare": last_head}
    return fused_run(name, op, function, inputs, grad_out, tokens, exact=exact, **rest)


def scaling(name: str, settings: Settings) -> dict[str, Any]:
    """Time and workspace of forward + backward for one head count and ever more tokens, and the fitted exponent."""
    op = f"{name}_attention"
    projection = projection_on(settings.device)
    runs = [long_run(name, settings, 1, tokens, projection) for tokens in settings.scaling_lengths]
    rows = [run.row for run in runs]
    measure(
        [run for run in runs if run.row.status == "ok"],
        TOLERANCE[settings.dtype],
        settings.device,
        **settings.rounds(0.5),
    )
    times = {row.tokens: row.forward_backward.median for row in rows if row.status == "ok"}
    # beyond the inputs, the output and the three gradients
    results = {run.row.tokens: 4 * run.grad_out.nbytes for run in runs}
    return {
        "op": op,
        "exponent": exponent(times),
        "rows": [
            row.to_json() | {"workspace_bytes": None if row.peak is None else row.peak - results[row.tokens]}
            for row in rows
        ],
    }


def crossovers(batch: int, settings: Settings) -> dict[str, Any]:
    """Each mechanism and SDPA at every length, and the least N from which on it is faster at all of them.

    Where no fused kernel serves, it is the reference's time, and the row says so.
    """
    names = [name for name in settings.ops if name != "conv_norm"]
    projection = projection_on(settings.device)
    rows: list[Row] = []
    for tokens in settings.crossover_lengths[batch]:
        runs = [long_run(name, settings, batch, tokens, projection) for name in names]
        for run in runs:
            if run.row.status == "= reference":
                run.row.status, run.row.implementation = "ok", "reference"
        inputs, grad_out = qkv(settings, batch, tokens)
        runs.append(Run(Row("sdpa", "sdpa", {}, tokens), F.scaled_dot_product_attention, inputs, grad_out))
        measure(runs, TOLERANCE[settings.dtype], settings.device, **settings.rounds(0.25))
        rows += [run.row for run in runs]
    return {"batch": batch, "rows": [row.to_json() for row in rows], "faster_from": faster_from(rows)}


def faster_from(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each mechanism and pass the least N from which on it beats SDPA at every measured N, or None."""
    sdpa = {row.tokens: row for row in rows if row.name == "sdpa"}
    found = []
    for name in dict.fromkeys(row.name for row in rows if row.name != "sdpa"):
        mine = [row for row in rows if row.name == name]
        for part in ("forward", "forward_backward"):
            pairs = {row.tokens: (getattr(row, part), getattr(sdpa[row.tokens], part)) for row in mine}
            wins = {n: a is not None and (b is None or a.median < b.median) for n, (a, b) in pairs.items()}
            implementation = mine[-1].implementation
            found.append({"name": name, "implementation": implementation, "pass": part, "tokens": crossover(wins)})
    return found


# --- floors ------------------------------------------------------------------------------------------------------


def floors(ops: Sequence[dict[str, Any]], found: Rates) -> list[dict[str, Any]]:
    """For each op's fused kernel (or what is its baseline, where there is none) the least time and how far it is."""
    lines = []
    for case in ops:
        fused = [row for row in case["rows"] if row["implementation"] == "fused" and row["status"] == "ok"]
        rows = fused or [row for row in case["rows"] if row["implementation"] == case["baseline"]]
        rows += [row for row in case["rows"] if row["implementation"] == "conv2d alone"]
        for row in rows:
            for part in ("forward", "forward_backward"):
                if row[part] is None:
                    continue
                work = Work(**case["work"][part])
                seconds = work.seconds(found.flops, found.bandwidth)
                lines.append(
                    {
                        "op": case["op"],
                        "variant": case["variant"],
                        "implementation": row["implementation"],
                        "pass": part,
                        "flop": work.flop,
                        "bytes": work.nbytes,
                        "floor_s": seconds,
                        "bound_by": "arithmetic" if work.flop / found.flops == seconds else "memory",
                        "measured_s": row[part]["median_s"],
                        "times_floor": row[part]["median_s"] / seconds,
                    }
                )
    return lines


# --- all of it ---------------------------------------------------------------------------------------------------


def benchmark(settings: Settings, path: Path) -> bool:
    """Run everything, print the tables as they grow, write ``path`` after each; whether every check held."""
    start, env = time.perf_counter(), environment(settings.device, settings.dtype)
    results: dict[str, Any] = {
        "benchmark": "attn_speed",
        "environment": env | {"peers": peers.versions()},
        "settings": {
            "heads": HEADS,
            "head_dim": HEAD_DIM,
            "random_features": cxv_kernels.num_random_features(HEAD_DIM),
            "landmarks": LANDMARKS,
            "batch": settings.batch,
            "tokens": settings.tokens,
            "scaling_lengths": list(settings.scaling_lengths),
            "crossover_lengths": {str(batch): list(n) for batch, n in settings.crossover_lengths.items()},
            "budget_s": settings.budget,
        },
        "rates": None,
        "ops": [],
        "scaling": [],
        "crossover": [],
        "floors": [],
    }

    def keep() -> None:
        results["wall_s"] = round(time.perf_counter() - start, 1)
        write_json(path, results)
        gc.collect()

    print(f"{env['device_name']}, {env['threads']} threads, torch {env['torch']}, {env['dtype']}\n", flush=True)
    verify(settings.device, [settings.dtype])
    machine = partial(rates, settings.device, settings.dtype, settings.rates_scale, settings.budget / 2)
    found = machine()
    results["rates"] = asdict(found)
    for make in cases(settings):
        results["ops"].append(compare(make(), settings))
        keep()
        print(op_table(results["ops"][-1:]).text(), flush=True)
        torch.compiler.reset()  # what was compiled for one case would count against the next one's recompilations
    found = found.best(machine())  # before and after the ops: a ceiling taken in a busy moment is none
    results["rates"], results["floors"] = asdict(found), floors(results["ops"], found)
    keep()
    print(floor_table(results).text(), flush=True)
    for name in settings.ops:
        if name in SCALING_OPS:
            results["scaling"].append(scaling(name, settings))
            keep()
    if results["scaling"]:
        print(scaling_table(results).text(), flush=True)
    if set(settings.ops) != {"conv_norm"}:
        for batch in settings.crossover_lengths:
            results["crossover"].append(crossovers(batch, settings))
            keep()
        print(crossover_table(results).text(), flush=True)
    print("\n".join(noise_lines(results)))
    sections = results["ops"] + results["scaling"] + results["crossover"]
    print(f"{path}, {results['wall_s']:.0f} s")
    return all(row["status"] != "failed" for section in sections for row in section["rows"])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 and one line on a bad value."""
    parser = Parser("attn_speed", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_shared("the JSON")
    parser.add_argument("--ops", type=some_of(OPS), default=OPS, help="comma-separated")
    parser.add_argument("--threads", type=positive, default=2, help="of the CPU")
    parser.add_argument("--batch", type=positive, help="of the ops' tables; unset: 32")
    parser.add_argument("--lengths", type=lengths_of, help="of the scaling, comma-separated; unset: 1024 to 262144")
    parser.add_argument("--budget", type=seconds, help="seconds per callable, at least 5 calls; unset: 1")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--quick", action="store_true", help="small sizes, few repetitions: a test")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE.json", help="measure nothing: print FILE.json's tables as Markdown"
    )
    arguments = parser.parse_args(argv)
    if arguments.markdown:
        arguments.results = parser.results("--markdown", arguments.markdown, "attn_speed")
    else:
        parser.check_shared(arguments)
    return arguments


def settings_of(arguments: argparse.Namespace) -> Settings:
    """What the flags ask for; ``--quick`` changes defaults, not what was given."""
    quick = arguments.quick
    return Settings(
        device=torch.device(arguments.device),
        dtype=DTYPES[arguments.dtype],
        ops=arguments.ops,
        batch=arguments.batch or (2 if quick else 32),
        tokens=128 if quick else 1024,
        channels=16 if quick else 128,
        side=8 if quick else 32,
        scaling_lengths=arguments.lengths or ((128, 512) if quick else SCALING_LENGTHS),
        crossover_lengths={1: (64, 128)} if quick else CROSSOVER_LENGTHS,
        compile=not arguments.no_compile,
        budget=arguments.budget or (0.01 if quick else 1.0),
        min_repeats=3 if quick else 5,
        max_repeats=5 if quick else 100,
        rates_scale=8 if quick else 1,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write the JSON; 0, or 1 if a fused result is wrong."""
    arguments = parse(argv)
    if arguments.markdown:
        print(report(arguments.results))
        return 0
    torch.set_num_threads(arguments.threads)
    settings = settings_of(arguments)
    with warnings.catch_warnings():  # the tables say what is served by the reference
        warnings.filterwarnings("ignore", message=".*is served by the reference", category=UserWarning)
        correct = benchmark(settings, arguments.out / f"attn_speed-{settings.device.type}.json")
    return 0 if correct else 1


if __name__ == "__main__":
    sys.exit(main())
