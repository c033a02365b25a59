"""``cxv cache``: list and clear the cache of decoded images."""

import argparse
import json
import os
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from ..data.cache import FILE_NAME, cache_folder
from ..errors import InputError, printable
from .flags import add_option

HELP = "list or clear the cache of decoded images"
DESCRIPTION = "List the files of the cache of decoded images with their sources, or delete them."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("list", "clear"), help="list the files, or delete them")
    add_option(parser, "cache_dir")


def run(args: argparse.Namespace) -> None:
    folder = cache_folder(args.cache_dir)
    if folder is None:
        raise InputError("`cache_dir`: there is no cache: it is none, or there is no home directory")
    paths = sorted(path for path in folder.glob("*") if FILE_NAME.fullmatch(path.name))
    try:
        _list(folder, paths) if args.action == "list" else _clear(folder, paths)
    except OSError as error:
        raise InputError(f"`cache_dir`: {error.filename}: {error.strerror}") from error


def _list(folder: Path, paths: list[Path]) -> None:
    paths = [path for path in paths if path.suffix == ".safetensors"]
    for path in paths:
        line = "damaged, or of an older version of cxv"
        with suppress(SafetensorError, ValueError, KeyError), safe_open(path, framework="pt") as file:
            facts, count = json.loads(file.metadata()["cxv"]), file.get_slice("images").get_shape()[0]
            missing = "" if os.path.exists(facts["source"]) else " (missing)"
            line = f"{count:,} {facts['split']} images of {printable(facts['source'])}{missing}"
        print(f"{path.stat().st_size / 1e6:10.1f} MB  {printable(path.name)}: {line}")
    print(f"{len(paths)} files, {sum(path.stat().st_size for path in paths) / 1e6:.1f} MB in {printable(folder)}")


def _clear(folder: Path, paths: list[Path]) -> None:
    count, size, busy = 0, 0, 0
    for lock in sorted({path.with_suffix(".lock") for path in paths}):
        try:
            with FileLock(lock, timeout=0):  # the process that writes the file has it
                for path in (lock.with_suffix(".safetensors"), lock.with_suffix(".tmp")):
                    if path.exists():
                        count, size = count + 1, size + path.stat().st_size
                        path.unlink()
                with suppress(PermissionError):  # Windows deletes it with the lock
                    lock.unlink(missing_ok=True)
        except Timeout:
            busy += 1
    note = f"; another process writes {busy}, which are kept" if busy else ""
    print(f"deleted {count} files, {size / 1e6:.1f} MB, in {printable(folder)}{note}")
