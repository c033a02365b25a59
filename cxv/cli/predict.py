"""``cxv predict``: classify image files."""

import argparse

import torch

from ..data import Preprocessing, normalize
from ..training.engine import pick_device
from .checkpoints import open_checkpoint
from .flags import add_checkpoint, add_machine


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "predict", help="classify images", description="Print the five most likely classes of each image."
    )
    parser.set_defaults(run=run)
    add_checkpoint(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, in any format that PIL reads")
    add_machine(parser)


def run(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    model, checkpoint = open_checkpoint(args, device, args.fused)
    preprocessing = Preprocessing.from_dict(checkpoint)
    images = [preprocessing.decode(path) for path in args.images]
    for path, image in zip(args.images, images, strict=True):
        with torch.no_grad():
            x = normalize(image[None].to(device), **checkpoint["normalization"])
            probabilities = model(x)[0].float().softmax(0)
        top = probabilities.topk(min(5, len(probabilities)))
        print(path)
        for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            print(f"  {100 * p:6.2f} %  {checkpoint['classes'][i]}")
