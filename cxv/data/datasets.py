"""Sources of images: CIFAR's archives, Tiny ImageNet's, folders of image files. Listed at once, decoded later."""

import hashlib
import importlib
import json
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..models.arguments import image_size
from .progress import Progress

MAX_DEFAULT_SIZE = 64
"""The side that a folder of larger images gets without ``img_size``: the paper's largest, Tiny ImageNet's."""
CHUNK = 1024
"""Images decoded before they are passed on."""
Chunks = Iterator[tuple[Tensor, Tensor]]
Select = Callable[[Tensor, str], Tensor]

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
_TINY = ("tiny-imagenet-200", "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")
_TINY_LAYOUT = "wnids.txt, train/WNID/images/*.JPEG, val/images/*.JPEG and val/val_annotations.txt"


@dataclass(eq=False)
class Source:
    """One split of a dataset, of square images of ``img_size`` pixels, known but not decoded.

    ``version`` is a digest of the files in ``root`` that it would be decoded from: another one means other images.
    ``open`` begins to decode them. ``paths``: of the image files, where each has its own.
    """

    split: str
    img_size: int
    root: Path
    version: str
    open: Callable[[], "Decoding"]
    paths: list[Path] = field(default_factory=list)


@dataclass
class Decoding:
    """A split of ``shape`` (N, C, S, S), at most, being decoded.

    ``chunks``: of uint8 images (n, C, S, S) with int64 labels (m,), m ≥ n; those of images left out are ``~label``.
    """

    classes: list[str]
    shape: tuple[int, int, int, int]
    chunks: Chunks


def cifar_sources(
    name: str,
    data_dir: str | Path,
    splits: Sequence[str],
    img_size: int | None,
    select: Select,
) -> list[Source]:
    """CIFAR-10 or CIFAR-100 as torchvision keeps it in ``data_dir``, downloaded if it is not there."""
    class_name, archive, url = _CIFAR[name]
    dataset = getattr(need("torchvision.datasets"), class_name)
    root = Path(data_dir) / dataset.base_folder
    img_size = img_size or 32

    def load(split: str) -> Any:
        with _downloading(name, data_dir, archive, url):
            return dataset(str(data_dir), train=split == "train", download=True)

    def select_images(data: Any, rows: Tensor) -> Tensor:
        images = torch.from_numpy(data[rows.numpy()]).permute(0, 3, 1, 2).contiguous()
        return images if images.shape[-1] == img_size else resize(images, img_size)

    def decoding(split: str) -> Decoding:
        dataset_split = load(split)
        labels = torch.tensor(dataset_split.targets)
        keep = select(labels, split)
        chunks = ((select_images(dataset_split.data, rows), labels[rows]) for rows in keep.split(CHUNK))
        return Decoding(list(dataset_split.classes), (len(keep), 3, img_size, img_size), chunks)

    files = {
        split: [root / file for file, _ in getattr(dataset, f"{split}_list")] + [root / dataset.meta["filename"]]
        for split in splits
    }
    if not all(path.is_file() for paths in files.values() for path in paths):
        load(splits[0])
    return [Source(split, img_size, root, _version(files[split], root), partial(decoding, split)) for split in splits]


def tiny_imagenet_sources(
    data_dir: str | Path,
    splits: Sequence[str],
    img_size: int | None,
    select: Select,
    on_corrupt: str,
) -> list[Source]:
    """Tiny ImageNet (200 classes, 64×64) from ``data_dir/tiny-imagenet-200`` or ``data_dir`` itself, downloaded if it
    is in neither. Its test images have no public labels: val/ is the test split, as in the paper."""
    folder, url, md5 = _TINY
    root = Path(data_dir)
    if not (root / "wnids.txt").is_file():
        root = root / folder
    if not (root / "wnids.txt").is_file():
        archives = need("torchvision.datasets.utils")
        with _downloading(
            "tiny-imagenet", data_dir, f"{folder}.zip", url, f", or its content ({_TINY_LAYOUT}) into {folder} there,"
        ):
            archives.download_url(url, str(data_dir), md5=md5)
            with tempfile.TemporaryDirectory(dir=data_dir) as part:  # all of it or, after a kill, nothing
                archives.extract_archive(str(Path(data_dir) / f"{folder}.zip"), part)
                os.replace(Path(part) / folder, root)
    try:
        wnids = sorted((root / "wnids.txt").read_text().split())
        words = {}
        if (root / "words.txt").is_file():
            words = dict(line.split("\t", 1) for line in (root / "words.txt").read_text().splitlines() if "\t" in line)
        files = {}
        if "train" in splits:
            files["train"] = {wnid: _images_in(root / "train" / wnid / "images") for wnid in wnids}
        if "test" in splits:
            files["test"] = {wnid: [] for wnid in wnids}
            for line in (root / "val" / "val_annotations.txt").read_text().splitlines():
                image, wnid = line.split("\t")[:2]
                files["test"][wnid].append(root / "val" / "images" / image)
    except (OSError, KeyError, ValueError) as error:
        raise InputError(
            f"`data_dir`: {root} is not Tiny ImageNet as it was published ({_TINY_LAYOUT}): {one_line(error)}"
        ) from error
    empty = next((f"{split}: {w}" for split, groups in files.items() for w, paths in groups.items() if not paths), None)
    if empty is not None:
        raise InputError(f"`data_dir`: {root} has no image of a class ({empty}); expected {_TINY_LAYOUT}")
    classes = [words.get(wnid, wnid).strip() for wnid in wnids]
    return _file_sources(root, classes, files, splits, img_size or 64, select, on_corrupt)


def folder_sources(
    data_dir: str | Path | None,
    splits: Sequence[str],
    img_size: int | None,
    select: Select,
    on_corrupt: str,
) -> list[Source]:
    """``data_dir/train/CLASS/…`` and ``data_dir/test/CLASS/…``, or ``val``."""
    if data_dir is None:
        raise InputError("`data_dir`: needed for `data` folder")
    root = Path(data_dir)
    if not root.is_dir():
        raise InputError(f"`data_dir`: {root} is not a directory")
    where = {}
    for split in splits:
        names = ("train",) if split == "train" else ("test", "val")
        where[split] = next((root / n for n in names if (root / n).is_dir()), None)
        if where[split] is None:
            raise InputError(f"`data_dir`: {root} has no directory {' or '.join(n + '/' for n in names)}")
    files = {split: _list_images(folder) for split, folder in where.items()}
    classes = list(next(iter(files.values())))
    for split, names_of_split in files.items():
        if list(names_of_split) != classes:
            first = where[splits[0]]
            only = [
                f"only in {folder}: {', '.join(sorted(names))}"
                for folder, names in (
                    (first, set(classes) - set(names_of_split)),
                    (where[split], set(names_of_split) - set(classes)),
                )
                if names
            ]
            raise InputError(f"`data_dir`: the classes of {first} and {where[split]} differ ({'; '.join(only)})")
    if len(classes) < 2:
        raise InputError(f"`data_dir`: {where[splits[0]]} has one class ({classes[0]}), at least two are needed")
    return _file_sources(root, classes, files, splits, img_size, select, on_corrupt)


def decode_image(path: str | Path, in_chans: int = 3, img_size: int | Sequence[int] | None = None) -> Tensor:
    """Read an image file as a uint8 tensor (in_chans, H, W).

    The image is rotated by its EXIF tag and converted to RGB (gray for ``in_chans=1``) without alpha. If its size
    differs from ``img_size``, it is cropped about the center to the aspect ratio and resized (bicubic, antialiased).

    Args:
        path: The file.
        in_chans: 3 for RGB, 1 for gray.
        img_size: Side in pixels, or (H, W). Default: the size of the image.

    Raises:
        InputError: If the file is not an image or is damaged. The message has the file.
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
        if img_size is not None and image.size != (size := image_size(img_size)[::-1]):
            image = ops.fit(image, size, image_module.Resampling.BICUBIC)
        pixels = torch.from_numpy(numpy.array(image))
    except MemoryError:
        raise
    except Exception as error:  # damaged files raise nearly anything: OSError, SyntaxError, struct.error, …
        raise InputError(f"{path}: cannot read the image ({one_line(error)})") from error
    return pixels[None] if in_chans == 1 else pixels.permute(2, 0, 1).contiguous()


def need(module: str, extra: str = "train") -> ModuleType:
    """Import an optional dependency, or say how to install it: with the extra ``cxv[extra]``."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"sklearn": "scikit-learn", "PIL": "pillow"}.get(module.split(".")[0], module.split(".")[0])
        raise InputError(f"{package} is needed here and cannot be imported: pip install 'cxv[{extra}]'") from error


def one_line(error: BaseException) -> str:
    """Return the message of an exception in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _file_sources(
    root: Path,
    classes: list[str],
    files: dict[str, dict[str, list[Path]]],
    splits: Sequence[str],
    img_size: int | None,
    select: Select,
    on_corrupt: str,
) -> list[Source]:
    chosen: dict[str, tuple[list[Path], Tensor]] = {}
    for split in splits:
        paths = [path for group in files[split].values() for path in group]
        labels = torch.tensor([i for i, group in enumerate(files[split].values()) for _ in group])
        keep = select(labels, split)
        chosen[split] = ([paths[i] for i in keep.tolist()], labels[keep])
    size = img_size or _first_size(chosen[splits[0]][0], on_corrupt)

    def decoding(split: str) -> Decoding:
        paths, labels = chosen[split]
        return Decoding(classes, (len(paths), 3, size, size), _decoded(split, paths, labels, size, on_corrupt))

    return [
        Source(split, size, root, _version(paths, root, classes), partial(decoding, split), paths)
        for split, (paths, _) in chosen.items()
    ]


def _decoded(split: str, paths: list[Path], labels: Tensor, img_size: int, on_corrupt: str) -> Chunks:
    def decode(path: Path) -> Tensor | InputError:
        try:
            return decode_image(path, 3, img_size)
        except InputError as error:
            return error

    with Progress(len(paths), f"decoding {split}") as progress, ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, len(paths), CHUNK):
            images, chunk_labels = [], labels[first : first + CHUNK].clone()
            for i, image in enumerate(pool.map(decode, paths[first : first + CHUNK])):
                if isinstance(image, Tensor):
                    images.append(image)
                elif on_corrupt == "error":
                    raise InputError(f"{image}; `on_corrupt` skip leaves such images out") from image
                else:
                    print(f"skipped {image}", file=sys.stderr)
                    chunk_labels[i] = ~chunk_labels[i]
                progress.update(1)
            if images:
                yield torch.stack(images), chunk_labels
            else:
                yield torch.empty(0, 3, img_size, img_size, dtype=torch.uint8), chunk_labels


def _list_images(folder: Path) -> dict[str, list[Path]]:
    """The image files of each class folder, both in sorted order; hidden and other files are passed over."""
    directories = sorted(d for d in folder.iterdir() if d.is_dir() and not d.name.startswith("."))
    images = {directory.name: _images_in(directory) for directory in directories}
    for directory in directories:
        if not images[directory.name]:
            raise InputError(f"{directory}: this class folder has no image")
    if not images:
        raise InputError(f"{folder}: no class folders in it; expected {folder / 'CLASS' / 'IMAGE'}")
    return images


def _images_in(directory: Path) -> list[Path]:
    extensions = set(need("PIL.Image").registered_extensions())
    return sorted(
        Path(parent, name)
        for parent, _, names in os.walk(directory, followlinks=True)
        for name in names
        if not name.startswith(".") and os.path.splitext(name)[1].lower() in extensions
    )


def _first_size(paths: list[Path], on_corrupt: str) -> int:
    for path in paths:
        try:
            return min(MAX_DEFAULT_SIZE, *decode_image(path).shape[-2:])
        except InputError:
            if on_corrupt == "error":
                raise
    raise InputError(f"{paths[0].parent}: not one image could be read")


def _version(paths: list[Path], root: Path, classes: Sequence[str] = ()) -> str:
    digest = hashlib.sha256(json.dumps(list(classes)).encode())
    for path in paths:
        try:
            stat = path.stat()
        except OSError as error:
            raise InputError(f"{path}: cannot read the image ({error.strerror})") from error
        digest.update(f"{os.path.relpath(path, root)}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def resize(images: Tensor, img_size: int) -> Tensor:
    """(N, C, S, S) uint8 to ``img_size`` pixels, bicubic and antialiased."""
    size = (img_size, img_size)
    chunks = (F.interpolate(x.float(), size, mode="bicubic", antialias=True) for x in images.split(CHUNK))
    return torch.cat([x.round().clamp(0, 255).to(torch.uint8) for x in chunks])


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
