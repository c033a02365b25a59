"""Datasets as uint8 images (in memory, in a mapped file or on a device), and batches of them.

The paper normalizes each channel with mean = std = 0.5, and Tiny ImageNet with its own statistics.
"""

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cxv_kernels.validation import python_numbers

from ..errors import InputError
from .cache import Decoded, cache_folder, check_memory, crc, decode
from .datasets import (
    Select,
    Source,
    cifar_sources,
    folder_sources,
    need,
    resize,
    tiny_imagenet_sources,
)

if TYPE_CHECKING:
    from .augment import Augmentation

DATASETS = ("digits", "cifar10", "cifar100", "tiny-imagenet", "folder")
SPLITS = ("train", "test")
VALIDATION = "validation"
MEAN = STD = 0.5
TINY_IMAGENET = {
    "mean": [122.479 / 255, 114.276 / 255, 101.396 / 255],
    "std": [70.492 / 255, 68.568 / 255, 71.813 / 255],
}
"""Mean and std of the channels of Tiny ImageNet, for pixels in [0, 1], from the paper's scripts."""
GROUP_BYTES = 2**22
"""Bytes of images that are gathered and augmented at once; several batches of small images share these calls."""
DEVICE_SHARE = 0.25
"""The largest share of a device's free memory that a dataset uses by default."""

_DIGITS_SEED = 0  # selects the held-out fifth, because ``seed`` must not move images between training and test


@dataclass
class ImageSet:
    """A split of a dataset: ``pixels`` (M, C, S, S) uint8 and ``labels`` (N,) int64.

    ``rows`` (N,) int64 are the indices of the split's images in ``pixels``; None stands for all images in order.
    ``skipped`` lists the files that were skipped. ``normalization`` has mean and std of pixels in [0, 1], as numbers or
    with a number per channel.
    """

    pixels: Tensor
    labels: Tensor
    skipped: list[str] = field(default_factory=list)
    rows: Tensor | None = None
    normalization: dict[str, Any] = field(default_factory=lambda: {"mean": MEAN, "std": STD})
    _fingerprint: int | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> Tensor:
        """The images (N, C, S, S), uint8. They are a copy if the split has ``rows``."""
        return self.pixels if self.rows is None else self.pixels[self.rows]

    def subset(self, index: Tensor) -> "ImageSet":
        """Return the images with these indices, without a copy."""
        rows = index if self.rows is None else self.rows[index]
        return replace(self, labels=self.labels[index], rows=rows, _fingerprint=None)

    def take(self, index: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return images (n, C, S, S), uint8, and labels (n,) of these indices (int64, on the CPU), on ``device``."""
        rows = index if self.rows is None else self.rows[index]
        images, labels = (t[i.to(t.device)] for t, i in ((self.pixels, rows), (self.labels, index)))
        pin = device.type == "cuda" and images.device.type == "cpu"  # the copy goes on while this process does
        images, labels = (t.pin_memory() if pin else t for t in (images, labels))
        return images.to(device, non_blocking=pin), labels.to(device, non_blocking=pin)

    def to(self, device: torch.device) -> "ImageSet":
        """Return the set with its own pixels in the memory of ``device``. Its batches are then made there."""
        pixels = self.images.to(device, copy=self.rows is None)
        return replace(self, pixels=pixels, labels=self.labels.to(device), rows=None)

    def fingerprint(self) -> int:
        """Return a CRC-32 of pixels and labels, which is equal for the same images in the same order."""
        if self._fingerprint is None:
            total = 0
            for index in torch.arange(len(self)).split(4096):
                total = crc(self.take(index, torch.device("cpu"))[0], total)
            self._fingerprint = crc(self.labels.cpu(), total)
        return self._fingerprint


@dataclass
class Data:
    """A dataset: the ``classes`` in label order, the ``img_size`` in pixels, and the loaded splits."""

    name: str
    classes: list[str]
    img_size: int
    splits: dict[str, ImageSet]

    @property
    def in_chans(self) -> int:
        return next(iter(self.splits.values())).pixels.shape[1]

    @property
    def normalization(self) -> dict[str, Any]:
        return next(iter(self.splits.values())).normalization

    @property
    def place(self) -> str:
        """The location of the pixels, for log lines."""
        pixels = self.splits[next(iter(self.splits))].pixels
        return "in memory" if pixels.device.type == "cpu" else f"on {pixels.device}"

    @property
    def train(self) -> ImageSet:
        return self.splits["train"]

    @property
    def test(self) -> ImageSet:
        return self.splits["test"]

    @property
    def validation(self) -> ImageSet | None:
        return self.splits.get(VALIDATION)


@python_numbers
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
    cache_dir: str | Path | None = None,
    normalization: dict[str, Any] | None = None,
    log: Callable[[str], None] | None = None,
) -> Data:
    """Load a dataset as uint8 images. Digits are in memory; other datasets are decoded once and mapped from a cache.

    Args:
        name: Name of the dataset. ``"digits"`` is the digits of scikit-learn (1797 gray 8×8 scans, of which a fixed
            stratified fifth is the test set). ``"cifar10"`` and ``"cifar100"`` are those of torchvision, downloaded
            into ``data_dir`` if they are missing. ``"tiny-imagenet"`` (200 classes, 64×64) is downloaded in the same
            way, and its ``val/`` is the test set. ``"folder"`` reads ``data_dir/train/CLASS/…`` and
            ``data_dir/test/CLASS/…`` (or ``val``, if there is no ``test``) as RGB, in any format that PIL reads.
        data_dir: Directory of the files. Default for downloaded datasets: ``data``.
        img_size: Side of the images in pixels. Images of other sizes are cropped about the center to a square and
            resized (bicubic, antialiased). Default: the size of the dataset; for a folder the shorter side of its first
            training image (in sorted order), at most 64.
        limit_train: Largest number of training images, balanced over the classes and drawn by ``seed``. Only these
            images are decoded.
        limit_test: Largest number of test images, drawn in the same way.
        validation: Number of training images for a split ``"validation"``, drawn by ``seed`` from each class by its
            share. ``limit_train`` counts the images that remain for training.
        seed: Seed of the draws.
        on_corrupt: ``"error"`` to raise an error for an image that cannot be decoded, or ``"skip"`` to skip the image.
        splits: The splits to load, ``"train"`` and ``"test"``.
        cache_dir: Directory of the cache, see :mod:`cxv.data.cache`. ``"none"`` decodes into memory.
        normalization: ``mean`` and ``std`` of pixels in [0, 1]. Default: those of the paper for this dataset.
        log: Function that receives log lines about the cache and skipped images. Default: print them.

    Returns:
        The dataset. Its ``train``, ``test`` and ``validation`` are the splits.

    Raises:
        InputError: If an argument or a file is invalid, or the memory is too small.
    """
    sizes = {"img_size": img_size, "limit_train": limit_train, "limit_test": limit_test, "validation": validation}
    _check_arguments(name, on_corrupt, splits, sizes)
    if limit_train is not None:
        limit_train += validation or 0
    limits = {"train": limit_train, "test": limit_test}
    log = log or (lambda line: print(line, flush=True))
    if normalization is None:
        normalization = TINY_IMAGENET if name == "tiny-imagenet" else {"mean": MEAN, "std": STD}

    def select(labels: Tensor, split: str) -> Tensor:
        return balanced_subset(labels, limits[split], seed)

    if name == "digits":
        data = _digits(splits, img_size, select)
    else:
        loaded = {}
        for source in _sources(name, data_dir, splits, img_size, select, on_corrupt):
            limit = limits[source.split]
            variant = f"{name} {on_corrupt}" + ("" if limit is None else f" limit {limit} seed {seed}")
            loaded[source] = decode(source, variant, cache_folder(cache_dir), log)
        data = _readable(name, loaded, log)
    for split in data.splits.values():
        split.normalization = normalization
    return data if validation is None else _hold_out(data, validation, seed)


def _check_arguments(name: str, on_corrupt: str, splits: Sequence[str], sizes: dict[str, int | None]) -> None:
    if name not in DATASETS:
        raise InputError(f"`data`: unknown dataset {name!r}{_closest(name)}; allowed: {', '.join(DATASETS)}")
    if on_corrupt not in ("error", "skip"):
        raise InputError(f"`on_corrupt`: expected error or skip, got {on_corrupt!r}")
    for arg, value in sizes.items():
        if value is not None and not (isinstance(value, Integral) and value >= 1 and not isinstance(value, bool)):
            raise InputError(f"`{arg}`: expected a whole number, at least 1, got {value}")
    if isinstance(splits, str) or not splits or not all(split in SPLITS for split in splits):
        raise InputError(f"splits: expected a sequence of {' and '.join(map(repr, SPLITS))}, got {splits!r}")
    if sizes["validation"] is not None and "train" not in splits:
        raise InputError(f"`validation`: taken from the training images, and splits are {splits!r}")


@python_numbers
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
    validation, rest = order[:n].sort().values, order[n:].sort().values
    if len(labels[rest].unique()) < len(labels.unique()):
        raise InputError(f"`validation`: {n} of {len(labels)} training images leave a class without one to train on")
    splits = {"train": rest, VALIDATION: validation}
    return replace(data, splits=data.splits | {name: data.train.subset(i) for name, i in splits.items()})


def _readable(name: str, loaded: dict[Source, Decoded], log: Callable[[str], None]) -> Data:
    """The dataset of the images that could be decoded."""
    splits = {}
    for source, decoded in loaded.items():
        good = decoded.labels >= 0
        labels = decoded.labels[good]
        skipped = [str(source.paths[i]) for i in (~good).nonzero().flatten().tolist()]
        if skipped:
            log(f"{source.split}: skipped {len(skipped)} of {len(good)} images that could not be read")
        lost = set((~decoded.labels[~good]).tolist()) - set(labels.tolist())
        if lost:
            where = f"{source.split} images of {decoded.classes[min(lost)]}"
            raise InputError(f"`data_dir`: {source.root}: not one of the {where} could be read")
        splits[source.split] = ImageSet(decoded.images, labels, skipped, _fingerprint=decoded.fingerprint)
    return Data(name, decoded.classes, source.img_size, splits)


def to_device(data: Data, device: torch.device, wanted: bool | None) -> Data:
    """The data in the memory of ``device`` if ``wanted``, or for None if that is a GPU's and has ample room.

    Raises:
        InputError: wanted, and it has no room.
    """
    size = sum(len(split) * split.pixels[:1].numel() for split in data.splits.values())
    if wanted is None:
        wanted = device.type == "cuda" and size <= DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]
    if not wanted:
        return data
    if device.type == "cpu":
        check_memory(size)
    try:
        return replace(data, splits={name: split.to(device) for name, split in data.splits.items()})
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"`data_on_device`: the images take {size / 2**30:.2f} GiB, which {device} has not free; leave it out"
        ) from error


@python_numbers
def batches(
    data: ImageSet,
    batch_size: int,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    *,
    augment: "Augmentation | None" = None,
    epoch: int = 0,
    skip: int = 0,
    shard: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of normalized images (B, C, S, S), float32, and labels (B,), int64, on ``device``.

    The batches have the order of the set, or are shuffled by a CPU ``generator``. The last batch can be smaller.
    ``augment`` runs on the device with its draws for ``epoch``. The first ``skip`` batches are skipped. ``shard``
    selects the rows of a batch for this process.
    """
    device = torch.device(device)
    order = torch.arange(len(data)) if generator is None else torch.randperm(len(data), generator=generator)
    draws = None if augment is None else augment.draws(len(data), epoch)
    parts = order.split(batch_size)
    together = max(1, GROUP_BYTES // (batch_size * data.pixels[:1].numel()))
    for first in range(skip - skip % together, len(parts), together):
        group = parts[first : first + together]
        group = group if shard is None else [shard(rows) for rows in group]
        rows = torch.cat(list(group))
        images, labels = data.take(rows, device)
        if augment is not None:
            images = augment(images, draws[rows])
        sizes = [len(part) for part in group]
        for i, batch in enumerate(zip(images.split(sizes), labels.split(sizes), strict=True), first):
            if i >= skip:
                yield normalize(batch[0], **data.normalization), batch[1]


@python_numbers
def normalize(images: Tensor, mean: float | Sequence[float] = MEAN, std: float | Sequence[float] = STD) -> Tensor:
    """Convert uint8 images (…, C, H, W) to float32 in [0, 1], subtract the mean and divide by the std.

    The paper's 0.5 and 0.5 give [-1, 1].
    """

    def of_channels(values: float | Sequence[float]) -> float | Tensor:
        if not isinstance(values, Sequence):
            return values
        return torch.tensor(values, device=images.device)[:, None, None]

    return images.float().div_(255).sub_(of_channels(mean)).div_(of_channels(std))


def _sources(
    name: str, data_dir: Any, splits: Sequence[str], img_size: int | None, select: Select, on_corrupt: str
) -> list[Source]:
    if name == "folder":
        return folder_sources(data_dir, splits, img_size, select, on_corrupt)
    if name == "tiny-imagenet":
        return tiny_imagenet_sources(data_dir or "data", splits, img_size, select, on_corrupt)
    return cifar_sources(name, data_dir or "data", splits, img_size, select)


def _digits(splits: Sequence[str], img_size: int | None, select: Select) -> Data:
    datasets, selection = need("sklearn.datasets"), need("sklearn.model_selection")
    bunch = datasets.load_digits()
    x = torch.from_numpy(bunch.images / 16 * 255).round().to(torch.uint8)[:, None]  # levels 0..16
    y = torch.from_numpy(bunch.target).long()
    train, test = selection.train_test_split(range(len(y)), test_size=0.2, random_state=_DIGITS_SEED, stratify=y)
    rows_of = {"train": torch.tensor(train), "test": torch.tensor(test)}
    loaded = {}
    for split in splits:
        rows = rows_of[split]
        rows = rows[select(y[rows], split)]
        images = x[rows]
        if img_size not in (None, images.shape[-1]):
            check_memory(len(images) * img_size**2)
            images = resize(images, img_size)
        loaded[split] = ImageSet(images, y[rows])
    return Data("digits", [str(i) for i in range(10)], img_size or x.shape[-1], loaded)


def _closest(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), DATASETS, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""
