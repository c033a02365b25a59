"""Checkpoints: written atomically, read with ``weights_only=True``, enough to rebuild the model or go on."""

import io
import os
import random
import shutil
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..models import create_model
from .errors import InputError

FORMAT = "cxv-checkpoint-1"
LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"


def atomic_write(path: str | Path, content: bytes | memoryview, previous: str | Path | None = None) -> None:
    """Write a file so that, whatever happens, ``path`` holds either all of the old content or all of the new.

    The old content is kept as ``previous``, if that is given.

    Raises:
        InputError: the disk is full, the directory is not writable, …
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)  # a kill here leaves no ``path``: its readers take ``previous`` then
        os.replace(temporary, path)
        if os.name == "posix":  # the new name is on the disk once its directory is
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
    except OSError as error:
        with suppress(OSError):  # half a file only fills the disk more
            temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def check_space(output: Path, model: nn.Module) -> None:
    """See that a run's checkpoints find room on the disk, before an epoch is spent on them: by what the disk has free,
    and, as quotas and limits do not show there, by taking the room of one for a moment.

    Raises:
        InputError: they do not, or ``output`` cannot be written to.
    """
    tensors = [*model.parameters(), *model.buffers()]
    size = 4 * sum(t.numel() * t.element_size() for t in tensors) + 2**18  # the weights, the best, two moments
    needed = size * (1 + sum(not (output / name).exists() for name in (LAST, PREVIOUS, BEST)))
    free = shutil.disk_usage(output).free
    if free < needed:
        raise InputError(
            f"--output: {output} has {free / 1e6:.1f} MB free, and the next checkpoints need {needed / 1e6:.1f} MB"
        )
    try:
        with tempfile.TemporaryFile(dir=output) as f:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(f.fileno(), 0, size)
    except OSError as error:
        raise InputError(
            f"--output: {output} has no room for a checkpoint of {size / 1e6:.1f} MB: {error.strerror or error}"
        ) from error


def pack_checkpoint(checkpoint: dict[str, Any]) -> memoryview:
    """The bytes of a checkpoint, for :func:`atomic_write`."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **checkpoint}, buffer)
    return buffer.getbuffer()


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read one checkpoint file onto the CPU.

    Raises:
        InputError: it is missing, truncated, corrupt, or another program's.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such checkpoint")
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
    except Exception as error:  # a damaged file raises nearly anything
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        other = path.with_name(BEST if path.name == LAST else LAST)
        hint = f"; {other.name} beside it may be intact" if other.is_file() else ""
        raise InputError(f"{path}: truncated or corrupt, not a readable checkpoint ({reason}){hint}") from error
    found = checkpoint.get("format") if isinstance(checkpoint, dict) else None
    if found != FORMAT:
        raise InputError(f"{path}: not a checkpoint of cxv (its format is {found!r}, expected {FORMAT!r})")
    return checkpoint


def read_last(output: str | Path) -> tuple[dict[str, Any], str | None]:
    """The checkpoint that a run goes on from: ``last.pt``, or ``previous.pt`` where that cannot be read.

    Returns:
        The checkpoint, and why it is the previous one if it is.

    Raises:
        InputError: neither can be read; the message is about ``last.pt``.
    """
    output = Path(output)
    try:
        return read_checkpoint(output / LAST), None
    except InputError as error:
        try:
            return read_checkpoint(output / PREVIOUS), str(error)
        except InputError:
            raise error from None


def load_model(
    checkpoint_dir: str | Path,
    which: str = "best",
    device: torch.device | str = "cpu",
    use_fused: bool | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild a trained model from its run's directory alone.

    Args:
        checkpoint_dir: the ``--output`` of the run, or one of the checkpoint files in it.
        which: ``"best"`` or ``"last"``.
        device: where to put the model.
        use_fused: the fused kernels or plain PyTorch; default as in the run.

    Returns:
        The model, in ``eval()`` mode, and the checkpoint: ``classes`` (names in label order), ``img_size``
        (pixels), ``in_chans``, ``normalisation``, ``args``, ``epoch``, ``history`` …

    Raises:
        InputError: no such checkpoint, a damaged one, or one whose weights do not fit the model that it
        names.
    """
    if which not in ("best", "last"):
        raise InputError(f"which: expected best or last, got {which!r}")
    path = Path(checkpoint_dir)
    if not path.exists():
        raise InputError(f"{path}: no such directory")
    if path.is_dir():
        path = path / f"{which}.pt"
    checkpoint = read_checkpoint(path)
    kwargs = dict(checkpoint["model_kwargs"])
    if use_fused is not None:
        kwargs["use_fused"] = use_fused
    model = build_model(checkpoint["model_name"], kwargs)
    load_weights(model, checkpoint, path)
    return model.to(device).eval(), checkpoint


def build_model(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """``cxv.create_model``, its refusals as :class:`InputError`."""
    try:
        return create_model(name, **kwargs)
    except (ValueError, ImportError) as error:
        raise InputError(f"--model {name}: {error}") from error
    except TypeError as error:  # not every baseline has every argument
        odd = [k for k in ("embed_dim", "drop_rate") if f"'{k}'" in str(error)]
        if not odd:
            raise
        raise InputError(f"--{odd[0].replace('_', '-')}: {name} has no such argument") from error


def load_weights(model: nn.Module, checkpoint: dict[str, Any], path: str | Path) -> None:
    """Copy a checkpoint's weights into the model.

    Raises:
        InputError: names or shapes differ; the model is as it was.
    """
    here = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    there = {name: tuple(t.shape) for name, t in checkpoint["model"].items()}
    odd = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if odd:
        k = odd[0]
        raise InputError(
            f"{path}: the weights of {checkpoint['model_name']} in it do not fit {type(model).__name__}: "
            f"{k} is {there.get(k, 'absent')} in the file and {here.get(k, 'absent')} in the model "
            f"({len(odd)} tensors differ)"
        )
    model.load_state_dict(checkpoint["model"])


def rng_state(device: torch.device) -> dict[str, Any]:
    """The states of the random generators that a training step may draw from."""
    state = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what :func:`rng_state` gave."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
