"""The file format of checkpoints. Files are written atomically, have checksums, and cannot run code when read.

This module does not depend on the models: :mod:`cxv.models.registry` builds the model that a file names.
"""

import io
import json
import os
import random
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError, first_line

FORMAT = "cxv-checkpoint-1"
LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
SAFETENSORS = "model.safetensors"
METADATA_KEY = "cxv"
"""The key in the header of a safetensors file under which :data:`METADATA` are stored as JSON."""
METADATA: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "model_name": ("a string", lambda v: isinstance(v, str)),
    "model_kwargs": ("a dict", lambda v: isinstance(v, dict)),
    "classes": ("a list of strings", lambda v: isinstance(v, list) and all(isinstance(name, str) for name in v)),
    "img_size": (
        "an integer, or two (H, W)",
        lambda v: isinstance(v, int) or (isinstance(v, list | tuple) and [type(side) for side in v] == [int, int]),
    ),
    "in_chans": ("an integer", lambda v: isinstance(v, int)),
    "normalization": ("a dict of mean and std", lambda v: isinstance(v, dict) and v.keys() == {"mean", "std"}),
    "preprocessing": ("a dict or None", lambda v: v is None or isinstance(v, dict)),
    "seed": ("an integer or None", lambda v: v is None or isinstance(v, int)),
    "epoch": ("an integer or None", lambda v: v is None or isinstance(v, int)),
    "metrics": (
        "a dict of numbers",
        lambda v: isinstance(v, dict) and all(isinstance(x, int | float) for x in v.values()),
    ),
    "args": ("a dict", lambda v: isinstance(v, dict)),
    "notes": ("a dict of strings", lambda v: isinstance(v, dict) and all(isinstance(text, str) for text in v.values())),
}
"""The metadata of a shared file. ``metrics`` has losses and top-1 (per cent) of ``epoch``, and ``args`` has the
arguments of ``cxv train`` except paths and the machine. Both are empty if ``cxv train`` did not make the model.
``notes`` are texts for people, such as the terms of the data."""
WEIGHTS = Path(__file__).parent / "weights"
"""The folder of the pretrained weights. The file of ``"cpv-5/4"`` is ``cpv-5-4.safetensors``."""
_RENAMED = {"normalisation": "normalization", "optimiser": "optimizer", "position": "resume_state"}
"""Keys in files from before the release of version 0.1.0, and their current names."""


def atomic_write(path: str | Path, content: bytes | memoryview, previous: str | Path | None = None) -> None:
    """Write a file so that ``path`` has either the complete old content or the complete new content at any time.

    If ``previous`` is given, the old content is kept there.

    Raises:
        InputError: If the file cannot be written, for example because the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)  # after a kill here there is no ``path``, and its readers use ``previous``
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):  # half a file only fills the disk more
            temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    # The new name is on the disk once its directory is. Some network and shared folders cannot synchronize a directory.
    with suppress(OSError):
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file with :func:`atomic_write`."""
    atomic_write(path, (json.dumps(value, indent=2) + "\n").encode())


def check_space(output: Path, model: nn.Module, copies: int) -> None:
    """Check before an epoch that the disk has room for the checkpoints of a run in the directory ``output``.

    The check reads the free space of the disk. It also allocates the space of one checkpoint for a moment, because
    quotas and limits are not visible in the free space. A checkpoint has ``copies`` copies of the weights, such as
    the weights, the best weights and two moments.

    Raises:
        InputError: If there is not enough space, or ``output`` is not writable.
    """
    tensors = [*model.parameters(), *model.buffers()]
    size = copies * sum(t.numel() * t.element_size() for t in tensors) + 2**18
    needed = size * (1 + sum(not (output / name).exists() for name in (LAST, PREVIOUS, BEST)))
    free = shutil.disk_usage(output).free
    if free < needed:
        raise InputError(
            f"`output`: {output} has {free / 1e6:.1f} MB free, and the next checkpoints need {needed / 1e6:.1f} MB"
        )
    try:
        with tempfile.TemporaryFile(dir=output) as f:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(f.fileno(), 0, size)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"`output`: {output} has no room for a checkpoint of {size / 1e6:.1f} MB: {reason}") from error


def pack_checkpoint(checkpoint: dict[str, Any]) -> memoryview:
    """Return the bytes of a checkpoint, for :func:`atomic_write`."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **checkpoint}, buffer)
    return buffer.getbuffer()


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file, ``.pt`` or ``.safetensors``, onto the CPU. Neither format can run code.

    Raises:
        InputError: If the file is missing, truncated, corrupt, or from another program.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        content = io.BytesIO(path.read_bytes())
        with zipfile.ZipFile(content) as archive:  # torch itself does not look at the checksums
            damaged = archive.testzip()
        if damaged is not None:
            raise OSError(f"wrong checksum of {damaged}")
        content.seek(0)
        checkpoint = torch.load(content, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise almost any exception
        other = path.with_name(BEST if path.name == LAST else LAST)
        hint = f"; {other.name} beside it may be intact" if other.is_file() else ""
        reason = f"not a readable checkpoint ({first_line(error)}){hint}"
        raise InputError(f"{path}: truncated or corrupt, {reason}") from error
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if found != FORMAT:
        raise InputError(f"{path}: not a checkpoint of cxv (its format is {found!r}, expected {FORMAT!r})")
    return _update(checkpoint)


def check_metadata(metadata: Any) -> None:
    """Raise ``InputError`` with the name of an entry of :data:`METADATA` that is missing or invalid."""
    if not isinstance(metadata, dict):
        raise InputError(f"metadata: expected a dict, got {metadata!r}")
    for name, (expected, valid) in METADATA.items():
        if not valid(metadata.get(name)):
            raise InputError(f"{name}: expected {expected}, got {metadata.get(name)!r}")
    classes, num_classes = metadata["classes"], metadata["model_kwargs"].get("num_classes", 10)
    if len(classes) != num_classes:
        raise InputError(f"classes: expected {num_classes} names, as many as num_classes, got {classes}")


def _update(entries: Any) -> Any:
    """Give an older file the current names and entries. Values other than a dict are returned unchanged."""
    if not isinstance(entries, dict):
        return entries
    return {"notes": {}} | {_RENAMED.get(name, name): v for name, v in entries.items()}


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path}: truncated or corrupt, not a safetensors file ({error})") from error
    if METADATA_KEY not in header:
        raise InputError(
            f"{path}: its header has no {METADATA_KEY!r} entry, so it does not say which model the weights are of; "
            "cxv.save_safetensors writes one"
        )
    try:
        metadata = _update(json.loads(header[METADATA_KEY]))
    except ValueError as error:
        raise InputError(f"{path}: the {METADATA_KEY!r} entry of its header is not JSON ({error})") from error
    try:
        check_metadata(metadata)
    except InputError as error:
        raise InputError(f"{path}: in the {METADATA_KEY!r} entry of its header, {error}") from error
    return {"model": weights, **{name: metadata.get(name) for name in METADATA}}


def read_last(output: str | Path) -> tuple[dict[str, Any], str | None]:
    """Read the checkpoint from which a run continues: ``last.pt``, or ``previous.pt`` if ``last.pt`` is unreadable.

    An epoch that is the best is written to ``best.pt`` first. If the process was killed before it wrote ``last.pt``,
    the run continues from ``best.pt``: another computation of this epoch could have another result on a GPU.

    Returns:
        The checkpoint, and the reason why it is not ``last.pt``, or None.

    Raises:
        InputError: If neither can be read. The message is about ``last.pt``.
    """
    output, reason = Path(output), None
    try:
        saved = read_checkpoint(output / LAST)
    except InputError as error:
        reason = str(error)
        try:
            saved = read_checkpoint(output / PREVIOUS)
        except InputError:
            raise error from None
    with suppress(InputError):
        best = read_checkpoint(output / BEST)
        if best["epoch"] > saved["epoch"] and best["args"] == saved["args"]:
            reason = reason or f"{output / LAST} was not written after epoch {best['epoch']}"
            return best, f"{reason}; going on from {BEST}"
    return saved, reason and f"{reason}; going on from {PREVIOUS}, which is one save older"


def pretrained_models() -> list[str]:
    """Return the names of the models that have pretrained weights in this package."""
    return sorted(re.sub(r"(\d)-(\d)", r"\1/\2", path.stem) for path in WEIGHTS.glob("*.safetensors"))


def find_pretrained(name: str) -> Path:
    """Return the file with the pretrained weights of a model. Raise ``InputError`` if the package has none."""
    if name.lower() not in pretrained_models():
        models = ", ".join(pretrained_models()) or "none"
        raise InputError(f"{name} has no pretrained weights; these models do: {models}")
    return WEIGHTS / f"{name.lower().replace('/', '-')}.safetensors"


def find_checkpoint(path: str | Path, which: str = "best") -> Path:
    """Return the checkpoint file for ``path``: a file, a directory with one, or the name of a pretrained model.

    Raises:
        InputError: If ``path`` is none of them, ``which`` is neither ``"best"`` nor ``"last"``, or it is ``"last"``
            and ``path`` is not the directory of a run.
    """
    if which not in ("best", "last"):
        raise InputError(f"which: expected best or last, got {which!r}")
    path = Path(path)
    if path.is_dir():
        found, shared = path / f"{which}.pt", path / SAFETENSORS
        return shared if which == "best" and shared.exists() and not found.exists() else found
    models = pretrained_models()
    if not path.exists() and path.as_posix().lower() not in models:
        raise InputError(f"{path}: no such file or directory; pretrained models: {', '.join(models) or 'none'}")
    if which == "last":
        raise InputError(f"`which`: last is an epoch of a run, and {path} is not the directory of one")
    return path if path.exists() else find_pretrained(path.as_posix())


def load_weights(model: nn.Module, checkpoint: dict[str, Any], path: str | Path) -> None:
    """Copy the weights of a checkpoint into the model, or raise ``InputError`` if names or shapes differ."""
    if problem := mismatch(model.state_dict(), checkpoint["model"], "file"):
        name = checkpoint["model_name"]
        raise InputError(f"{path}: the weights of {name} in it do not fit {type(model).__name__}: {problem}")
    model.load_state_dict(checkpoint["model"])


def mismatch(model: Mapping[str, Tensor], other: Mapping[str, Tensor], place: str) -> str | None:
    """Describe the names or shapes in which the tensors of a model and of another ``place`` differ, if they do."""
    here, there = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (model, other))
    names = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if not names:
        return None
    shapes = f"{there.get(names[0], 'absent')} in the {place} and {here.get(names[0], 'absent')} in the model"
    return f"{names[0]} is {shapes} ({len(names)} tensors differ)"


def rng_state(device: torch.device) -> dict[str, Any]:
    """Return the states of the random generators that a training step can use."""
    state = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore the states of :func:`rng_state`."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
