"""Compare exported models with the eager model on the CPU: top-1, file size, time.

    cxv train --data digits
    python examples/deploy_benchmark.py --checkpoint runs/digits-cpv-2-4 --output benchmarks/results

Compares the eager model (reference and fused), ONNX (float32, and int8 calibrated on 512 training images) under
onnxruntime, and a fused AOTInductor package. Times are medians of interleaved calls. Writes deploy-cpu.csv.
"""

import argparse
import csv
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import cxv
from cxv.data import load_data, normalize
from cxv.export import export_model, load_exported
from cxv.training import load_model

BATCHES = (1, 32)
ROUNDS = 30


def seconds(calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """The time of each call, round after round."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - begin)
    return samples


def main(argv: list[str] | None = None) -> int:
    """Measure, write the CSV, print it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="the --output of cxv train")
    parser.add_argument("--limit-test", type=int, default=10_000, help="images of the test set")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--output", type=Path, default=Path(), help="folder of deploy-cpu.csv")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    fused, checkpoint = load_model(arguments.checkpoint, use_fused=True)
    reference, _ = load_model(arguments.checkpoint, use_fused=False)
    run, side = checkpoint["args"], checkpoint["img_size"]
    options = {"img_size": side, "limit_train": 512, "limit_test": arguments.limit_test, "seed": run["seed"]}
    data = load_data(run["data"], run["data_dir"], normalization=checkpoint["normalization"], **options)
    images, calibration = (normalize(split.images, **data.normalization) for split in (data.test, data.train))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        export, out = partial(export_model, img_size=side, in_chans=data.in_chans), Path(folder)
        files = {
            "ONNX, float32": (export(reference, out / "a.onnx", "onnx"), "onnx"),
            "ONNX, int8": (export(reference, out / "b.onnx", "onnx", calibration=calibration), "onnx"),
            "AOTInductor, fused": (export(fused, out / "c.pt2", "aoti"), "aoti"),
        }
        models = {"eager, reference": reference, "eager, fused": fused}
        models |= {name: load_exported(file.path, format, arguments.threads) for name, (file, format) in files.items()}
        rows = {}
        for name, model in models.items():
            predictions = torch.cat([model(part).argmax(1) for part in images.split(100)])
            top1 = 100 * (predictions == data.test.labels).double().mean().item()
            rows[name] = {"name": name, "top1": top1, "bytes": files[name][0].size if name in files else ""}
        for batch in BATCHES:
            part = images[:batch].contiguous()
            for name, samples in seconds({name: partial(model, part) for name, model in models.items()}).items():
                first, median, third = statistics.quantiles(samples, n=4)
                rows[name] |= {f"batch_{batch}_ms": 1e3 * median, f"batch_{batch}_iqr_ms": 1e3 * (third - first)}
    shared = {"model": checkpoint["model_name"], "img_size": side, "data": run["data"], "images": len(images)}
    shared |= {"threads": arguments.threads, "torch": torch.__version__, "cxv": cxv.__version__}
    with (arguments.output / "deploy-cpu.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*next(iter(rows.values())), *shared])
        writer.writeheader()
        writer.writerows(row | shared for row in rows.values())
    for name, row in rows.items():
        times = "  ".join(f"batch {batch}: {row[f'batch_{batch}_ms']:8.2f} ms" for batch in BATCHES)
        print(f"{name:20} {row['top1']:6.2f} %  {times}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
