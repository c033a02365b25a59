"""Rebuild Table 1 of the paper: parameters, multiply-adds, memory and speed of its fifteen models.

    python benchmarks/paper/table1.py

Writes results/table1-<device>.csv. Accuracies come from cifar10.py.
"""

import math
import multiprocessing
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import _harness as bench  # imported before torch: it sets log levels
from _report import Table, gb

import cxv
from cxv.models.registry import TABLE_1, has_fused_ops
from cxv_kernels.testing import peak_memory

# isort: split
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten

# Table 1: parameters (M), multiply-adds (G), GPU memory at batch 32 (GB), top-1 (%) on CIFAR-10, CIFAR-100 and Tiny
# ImageNet.
PAPER: dict[str, tuple[float, float, float, float, float, float]] = {
    "resnet-18": (11.2, 0.56, 0.6, 86.29, 59.15, 43.02),
    "resnet-34": (21.3, 1.16, 0.7, 87.97, 56.05, 42.65),
    "fnet-10": (1.3, 1.34, 2.3, 51.05, 11.97, 8.14),
    "mlp-mixer-5": (21.3, 3.02, 1.5, 60.26, 34.81, 20.26),
    "wavemix-5": (1.4, 2.59, 0.4, 83.71, 51.62, 32.70),
    "convmixer-16": (1.3, 1.37, 3.5, 88.46, 61.80, 45.39),
    "vit-10/4": (1.3, 1.34, 14.7, 57.53, 30.80, 23.18),
    "hybrid-vin-6/8": (1.3, 1.41, 5.3, 77.96, 50.06, 36.84),
    "hybrid-vip-6/8": (1.3, 1.31, 5.9, 77.54, 57.22, 38.85),
    "hybrid-vilt-6/8": (1.3, 0.33, 2.6, 78.34, 52.38, 37.17),
    "cct-6/4": (1.3, 1.32, 13.6, 82.66, 58.34, 35.21),
    "cvt-5/4": (1.3, 1.32, 9.4, 77.90, 57.82, 39.81),
    "cnv-5/4": (1.3, 1.39, 3.1, 89.56, 59.23, 49.56),
    "cltv-5/4": (1.3, 1.38, 1.8, 86.99, 60.11, 46.69),
    "cpv-5/4": (1.3, 1.37, 3.2, 91.42, 57.34, 47.29),
}
# How often torchsummary counted a parameter: it does not see the channel norms of the authors, whose parameters are
# called g and b, and it counts the shared MLP of WaveMix at each of four levels.
TIMES = {
    "wavemix-5": {"blocks.*.mlp.*": 4},
    "hybrid-vilt-6/8": {"*.pre_norm.*": 0},
    **{name: {"*.conv_norm.norm.*": 0} for name in ("cnv-5/4", "cltv-5/4", "cpv-5/4")},
}


# --- counts ------------------------------------------------------------------------------------------------------


def torchsummary_parameters(model: nn.Module, times: Mapping[str, int]) -> int:
    """Parameters as torchsummary 1.5 counts them: the ``weight`` and ``bias`` of modules, once per call.

    Args:
        times: how often a parameter is counted, by shell wildcards of its name; once by default.
    """

    def count(name: str) -> int:
        for pattern, n in times.items():
            if fnmatchcase(name, pattern):
                return n
        return int(name.rpartition(".")[2] in ("weight", "bias"))

    return sum(count(name) * p.numel() for name, p in model.named_parameters())


class _LayerMacs(TorchDispatchMode):
    """Counts products with a parameter, as thop and ptflops do, and no product of two activations."""

    def __init__(self, parameters: Iterable[Tensor]):
        super().__init__()
        self.storages = {p.untyped_storage().data_ptr() for p in parameters}
        self.copies: list[Tensor] = []  # kept alive, so that no address is used twice
        self.macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        op = func.overloadpacket
        if op is aten.convolution and self._is_parameter(args[1]):
            weight, bias = args[1:3]
            # per output element; for a transposed convolution this is up to stride² times too many, as in the paper
            fan_in = weight.shape[0] // args[8] if args[6] else weight.shape[1]
            self.macs += out.numel() * (fan_in * math.prod(weight.shape[2:]) + (bias is not None))
        elif op in (aten.mm, aten.addmm):
            a, b = args[-2:]
            if self._is_parameter(a) or self._is_parameter(b):
                self.macs += a.shape[0] * a.shape[1] * b.shape[1]
        elif op in (aten.native_batch_norm, aten._native_batch_norm_legit, aten._native_batch_norm_legit_no_training):
            self.macs += 2 * args[0].numel()
        elif op is aten.clone and self._is_parameter(args[0]):  # a kernel repeated for several channels
            self.storages.add(out.untyped_storage().data_ptr())
            self.copies.append(out)
        return out

    def _is_parameter(self, t: Tensor) -> bool:
        return t.untyped_storage().data_ptr() in self.storages


def layer_macs(model: nn.Module, image: Tensor) -> int:
    """Multiply-adds of one image by the convention of Table 1: convolutions (a bias counts one per output), linear
    layers without bias, batch norm (two per element). Attention products, FAVOR+ features, FFTs and wavelets count
    nothing."""
    with torch.no_grad(), _LayerMacs(model.parameters()) as counter:
        model.eval()(image)
    return counter.macs


def true_macs(model: nn.Module, image: Tensor) -> int:
    """Multiply-adds of all convolutions and matrix products, including attention."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(image)
    return counter.get_total_flops() // 2


def counts(name: str) -> dict[str, int]:
    """Parameters and multiply-adds of a model with 10 classes, for one 3×32×32 image."""
    model = cxv.create_model(name, num_classes=bench.CLASSES)
    image = torch.zeros(1, 3, bench.IMAGE_SIZE, bench.IMAGE_SIZE)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "torchsummary": torchsummary_parameters(model, TIMES.get(name, {})),
        "macs": layer_macs(model, image),
        "true_macs": true_macs(model, image),
    }


# --- measurements ------------------------------------------------------------------------------------------------


def measure(
    name: str, mode: str, batch: int, device: torch.device, dtype: torch.dtype, threads: int, quick: bool
) -> dict[str, Any]:
    """Peak and saved bytes, and images per second in training and inference."""
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(threads)
    try:
        peak = bench.peak_of_training(name, mode, batch, bench.IMAGE_SIZE, device, dtype)
        images, labels = bench.random_batch(batch, bench.IMAGE_SIZE, device, dtype)
        model = bench.build(name, mode).to(device, images.dtype).train()
        optimizer = torch.optim.AdamW(model.parameters())
        saved = peak_memory(partial(bench.loss_of, model, images, labels, dtype), device).kept

        def infer() -> None:
            with torch.no_grad(), bench.autocast(device, dtype):
                model(images)

        rounds = {"budget": 0.001 if quick else 0.4, "min_repeats": 2, "limit": 8.0}
        (train,) = bench.interleaved(
            [partial(bench.training_step, model, optimizer, images, labels, dtype)], device, **rounds
        )
        model.eval()
        (inference,) = bench.interleaved([infer], device, **rounds)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not bench.out_of_memory(error):
            raise
        return {"status": "out of memory"}
    rates = {"train_images_per_s": train, "inference_images_per_s": inference}
    rates = {key: f"{batch / timing.median:.4g}" if timing else "" for key, timing in rates.items()}
    return {"status": "ok", "peak_bytes": peak, "saved_bytes": saved} | rates


def in_own_process(function: Any, *args: Any) -> dict[str, Any]:
    """Run in a process of its own: a model that the system kills for its memory costs no other row."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        try:
            return process.submit(function, *args).result()
        except BrokenProcessPool:
            return {"status": "killed"}


# --- tables ------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Each cell shows the paper's figure / ours; memory in float32, eager → fused."""
    header = ["model", "parameters, M", "multiply-adds, G", "memory, GB", "CIFAR-10 / CIFAR-100 / Tiny ImageNet, %"]
    found = Table(header)
    for name, (parameters, macs, memory, *top1) in PAPER.items():
        mine = [row for row in rows if row["name"] == name and row["dtype"] == "float32"]
        if not mine:
            continue
        peaks = " → ".join(gb(int(row["peak_bytes"])) if row["status"] == "ok" else row["status"] for row in mine)
        cells = [f"{parameters:g} / {int(mine[0]['torchsummary']) / 1e6:.3f}"]
        cells += [f"{macs:g} / {int(mine[0]['macs']) / 1e9:.3f}", f"{memory:g} / {peaks}"]
        found.rows.append([name, *cells, " / ".join(f"{value:.2f}" for value in top1)])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Count, measure, print, write the CSV after each row."""
    parser = bench.Parser(__doc__.partition("\n")[0], dtypes=("float32", "bfloat16"))
    parser.set_defaults(threads=2)
    parser.add_names("--models", TABLE_1)
    parser.add_argument("--batch", type=bench.positive, help="images of a step; default: 32, as in the paper")
    parser.add_argument("--counts-only", action="store_true", help="skip memory and speed")
    arguments = parser.parse(argv)
    device, batch = torch.device(arguments.device), arguments.batch or (2 if arguments.quick else 32)
    path = arguments.output / f"table1-{device.type}.csv"
    rows = [row for row in bench.read_csv(path) if row["name"] not in arguments.models]
    for name in bench.progress(arguments.models):
        fixed = counts(name)
        for mode in ("eager", "fused") if has_fused_ops(name) else ("eager",):
            for dtype in arguments.dtype:
                row = {"name": name, "mode": mode, "dtype": bench.name_of(dtype), "batch": batch, **fixed}
                if not arguments.counts_only:
                    options = (name, mode, batch, device, dtype, torch.get_num_threads(), arguments.quick)
                    row |= in_own_process(measure, *options)
                rows.append(row | {"status": row.get("status", "not measured")} | bench.environment(device))
                bench.write_csv(path, sorted(rows, key=lambda row: list(TABLE_1).index(row["name"])))
    print(f"Paper / here. Memory: peak of a training step in float32, batch {batch}, eager → fused.\n")
    print(table(bench.read_csv(path)).text())
    print(f"Wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
