"""``cxv eval``: top-1 of a trained model."""

import argparse

import torch.nn.functional as F

from ..training.engine import autocast_for, evaluate, pick_device, predict
from .checkpoints import load_run_data, open_checkpoint
from .flags import add_checkpoint, add_machine, add_option
from .report import Report, check_suffix


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "eval",
        help="evaluate a trained model",
        description="Print the top-1 accuracy and the loss of a trained model on a test set.",
    )
    parser.set_defaults(run=run)
    add_checkpoint(parser)
    add_option(parser, "data", shown="the run's")
    add_option(parser, "data_dir", shown="the run's", note="; folder needs only test/ or val/")
    add_option(parser, "labels", shown="the run's")
    add_option(parser, "cache_dir")
    for name in ("limit_test", "on_corrupt", "batch_size", "precision"):
        add_option(parser, name, shown="the run's")
    parser.add_argument(
        "--report",
        metavar="FILE",
        help="write confusion matrix, accuracy of each class and worst mistakes into one .html or .png file",
    )
    add_machine(parser)


def run(args: argparse.Namespace) -> None:
    if args.report is not None:
        check_suffix(args.report)
    device = pick_device(args.device)
    model, checkpoint = open_checkpoint(args, device, args.fused)
    run = checkpoint["args"]
    data = load_run_data(args, checkpoint, "test")
    precision = args.precision or run["precision"]
    if precision == "fp16" and args.precision is None and device.type != "cuda":
        precision = "fp32"
    batch_size = run["batch_size"] if args.batch_size is None else args.batch_size
    arguments = (model, data.test, batch_size, device, autocast_for(precision, device))
    if args.report is None:
        loss, top1 = evaluate(*arguments)
    else:
        logits, labels = predict(*arguments), data.test.labels
        loss = F.cross_entropy(logits, labels).item()
        top1 = 100 * (logits.argmax(1) == labels).sum().item() / len(labels)
    epoch = "" if checkpoint["epoch"] is None else f" of epoch {checkpoint['epoch']}"
    line = (
        f"{checkpoint['model_name']}{epoch} on {data.name}: top-1 {top1:.2f} %, "
        f"loss {loss:.4f} ({len(data.test):,} images, {precision})"
    )
    print(line)
    if args.report is not None:
        Report(line, data.classes, data.test, logits).write(args.report)
        print(f"report in {args.report}")
