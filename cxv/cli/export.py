"""``cxv export``: a trained model for programs without cxv."""

import argparse

from ..data import Preprocessing, normalize
from ..errors import InputError
from ..export import FORMATS, OPSET, export_model
from ..models.arguments import image_size
from ..sharing import save_safetensors
from .checkpoints import load_run_data, open_checkpoint
from .flags import add_checkpoint, add_option

CALIBRATION_IMAGES, CHECK_IMAGES = 512, 1000


HELP = "write a trained model as ONNX, torch.export or AOTInductor"
DESCRIPTION = (
    "Write a trained model for programs without cxv. The file is read back and compared with the model on random "
    "images of several batch sizes before it takes its name. See docs/deploy.md."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument(
        "--format",
        choices=(*FORMATS, "safetensors"),
        required=True,
        help=f"onnx: opset {OPSET}, plain operators; torch: torch.export.load; aoti: compiled for this CPU; "
        "safetensors: weights and metadata alone, see docs/sharing.md",
    )
    parser.add_argument(
        "--int8", action="store_true", help="onnx in 8 bits, calibrated on images of the run's training set"
    )
    add_option(
        parser, "data", shown="with --int8 the run's", note="; compare the file with the model on its test images"
    )
    add_option(parser, "data_dir", shown="the run's")
    add_option(parser, "threads")
    parser.add_argument("out", metavar="OUT", help="the file to write: .onnx, .safetensors, or .pt2 for torch and aoti")


def run(args: argparse.Namespace) -> None:
    if args.int8 and args.format != "onnx":
        raise InputError(f"--int8: written with --format onnx alone, got {args.format}")
    if args.format == "safetensors":
        for name in ("fused", "data", "data_dir", "threads"):
            if getattr(args, name) is not None:
                raise InputError(f"`{name}`: not for --format safetensors, which copies the weights as they are")
        save_safetensors(args.checkpoint, args.out, which=args.which)
        print(f"{args.out}: the weights, and what cxv.create_model(…, checkpoint={args.out!r}) needs")
        return
    if args.format == "onnx" and args.fused:
        raise InputError("--fused: an ONNX file holds the references, which every runtime has")
    model, checkpoint = open_checkpoint(args, "cpu", False if args.format == "onnx" else args.fused)
    images = calibration = None
    if args.int8 or args.data is not None or args.data_dir is not None:
        splits = ("train", "test") if args.int8 else ("test",)
        limits = {"limit_train": CALIBRATION_IMAGES, "limit_test": CHECK_IMAGES}
        data = load_run_data(args, checkpoint, *splits, match_classes=False, **limits)
        images = normalize(data.test.images, **data.normalization)
        calibration = normalize(data.train.images, **data.normalization) if args.int8 else None
    preprocessing = Preprocessing.from_dict(checkpoint).to_dict()
    done = export_model(
        model,
        args.out,
        args.format,
        img_size=checkpoint["img_size"],
        in_chans=checkpoint["in_chans"],
        images=images,
        calibration=calibration,
        metadata={"model_name": checkpoint["model_name"], "classes": checkpoint["classes"], **preprocessing},
    )
    size = "any size" if done.any_size else "×".join(map(str, image_size(checkpoint["img_size"])))
    real = "" if images is None else f", {100 * done.agreement:.1f} % of {len(images):,} images have the same class"
    print(
        f"{done.path}: {done.size / 1e6:.2f} MB, any batch, images of {size}; logits within {done.difference:.1e} of "
        f"{checkpoint['model_name']}'s{real}"
    )
