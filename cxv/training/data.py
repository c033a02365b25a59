"""Datasets, decoded once into uint8 tensors, and the batches drawn from them.

The paper scales each channel by mean = std = 0.5, and so does this; RandAugment, where wanted, comes before.
"""

import difflib
import importlib
import os
import socket
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError
from .progress import Progress

if TYPE_CHECKING:
    from .augment import RandAugment

DATASETS = ("digits", "cifar10", "cifar100", "folder")
SPLITS = ("train", "test")
VALIDATION = "validation"
MEAN = STD = 0.5
MAX_DEFAULT_SIZE = 64
"""The side that a folder of larger images gets without ``img_size``: the paper's largest, Tiny ImageNet's."""

_DIGITS_SEED = 0  # of the held-out fifth: another --seed must not move images between training and test
_CIFAR = {
    "cifar10": (
        "CIFAR10",
        "cifar-10-python.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    ),
    "cifar100": (
        "CIFAR100",
        "cifar-100-python.tar.gz",
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    ),
}


@dataclass
class ImageSet:
    """One split: ``images`` (N, C, S, S) uint8, ``labels`` (N,) int64, ``skipped``: the files left out."""

    images: Tensor
    labels: Tensor
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprint(self) -> int:
        """A CRC-32 of the pixels and the labels: equal for the same images in the same order."""
        return zlib.crc32(self.labels.contiguous().numpy(), zlib.crc32(self.images.contiguous().numpy()))


@dataclass
class Data:
    """A dataset: its ``classes`` in label order, the ``img_size`` in pixels, and the splits asked for."""

    name: str
    classes: list[str]
    img_size: int
    splits: dict[str, ImageSet]

    @property
    def in_chans(self) -> int:
        return next(iter(self.splits.values())).images.shape[1]

    @property
    def train(self) -> ImageSet:
        return self.splits["train"]

    @property
    def test(self) -> ImageSet:
        return self.splits["test"]

    @property
    def validation(self) -> ImageSet | None:
        return self.splits.get(VALIDATION)


def load_data(
    name: str,
    data_dir: str | Path | None = None,
    *,
    img_size: int | None = None,
    limit_train: int | None = None,
    limit_test: int | None = None,
    validation: int | None = None,
    seed: int = 0,
    on_corrupt: str = "error",
    splits: Sequence[str] = SPLITS,
) -> Data:
    """Load a dataset into memory as uint8.

    Args:
        name: ``"digits"`` (scikit-learn's 1797 real 8×8 scans, grey, a fixed stratified fifth held out),
            ``"cifar10"`` or ``"cifar100"`` (torchvision's, downloaded into ``data_dir`` if not there), or
            ``"folder"``: ``data_dir/train/CLASS/…`` and ``data_dir/test/CLASS/…`` (or ``val``; ``test`` if
            both are there), in any format that PIL reads, as RGB (alpha is dropped).
        data_dir: where the files are; ``data`` for CIFAR by default.
        img_size: side in pixels. Other sizes are cropped about the centre to a square and resized (bicubic,
            antialiased). Default: the dataset's own; for a folder the shorter side of its first training
            image (in sorted order), at most 64.
        limit_train, limit_test: use at most so many images, balanced over the classes, drawn by ``seed``.
            Only those are decoded.
        validation: take so many of the training images, each class by its share, drawn by ``seed``, for a split
            ``"validation"``; ``limit_train`` counts what is left to train on.
        on_corrupt: ``"error"`` or ``"skip"``: what to do about an image that cannot be decoded.
        splits: which of ``"train"`` and ``"test"`` to load.

    Raises:
        InputError: anything wrong with these arguments or with the files, or too little memory for them.
    """
    if name not in DATASETS:
        raise InputError(f"--data: unknown dataset {name!r}{_closest(name)}; allowed: {', '.join(DATASETS)}")
    if on_corrupt not in ("error", "skip"):
        raise InputError(f"--on-corrupt: expected error or skip, got {on_corrupt!r}")
    for arg, value in (
        ("--img-size", img_size),
        ("--limit-train", limit_train),
        ("--limit-test", limit_test),
        ("--validation", validation),
    ):
        if value is not None and value < 1:
            raise InputError(f"{arg}: expected at least 1, got {value}")
    if limit_train is not None:
        limit_train += validation or 0
    limits = {"train": limit_train, "test": limit_test}
    if name == "folder":
        data = _folder(data_dir, img_size, limits, seed, on_corrupt, splits)
        return data if validation is None else _hold_out(data, validation, seed)
    images, labels, classes = _digits(splits) if name == "digits" else _cifar(name, data_dir or "data", splits)
    loaded = {}
    for split in splits:
        keep = balanced_subset(labels[split], limits[split], seed)
        x = images[split][keep]
        if img_size is not None and x.shape[-1] != img_size:
            _check_memory(len(x) * x.shape[1] * img_size**2)
            x = _resize(x, img_size)
        loaded[split] = ImageSet(x, labels[split][keep])
    data = Data(name, classes, next(iter(loaded.values())).images.shape[-1], loaded)
    return data if validation is None else _hold_out(data, validation, seed)


def balanced_subset(labels: Tensor, limit: int | None, seed: int) -> Tensor:
    """Indices, sorted, of at most ``limit`` items with the same number of each label, within one.

    A class that has too few gives all it has, and the others make up for it. ``None``: every index.
    """
    if limit is None or limit >= len(labels):
        return torch.arange(len(labels))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rank = torch.empty_like(order)  # how many of its own class come before each item in that order
    for c in labels.unique():
        mine = order[labels[order] == c]
        rank[mine] = torch.arange(len(mine))
    # the first of every class, then the second of every class, …; a class's turn in a round is random too
    turn = torch.argsort(rank[order], stable=True)
    return order[turn[:limit]].sort().values


def _hold_out(data: Data, n: int, seed: int) -> Data:
    """The data with ``n`` of the training images, each class by its share, in a split of their own."""
    labels = data.train.labels
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    share = torch.empty(len(labels), dtype=torch.float64)  # how far through its own class each image comes
    for c in labels.unique():
        mine = order[labels[order] == c]
        share[mine] = (torch.arange(len(mine), dtype=share.dtype) + 0.5) / len(mine)
    order = order[torch.argsort(share[order], stable=True)]
    held, rest = order[:n].sort().values, order[n:].sort().values
    if len(labels[rest].unique()) < len(labels.unique()):
        raise InputError(f"--validation: {n} of {len(labels)} training images leave a class without one to train on")
    splits = {"train": rest, VALIDATION: held}
    split = {name: ImageSet(data.train.images[i], labels[i], data.train.skipped) for name, i in splits.items()}
    return replace(data, splits=data.splits | split)


def batches(
    data: ImageSet,
    batch_size: int,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    *,
    augment: "RandAugment | None" = None,
    epoch: int = 0,
    skip: int = 0,
    share: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of ``(images, labels)``: (B, C, S, S) float32 in [-1, 1] and (B,) int64, on ``device``.

    In the order of the set, or shuffled by ``generator`` (a CPU one); the last batch may be smaller. ``augment``
    works on the device, by its draws for ``epoch``. The first ``skip`` batches are left out. ``share`` takes
    the rows of a batch and returns those to give of it.
    """
    order = None if generator is None else torch.randperm(len(data), generator=generator)
    if order is None and share is not None:
        order = torch.arange(len(data))
    draws = None if augment is None else augment.draws(len(data), epoch)
    for i in range(skip * batch_size, len(data), batch_size):
        rows = slice(i, i + batch_size) if order is None else order[i : i + batch_size]
        if share is not None:
            rows = share(rows)
        x = data.images[rows].to(device)
        if augment is not None:
            x = augment(x, draws[rows])
        yield normalise(x), data.labels[rows].to(device)


def normalise(images: Tensor) -> Tensor:
    """uint8 to float32 with the paper's mean = std = 0.5: [0, 255] to [-1, 1]."""
    return images.float().div_(255).sub_(MEAN).div_(STD)


def decode_image(path: str | Path, in_chans: int = 3, img_size: int | None = None) -> Tensor:
    """An image file as a uint8 tensor (in_chans, S, S), or (in_chans, H, W) without ``img_size``.

    Turned upright by its EXIF tag, made RGB (or grey for ``in_chans=1``; alpha is dropped), cropped about the
    centre to a square and resized (bicubic, antialiased) unless it has that size already.

    Raises:
        InputError: not an image, or a damaged one; the message names the file.
    """
    image_module, ops, numpy = need("PIL.Image"), need("PIL.ImageOps"), need("numpy")
    try:
        with image_module.open(path) as image:
            image = ops.exif_transpose(image)
            if image.mode.startswith("I;16"):  # PIL would clip 16 bits to 8, and leave the image white
                image = image_module.fromarray((numpy.asarray(image) >> 8).astype("uint8"))
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            image = image.convert("L" if in_chans == 1 else "RGB")
        if img_size is not None and image.size != (img_size, img_size):
            image = ops.fit(image, (img_size, img_size), image_module.Resampling.BICUBIC)
        pixels = torch.from_numpy(numpy.array(image))
    except MemoryError:
        raise
    except Exception as error:  # damaged files raise nearly anything: OSError, SyntaxError, struct.error, …
        raise InputError(f"{path}: cannot read the image ({_one_line(error)})") from error
    return pixels[None] if in_chans == 1 else pixels.permute(2, 0, 1).contiguous()


def need(module: str) -> ModuleType:
    """Import an optional dependency, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"sklearn": "scikit-learn", "PIL": "pillow"}.get(module.split(".")[0], module.split(".")[0])
        raise InputError(f"{package} is needed here and cannot be imported: pip install 'cxv[train]'") from error


def available_memory() -> int | None:
    """Bytes of memory that a process can still take, the container's limit included; None where unknown."""
    found = []
    with suppress(OSError), open("/proc/meminfo") as f:
        found += [int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable:")]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # not there, or "max"
            found.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
    return min(found, default=None)


def _digits(splits: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    datasets, selection = need("sklearn.datasets"), need("sklearn.model_selection")
    bunch = datasets.load_digits()
    x = torch.from_numpy(bunch.images / 16 * 255).round().to(torch.uint8)[:, None]  # levels 0..16
    y = torch.from_numpy(bunch.target).long()
    train, test = selection.train_test_split(range(len(y)), test_size=0.2, random_state=_DIGITS_SEED, stratify=y)
    rows = {"train": torch.tensor(train), "test": torch.tensor(test)}
    return {s: x[rows[s]] for s in splits}, {s: y[rows[s]] for s in splits}, [str(i) for i in range(10)]


def _cifar(
    name: str, data_dir: str | Path, splits: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    class_name, file, url = _CIFAR[name]
    dataset = getattr(need("torchvision.datasets"), class_name)
    _check_memory(60_000 * 3 * 32 * 32)
    images, labels, classes = {}, {}, []
    for split in splits:
        try:
            with _timeout(30):
                found = dataset(str(data_dir), train=split == "train", download=True)
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"{name}: cannot be downloaded ({_one_line(error)}); put {file} (from {url}) into "
                f"{Path(data_dir).absolute()} and run again"
            ) from error
        images[split] = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
        labels[split] = torch.tensor(found.targets)
        classes = list(found.classes)
    return images, labels, classes


def _folder(
    data_dir: str | Path | None,
    img_size: int | None,
    limits: dict[str, int | None],
    seed: int,
    on_corrupt: str,
    splits: Sequence[str],
) -> Data:
    if data_dir is None:
        raise InputError("--data-dir: needed for --data folder")
    root = Path(data_dir)
    if not root.is_dir():
        raise InputError(f"--data-dir: {root} is not a directory")
    where = {}
    for split in splits:
        names = ("train",) if split == "train" else ("test", "val")
        where[split] = next((root / n for n in names if (root / n).is_dir()), None)
        if where[split] is None:
            raise InputError(f"--data-dir: {root} has no directory {' or '.join(n + '/' for n in names)}")
    files = {split: _list_images(folder) for split, folder in where.items()}
    classes = list(next(iter(files.values())))
    for split, found in files.items():
        if list(found) != classes:
            first = where[splits[0]]
            only = [
                f"only in {folder}: {', '.join(sorted(names))}"
                for folder, names in (
                    (first, set(classes) - set(found)),
                    (where[split], set(found) - set(classes)),
                )
                if names
            ]
            raise InputError(f"--data-dir: the classes of {first} and {where[split]} differ ({'; '.join(only)})")
    if len(classes) < 2:
        raise InputError(f"--data-dir: {where[splits[0]]} has one class ({classes[0]}), at least two are needed")

    chosen: dict[str, tuple[list[Path], Tensor]] = {}
    for split, found in files.items():
        paths = [path for group in found.values() for path in group]
        labels = torch.tensor([i for i, group in enumerate(found.values()) for _ in group])
        keep = balanced_subset(labels, limits[split], seed)
        chosen[split] = ([paths[i] for i in keep.tolist()], labels[keep])
    if img_size is None:
        img_size = _first_size(next(iter(chosen.values()))[0], on_corrupt)
    _check_memory(sum(len(paths) for paths, _ in chosen.values()) * 3 * img_size**2)
    loaded = {s: _decode(s, paths, labels, img_size, on_corrupt) for s, (paths, labels) in chosen.items()}
    for split, data in loaded.items():
        lost = set(chosen[split][1].tolist()) - set(data.labels.tolist())
        if lost:
            raise InputError(f"{where[split] / classes[min(lost)]}: not one image of this class could be read")
    return Data("folder", classes, img_size, loaded)


def _list_images(folder: Path) -> dict[str, list[Path]]:
    """The image files of each class folder, both in sorted order; hidden and other files are passed over."""
    extensions = set(need("PIL.Image").registered_extensions())
    found = {}
    for directory in sorted(d for d in folder.iterdir() if d.is_dir() and not d.name.startswith(".")):
        found[directory.name] = sorted(
            Path(parent, name)
            for parent, _, names in os.walk(directory, followlinks=True)
            for name in names
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in extensions
        )
        if not found[directory.name]:
            raise InputError(f"{directory}: this class folder has no image")
    if not found:
        raise InputError(f"{folder}: no class folders in it; expected {folder / 'CLASS' / 'IMAGE'}")
    return found


def _first_size(paths: list[Path], on_corrupt: str) -> int:
    for path in paths:
        try:
            return min(MAX_DEFAULT_SIZE, *decode_image(path).shape[-2:])
        except InputError:
            if on_corrupt == "error":
                raise
    raise InputError(f"{paths[0].parent}: not one image could be read")


def _decode(split: str, paths: list[Path], labels: Tensor, img_size: int, on_corrupt: str) -> ImageSet:
    images = torch.empty(len(paths), 3, img_size, img_size, dtype=torch.uint8)
    good, skipped = [], []
    with Progress(len(paths), f"decoding {split}") as progress:
        for i, path in enumerate(paths):
            try:
                images[i] = decode_image(path, 3, img_size)
                good.append(i)
            except InputError as error:
                if on_corrupt == "error":
                    raise InputError(f"{error}; --on-corrupt skip leaves such images out") from error
                skipped.append(str(path))
                print(f"skipped {error}", file=sys.stderr)
            progress.update(1)
    if skipped:
        print(f"{split}: skipped {len(skipped)} of {len(paths)} images that could not be read")
        keep = torch.tensor(good, dtype=torch.long)
        images, labels = images[keep], labels[keep]
    return ImageSet(images, labels, skipped)


def _resize(images: Tensor, img_size: int) -> Tensor:
    size = (img_size, img_size)
    chunks = (F.interpolate(x.float(), size, mode="bicubic", antialias=True) for x in images.split(1024))
    return torch.cat([x.round().clamp(0, 255).to(torch.uint8) for x in chunks])


def _check_memory(size: int) -> None:
    free = available_memory()
    if free is not None and size > 0.9 * free:
        raise InputError(
            f"the images take {size / 2**30:.2f} GiB of memory once decoded, and {free / 2**30:.2f} GiB is "
            "available: use a smaller --img-size, or --limit-train and --limit-test"
        )


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    # torchvision's downloader has none, and a firewall that drops packets would hang it
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _closest(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), DATASETS, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
