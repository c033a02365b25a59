"""Measure the time of the fused ops against plain and compiled PyTorch, softmax attention and other packages.

    pip install -e '.[bench]'          # the other packages; without them their rows say "not available"
    python benchmarks/attn_speed.py

Writes results/attn_speed-<device>.csv.
"""

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import _harness as bench  # imported before torch: it sets log levels
from _baselines import AGREEMENT, BASELINES
from _report import length_times, op_times, show

import cxv_kernels
from cxv_kernels.ops.conv_norm.reference import conv_norm_reference

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor

OPS = ("performer", "linear", "nystrom", "conv_norm")
FEATURE_MAPS = ("softmax", "elu", "relu")
LAYOUTS = {"channels_last": torch.channels_last, "NCHW": torch.contiguous_format}
LENGTHS = {1: (256, 1024, 4096, 16384, 65536, 262144), 32: (64, 128, 256, 512, 1024)}  # by batch
LONGEST_SOFTMAX = 16384  # softmax attention takes minutes beyond


# --- one op against its alternatives -----------------------------------------------------------------------------


def attention_runs(
    name: str, variant: str, batch: int, tokens: int, device: torch.device, dtype: torch.dtype, compiled: bool
) -> list[bench.Run]:
    """The reference, the fused op and, for the paper's feature maps, every alternative."""
    projection = bench.projection_on(device)
    inputs, grad_out = bench.random_qkv(batch, tokens, device, dtype)
    main = variant in ("", "softmax")
    values = {"name": name, "variant": variant, "dtype": bench.name_of(dtype), "batch": batch, "size": tokens}
    exact = bench.in_float64(bench.attention(name, "reference", projection.double(), variant), inputs, grad_out)
    shared = {"held": (projection,), "exact": exact}
    reference = bench.attention(name, "reference", projection, variant)
    fused = bench.fused_row("op", f"{name}_attention", grad_out, **values)
    runs = [
        bench.Run(bench.Row("op", implementation="reference", **values), reference, inputs, grad_out, **shared),
        bench.Run(fused, bench.attention(name, None, projection, variant), inputs, grad_out, **shared),
    ]
    if main:
        if compiled:
            runs.append(compiled_run(values, reference, inputs, grad_out, **shared))
        runs.append(baseline_run(name, values, projection, inputs, grad_out))
        softmax = bench.Row("op", implementation="softmax (SDPA)", **values)
        runs.append(bench.Run(softmax, F.scaled_dot_product_attention, inputs, grad_out))
    return runs


def compiled_run(
    values: dict[str, Any], function: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad_out: Tensor, **rest: Any
) -> bench.Run:
    """``torch.compile(function)``, compiled here for both passes."""
    row = bench.Row("op", implementation="torch.compile", **values)
    run = bench.Run(row, torch.compile(function, dynamic=False), inputs, grad_out, **rest)
    with bench.noting_failures(row):
        run.forward()
        run.forward_backward()
    return run


def baseline_run(
    name: str, values: dict[str, Any], projection: Tensor, inputs: tuple[Tensor, ...], grad_out: Tensor
) -> bench.Run:
    """The package that computes the same function, if it is installed and does."""
    package, make = BASELINES[name]
    row = bench.Row("op", implementation=package, **values)
    run = bench.Run(row, F.scaled_dot_product_attention, inputs, grad_out, held=(projection,))
    with bench.noting_failures(row):
        baseline, one_head = make(bench.HEADS, projection), make(1, projection)
        # one head of one sample: packages may share a stabilizer or a scale over the batch
        head, head_grad = tuple(x.detach()[:1, :1].float().requires_grad_() for x in inputs), grad_out[:1, :1].float()
        exact = bench.in_float64(bench.attention(name, "reference", projection.double()), head, head_grad)
        row.error, row.tolerance = (
            bench.relative_error(bench.with_gradients(one_head.as_ours, head, head_grad), exact()),
            AGREEMENT,
        )
        if not row.error <= AGREEMENT:
            row.status, row.note = "not available", "computes another function"
            return run
        run.function, run.grad_out = baseline.function, baseline.pack_grad(grad_out)
        run.inputs = tuple(x.detach().requires_grad_() for x in baseline.pack(*inputs))
        run.forward_backward()
    return run


def plain_conv_norm(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Convolution and channel LayerNorm as one writes them without this package."""
    y = F.conv2d(x, weight, bias, padding=1).permute(0, 2, 3, 1)
    return F.layer_norm(y, gamma.shape, gamma, beta).permute(0, 3, 1, 2)


def conv_norm_runs(
    layout: str, batch: int, channels: int, side: int, device: torch.device, dtype: torch.dtype, compiled: bool
) -> list[bench.Run]:
    """conv_norm in a memory layout against F.conv2d and F.layer_norm, and the convolution alone."""
    generator, memory_format = torch.Generator().manual_seed(0), LAYOUTS[layout]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    x, y = (random(batch, channels, side, side) for _ in range(2))
    weight = random(channels, channels, 3, 3) * (9 * channels) ** -0.5
    # close to the initial values of a norm: where γ vanishes the fused backward convolves again
    others = [random(channels) * 0.1 + (name == "gamma") for name in ("bias", "gamma", "beta")]
    inputs = (x.to(memory_format=memory_format), weight.to(memory_format=memory_format), *others)
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    # each gradient in the layout of its output: F.layer_norm returns channels_last for both
    after_norm, grad = y.to(memory_format=torch.channels_last), y.to(memory_format=memory_format)
    values = {"name": "conv_norm", "variant": layout, "dtype": bench.name_of(dtype), "batch": batch, "size": side}
    exact = bench.in_float64(conv_norm_reference, inputs, after_norm)
    plain = bench.Row("op", implementation="conv2d, layer_norm", **values)
    fused = bench.fused_row("op", "conv_norm", x, **values)
    runs = [
        bench.Run(plain, plain_conv_norm, inputs, after_norm, exact=exact),
        bench.Run(fused, cxv_kernels.conv_norm, inputs, grad, exact=exact),
    ]
    if compiled:
        runs.append(compiled_run(values, plain_conv_norm, inputs, after_norm, exact=exact))
    alone = bench.Row("op", implementation="conv2d alone", **values)
    return [*runs, bench.Run(alone, partial(F.conv2d, padding=1), inputs[:3], grad)]


# --- time against the number of tokens ---------------------------------------------------------------------------


def length_runs(
    names: Sequence[str], batch: int, tokens: int, device: torch.device, dtype: torch.dtype
) -> Iterator[bench.Run]:
    """Each mechanism as the dispatcher selects it, checked on one head, and softmax attention."""
    projection = bench.projection_on(device)
    inputs, grad_out = bench.random_qkv(batch, tokens, device, dtype)
    values = {"dtype": bench.name_of(dtype), "batch": batch, "size": tokens}
    for name in names:
        last = tuple(t.detach() for t in last_head(inputs))
        exact = bench.in_float64(bench.attention(name, "reference", projection.double()), last, *last_head([grad_out]))
        row = bench.fused_row("length", f"{name}_attention", grad_out, name=name, **values)
        if row.status == "= reference":
            row.status, row.implementation = "ok", "reference"
        yield bench.Run(row, bench.attention(name, None, projection), inputs, grad_out, (projection,), exact, last_head)
    if tokens <= LONGEST_SOFTMAX:
        softmax = bench.Row("length", "sdpa", "torch", **values)
        yield bench.Run(softmax, F.scaled_dot_product_attention, inputs, grad_out)


def last_head(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Heads are independent, and at many tokens float64 is affordable for one of them."""
    return [t[-1:, -1:] for t in tensors]


# --- the machine -------------------------------------------------------------------------------------------------


def rooflines(device: torch.device, dtype: torch.dtype, quick: bool) -> list[bench.Row]:
    """The fastest matrix product or convolution and the fastest copy that this machine was seen to do."""
    cuda = device.type == "cuda"
    large, length = (8192, 2**31) if cuda else (2048, 2**28)
    large, length = (large // 8, length // 64) if quick else (large, length)
    length //= dtype.itemsize
    a, b = (torch.randn(large, large, device=device).to(dtype) for _ in range(2))
    x, w = torch.randn(8, 256, 32, 32, device=device).to(dtype), torch.randn(256, 256, 3, 3, device=device).to(dtype)
    x, w = x.to(memory_format=torch.channels_last), w.to(memory_format=torch.channels_last)
    p, q = (torch.ones(length, device=device, dtype=dtype) for _ in range(2))
    amounts = [2 * large**3, 18 * 256 * 256 * 8 * 32**2, 2 * p.nbytes]
    with torch.no_grad():
        calls = [lambda: a @ b, lambda: F.conv2d(x, w, padding=1), lambda: q.copy_(p)]
        for call in calls:
            call()
        timings = bench.interleaved(calls, device, budget=0.05 if quick else 0.5, max_repeats=1000)
    rates = [n / min(t.samples) if t else 0.0 for n, t in zip(amounts, timings, strict=True)]
    found = {"GFLOP/s": max(rates[:2]) / 1e9, "GB/s": rates[2] / 1e9}
    return [
        bench.Row("roofline", "machine", "torch", bench.name_of(dtype), variant=unit, note=f"{rate:,.1f}")
        for unit, rate in found.items()
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write the CSV; 1 if a fused result is wrong."""
    parser = bench.Parser(__doc__.partition("\n")[0])
    parser.set_defaults(threads=2)
    parser.add_names("--ops", OPS)
    parser.add_argument("--batch", type=bench.positive, help="of the table of ops; default: 32")
    parser.add_argument("--lengths", type=bench.positives, help="numbers of tokens at batch 1; default: 256 to 262144")
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile")
    arguments = parser.parse(argv)
    device, quick, compiled = torch.device(arguments.device), arguments.quick, not arguments.no_compile
    batch, tokens = arguments.batch or (2 if quick else 32), 128 if quick else 1024
    channels, side = (16, 8) if quick else (128, 32)
    lengths = {1: (64, 128)} if quick else LENGTHS
    lengths = lengths | ({1: arguments.lengths} if arguments.lengths else {})
    rounds = {"budget": 0.01, "max_repeats": 5} if quick else {"budget": 1.0, "min_repeats": 5}
    short = {"budget": 0.01, "max_repeats": 5} if quick else {"budget": 0.25}
    results = bench.Results("attn_speed", arguments)

    mechanisms = [name for name in arguments.ops if name != "conv_norm"]
    for dtype in arguments.dtype:
        results.add(*rooflines(device, dtype, quick))
        cases = [(name, v) for name in arguments.ops for v in variants_of(name)]
        for name, variant in bench.progress(cases):
            if name == "conv_norm":
                runs = conv_norm_runs(variant, batch, channels, side, device, dtype, compiled)
            else:
                runs = attention_runs(name, variant, batch, tokens, device, dtype, compiled)
            bench.measure(runs, bench.TOLERANCE[dtype], **rounds)
            results.add(*(run.row for run in runs))
            torch.compiler.reset()
            gc.collect()
        for size, count in bench.progress([(b, n) for b, ns in lengths.items() for n in ns] if mechanisms else []):
            runs = list(length_runs(mechanisms, size, count, device, dtype))
            bench.measure(runs, bench.TOLERANCE[dtype], **short)
            results.add(*(run.row for run in runs))
            gc.collect()

    ops = (
        f"Batch {batch}, {bench.HEADS} heads of {bench.HEAD_DIM} channels, N = {tokens:,}. "
        "Times: median ± interquartile range.\nRatio: to the first row of each op."
    )
    parts = [ops, op_times(results.rows).text()]
    if mechanisms:
        parts += ["Time in ms against the number of tokens N.", length_times(results.rows).text()]
    return show(results, *parts)


def variants_of(name: str) -> Sequence[str]:
    """Feature maps of linear attention, memory layouts of conv_norm."""
    return {"linear": FEATURE_MAPS, "conv_norm": tuple(LAYOUTS)}.get(name, ("",))


if __name__ == "__main__":
    sys.exit(main())
