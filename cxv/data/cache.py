"""A cache of decoded images: files that are mapped into memory, shared by processes, and may be larger than memory.

A split is one safetensors file with ``images`` (N, C, H, W) uint8 and ``labels`` (M,) int64. Its header describes the
source and has a CRC-32 of everything. The files are in ``cache_dir``, else in ``$CXV_CACHE``, else in ``cxv`` of
``$XDG_CACHE_HOME`` or ``~/.cache``; "none" turns the cache off. You can delete the files at any time.
"""

import errno
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import InputError, printable
from .datasets import Source

FORMAT = "cxv-images-1"
NONE = "none"
FILE_NAME = re.compile(r".+-(train|validation|test)-\d+(x\d+)?-[0-9a-f]{8}\.(safetensors|tmp|lock)")
"""The names of the files of a cache."""
_PIECE = 2**24  # bytes between looks at Ctrl-C

Log = Callable[[str], None]


@dataclass
class Decoded:
    """A split, decoded: ``images`` (N, C, H, W) uint8, which may be mapped from a file, and the ``labels`` (M,) of all
    its files, negative (``~label``) where one could not be decoded. ``fingerprint``: CRC-32 of images and their labels.
    """

    classes: list[str]
    images: Tensor
    labels: Tensor
    fingerprint: int


def cache_folder(folder: str | Path | None, log: Log | None = None) -> Path | None:
    """Where the cache is: ``folder``, or the default for None; no folder for "none", or if there is no home directory,
    which ``log`` reports."""
    folder = folder or os.environ.get("CXV_CACHE")
    if folder is not None:
        return None if str(folder) == NONE else Path(folder)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(cache) and cache != "/.cache":  # which is what an empty HOME gives
        return Path(cache) / "cxv"
    if log is not None:
        log("no cache of the decoded images, as there is no home directory; `cache_dir` gives another one")
    return None


def decode(source: Source, variant: str, folder: Path | None, log: Log) -> Decoded:
    """Read the images of ``source`` from the cache in ``folder``; decode them into it if they are missing or outdated.

    ``variant`` distinguishes different choices from the same files. One process decodes while others wait for it.
    Without a folder, or if it cannot be written, the images are decoded into memory, and ``log`` says so.

    Raises:
        InputError: an image is damaged, or neither the disk nor the memory has room.
    """
    if folder is None:
        return _in_memory(source)
    variant = f"{variant} {source.preprocessing.of_pixels()}"
    version = f"{source.version} {variant}"
    key = zlib.crc32(os.fsencode(f"{source.root.absolute()} {variant}"))
    size, name = "x".join(map(str, source.preprocessing.img_size)), re.sub(r"[^\w.-]", "_", printable(source.root.name))
    path = folder / f"{name}-{source.split}-{size}-{key:08x}.safetensors"
    try:
        cached = _read(path, source, version, log)
        if cached is not None:
            return cached
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log(f"{path.stem}: another process is decoding these images, waiting for it")
            lock.acquire()
        try:
            cached = _read(path, source, version, lambda line: None)
            if cached is None:  # else another process was first
                _write(path, source, version)
        finally:
            lock.release()
        cached = cached or _read(path, source, version, log)
        if cached is not None:
            return cached
        reason = "the file cannot be read back"
    except (OSError, NotImplementedError) as error:  # full, read-only, no locks on this file system, …
        reason = getattr(error, "strerror", None) or str(error)
    log(f"{source.split}: no cache of the decoded images in {folder} ({reason}); decoding into memory")
    return _in_memory(source)


def crc(tensor: Tensor, start: int = 0) -> int:
    """CRC-32 of a contiguous tensor's bytes, going on from ``start``."""
    content = _content(tensor)
    for i in range(0, len(content), _PIECE):
        start = zlib.crc32(content[i : i + _PIECE], start)
    return start


def _read(path: Path, source: Source, version: str, log: Log) -> Decoded | None:
    """Read the cache file; None if there is none, or it is damaged or of another version of the source."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:  # maps the file; its tensors keep it
            facts = json.loads(file.metadata()["cxv"])
            images, labels = file.get_tensor("images"), file.get_tensor("labels")
        if facts["format"] != FORMAT or facts["version"] != version:
            log(f"{source.split}: the images in {source.root} have changed, decoding them anew")
            return None
        fingerprint = crc(labels[labels >= 0], crc(images))
        if _seal(facts, fingerprint, labels) != facts["crc32"]:
            raise ValueError("wrong checksum")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        log(f"{path} is damaged ({error}), decoding the images anew")
        return None
    return Decoded(facts["classes"], images, labels, fingerprint)


def _write(path: Path, source: Source, version: str) -> None:
    """Decode into a file beside ``path``, chunk by chunk, and rename it; the tensors are never in memory as a whole."""
    decoding = source.open()
    count, *image = decoding.shape
    facts: dict[str, Any] = {"format": FORMAT, "version": version, "classes": decoding.classes}
    facts |= {"source": printable(source.root.absolute()), "split": source.split}
    room = (len(_header(facts | {"crc32": 2**32}, count, decoding.shape)) + 63) // 64 * 64
    needed = room + 8 * count + math.prod(decoding.shape)
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free")
    temporary = path.with_suffix(".tmp")  # the lock is ours, so the file of a killed process can be overwritten
    try:
        with open(temporary, "wb") as f:
            f.seek(room + 8 * count)
            labels, kept, images_crc = [], 0, 0
            for images, chunk_labels in decoding.chunks:
                f.write(_content(images))
                labels, kept, images_crc = [*labels, chunk_labels], kept + len(images), crc(images, images_crc)
            all_labels = torch.cat(labels)
            facts["crc32"] = _seal(facts, crc(all_labels[all_labels >= 0], images_crc), all_labels)
            f.seek(0)
            f.write(_header(facts, count, (kept, *image)).ljust(room))
            f.write(_content(all_labels))
            f.seek(0)
            f.write((room - 8).to_bytes(8, "little"))
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _header(facts: dict[str, Any], count: int, shape: tuple[int, ...]) -> bytes:
    """The header of a safetensors file: labels, then images, so that those left out are missing at its end."""
    entries = {
        "__metadata__": {"cxv": json.dumps(facts)},
        "labels": {"dtype": "I64", "shape": [count], "data_offsets": [0, 8 * count]},
        "images": {"dtype": "U8", "shape": list(shape), "data_offsets": [8 * count, 8 * count + math.prod(shape)]},
    }
    return bytes(8) + json.dumps(entries).encode()


def _seal(facts: dict[str, Any], fingerprint: int, labels: Tensor) -> int:
    """One checksum over what else was read: the images' and labels' own, all labels, the header."""
    rest = json.dumps([{k: v for k, v in facts.items() if k != "crc32"}, fingerprint]).encode()
    return crc(labels, zlib.crc32(rest))


def _content(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def _in_memory(source: Source) -> Decoded:
    decoding = source.open()
    check_memory(math.prod(decoding.shape))
    images = torch.empty(decoding.shape, dtype=torch.uint8)
    labels, kept = [], 0
    for chunk, chunk_labels in decoding.chunks:
        images[kept : kept + len(chunk)] = chunk
        labels, kept = [*labels, chunk_labels], kept + len(chunk)
    images, all_labels = images[:kept], torch.cat(labels)
    return Decoded(decoding.classes, images, all_labels, crc(all_labels[all_labels >= 0], crc(images)))


def check_memory(size: int) -> None:
    """Raise ``InputError`` if ``size`` bytes of images do not fit into memory."""
    free = available_memory()
    if free is not None and size > 0.9 * free:
        raise InputError(
            f"the images take {size / 2**30:.2f} GiB of memory once decoded, and {free / 2**30:.2f} GiB is "
            "available: give a `cache_dir` on a disk with room, from which they are mapped, or use a smaller "
            "`img_size`, or `limit_train` and `limit_test`"
        )


def available_memory() -> int | None:
    """Bytes of memory that a process can still take, the container's limit included; None where unknown."""
    bytes_left = []
    with suppress(OSError), open("/proc/meminfo") as f:
        bytes_left += [int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable:")]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # not there, or "max"
            bytes_left.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
    return min(bytes_left, default=None)
