"""``cxv eval``: the scores of a trained model."""

import argparse
import csv
import io
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..checkpoint import atomic_write, find_checkpoint
from ..data.loader import ImageSet
from ..errors import InputError, printable
from ..training.config import METRICS
from ..training.engine import autocast_for, pick_device, predict
from .checkpoints import load_run_data, open_checkpoint
from .flags import add_checkpoint, add_machine, add_option
from .report import Report, check_report
from .scores import Scores

SPLITS = {"train": "train", "val": "validation", "test": "test"}


HELP = "evaluate a trained model"
DESCRIPTION = "Print top-1 and top-5 accuracy, macro-F1, balanced accuracy and the loss of a trained model."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    add_option(parser, "data", shown="the run's")
    add_option(
        parser,
        "data_dir",
        shown="the run's, or with `labels` the folder of that file",
        note="; only the evaluated split is needed",
    )
    add_option(parser, "labels", shown="the run's")
    parser.add_argument("--split", choices=tuple(SPLITS), default="test", help="images to evaluate (default: test)")
    add_option(parser, "cache_dir")
    for name in ("limit_test", "on_corrupt", "batch_size", "precision"):
        add_option(parser, name, shown="the run's")
    parser.add_argument(
        "--predictions",
        metavar="FILE",
        help="write a CSV file with a row for each image: file, class, predicted class and probabilities of both",
    )
    parser.add_argument(
        "--report",
        metavar="FILE",
        help="write curves, confusion matrix, accuracy of each class and worst mistakes into one .html or .png file",
    )
    add_machine(parser)


def run(args: argparse.Namespace) -> None:
    for file in filter(None, (args.predictions, args.report)):
        if not Path(file).parent.is_dir():
            raise InputError(f"cannot write {file}: {Path(file).parent} is not a directory")
    if args.report is not None:
        check_report(args.report)
    split = SPLITS[args.split]
    if args.limit_test is not None and split != "test":
        raise InputError(f"`limit_test`: for the test images alone, and --split is {args.split}")
    device = pick_device(args.device)
    model, checkpoint = open_checkpoint(args, device, args.fused)
    run = checkpoint["args"]
    data = load_run_data(args, checkpoint, split)
    precision = args.precision or run["precision"]
    if precision == "fp16" and args.precision is None and device.type != "cuda":
        precision = "fp32"
    batch_size = run["batch_size"] if args.batch_size is None else args.batch_size
    images = data.splits[split]
    logits = predict(model, images, batch_size, device, autocast_for(precision, device))
    scores = Scores(logits, images.labels)
    epoch = "" if checkpoint["epoch"] is None else f" of epoch {checkpoint['epoch']}"
    where = data.name if split == "test" else f"the {split} images of {data.name}"
    title = f"{checkpoint['model_name']}{epoch} on {where}: {scores} ({len(images):,} images, {precision})"
    print(title)
    files = images.paths or [f"{split} image {i}" for i in range(len(images))]
    if args.predictions is not None:
        _write_predictions(args.predictions, files, images, scores, data.classes)
        print(f"predictions in {printable(args.predictions)}")
    if args.report is not None:
        history = _history(find_checkpoint(args.checkpoint, args.which), checkpoint)
        Report(title, data.classes, images, logits, files, history).write(args.report)
        print(f"report in {printable(args.report)}")


def _write_predictions(path: str, files: list[str], images: ImageSet, scores: Scores, classes: list[str]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("file", "class", "predicted", "probability_of_class", "probability_of_predicted"))
    for file, true, predicted, p in zip(
        files, images.labels.tolist(), scores.predicted.tolist(), scores.probabilities, strict=True
    ):
        writer.writerow((file, classes[true], classes[predicted], f"{p[true]:.6f}", f"{p[predicted]:.6f}"))
    atomic_write(path, text.getvalue().encode(errors="backslashreplace"))


def _history(path: Path, checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    """The epochs of the run: all of them if the checkpoint is in its directory, else those up to the checkpoint."""
    if "history" in checkpoint:
        with suppress(OSError, ValueError):
            return [json.loads(line) for line in (path.parent / METRICS).read_bytes().splitlines()]
    return checkpoint.get("history") or []
