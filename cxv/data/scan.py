"""Find the images of a dataset: in folders by split and class, or in a CSV file. Nothing is passed over in silence."""

import csv
import os
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InputError, listed, printable
from .decode import readable_extensions

SPLITS = ("train", "validation", "test")
_SPLIT_OF = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_SYSTEM = {"@eadir", "__macosx", "$recycle.bin", "system volume information", "lost+found", "thumbs.db", "desktop.ini"}
_COLUMNS = {"path": ("path", "file", "filename", "image"), "label": ("label", "class"), "split": ("split",)}
_READ = "links to folders that are read already"


@dataclass
class Listing:
    """The image files of a split, with the class of each, and counts of what was passed over, by reason."""

    where: Path
    paths: list[Path] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)

    def describe(self, split: str) -> str | None:
        """Return a line about the split if files were passed over."""
        if not self.passed_over:
            return None
        parts = [
            f"{reason}: {count}" + (" (pip install pillow-heif)" if reason in (".heic", ".heif") else "")
            for reason, count in sorted(self.passed_over.items())
        ]
        images, classes = f"{len(self.paths):,} images", f"{len(set(self.labels))} classes"
        return f"{split}: {images}, {classes} in {printable(self.where)}; passed over: {listed(parts, 20)}"


def class_name(name: str) -> str:
    """Return the class of a folder or label: in Unicode's form NFC, :func:`printable`."""
    return unicodedata.normalize("NFC", printable(name))


def find_splits(root: Path) -> dict[str, Path]:
    """Return the folders of the splits in ``root``: train; val, valid or validation; test; in any letter case.

    Without splits the subfolders of ``root`` are classes, and the result is empty.

    Raises:
        InputError: If a folder cannot be read, or a split has two folders.
    """
    subfolders = [entry for entry in _entries(root) if _leads_to(entry.is_dir) and not is_hidden(entry.name)]
    named = [folder for folder in subfolders if folder.name.lower() in _SPLIT_OF]
    # a folder "train" beside "car" and "bus" is a class, unless there are folders in it
    if not named or (len(named) < len(subfolders) and not any(map(_has_folders, named))):
        return {}
    folders: dict[str, Path] = {}
    for folder in named:
        split = _SPLIT_OF[folder.name.lower()]
        if split in folders:
            names = f"{folders[split].name}, {folder.name}"
            raise InputError(f"`data_dir`: {root} has two folders of {split} images: {names}")
        folders[split] = Path(folder.path)
    return folders


def scan_csv(file: Path, root: Path) -> tuple[dict[str, Listing], bool]:
    """Read the images of a CSV file with the columns ``path`` and ``label``, and ``split`` if there are splits.

    Paths are relative to ``root``. A file of two columns needs no header.

    Returns:
        The listings by split, and False if there is no such column and all images are in ``"train"``.

    Raises:
        InputError: If the file cannot be read, a line is incomplete, or two lines contradict each other.
    """
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            rows = [(i, row) for i, row in enumerate(csv.reader(lines), 1) if any(cell.strip() for cell in row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"`labels`: cannot read {file} ({getattr(error, 'strerror', None) or error})") from error
    header = [cell.strip().lower() for cell in rows[0][1]] if rows else []
    columns = {
        name: next((header.index(word) for word in words if word in header), None) for name, words in _COLUMNS.items()
    }
    if columns["path"] is not None and columns["label"] is not None:
        rows = rows[1:]
    elif len(header) == 2:
        columns = {"path": 0, "label": 1, "split": None}
    else:
        raise InputError(f"`labels`: {file} needs the columns path and label, and its first line is {','.join(header)}")
    if not rows:
        raise InputError(f"`labels`: {file} has no lines of images")
    listings: dict[str, Listing] = {}
    label_of: dict[Path, tuple[str, str]] = {}
    for number, row in rows:
        cells = {name: row[i].strip() if i is not None and i < len(row) else "" for name, i in columns.items()}
        split = "train" if columns["split"] is None else _SPLIT_OF.get(cells["split"].lower())
        if not cells["path"] or not cells["label"] or split is None:
            expected = "path, label" + ("" if columns["split"] is None else f", split ({', '.join(SPLITS)})")
            raise InputError(f"`labels`: {file}, line {number}: expected {expected}, got {','.join(row)}")
        path, listing = root / cells["path"], listings.setdefault(split, Listing(file))
        entry = (class_name(cells["label"]), split)
        if label_of.setdefault(path, entry) != entry:
            raise InputError(
                f"`labels`: {file}, line {number}: {cells['path']} is {' in '.join(entry)} here and "
                f"{' in '.join(label_of[path])} in a line above"
            )
        listing.paths.append(path)
        listing.labels.append(entry[0])
    for listing in listings.values():
        unique = dict(zip(listing.paths, listing.labels, strict=True))
        if len(unique) < len(listing.paths):
            listing.passed_over["repeated lines"] = len(listing.paths) - len(unique)
        listing.paths, listing.labels = map(list, zip(*sorted(unique.items()), strict=True))
    return listings, columns["split"] is not None


def list_images(root: Path, folders: dict[str, Path], splits: Iterable[str]) -> dict[str, Listing]:
    """List the images of ``splits`` from their ``folders``, which hold a folder of each class.

    Links to folders are followed after all real folders, and each folder is read once.

    Raises:
        InputError: If a folder cannot be read, two classes are one folder, or a class has no training image.
    """
    extensions = readable_extensions()
    listings = {split: Listing(folders[split]) for split in SPLITS if split in folders}
    roots = {_identity(folder) for folder in (root, *root.resolve().parents, *folders.values())}
    read, todo = set(roots), deque()  # todo: split, class, folder
    for split, folder in folders.items():
        known: dict[tuple[int, int], str] = {}
        for entry in _entries(folder):
            if not _leads_to(entry.is_dir) or is_hidden(entry.name):
                _sort_in(entry, extensions, listings[split].passed_over, " outside of the class folders")
            elif _identity(entry.path) in roots:
                listings[split].passed_over[_READ] += 1
            else:
                same = known.setdefault(_identity(entry.path), entry.name)
                if same != entry.name:
                    raise InputError(f"`data_dir`: {folder}: the classes {same} and {entry.name} are one folder")
                todo.append((split, class_name(entry.name), entry.path))
        read |= known.keys()
    if root not in folders.values():
        for entry in _entries(root):
            if Path(entry.path) not in folders.values() and not is_hidden(entry.name) and _leads_to(entry.is_dir):
                inner = [inner.path for inner in _entries(entry.path) if _leads_to(inner.is_dir)]
                if images := sum(_count_images(path, extensions) for path in (entry.path, *inner)):
                    next(iter(listings.values())).passed_over[f"{entry.name}/ beside the splits (images)"] += images
    todo = deque(item for item in todo if item[0] in splits)
    found: dict[tuple[str, str], list[Path]] = {item[:2]: [] for item in todo}
    top, links = {item[2] for item in todo}, deque()
    while todo or links:
        split, label, folder = todo.popleft() if todo else links.popleft()
        passed_over = listings[split].passed_over
        if folder not in top:
            if _identity(folder) in read:
                passed_over[_READ] += 1
                continue
            read.add(_identity(folder))
        for entry in _entries(folder):
            if _leads_to(entry.is_dir) and not is_hidden(entry.name):
                (links if entry.is_symlink() else todo).append((split, label, entry.path))
            elif _sort_in(entry, extensions, passed_over):
                found[split, label].append(Path(entry.path))
    for (split, label), paths in sorted(found.items()):
        listings[split].paths += sorted(paths)
        listings[split].labels += [label] * len(paths)
    for (split, label), paths in found.items():
        if not paths and split == "train":
            rest = listings[split].describe(split)
            raise InputError(
                f"`data_dir`: {folders[split] / label}: this class folder has no image" + (f" ({rest})" if rest else "")
            )
    return {split: listings[split] for split in splits if split in listings}


def _sort_in(entry: os.DirEntry, extensions: Iterable[str], passed_over: Counter[str], where: str = "") -> bool:
    """Return True for an image file (a broken link to one included); count anything else."""
    ext = os.path.splitext(entry.name)[1].lower()
    if is_hidden(entry.name) and _leads_to(entry.is_dir):
        images = _count_images(entry.path, extensions)
        passed_over[f"{entry.name}/ (images)" if images else f"{entry.name}/"] += images or 1
    elif is_hidden(entry.name):
        passed_over["hidden files"] += 1
    elif not _leads_to(entry.is_file) and os.path.exists(entry):
        passed_over["neither files nor folders"] += 1
    elif ext not in extensions or where:
        passed_over[(ext or "without extension") + where] += 1
    else:
        return True
    return False


def _count_images(folder: str, extensions: Iterable[str]) -> int:
    with suppress(InputError):  # another user's trash
        return sum(os.path.splitext(entry.name)[1].lower() in extensions for entry in _entries(folder))
    return 0


def is_hidden(name: str) -> bool:
    """Return True for the name of a hidden file or folder, or one of the operating system."""
    return name.startswith(".") or name.lower() in _SYSTEM


def _has_folders(folder: os.DirEntry) -> bool:
    return any(_leads_to(entry.is_dir) and not is_hidden(entry.name) for entry in _entries(folder.path))


def _entries(folder: str | Path) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"`data_dir`: cannot read {printable(folder)} ({error.strerror})") from error


def _leads_to(kind: Callable[[], bool]) -> bool:
    """Return ``entry.is_dir()`` or ``entry.is_file()``, which raise an error for a link to itself."""
    with suppress(OSError):
        return kind()
    return False


def _identity(folder: str | Path) -> tuple[int, int]:
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino
