"""Exported models beside the eager one, on the CPU: top-1, size, milliseconds.

``python benchmarks/deploy.py --checkpoint runs/digits-cpv-2-4``: a run of ``cxv train`` in eager mode (the references,
and the fused kernels), in ONNX (float32, and int8 calibrated on 512 training images) under onnxruntime, and as a fused
AOTInductor package. The times are medians of interleaved rounds in one process.
"""

import argparse
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from common import cpu_name, positive
from memory import interleaved

from cxv.export import export_model, load_exported
from cxv.training.checkpoint import load_model
from cxv.training.data import load_data, normalise

BATCHES = (1, 32)


def main(argv: list[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="the --output of cxv train")
    parser.add_argument("--limit-test", type=positive, default=10_000, help="images of the test set")
    parser.add_argument("--threads", type=positive, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    fused, checkpoint = load_model(args.checkpoint, use_fused=True)
    reference, _ = load_model(args.checkpoint, use_fused=False)
    run, side = checkpoint["args"], checkpoint["img_size"]
    data = load_data(
        run["data"],
        run["data_dir"],
        img_size=side,
        limit_train=512,
        limit_test=args.limit_test,
        seed=run["seed"],
        normalisation=checkpoint["normalisation"],
    )
    images, calibration = (normalise(s.images, **data.normalisation) for s in (data.test, data.train))
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        export = partial(export_model, img_size=side, in_chans=data.in_chans)
        out = Path(directory)
        files = {
            "ONNX, float32": (export(reference, out / "a.onnx", "onnx"), "onnx"),
            "ONNX, int8": (export(reference, out / "b.onnx", "onnx", calibration=calibration), "onnx"),
            "AOTInductor, fused": (export(fused, out / "c.pt2", "aoti"), "aoti"),
        }
        models = {"eager, reference": reference, "eager, fused": fused}
        models |= {name: load_exported(done.path, format, args.threads) for name, (done, format) in files.items()}
        top1 = {}
        for name, model in models.items():
            guesses = torch.cat([model(part).argmax(1) for part in images.split(100)])
            top1[name] = 100 * (guesses == data.test.labels).double().mean().item()
        times = []
        for batch in BATCHES:
            calls = [partial(model, images[:batch].contiguous()) for model in models.values()]
            for call in calls:
                call()
            times.append(dict(zip(models, interleaved(calls, budget=1.0, min_repeats=15), strict=True)))
    print(
        f"{checkpoint['model_name']}, images of {side}×{side}; top-1 of {len(images):,} images of {run['data']}; "
        f"{args.threads} of {os.cpu_count()} threads of {cpu_name()}, torch {torch.__version__}; "
        "median (interquartile range).\n"
    )
    print("| | top-1 | MB | " + " | ".join(f"batch {b}, ms" for b in BATCHES) + " |\n|---|---:|---:|---:|---:|")
    for name in models:
        size = f"{files[name][0].size / 1e6:.2f}" if name in files else ""
        cells = [f"{1e3 * t[name].median:.2f} ({1e3 * t[name].spread:.2f})" for t in times]
        print(f"| {name} | {top1[name]:.2f} % | {size} | {' | '.join(cells)} |")


if __name__ == "__main__":
    sys.exit(main())
