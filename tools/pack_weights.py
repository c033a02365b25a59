#!/usr/bin/env python3
"""Write the weights of a run on CIFAR-10 into the package, for ``pretrained=True``:

    python tools/pack_weights.py runs/cltv --metric test_top1=91.42 \
        --evaluation "10,000 test images of CIFAR-10 at 32 pixels, float32" \
        --training "30 epochs on the 50,000 training images"

The file is cxv/weights/MODEL.safetensors in float16; it replaces an earlier file of the same model. The metadata of the
run (arguments, epoch, seed, class names, size and normalization of the images) go into it with these notes.

The published top-1 must be that of the float16 file. Write the file, run `cxv eval --checkpoint cltv-5/4 …`, and write
the file again with the printed figure. Then run tools/docs_tables.py, which updates docs/sharing.md.
"""

import argparse

import torch

import cxv
from cxv.checkpoint import WEIGHTS, find_checkpoint, read_checkpoint

DATA = "CIFAR-10 (Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html)"
DATA_TERMS = "no license stated; the authors ask to cite their report; a subset of the withdrawn 80 Million Tiny Images"
OF_THE_MACHINE = ("use_fused", "recompute")  # arguments for which the user's own defaults apply


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the --output of `cxv train`, or a .pt or .safetensors file")
    parser.add_argument("--metric", required=True, metavar="NAME=PERCENT", help="the published top-1 of this file")
    parser.add_argument("--evaluation", required=True, metavar="TEXT", help="images, size and precision of that top-1")
    parser.add_argument("--training", required=True, metavar="TEXT", help="images, stages and state of the training")
    args = parser.parse_args()
    checkpoint = read_checkpoint(find_checkpoint(args.run))
    metric, _, percent = args.metric.partition("=")
    path = WEIGHTS / f"{checkpoint['model_name'].replace('/', '-')}.safetensors"
    cxv.save_safetensors(
        args.run,
        path,
        dtype=torch.float16,
        model_kwargs={k: v for k, v in checkpoint["model_kwargs"].items() if k not in OF_THE_MACHINE},
        metrics={metric: float(percent)},
        notes={
            "training": args.training,
            "evaluation": args.evaluation,
            "data": DATA,
            "terms of the data": DATA_TERMS,
            "license": "Apache-2.0",
            "versions": f"written with cxv {cxv.__version__} and torch {torch.__version__.partition('+')[0]}",
        },
    )
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
