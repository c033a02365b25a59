"""The ``cxv`` command: train, evaluate, use and export the models."""

import argparse
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any, NoReturn

import torch
import torch.nn.functional as F

from cxv_kernels import __version__

from .errors import InputError
from .export import FORMATS, OPSET, export_model
from .models import create_model, list_models
from .models.arguments import image_size
from .models.registry import load_model
from .sharing import save_safetensors
from .training.config import DEFAULTS, OPTIMIZERS, RECIPES, TrainConfig, flag
from .training.data import DATASETS, load_data, normalize
from .training.distributed import PeerError, World, process_group
from .training.loop import PRECISIONS, autocast_for, evaluate, pick_device, predict, train
from .training.optim import SCHEDULES
from .training.report import Report, check_suffix
from .training.seeds import has_seeds, train_seeds
from .training.sources import decode_image

CALIBRATION_IMAGES, CHECK_IMAGES = 512, 1000  # of cxv export
_ARGUMENTS = {*(f.name for f in fields(TrainConfig)), "format", "report"}  # those that errors of the library name


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0, or 2 after an error that the user can put right (one line on stderr), or 130 when interrupted by Ctrl-C and
        143 by SIGTERM (128 + the signal), after what was done is saved.
    """
    try:
        args = _parser().parse_args(argv)
        args.run(args)
    except PeerError:
        return 2
    except InputError as error:
        print(f"cxv: error: {_with_flags(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        if World.current().is_main:
            print("cxv: interrupted", file=sys.stderr)
        return 128 + getattr(error, "signal", signal.SIGINT)
    return 0


def _with_flags(message: str) -> str:
    """Replace the arguments that a message names in backticks, like `` `batch_size` ``, by their flags."""
    return re.sub(r"`(\w+)`", lambda name: flag(name[1]) if name[1] in _ARGUMENTS else name[0], message)


def _train(args: argparse.Namespace) -> None:
    config = TrainConfig(**{f.name: getattr(args, f.name) for f in fields(TrainConfig)})
    config.model_args = dict(config.model_args) if config.model_args else None
    if args.repeats is not None:
        if config.seeds is not None:
            raise InputError("--repeats and --seeds exclude each other")
        first = config.seed or 0
        config = replace(config, seed=None, seeds=tuple(range(first, first + args.repeats)))
    with process_group():
        if World.current().from_main(lambda: has_seeds(config)):
            train_seeds(config)
        else:
            train(config)


def _eval(args: argparse.Namespace) -> None:
    if args.report is not None:
        check_suffix(args.report)
    device = pick_device(args.device)
    _set_threads(args.threads)
    model, checkpoint = load_model(args.checkpoint, args.which, device, args.fused)
    _check_normalization(checkpoint, args)
    run = DEFAULTS | dict.fromkeys(("data", "data_dir", "limit_test")) | checkpoint["args"]  # shared files lack some
    name = args.data or run["data"]
    if name is None:
        raise InputError(f"--data: give it, as {args.checkpoint} does not say what the model was trained on")
    same = name == run["data"]
    data = load_data(
        name,
        args.data_dir or (run["data_dir"] if same else None),
        img_size=checkpoint["img_size"],
        limit_test=args.limit_test or (run["limit_test"] if same and args.data_dir is None else None),
        seed=run["seed"],
        on_corrupt=args.on_corrupt or run["on_corrupt"],
        splits=("test",),
        cache_dir=args.cache_dir,
        normalization=checkpoint["normalization"],
    )
    if data.classes != checkpoint["classes"]:
        raise InputError(
            f"--data: its classes ({', '.join(data.classes)}) are not those of the checkpoint "
            f"({', '.join(checkpoint['classes'])})"
        )
    if data.in_chans != checkpoint["in_chans"]:
        raise InputError(
            f"--data: images of {data.in_chans} channels, and the checkpoint's model takes {checkpoint['in_chans']}"
        )
    precision = args.precision or run["precision"]
    if precision == "fp16" and args.precision is None and device.type != "cuda":
        precision = "fp32"
    batch_size = args.batch_size or run["batch_size"]
    how = (model, data.test, batch_size, device, autocast_for(precision, device))
    if args.report is None:
        loss, top1 = evaluate(*how)
    else:
        logits, labels = predict(*how), data.test.labels
        loss = F.cross_entropy(logits, labels).item()
        top1 = 100 * (logits.argmax(1) == labels).sum().item() / len(labels)
    epoch = "" if checkpoint["epoch"] is None else f" of epoch {checkpoint['epoch']}"
    line = (
        f"{checkpoint['model_name']}{epoch} on {name}: top-1 {top1:.2f} %, "
        f"loss {loss:.4f} ({len(data.test):,} images, {precision})"
    )
    print(line)
    if args.report is not None:
        Report(line, data.classes, data.test, logits).write(args.report)
        print(f"report in {args.report}")


def _predict(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    _set_threads(args.threads)
    model, checkpoint = load_model(args.checkpoint, args.which, device, args.fused)
    _check_normalization(checkpoint, args)
    images = [decode_image(path, checkpoint["in_chans"], checkpoint["img_size"]) for path in args.images]
    for path, image in zip(args.images, images, strict=True):
        with torch.no_grad():
            x = normalize(image[None].to(device), **checkpoint["normalization"])
            probabilities = model(x)[0].float().softmax(0)
        top = probabilities.topk(min(5, len(probabilities)))
        print(path)
        for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True):
            print(f"  {100 * p:6.2f} %  {checkpoint['classes'][i]}")


def _check_normalization(checkpoint: dict[str, Any], args: argparse.Namespace) -> None:
    try:
        normalize(torch.zeros(1, checkpoint["in_chans"], 1, 1, dtype=torch.uint8), **checkpoint["normalization"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"--checkpoint: {args.checkpoint} wants pixels normalized by {checkpoint['normalization']}; expected mean "
            f"and std, numbers or one for each of {checkpoint['in_chans']} channels"
        ) from error


def _export(args: argparse.Namespace) -> None:
    if args.int8 and args.format != "onnx":
        raise InputError(f"--int8: written with --format onnx alone, got {args.format}")
    if args.format == "safetensors":
        save_safetensors(args.checkpoint, args.out, which=args.which)
        print(f"{args.out}: the weights, and what cxv.create_model(…, checkpoint={args.out!r}) needs")
        return
    fused = False if args.format == "onnx" else args.fused
    if args.format == "onnx" and args.fused:
        raise InputError("--fused: an ONNX file holds the references, which every runtime has")
    model, checkpoint = load_model(args.checkpoint, args.which, "cpu", fused)
    _check_normalization(checkpoint, args)
    _set_threads(args.threads)
    images = calibration = None
    run = checkpoint["args"]
    if args.int8 or args.data is not None or args.data_dir is not None:
        name = args.data or run.get("data")
        if name is None:
            raise InputError(f"--data: give it, as {args.checkpoint} does not say what the model was trained on")
        data = load_data(
            name,
            args.data_dir or (run.get("data_dir") if name == run.get("data") else None),
            img_size=checkpoint["img_size"],
            limit_train=CALIBRATION_IMAGES,
            limit_test=CHECK_IMAGES,
            seed=run.get("seed") or 0,
            on_corrupt=run.get("on_corrupt") or "error",
            splits=("train", "test") if args.int8 else ("test",),
            normalization=checkpoint["normalization"],
        )
        if data.in_chans != checkpoint["in_chans"]:
            raise InputError(
                f"--data: images of {data.in_chans} channels, and the checkpoint's model takes {checkpoint['in_chans']}"
            )
        images = normalize(data.test.images, **data.normalization)
        calibration = normalize(data.train.images, **data.normalization) if args.int8 else None
    known = ("model_name", "classes", "img_size", "in_chans", "normalization")
    done = export_model(
        model,
        args.out,
        args.format,
        img_size=checkpoint["img_size"],
        in_chans=checkpoint["in_chans"],
        images=images,
        calibration=calibration,
        metadata={k: checkpoint[k] for k in known},
    )
    size = "any size" if done.any_size else "×".join(map(str, image_size(checkpoint["img_size"])))
    real = "" if images is None else f", {100 * done.agreement:.1f} % of {len(images):,} images have the same class"
    print(
        f"{done.path}: {done.size / 1e6:.2f} MB, any batch, images of {size}; logits within {done.difference:.1e} of "
        f"{checkpoint['model_name']}'s{real}"
    )


def _models(args: argparse.Namespace) -> None:
    print(f"{'model':24s} parameters (10 classes)")
    for name in list_models():
        try:
            parameters = f"{sum(p.numel() for p in create_model(name, num_classes=10).parameters()):10,d}"
        except ImportError as error:
            parameters = str(error).rpartition(": ")[2]
        print(f"{name:24s} {parameters}")
    print("the same families with other layers/heads: cpv-2/4, cltv-8/4, …")


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="cxv", description="Convolutional X-formers for vision (arXiv 2201.10271).")
    parser.add_argument("--version", action="version", version=f"cxv {__version__}, torch {torch.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    p = commands.add_parser(
        "train",
        help="train a model with DualOpT",
        description="Train a model by the paper's recipe: AdamW until top-1 is stale or --epochs are done, "
        "then SGD from the best weights until it is stale or --sgd-epochs are done. Without arguments it "
        "trains a small CPV (cpv-2/4, --embed-dim 64) on scikit-learn's digits: minutes on one CPU core. "
        "Ctrl-C and SIGTERM stop it between two batches and lose nothing; exit status 130 and 143.",
    )
    p.set_defaults(run=_train)
    g = p.add_argument_group("model")
    g.add_argument(
        "--model",
        metavar="NAME",
        help="see `cxv models` (default: cpv-5/4; for digits cpv-2/4 with --embed-dim 64)",
    )
    g.add_argument(
        "--init",
        metavar="PATH",
        help="start with the weights of this run, .pt or .safetensors file, with a new classifier if the number of "
        "classes differs (default: random weights)",
    )
    g.add_argument("--embed-dim", type=_at_least(1), metavar="N", help="channels (default: the model's own, 128)")
    g.add_argument(
        "--drop-rate", type=float, metavar="P", help="dropout (default: the model's own; the paper's is 0.5)"
    )
    g.add_argument(
        "--stem-stride",
        type=_at_least(1),
        metavar="N",
        help="of the first convolution, or the side of a patch where the model has those (default: the model's own, 1; "
        "for tiny-imagenet 2, as in the paper)",
    )
    g.add_argument(
        "--model-arg",
        type=name_value,
        action="append",
        dest="model_args",
        metavar="NAME=VALUE",
        help="any other argument of the model, e.g. stem_convs=3 or norm=batch, see `help(cxv.models.CXV)`; repeatable",
    )
    g.add_argument(
        "--fused",
        action=argparse.BooleanOptionalAction,
        help="fused kernels or plain PyTorch (default: --fused)",
    )
    g.add_argument(
        "--recompute",
        action=argparse.BooleanOptionalAction,
        help="with --fused: recompute activations in the backward pass to save memory, or keep them, which is faster "
        "(default: --recompute)",
    )
    g = p.add_argument_group("data")
    g.add_argument("--data", metavar="NAME", help=f"{', '.join(DATASETS)} (default: digits)")
    g.add_argument(
        "--data-dir",
        metavar="DIR",
        help="for folder: it has train/CLASS/… and test/CLASS/… (or val); for the others: where the archive is or "
        "goes (default: data)",
    )
    _add_cache(g)
    g.add_argument(
        "--data-on-device",
        action=argparse.BooleanOptionalAction,
        help="all images in the GPU's memory, where batches are drawn and augmented (default: where they take at most "
        "a quarter of what is free)",
    )
    g.add_argument(
        "--img-size",
        type=_at_least(1),
        metavar="PIXELS",
        help="side of the images (default: the dataset's own; for folder the shorter side of the first "
        "training image, at most 64); others are cropped about the center and resized",
    )
    g.add_argument("--limit-train", type=_at_least(1), metavar="N", help="train on N images, balanced over the classes")
    g.add_argument("--limit-test", type=_at_least(1), metavar="N", help="test on N images, balanced over the classes")
    g.add_argument("--on-corrupt", choices=("error", "skip"), help="an unreadable image: stop or skip (default: error)")
    g.add_argument(
        "--validation",
        type=_at_least(1),
        metavar="N",
        help="hold out N of the training images, each class by its share; they pick the best epoch and the test "
        "set only reports (default: the test set picks, as in the paper, whose runs would hold out 5000)",
    )
    g = p.add_argument_group("recipe")
    g.add_argument(
        "--recipe",
        choices=RECIPES,
        help="the paper's: DualOpT, caps of 300 and 100 epochs, patience 20, batches of 128, both rates 0.001, fp32; "
        "paper-augmented adds RandAugment (cnv, cpv: 1,1; cltv: 3,3) and --post-train; modern is for few epochs (30): "
        "AdamW with a one-cycle rate, flips and crops, label smoothing, EMA, no dropout, bf16, and images that grow "
        "from half their size; arguments given besides win",
    )
    g.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        help="DualOpT, or AdamW or SGD alone, by the same rule of --patience (default: dualopt)",
    )
    g.add_argument(
        "--hflip",
        action=argparse.BooleanOptionalAction,
        help="flip every second training image, at random (default: no)",
    )
    g.add_argument(
        "--random-crop",
        type=_at_least(1),
        metavar="PIXELS",
        help="pad training images by so many black pixels a side and crop them at random to their size (default: no)",
    )
    g.add_argument(
        "--rand-augment",
        type=_numbers(2, "OPS,MAGNITUDE"),
        metavar="OPS,MAGNITUDE",
        help="RandAugment: operations an image, magnitude from 0 to 30 (default: none)",
    )
    g.add_argument(
        "--post-train",
        action=argparse.BooleanOptionalAction,
        help="once training on augmented images is over, the same on clean ones from the best weights (default: no)",
    )
    g.add_argument(
        "--epochs",
        type=_at_least(0),
        metavar="N",
        help="cap of the AdamW phase, or the only one (default: 300; digits: 60)",
    )
    g.add_argument(
        "--sgd-epochs",
        type=_at_least(0),
        metavar="N",
        help="cap of DualOpT's SGD phase (default: a third of --epochs, rounded up)",
    )
    g.add_argument(
        "--patience",
        type=_at_least(1),
        metavar="N",
        help="stale epochs that end a phase (default: 20, the paper's)",
    )
    g.add_argument(
        "--batch-size",
        type=_at_least(1),
        metavar="N",
        help="images a batch, which the processes of torchrun share (default: 128)",
    )
    g.add_argument(
        "--accumulate", type=_at_least(1), metavar="N", help="batches whose gradients make one step (default: 1)"
    )
    g.add_argument("--clip-grad", type=float, metavar="NORM", help="largest norm of a gradient (default: no limit)")
    g.add_argument("--lr", type=float, help="of AdamW, or of the only optimizer (default: 0.001)")
    g.add_argument("--sgd-lr", type=float, metavar="LR", help="of DualOpT's SGD (default: 0.001)")
    g.add_argument(
        "--schedule",
        choices=SCHEDULES,
        help="how the rate changes over --epochs: not at all, by a cosine to 0, or PyTorch's OneCycleLR; --lr is the "
        "peak; cosine and onecycle need --optimizer adamw or sgd (default: constant)",
    )
    g.add_argument(
        "--warmup-epochs",
        type=float,
        metavar="N",
        help="epochs until the peak of the schedule, a fraction too (default: none for cosine, 30 %% for onecycle)",
    )
    g.add_argument(
        "--weight-decay",
        type=float,
        metavar="DECAY",
        help="AdamW's, of matrices and convolutions, not of norms, biases and positions (default: 0.01 of everything)",
    )
    g.add_argument(
        "--label-smoothing", type=float, metavar="P", help="of the training loss, from 0 to less than 1 (default: 0)"
    )
    g.add_argument(
        "--ema-decay",
        type=float,
        metavar="DECAY",
        help="average the weights over the steps with this decay, e.g. 0.999; the average is evaluated and used "
        "(default: no average)",
    )
    g.add_argument(
        "--progressive",
        type=_stages,
        metavar="SIZE:EPOCHS,…",
        help="train at growing image sizes, e.g. 16:10,24:4,32:6, with a model that takes any size (default: one size)",
    )
    g = p.add_argument_group("training")
    g.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="fp32, or autocast to bf16 or fp16 (CUDA only) (default: fp32)",
    )
    g.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile the model; not lean in memory, and a resumed run is not bit-exact (default: no)",
    )
    g.add_argument("--seed", type=_at_least(0), metavar="N", help="of weights, order, dropout and subsets (default: 0)")
    g.add_argument(
        "--seeds",
        type=_numbers(None, "0,1,2"),
        metavar="N,N,…",
        help="one run for each, in OUTPUT/seed-N; best, mean and standard deviation go into OUTPUT/summary.json",
    )
    g.add_argument("--repeats", type=_at_least(1), metavar="N", help="the same for N seeds from --seed on")
    _add_machine(g, default=None)
    g = p.add_argument_group("output")
    g.add_argument("--output", metavar="DIR", help="where the run's files go (default: runs/DATA-MODEL)")
    g.add_argument(
        "--tensorboard",
        action=argparse.BooleanOptionalAction,
        help="the numbers of metrics.jsonl for TensorBoard too, in OUTPUT/tensorboard (default: no)",
    )
    g.add_argument(
        "--resume", action="store_true", help="go on with the run in --output; other arguments default to its"
    )
    g.add_argument("--overwrite", action="store_true", help="delete the run in --output first")

    p = commands.add_parser("eval", help="top-1 of a trained model", description="Top-1 of a trained model.")
    p.set_defaults(run=_eval)
    _add_checkpoint(p)
    p.add_argument("--data", metavar="NAME", help=f"{', '.join(DATASETS)} (default: the run's)")
    p.add_argument("--data-dir", metavar="DIR", help="its files (default: the run's); folder needs only test/ or val/")
    _add_cache(p)
    p.add_argument("--limit-test", type=_at_least(1), metavar="N", help="at most N images (default: as in the run)")
    p.add_argument("--on-corrupt", choices=("error", "skip"), help="an unreadable image (default: as in the run)")
    p.add_argument("--batch-size", type=_at_least(1), metavar="N", help="default: the run's")
    p.add_argument("--precision", choices=PRECISIONS, help="default: the run's")
    p.add_argument(
        "--report",
        metavar="FILE",
        help="confusion matrix, accuracy by class and the worst mistakes, in one .html or .png file",
    )
    _add_machine(p, default="auto")

    p = commands.add_parser("predict", help="classify images", description="The five likeliest classes of images.")
    p.set_defaults(run=_predict)
    _add_checkpoint(p)
    p.add_argument("images", nargs="+", metavar="IMAGE", help="image files, in any format that PIL reads")
    _add_machine(p, default="auto")

    p = commands.add_parser(
        "export",
        help="write a trained model as ONNX, torch.export or AOTInductor",
        description="Write a trained model for programs without cxv. The file is read back and compared with the model "
        "on random images of several batch sizes before it takes its name. See docs/deploy.md.",
    )
    p.set_defaults(run=_export)
    _add_checkpoint(p)
    p.add_argument(
        "--format",
        choices=(*FORMATS, "safetensors"),
        required=True,
        help=f"onnx: opset {OPSET}, plain operators; torch: torch.export.load; aoti: compiled for this CPU; "
        "safetensors: weights and metadata alone, see docs/sharing.md",
    )
    p.add_argument("--int8", action="store_true", help="onnx in 8 bits, calibrated on images of the run's training set")
    p.add_argument("--data", metavar="NAME", help="compare on its test images too (with --int8, by default the run's)")
    p.add_argument("--data-dir", metavar="DIR", help="its files (default: the run's)")
    p.add_argument("--threads", type=_at_least(1), metavar="N", help="CPU threads (default: torch's choice)")
    p.add_argument("out", metavar="OUT", help="the file to write: .onnx, .safetensors, or .pt2 for torch and aoti")

    p = commands.add_parser("models", help="list the models", description="The models and their parameter counts.")
    p.set_defaults(run=_models)
    return parser


def _add_cache(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="where decoded images are kept, to be mapped into memory; none: nowhere (default: $CXV_CACHE, else cxv in "
        "$XDG_CACHE_HOME or ~/.cache)",
    )


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="the --output of `cxv train`, a .pt file in it, or a .safetensors file of cxv.save_safetensors",
    )
    parser.add_argument(
        "--which", choices=("best", "last"), default="best", help="which of its weights (default: best)"
    )
    parser.add_argument(
        "--fused",
        action=argparse.BooleanOptionalAction,
        help="fused kernels or plain PyTorch (default: as in the run)",
    )


def _add_machine(parser: argparse._ActionsContainer, default: str | None) -> None:
    parser.add_argument("--device", default=default, help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--threads", type=_at_least(1), metavar="N", help="CPU threads (default: torch's choice)")


def _at_least(least: int):
    def whole_number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"expected a whole number, at least {least}, got {text!r}")
        return value

    return whole_number


def name_value(text: str) -> tuple[str, int | float | bool | str | None]:
    """``"stem_convs=3"`` → ("stem_convs", 3): a number, true, false, none, or else a word."""
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals and value):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    words = {"true": True, "false": False, "none": None}
    if value.lower() in words:
        return name, words[value.lower()]
    for number in (int, float):
        with suppress(ValueError):
            return name, number(value)
    return name, value


def _stages(text: str) -> tuple[tuple[int, int], ...]:
    try:
        return tuple((int(size), int(epochs)) for size, epochs in (stage.split(":") for stage in text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected SIZE:EPOCHS,… like 16:10,24:4,32:6, got {text!r}") from error


def _numbers(count: int | None, example: str):
    def whole_numbers(text: str) -> tuple[int, ...]:
        try:
            values = tuple(int(part) for part in text.split(","))
        except ValueError:
            values = ()
        if not values or (count is not None and len(values) != count):
            raise argparse.ArgumentTypeError(f"expected whole numbers like {example}, got {text!r}")
        return values

    return whole_numbers


if __name__ == "__main__":
    sys.exit(main())
