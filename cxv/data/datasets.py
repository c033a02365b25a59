"""Sources of images: CIFAR's archives, Tiny ImageNet's, folders of image files. Listed at once, decoded later."""

import hashlib
import json
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cxv_kernels.validation import python_numbers

from ..errors import InputError, listed, printable
from .decode import Preprocessing, first_pages, one_line, stored_size
from .progress import Progress
from .scan import SPLITS, Listing, find_splits, list_images, scan_csv

MAX_DEFAULT_SIZE = 64
"""The side that a folder of larger images gets without ``img_size``: the paper's largest, Tiny ImageNet's."""
MAX_HEADERS = 1000
"""Images whose size is looked up to choose the default ``img_size``."""
CHUNK = 1024
"""Images decoded before they are passed on."""
SPLIT_SEED = 0  # of folders without splits, because the run's ``seed`` must not move images between splits
SHARES = {"test": 0.1, "validation": 0.1}
"""The shares of the images of a folder without splits; the rest is for training."""
Chunks = Iterator[tuple[Tensor, Tensor]]

_TINY = ("tiny-imagenet-200", "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")
_TINY_LAYOUT = "wnids.txt, train/WNID/images/*.JPEG, val/images/*.JPEG and val/val_annotations.txt"


@dataclass
class Request:
    """What to load: the ``splits``, and of each at most as many images as ``limits`` has for it, drawn by ``seed``.

    ``preprocessing`` has no ``img_size`` if the dataset chooses it. ``whole``: a folder without splits is not divided.
    """

    splits: Sequence[str]
    preprocessing: Preprocessing
    limits: dict[str, int | None]
    seed: int
    on_corrupt: str
    log: Callable[[str], None]
    whole: bool = False
    has_validation: bool = False

    def select(self, labels: Tensor, split: str) -> Tensor:
        """Return the indices of the images to load, for the labels of a split."""
        return balanced_subset(labels, self.limits.get(split), self.seed)

    def sized(self, img_size: int) -> Preprocessing:
        """The preprocessing, with ``img_size`` if none was given."""
        given = self.preprocessing
        return given if given.img_size is not None else replace(given, img_size=img_size)


@dataclass(eq=False)
class Source:
    """One split of a dataset, known but not decoded.

    ``version`` is a digest of the files in ``root`` that it would be decoded from: another one means other images.
    ``open`` begins to decode them. ``paths``: of the image files, where each has its own.
    """

    split: str
    preprocessing: Preprocessing
    root: Path
    version: str
    open: Callable[[], "Decoding"]
    paths: list[Path] = field(default_factory=list)


@dataclass
class Decoding:
    """A split of ``shape`` (N, C, H, W), at most, being decoded.

    ``chunks``: of uint8 images (n, C, H, W) with int64 labels (m,), m ≥ n; those of images left out are ``~label``.
    """

    classes: list[str]
    shape: tuple[int, int, int, int]
    chunks: Chunks


def cifar_sources(name: str, data_dir: str | Path, request: Request) -> list[Source]:
    """CIFAR-10 or CIFAR-100 as torchvision keeps it in ``data_dir``, downloaded if it is not there."""
    import torchvision.datasets

    dataset = getattr(torchvision.datasets, name.upper())
    root = Path(data_dir) / dataset.base_folder
    splits, preprocessing = request.splits, request.sized(32)

    def load(split: str) -> Any:
        with _downloading(name, data_dir, dataset.filename, dataset.url):
            return dataset(str(data_dir), train=split == "train", download=True)

    def select_images(data: Any, rows: Tensor) -> Tensor:
        return preprocessing.convert(torch.from_numpy(data[rows.numpy()]).permute(0, 3, 1, 2).contiguous())

    def decoding(split: str) -> Decoding:
        dataset_split = load(split)
        labels = torch.tensor(dataset_split.targets)
        keep = request.select(labels, split)
        chunks = ((select_images(dataset_split.data, rows), labels[rows]) for rows in keep.split(CHUNK))
        shape = (len(keep), preprocessing.in_chans, *preprocessing.img_size)
        return Decoding(list(dataset_split.classes), shape, chunks)

    files = {
        split: [root / file for file, _ in getattr(dataset, f"{split}_list")] + [root / dataset.meta["filename"]]
        for split in splits
    }
    if not all(path.is_file() for paths in files.values() for path in paths):
        load(splits[0])
    return [Source(split, preprocessing, root, _version(files[split]), partial(decoding, split)) for split in splits]


def tiny_imagenet_sources(data_dir: str | Path, request: Request) -> list[Source]:
    """Tiny ImageNet (200 classes, 64×64) from ``data_dir/tiny-imagenet-200`` or ``data_dir`` itself, downloaded if it
    is in neither. Its test images have no public labels: val/ is the test split, as in the paper."""
    folder, url, md5 = _TINY
    root = Path(data_dir)
    if not (root / "wnids.txt").is_file():
        root = root / folder
    if not (root / "wnids.txt").is_file():
        from torchvision.datasets import utils

        with _downloading(
            "tiny-imagenet", data_dir, f"{folder}.zip", url, f", or its content ({_TINY_LAYOUT}) into {folder} there,"
        ):
            utils.download_url(url, str(data_dir), md5=md5)
            with tempfile.TemporaryDirectory(dir=data_dir) as part:  # all of it or, after a kill, nothing
                utils.extract_archive(str(Path(data_dir) / f"{folder}.zip"), part)
                os.replace(Path(part) / folder, root)
    try:
        wnids = sorted((root / "wnids.txt").read_text(encoding="utf-8").split())
        words = {}
        if (root / "words.txt").is_file():
            lines = (root / "words.txt").read_text(encoding="utf-8").splitlines()
            words = dict(line.split("\t", 1) for line in lines if "\t" in line)
        files = {}
        if "train" in request.splits:
            files["train"] = {wnid: sorted((root / "train" / wnid / "images").glob("*.JPEG")) for wnid in wnids}
        if "test" in request.splits:
            files["test"] = {wnid: [] for wnid in wnids}
            for line in (root / "val" / "val_annotations.txt").read_text(encoding="utf-8").splitlines():
                image, wnid = line.split("\t")[:2]
                files["test"][wnid].append(root / "val" / "images" / image)
    except (OSError, KeyError, ValueError) as error:
        raise InputError(
            f"`data_dir`: {root} is not Tiny ImageNet as it was published ({_TINY_LAYOUT}): {one_line(error)}"
        ) from error
    empty = next((f"{split}: {w}" for split, groups in files.items() for w, paths in groups.items() if not paths), None)
    if empty is not None:
        raise InputError(f"`data_dir`: {root} has no image of a class ({empty}); expected {_TINY_LAYOUT}")
    classes = {wnid: words.get(wnid, wnid).strip() for wnid in wnids}
    listings = {}
    for split, groups in files.items():
        paths = [path for group in groups.values() for path in group]
        listings[split] = Listing(root, paths, [wnid for wnid, group in groups.items() for _ in group])
    request = replace(request, preprocessing=request.sized(64))
    return _file_sources(root, classes, listings, request)


def folder_sources(data_dir: str | Path | None, labels: str | Path | None, request: Request) -> list[Source]:
    """Images in folders by split and class, or in a CSV file ``labels``; :func:`cxv.data.load_data` has the layouts."""
    if data_dir is None and labels is None:
        raise InputError("`data_dir`: needed for `data` folder")
    root = Path(data_dir) if data_dir is not None else Path(labels).parent
    if not root.is_dir():
        raise InputError(f"`data_dir`: {root} is not a directory")
    splits, log = list(request.splits), request.log
    if labels is not None:
        listings, has_splits = scan_csv(Path(labels), root)
    else:
        folders = find_splits(root)
        for first, second in combinations(folders, 2):
            if os.path.samefile(folders[first], folders[second]):
                log(f"the {first} and the {second} images are the same: {folders[first]} and {folders[second]}")
        has_splits = bool(folders)
        more = ["validation"] if "train" in splits or "test" not in folders else []
        wanted = [split for split in SPLITS if split in splits + more] if has_splits else ["train"]
        listings = list_images(root, folders or {"train": root}, wanted)
    for split, listing in listings.items():
        line = listing.describe(split if has_splits else "all")
        if line is not None:
            log(line)
    where = root if labels is None else Path(labels)
    if not has_splits:
        listings = _divide(listings["train"], request, where)
    elif "test" in splits and "test" not in listings and "validation" in listings:
        listings["test"] = listings.pop("validation")
        log(f"{printable(where)} has no test images: its validation images are the test set")
    if "train" in splits and "validation" in listings and "validation" not in splits:
        splits.append("validation")
    if request.has_validation and "validation" in listings:
        raise InputError(f"`validation`: {where} has its own validation images")
    for split in splits:
        if split not in listings:
            if labels is not None:
                raise InputError(f"`labels`: {labels} has no {split} images")
            names = {"train": "train/", "validation": "val/", "test": "test/ or val/"}
            raise InputError(f"`data_dir`: {root} has no directory {names[split]}")
        if not listings[split].paths:
            place = listings[split].where
            raise InputError(f"`data_dir`: {place}: no class folders in it; expected {place / 'CLASS' / 'IMAGE'}")
    listings = {split: listings[split] for split in splits}
    return _file_sources(root, _check_classes(listings), listings, replace(request, splits=splits))


def class_ranks(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return a random order of the labels, and how many of its own class come before each item in that order."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rank = torch.empty_like(order)
    for c in labels.unique():
        mine = order[labels[order] == c]
        rank[mine] = torch.arange(len(mine))
    return order, rank


@python_numbers
def balanced_subset(labels: Tensor, limit: int | None, seed: int) -> Tensor:
    """Return the indices, sorted, of at most ``limit`` items with the same number of each label, within one.

    A class that has too few gives all it has, and the others make up for it. ``None`` selects every index.
    """
    if limit is None or limit >= len(labels):
        return torch.arange(len(labels))
    order, rank = class_ranks(labels, seed)
    # the first of every class, then the second of every class, …; a class's turn in a round is random too
    turn = torch.argsort(rank[order], stable=True)
    return order[turn[:limit]].sort().values


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """Return a random order in which any first part has each class by its share."""
    order, rank = class_ranks(labels, seed)
    share = (rank.double() + 0.5) / labels.bincount()[labels]  # how far through its own class each image comes
    return order[torch.argsort(share[order], stable=True)]


def _divide(listing: Listing, request: Request, where: Path) -> dict[str, Listing]:
    """Divide the images of a folder without splits by :data:`SHARES`, or take all of them for each split."""
    if not listing.paths:
        return dict.fromkeys(request.splits, listing)  # the caller's error
    if request.whole:
        request.log(f"{printable(where)} has no splits: all of its {len(listing.paths):,} images are used")
        return dict.fromkeys(request.splits, listing)
    shares = {split: share for split, share in SHARES.items() if split == "test" or not request.has_validation}
    number = {name: i for i, name in enumerate(sorted(set(listing.labels)))}
    order = stratified_order(torch.tensor([number[label] for label in listing.labels]), SPLIT_SEED).tolist()
    rows, first = {}, 0
    for split, share in shares.items():
        count = max(1, round(share * len(order)))
        rows[split] = sorted(order[first : first + count])
        first += count
    rows["train"] = sorted(order[first:])
    divided = {
        split: Listing(listing.where, [listing.paths[i] for i in part], [listing.labels[i] for i in part])
        for split, part in rows.items()
    }
    counts = ", ".join(f"{len(divided[split].paths):,} {split}" for split in SPLITS if split in divided)
    request.log(
        f"{printable(where)} has no splits: its images are divided by class and seed {SPLIT_SEED} into {counts}"
    )
    if len(set(divided["train"].labels)) < len(number):
        raise InputError(f"`data_dir`: {where}: {len(order)} images are too few to divide: make train/, val/ and test/")
    return divided


def _check_classes(listings: dict[str, Listing]) -> dict[str, str]:
    """Return label and name of the classes. If there are training images, they decide which classes there are."""
    labels = {split: set(listing.labels) for split, listing in listings.items()}
    classes = sorted(labels.get("train", set().union(*labels.values())))
    for split, own in labels.items():
        if extra := sorted(own - set(classes)):
            missing = sorted(set(classes) - own)
            places = {listings["train"].where: missing, listings[split].where: extra}
            only = "; ".join(f"only in {place}: {listed(names)}" for place, names in places.items() if names)
            first, second = places
            raise InputError(f"`data_dir`: the classes of {first} and {second} differ ({only})")
    if len(classes) < 2 and "train" in labels:
        raise InputError(f"`data_dir`: {listings['train'].where} has one class ({classes[0]}), at least two are needed")
    return dict(zip(classes, classes, strict=True))


def _file_sources(root: Path, names: dict[str, str], listings: dict[str, Listing], request: Request) -> list[Source]:
    """The sources of listed files; ``names``: of the classes, by their labels in the listings."""
    classes = list(names.values())
    number = {name: i for i, name in enumerate(names)}
    chosen: dict[str, tuple[list[Path], Tensor]] = {}
    for split in request.splits:
        paths, labels = listings[split].paths, torch.tensor([number[label] for label in listings[split].labels])
        keep = request.select(labels, split)
        chosen[split] = ([paths[i] for i in keep.tolist()], labels[keep])
    preprocessing = request.preprocessing
    if preprocessing.img_size is None:
        preprocessing = request.sized(_typical_side(chosen[request.splits[0]][0], request))

    def decoding(split: str) -> Decoding:
        paths, labels = chosen[split]
        shape = (len(paths), preprocessing.in_chans, *preprocessing.img_size)
        return Decoding(classes, shape, _decoded(split, paths, labels, preprocessing, request))

    return [
        Source(split, preprocessing, root, _version(paths, classes, labels), partial(decoding, split), paths)
        for split, (paths, labels) in chosen.items()
    ]


def _decoded(split: str, paths: list[Path], labels: Tensor, preprocessing: Preprocessing, request: Request) -> Chunks:
    multipage: list[Path] = []

    def decode(path: Path) -> Tensor | InputError:
        try:
            return preprocessing.decode(path, multipage)
        except InputError as error:
            return error

    with Progress(len(paths), f"decoding {split}") as progress, ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, len(paths), CHUNK):
            images, chunk_labels = [], labels[first : first + CHUNK].clone()
            for i, image in enumerate(pool.map(decode, paths[first : first + CHUNK])):
                if isinstance(image, Tensor):
                    images.append(image)
                elif request.on_corrupt == "error":
                    raise InputError(f"{image}; `on_corrupt` skip leaves such images out") from image
                else:
                    print(f"skipped {printable(str(image))}", file=sys.stderr)
                    chunk_labels[i] = ~chunk_labels[i]
                progress.update(1)
            empty = torch.empty(0, preprocessing.in_chans, *preprocessing.img_size, dtype=torch.uint8)
            yield torch.stack(images) if images else empty, chunk_labels
    if multipage:
        request.log(f"{split}: {first_pages([path.name for path in multipage])}")


def _typical_side(paths: list[Path], request: Request) -> int:
    """Return the median of the shorter sides, at most :data:`MAX_DEFAULT_SIZE`, and log a choice between sizes."""
    sizes = []
    for path in paths[:: -(-len(paths) // MAX_HEADERS)]:
        with suppress(Exception):  # decoding reports damaged files
            sizes.append(stored_size(path))
    if not sizes:
        raise InputError(f"{paths[0].parent}: not one image could be read")
    side = min(MAX_DEFAULT_SIZE, sorted(map(min, sizes))[(len(sizes) - 1) // 2])
    if set(sizes) != {(side, side)}:
        sizes.sort(key=lambda size: size[0] * size[1])
        extremes = " to ".join(dict.fromkeys("×".join(map(str, size)) for size in (sizes[0], sizes[-1])))
        how = {"crop": "cropped and resized", "pad": "resized and padded", "squash": "resized"}
        request.log(
            f"images of {extremes} pixels are {how[request.preprocessing.resize]} to {side}×{side}; "
            "`img_size` and `resize` change it"
        )
    return side


def _version(paths: list[Path], classes: Sequence[str] = (), labels: Tensor | None = None) -> str:
    """Return a digest of the files, the classes and the labels, which a CSV file can change without the files."""
    numbers = None if labels is None else labels.tolist()
    digest = hashlib.sha256(json.dumps([list(classes), numbers]).encode())
    for path in paths:
        facts: tuple[int, ...] = ()
        with suppress(OSError):  # a broken link: decoding reports it
            stat = path.stat()
            facts = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
        digest.update(os.fsencode(os.path.abspath(path)) + f"\0{facts}\0".encode())
    return digest.hexdigest()


@contextmanager
def _downloading(name: str, data_dir: str | Path, file: str, url: str, instead: str = "") -> Iterator[None]:
    # torchvision's downloader has no time-out, and a firewall that drops packets would hang it
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{name}: cannot be downloaded ({one_line(error)}); put {file} (from {url}) into "
            f"{Path(data_dir).absolute()}{instead} and run again"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
