"""A run's numbers for TensorBoard."""

from pathlib import Path
from typing import Any

from ..errors import InputError
from .curves import phase_name

_SCALARS = ("lr", "images_per_second", "skipped_steps")


class TensorBoard:
    """Event files in ``folder``, a point for each epoch.

    They start anew with the epochs that a resumed run has behind it: the checkpoint's history is the truth.

    Raises:
        InputError: the package tensorboard is not installed, or the folder cannot be written.
    """

    def __init__(self, folder: Path, history: list[dict[str, Any]]):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError("`tensorboard`: needs the package tensorboard: pip install 'cxv[tensorboard]'") from error
        try:
            for path in folder.glob("events.out.tfevents.*"):
                path.unlink()
            self._writer = SummaryWriter(str(folder))
        except OSError as error:
            raise InputError(f"`tensorboard`: cannot write {folder}: {error.strerror or error}") from error
        self._phase: str | None = None
        for row in history:
            self.add(row)

    def add(self, row: dict[str, Any]) -> None:
        """Write a line of ``metrics.jsonl``: ``loss/SPLIT``, ``top1/SPLIT`` (per cent), the rest by its name."""
        for key, value in row.items():
            split, _, kind = key.rpartition("_")
            if kind in ("loss", "top1"):
                self._writer.add_scalar(f"{kind}/{split}", value, row["epoch"])
            elif key in _SCALARS:
                self._writer.add_scalar(key, value, row["epoch"])
        if phase_name(row) != self._phase:
            self._phase = phase_name(row)
            self._writer.add_text("phase", self._phase, row["epoch"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
