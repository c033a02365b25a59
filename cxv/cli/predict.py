"""``cxv predict``: classify image files."""

import argparse
import csv
import glob
import io
import json
import os
import sys
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from http.client import HTTPException
from itertools import islice
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from ..data import Preprocessing, normalize
from ..data.decode import first_pages, one_line, pixel_limit, readable_extensions
from ..data.scan import is_hidden
from ..errors import InputError, printable
from ..training.engine import pick_device
from .checkpoints import open_checkpoint
from .flags import WHOLE_NUMBER, add_checkpoint, add_machine, parser_of

_BATCH = 64
_TIMEOUT, _LARGEST = 30, 2**28  # seconds and bytes of a download
Prediction = tuple[str, list[tuple[str, float]]]
"""A file, and classes with their probabilities, the most likely first."""


HELP = "classify images"
DESCRIPTION = (
    "Print the most likely classes of each image. An image that cannot be read is reported, the others are classified, "
    "and the exit status is 1."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint(parser)
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="image file, folder (with its subfolders), pattern such as 'photos/**/*.jpg', URL, or - (standard input)",
    )
    parser.add_argument(
        "--top-k",
        type=parser_of(*WHOLE_NUMBER, (lambda k: k >= 1, "at least 1")),
        default=5,
        metavar="K",
        help="number of classes to print (default: 5)",
    )
    parser.add_argument(
        "--format",
        choices=("table", "csv", "json"),
        default="table",
        help="table; csv: a line for each class with file, rank, class, probability; json: a list (default: table)",
    )
    add_machine(parser)


def run(args: argparse.Namespace) -> int:
    device = pick_device(args.device)
    model, checkpoint = open_checkpoint(args, device, args.fused)
    failures: list[dict[str, str]] = []
    with pixel_limit(checkpoint["args"].get("max_pixels")):
        images = _decoded(_files(args.images), Preprocessing.from_dict(checkpoint), failures)
        _WRITERS[args.format](_predicted(model, checkpoint, images, args.top_k, device), failures)
    return 1 if failures else 0


def _predicted(
    model: nn.Module, checkpoint: dict[str, Any], images: Iterable[tuple[str, Tensor]], k: int, device: torch.device
) -> Iterator[Prediction]:
    classes, images = checkpoint["classes"], iter(images)
    while batch := list(islice(images, _BATCH)):
        files, pixels = zip(*batch, strict=True)
        with torch.no_grad():
            x = normalize(torch.stack(pixels).to(device), **checkpoint["normalization"])
            top = model(x).float().softmax(1).topk(min(k, len(classes)))
        for file, values, indices in zip(files, top.values.tolist(), top.indices.tolist(), strict=True):
            yield file, [(classes[i], p) for i, p in zip(indices, values, strict=True)]


def _decoded(
    files: Iterable[str], preprocessing: Preprocessing, failures: list[dict[str, str]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield each file with its pixels; report those that cannot be read, and add them to ``failures``."""
    multipage: list[str] = []
    for file in files:
        pages: list[Any] = []
        try:
            pixels = preprocessing.decode(_opened(file), pages)
        except InputError as error:
            print(f"cxv: error: {printable(error)}", file=sys.stderr)
            failures.append({"file": file, "error": str(error)})
        else:
            multipage += [file] * len(pages)
            yield file, pixels
    if multipage:
        print(f"cxv: {printable(first_pages(multipage))}", file=sys.stderr)


def _files(arguments: Sequence[str]) -> Iterator[str]:
    """Yield the files of folders and patterns, and other arguments as they are."""
    for argument in arguments:
        matches = [argument]
        if not os.path.lexists(argument) and glob.has_magic(argument):
            matches = sorted(glob.glob(argument, recursive=True)) or matches
        for match in matches:
            images = _images_in(match) if os.path.isdir(match) else iter(())
            yield next(images, match)  # a folder without images: _opened says so
            yield from images


def _images_in(folder: str) -> Iterator[str]:
    extensions, others = readable_extensions(), 0
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in sorted(names):
            if os.path.splitext(name)[1].lower() in extensions and not is_hidden(name):
                yield os.path.join(parent, name)
            else:
                others += 1
    if others:
        print(f"cxv: {printable(folder)}: passed over {others} files that are no images", file=sys.stderr)


def _opened(file: str) -> str | BinaryIO:
    """Return an image file as :meth:`Preprocessing.decode` takes it. Raise ``InputError`` if that is impossible."""
    if file == "-":
        return io.BytesIO(b"" if sys.stdin is None else sys.stdin.buffer.read())
    if os.path.isdir(file):
        raise InputError(f"{file}: no image in this folder")
    if not file.lower().startswith(("http://", "https://")):
        return file
    try:
        request = urllib.request.Request(file, headers={"User-Agent": "cxv"})  # some servers refuse Python's own
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            stream = io.BytesIO(answer.read(_LARGEST))
    except (OSError, ValueError, HTTPException) as error:
        raise InputError(f"{file}: cannot be downloaded ({one_line(error)})") from error
    stream.name = file
    return stream


def _write_table(predictions: Iterable[Prediction], failures: list[dict[str, str]]) -> None:
    for file, classes in predictions:
        print(printable(file))
        for name, p in classes:
            print(f"  {100 * p:6.2f} %  {printable(name)}")


def _write_csv(predictions: Iterable[Prediction], failures: list[dict[str, str]]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("file", "rank", "class", "probability"))
    for file, classes in predictions:
        writer.writerows((file, rank, name, f"{p:.6f}") for rank, (name, p) in enumerate(classes, 1))


def _write_json(predictions: Iterable[Prediction], failures: list[dict[str, str]]) -> None:
    entries: list[dict[str, Any]] = [
        {"file": file, "predictions": [{"class": name, "probability": p} for name, p in classes]}
        for file, classes in predictions
    ]
    print(json.dumps(entries + failures, indent=2))


_WRITERS = {"table": _write_table, "csv": _write_csv, "json": _write_json}
