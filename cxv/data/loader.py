"""Datasets as uint8 images (in memory, in a mapped file or on a device), and batches of them.

The paper normalizes each channel with mean = std = 0.5, and Tiny ImageNet with its own statistics.
"""

import difflib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cxv_kernels.validation import python_numbers

from ..errors import InputError, listed, need
from .cache import cache_folder, check_memory, crc, decode
from .datasets import Request, cifar_sources, folder_sources, stratified_order, tiny_imagenet_sources
from .decode import MEAN, STD, Preprocessing, normalize, pixel_limit, register_heif
from .scan import SPLITS

if TYPE_CHECKING:
    from .augment import Augmentation

DATASETS = ("digits", "cifar10", "cifar100", "tiny-imagenet", "folder")
VALIDATION = "validation"
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
    """A split of a dataset: ``pixels`` (M, C, H, W) uint8 and ``labels`` (N,) int64.

    ``rows`` (N,) int64 are the indices of the split's images in ``pixels``; None stands for all images in order.
    ``skipped`` lists the files that were skipped, and ``paths`` the N files of the images if each has its own.
    ``normalization`` has mean and std of pixels in [0, 1], as numbers or with a number per channel.
    """

    pixels: Tensor
    labels: Tensor
    skipped: list[str] = field(default_factory=list)
    rows: Tensor | None = None
    normalization: dict[str, Any] = field(default_factory=lambda: {"mean": MEAN, "std": STD})
    paths: list[str] = field(default_factory=list)
    _fingerprint: int | None = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> Tensor:
        """The images (N, C, H, W), uint8. They are a copy if the split has ``rows``."""
        return self.pixels if self.rows is None else self.pixels[self.rows]

    def subset(self, index: Tensor) -> "ImageSet":
        """Return the images with these indices, without a copy."""
        rows = index if self.rows is None else self.rows[index]
        paths = [self.paths[i] for i in index.tolist()] if self.paths else []
        return replace(self, labels=self.labels[index], rows=rows, paths=paths, _fingerprint=None)

    def take(self, index: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return images (n, C, H, W), uint8, and labels (n,) of these indices (int64, on the CPU), on ``device``."""
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
    """A dataset: the ``classes`` in label order, the loaded splits, and how the images were made from files."""

    name: str
    classes: list[str]
    preprocessing: Preprocessing
    splits: dict[str, ImageSet]

    @property
    def img_size(self) -> int | tuple[int, int]:
        """The side of the images in pixels, or (H, W)."""
        return self.preprocessing.side

    @property
    def in_chans(self) -> int:
        return self.preprocessing.in_chans

    @property
    def normalization(self) -> dict[str, Any]:
        return self.preprocessing.normalization

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
    name: str | Path | None = None,
    data_dir: str | Path | None = None,
    *,
    labels: str | Path | None = None,
    img_size: int | Sequence[int] | None = None,
    in_chans: int | None = None,
    resize: str = "crop",
    interpolation: str = "bicubic",
    background: str = "white",
    white_level: float | None = None,
    max_pixels: int | None = None,
    limit_train: int | None = None,
    limit_test: int | None = None,
    validation: int | float | None = None,
    seed: int = 0,
    on_corrupt: str = "error",
    splits: Sequence[str] = ("train", "test"),
    classes: Sequence[str] | None = None,
    divide: bool = True,
    cache_dir: str | Path | None = None,
    normalization: dict[str, Any] | None = None,
    log: Callable[[str], None] | None = None,
) -> Data:
    """Load a dataset as uint8 images. Digits are in memory; other datasets are decoded once and mapped from a cache.

    Args:
        name: Name of the dataset, or the path of a folder or of a CSV file. ``"digits"`` is the digits of scikit-learn
            (1797 gray 8×8 scans, of which a fixed stratified fifth is the test set). ``"cifar10"`` and ``"cifar100"``
            are those of torchvision, downloaded into ``data_dir`` if they are missing. ``"tiny-imagenet"`` (200
            classes, 64×64) is downloaded in the same way, and its ``val/`` is the test set. ``"folder"`` reads
            ``data_dir/SPLIT/CLASS/…`` in any format that PIL reads. The splits are ``train``, ``val`` (``valid``,
            ``validation``) and ``test``, in any letter case. Without ``test``, ``val`` is the test set. The images in
            ``data_dir/CLASS/…`` without splits are divided at random: 80 % for training, and of each class 10 % for
            validation and for the test. Default: ``"digits"``, or ``"folder"`` with ``data_dir`` or ``labels``.
        data_dir: Directory of the files. Default for downloaded datasets: ``data``.
        labels: CSV file with the columns ``path`` (relative to ``data_dir``, by default to the file), ``label`` and,
            if you choose the splits, ``split``.
        img_size: Side of the images in pixels, or (H, W). Default: the size of the dataset; for a folder the median of
            the shorter sides of the training images, at most 64.
        in_chans: 3 for RGB, 1 for gray. Default: 1 for digits, otherwise 3.
        resize, interpolation, background, white_level: See :class:`Preprocessing`.
        max_pixels: Largest image that is read, in pixels. Default: PIL's limit, 178,956,970.
        limit_train: Largest number of training images, balanced over the classes and drawn by ``seed``. Only these
            images are decoded.
        limit_test: Largest number of test images, drawn in the same way.
        validation: Number of training images for a split ``"validation"``, or their share if it is less than 1, drawn
            by ``seed`` from each class by its share. ``limit_train`` counts the images that remain for training.
        seed: Seed of the draws.
        on_corrupt: ``"error"`` to raise an error for an image that cannot be decoded, or ``"skip"`` to skip the image.
        splits: The splits to load: ``"train"``, ``"validation"``, ``"test"``. With the training images, the validation
            images of a folder are loaded too.
        classes: Names in label order, for example those of a checkpoint. The dataset may lack some of them. Default:
            those of the dataset.
        divide: Divide a folder without splits. With False, all of its images are used for each of ``splits``.
        cache_dir: Directory of the cache, see :mod:`cxv.data.cache`. ``"none"`` decodes into memory.
        normalization: ``mean`` and ``std`` of pixels in [0, 1]. Default: those of the paper for this dataset; 0.5 and
            0.5 for gray images.
        log: Function that receives log lines about the files, the cache and skipped images. Default: print them.

    Returns:
        The dataset. Its ``train``, ``test`` and ``validation`` are the splits.

    Raises:
        InputError: If an argument or a file is invalid, or the memory is too small.
    """
    name, data_dir, labels = locate(name, data_dir, labels)
    counts = {"limit_train": limit_train, "limit_test": limit_test, "max_pixels": max_pixels}
    _check_arguments(name, on_corrupt, splits, validation, in_chans, counts)
    log = log or (lambda line: print(line, flush=True))
    channels = in_chans or (1 if name == "digits" else 3)
    own = TINY_IMAGENET if (name, channels) == ("tiny-imagenet", 3) else {"mean": MEAN, "std": STD}
    normalization = normalization or own
    preprocessing = Preprocessing(img_size, channels, resize, interpolation, background, white_level, **normalization)
    if limit_train is not None and validation is not None:
        limit_train += round(validation if validation >= 1 else limit_train * validation / (1 - validation))
    needed = {"train" if split == VALIDATION and validation is not None else split for split in splits}
    request = Request(
        splits=[split for split in SPLITS if split in needed],
        preprocessing=preprocessing,
        limits={"train": limit_train, "test": limit_test},
        seed=seed,
        on_corrupt=on_corrupt,
        log=log,
        whole=not divide,
        has_validation=validation is not None,
    )
    if name == "digits":
        data = _digits(request)
    else:
        with pixel_limit(max_pixels):
            reader = f" {max_pixels} {register_heif()}" if on_corrupt == "skip" else ""  # they decide what is skipped
            data = _load_files(name, data_dir, labels, cache_dir, request, f"{name} {on_corrupt}{reader}")
    if validation is not None:
        data = _hold_out(data, validation, seed)
    kept = {k: v for k, v in data.splits.items() if k in splits or (k == VALIDATION and "train" in splits)}
    data = replace(data, splits=kept)
    return data if classes is None else _match_classes(data, list(classes), log)


def locate(
    data: str | Path | None, data_dir: str | Path | None, labels: str | Path | None = None
) -> tuple[str, str | None, str | None]:
    """Return the name of the dataset, its directory and its CSV file for arguments that leave some of them out.

    Raises:
        InputError: If ``data`` is neither a name nor a path, or the arguments exclude each other.
    """
    data_dir, labels = (None if path is None else str(path) for path in (data_dir, labels))
    data = ("digits" if data_dir is None and labels is None else "folder") if data is None else str(data)
    if data not in DATASETS:
        path = Path(data).expanduser()
        if path.is_dir():
            if data_dir is not None:
                raise InputError(f"`data_dir`: `data` {data} is a directory already, got {data_dir}")
            data, data_dir = "folder", str(path)
        elif path.is_file() and path.suffix.lower() == ".csv":
            if labels is not None:
                raise InputError(f"`labels`: `data` {data} is a CSV file already, got {labels}")
            data, labels = "folder", str(path)
        elif os.sep in data or data.startswith((".", "~")):
            raise InputError(f"`data`: {data} is neither a directory nor a .csv file")
        else:
            close = difflib.get_close_matches(data.lower(), DATASETS, n=1, cutoff=0.5)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise InputError(
                f"`data`: unknown dataset {data!r}{hint}; allowed: {', '.join(DATASETS)}, or the path of an existing "
                "directory or .csv file"
            )
    if labels is not None and data != "folder":
        raise InputError(f"`labels`: for `data` folder alone, got {data}")
    if data_dir is not None and data == "digits":
        raise InputError(f"`data_dir`: the digits have no directory; for the images in {data_dir}, give `data` folder")
    return data, data_dir, labels


def _check_arguments(
    name: str,
    on_corrupt: str,
    splits: Sequence[str],
    validation: Any,
    in_chans: int | None,
    counts: dict[str, int | None],
) -> None:
    if in_chans not in (None, 1, 3):
        raise InputError(f"`in_chans`: expected 1 or 3, got {in_chans}")
    if on_corrupt not in ("error", "skip"):
        raise InputError(f"`on_corrupt`: expected error or skip, got {on_corrupt!r}")
    for arg, value in counts.items():
        if value is not None and not (isinstance(value, Integral) and value >= 1 and not isinstance(value, bool)):
            raise InputError(f"`{arg}`: expected a whole number, at least 1, got {value}")
    if isinstance(splits, str) or not splits or not all(split in SPLITS for split in splits):
        raise InputError(f"splits: expected a sequence of {', '.join(map(repr, SPLITS))}, got {splits!r}")
    if validation is None:
        if name != "folder" and VALIDATION in splits:
            raise InputError(f"`data`: {name} has no validation images: hold out training images with `validation`")
    elif not isinstance(validation, Real) or not is_validation(validation):
        raise InputError(f"`validation`: expected {is_validation.__doc__}, got {validation}")
    elif {"train", VALIDATION}.isdisjoint(splits):
        raise InputError(f"`validation`: taken from the training images, and splits are {splits!r}")


def is_validation(value: float) -> bool:
    """a whole number of at least 1, or a share of less than 1"""
    return not isinstance(value, bool) and (0 < value < 1 or (value >= 1 and value % 1 == 0))


def _hold_out(data: Data, validation: float, seed: int) -> Data:
    """The data with some of the training images, each class by its share, in a split of their own."""
    labels = data.train.labels
    n = int(validation) if validation >= 1 else max(1, round(validation * len(labels)))
    order = stratified_order(labels, seed)
    held_out, rest = order[:n].sort().values, order[n:].sort().values
    if len(labels[rest].unique()) < len(labels.unique()):
        raise InputError(f"`validation`: {n} of {len(labels)} training images leave a class without one to train on")
    splits = {"train": rest, VALIDATION: held_out}
    return replace(data, splits=data.splits | {name: data.train.subset(i) for name, i in splits.items()})


def _match_classes(data: Data, classes: list[str], log: Callable[[str], None]) -> Data:
    """The data with the labels that ``classes`` gives to its classes by name."""
    if unknown := [name for name in data.classes if name not in classes]:
        raise InputError(f"`data`: its classes {listed(unknown)} are not among those of the model ({listed(classes)})")
    if data.classes == classes:
        return data
    missing = [name for name in classes if name not in data.classes]
    order = [name for name in classes if name in data.classes]
    absent = f" (not {listed(missing)})" if missing else ""
    what = f"{len(order)} of the model's {len(classes)} classes{absent}"
    what += " in another order" if order != data.classes else ""
    log(f"{data.name}: the images have {what}; classes are matched by name")
    label = torch.tensor([classes.index(name) for name in data.classes])
    splits = {k: replace(v, labels=label[v.labels], _fingerprint=None) for k, v in data.splits.items()}
    return replace(data, classes=classes, splits=splits)


def _load_files(
    name: str, data_dir: str | None, labels: str | None, cache_dir: Any, request: Request, variant: str
) -> Data:
    """Decode a dataset, or read its ``variant`` from the cache, without the images that cannot be decoded."""
    splits, folder = {}, cache_folder(cache_dir, request.log)
    if name == "folder":
        sources = folder_sources(data_dir, labels, request)
    elif name == "tiny-imagenet":
        sources = tiny_imagenet_sources(data_dir or "data", request)
    else:
        sources = cifar_sources(name, data_dir or "data", request)
    for source in sources:
        limit = request.limits.get(source.split)
        limited = "" if limit is None else f" limit {limit} seed {request.seed}"
        decoded = decode(source, variant + limited, folder, request.log)
        good = decoded.labels >= 0
        own = decoded.labels[good]
        skipped = [str(source.paths[i]) for i in (~good).nonzero().flatten().tolist()]
        if skipped:
            request.log(f"{source.split}: skipped {len(skipped)} of {len(good)} images that could not be read")
        if lost := set((~decoded.labels[~good]).tolist()) - set(own.tolist()):
            where = f"{source.split} images of {decoded.classes[min(lost)]}"
            raise InputError(f"`data_dir`: {source.root}: not one of the {where} could be read")
        paths = [str(source.paths[i]) for i in good.nonzero().flatten().tolist()] if source.paths else []
        normalization = source.preprocessing.normalization
        splits[source.split] = ImageSet(
            decoded.images, own, skipped, None, normalization, paths, _fingerprint=decoded.fingerprint
        )
    return Data(name, decoded.classes, source.preprocessing, splits)


def to_device(data: Data, device: torch.device, wanted: bool | None) -> Data:
    """Return the data in the memory of ``device`` if ``wanted``, or for None if that is a GPU's and has ample room.

    ``InputError`` is raised if it is wanted, and there is no room.
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
    """Yield batches of normalized images (B, C, H, W), float32, and labels (B,), int64, on ``device``.

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


def _digits(request: Request) -> Data:
    datasets, selection = need("sklearn.datasets", "train"), need("sklearn.model_selection", "train")
    bunch = datasets.load_digits()
    x = torch.from_numpy(bunch.images / 16 * 255).round().to(torch.uint8)[:, None]  # levels 0..16
    y = torch.from_numpy(bunch.target).long()
    train, test = selection.train_test_split(range(len(y)), test_size=0.2, random_state=_DIGITS_SEED, stratify=y)
    rows_of = {"train": torch.tensor(train), "test": torch.tensor(test)}
    preprocessing = request.sized(x.shape[-1])
    loaded = {}
    for split in request.splits:
        rows = rows_of[split]
        rows = rows[request.select(y[rows], split)]
        check_memory(len(rows) * preprocessing.in_chans * math.prod(preprocessing.img_size))
        images = preprocessing.convert(x[rows])
        loaded[split] = ImageSet(images, y[rows], normalization=preprocessing.normalization)
    return Data("digits", [str(i) for i in range(10)], preprocessing, loaded)
