"""Exported models beside the eager one, on the CPU: top-1, size, milliseconds.

``python benchmarks/deploy.py --checkpoint runs/digits-cpv-2-4``: a run of ``cxv train`` in eager mode (the references,
and the fused kernels), in ONNX (float32, and int8 calibrated on 512 training images) under onnxruntime, and as a fused
AOTInductor package. The times are medians of interleaved rounds in one process.
All goes to results/deploy-cpu.json, of which ``python benchmarks/tables.py`` draws the table of docs/deploy.md.
"""

import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from common import Parser, environment, positive, timing_json, write_json
from deploy_report import report
from memory import interleaved

from cxv.export import export_model, load_exported
from cxv.training.checkpoint import load_model
from cxv.training.data import load_data, normalise

BATCHES = (1, 32)


def main(argv: list[str] | None = None) -> None:
    """Measure, write the JSON, print the table."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="the --output of cxv train")
    parser.add_argument("--limit-test", type=positive, default=10_000, help="images of the test set")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of deploy-cpu.json")
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
    results = {
        "benchmark": "deploy",
        "environment": environment(torch.device("cpu"), torch.float32),
        "model": checkpoint["model_name"],
        "img_size": side,
        "data": run["data"],
        "images": len(images),
        "rows": [
            {
                "name": name,
                "top1": top1[name],
                "bytes": files[name][0].size if name in files else None,
                "times": {str(batch): timing_json(time[name]) for batch, time in zip(BATCHES, times, strict=True)},
            }
            for name in models
        ],
    }
    write_json(args.out / "deploy-cpu.json", results)
    print(report(results).text())


if __name__ == "__main__":
    sys.exit(main())
