"""Output of a run: log lines, training curves, TensorBoard files and the summary of the scores."""

import csv
import io
import statistics
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data.loader import Data
from ..errors import InputError, printable
from ..models.registry import has_fused_ops
from .config import NAMES, TrainConfig
from .distributed import World
from .dualopt import DualOpT

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SCALARS = ("lr", "images_per_second", "skipped_steps")  # of a line of metrics.jsonl, for TensorBoard


# --- log lines: they name arguments in backticks, of which the command line makes flags


def header_lines(config: TrainConfig, data: Data, parameters: int, device: torch.device, world: World) -> list[str]:
    """Describe a run before its first epoch: model, data, recipe, machine."""
    ops = "fused" if config.fused else "plain PyTorch"
    if not has_fused_ops(config.model):
        ops = "plain PyTorch (it has no fused ops)"
    compiled = ", compiled" if config.compile else ""
    held_out = "" if data.validation is None else f", {len(data.validation):,} validation"
    processes = "" if world.size == 1 else f" in each of {world.size} processes"
    return [
        f"{config.model}: {parameters:,} parameters, {ops}, {config.precision}{compiled}",
        f"{config.data}: {len(data.train):,} training{held_out} and {len(data.test):,} test images, "
        f"{len(data.classes)} classes, {'×'.join(map(str, data.train.pixels.shape[1:]))}, {data.place}",
        _recipe_line(config, data),
        f"on {device} with {torch.get_num_threads()} threads{processes}, output in {config.output}",
    ]


def _recipe_line(config: TrainConfig, data: Data) -> str:
    parts = ["DualOpT" if config.optimizer == "dualopt" else f"{NAMES[config.optimizer]} alone"]
    if config.rand_augment is not None:
        parts[0] += " with RandAugment {},{}".format(*config.rand_augment)
    parts[0] += "".join(f", {extra}" for extra in _extras(config))
    if config.post_train:
        parts.append("post-training on clean images")
    by = "the validation images; the test set is evaluated once, at the end"
    if data.validation is None:
        by = "the test set, as in the paper"
    return f"{', then '.join(parts)}; the best epoch by {by}"


def _extras(config: TrainConfig) -> list[str]:
    """The parts of a recipe that the paper's does not have."""
    extras = (
        (f"stem and {config.freeze} layers frozen", config.freeze is not None),
        ("horizontal flips", config.hflip),
        (f"random crops with {config.random_crop} pixels of padding", config.random_crop),
        (f"color jitter {config.color_jitter}", config.color_jitter),
        (f"random erasing {config.random_erasing}", config.random_erasing),
        (f"MixUp {config.mixup}", config.mixup),
        (f"CutMix {config.cutmix}", config.cutmix),
        ("balanced class weights", config.class_weights),
        ("balanced sampling", config.balanced_sampling),
        (f"{config.schedule} learning rate", config.schedule != "constant"),
        (f"weight decay {config.weight_decay} of matrices", config.weight_decay is not None),
        (f"label smoothing {config.label_smoothing}", config.label_smoothing),
        (f"EMA {config.ema_decay or 0:.4g}", config.ema_decay),
    )
    stages = (f"{epochs} epoch{'s' * (epochs > 1)} at {size} px" for size, epochs in config.progressive or ())
    return [text for text, on in extras if on] + list(stages)


def epoch_line(row: dict[str, Any], best: bool) -> str:
    """Describe an epoch by its line of ``metrics.jsonl``, in at most 100 columns: loss and top-1 of each split."""
    size = f" {row['img_size']}px" if "img_size" in row else ""
    split, short = ("validation", "val") if "validation_loss" in row else ("test", "test")
    seconds = f"{row['seconds']:.{0 if row['seconds'] >= 100 else 1}f}"
    return (
        f"epoch {row['epoch']:3d} {phase_name(row):5s} lr {row['lr']:.2g}{size}  "
        f"train loss {row['train_loss']:.3f} {row['train_top1']:.1f} %  "
        f"{short} {row[f'{split}_loss']:.3f} {row[f'{split}_top1']:.2f} %  {seconds} s"
        + ("  best" if best else "")
        + (f"\n          {row['skipped_steps']} steps skipped (fp16 overflow)" if row["skipped_steps"] else "")
    )


def restart_line(what: str, opt: DualOpT, reason: str) -> str:
    """Say that something else begins with the best weights: SGD, or post-training."""
    best = f"reloaded the best weights, of epoch {opt.best_epoch} ({opt.best_top1:.2f} %)"
    return f"{what} after epoch {opt.epoch}: {reason}; {best}"


def stop_reason(phase: str, reason: str | None, config: TrainConfig) -> str:
    """Say why a phase of training is over, for a :attr:`DualOpT.stop_reason`."""
    if reason == "patience":
        return f"{NAMES[phase]} has not improved top-1 for {config.patience} epochs"
    cap = "sgd_epochs" if config.optimizer == "dualopt" and phase == "sgd" else "epochs"
    return f"{NAMES[phase]} has reached `{cap}` {getattr(config, cap)}"


# --- the scores of a run, or of several with different seeds


def summarize(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The test set's top-1 (per cent) by each way of selecting an epoch, from the lines of ``metrics.jsonl``.

    With validation images, ``best_validation``: the best epoch by their top-1, an unbiased figure. Without them,
    ``best_test``: the best epoch by the test set itself, as in the paper, which is biased upward; and ``last``: the
    last epoch.
    """

    def pick(key: str) -> dict[str, Any]:
        row = best_row(history, key)
        return {k: row[k] for k in ("epoch", "test_top1", "validation_top1") if k in row}

    if "validation_top1" in history[0]:
        return {"best_validation": pick("validation_top1")}
    return {"best_test": pick("test_top1"), "last": pick("epoch")}


def best_row(history: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """The line of ``metrics.jsonl`` with the largest value of ``key``; the latest epoch of a tie, as in DualOpT."""
    return max(history, key=lambda row: (row[key], row["epoch"]))


def summary_line(summary: dict[str, Any]) -> str:
    """One line that gives every number of :func:`summarize`."""
    at = {name: f"{score['test_top1']:.2f} % (epoch {score['epoch']})" for name, score in summary.items()}
    if "best_validation" not in summary:
        return f"test top-1: best by test {at['best_test']}, last {at['last']}"
    top1 = f"{summary['best_validation']['validation_top1']:.2f} %"
    return f"test top-1: {at['best_validation']}, evaluated once, at the best validation top-1 {top1}"


def summarize_seeds(runs: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Best, mean and sample standard deviation of the test top-1 over runs, given by seed as :func:`summarize` does.

    The deviation of a single run is None.
    """
    total: dict[str, Any] = {"runs": {str(seed): run for seed, run in runs.items()}}
    for key in next(iter(runs.values())):
        values = [run[key]["test_top1"] for run in runs.values()]
        total[key] = {
            "best": max(values),
            "mean": statistics.fmean(values),
            "sd": statistics.stdev(values) if len(values) > 1 else None,
        }
    return total


def summary_lines(total: dict[str, Any]) -> list[str]:
    """:func:`summarize_seeds` in words, a line for each way of selecting."""
    names = {"best_test": "best by test", "best_validation": "at the best validation", "last": "last epoch"}
    lines, start = [], f"test top-1 over {len(total['runs'])} seeds"
    for key in names.keys() & total.keys():
        best, mean, sd = total[key].values()
        spread = "" if sd is None else f" ± {sd:.2f}"
        lines.append(f"{start}, {names[key]}: mean {mean:.2f}{spread} %, best {best:.2f} %")
    return sorted(lines)


# --- tables and curves


def to_csv(history: list[dict[str, Any]]) -> bytes:
    """The lines of ``metrics.jsonl`` as a table. Missing numbers are empty cells."""
    table = io.StringIO()
    writer = csv.DictWriter(table, list(dict.fromkeys(name for row in history for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    return table.getvalue().encode()


def phase_name(row: dict[str, Any]) -> str:
    """The phase of an epoch, e.g. ``"RA-AdamW"`` where RandAugment was on."""
    return ("RA-" if row.get("augmented") else "") + NAMES[row["phase"]]


def plot_curves(history: list[dict[str, Any]], title: str = "") -> bytes:
    """Draw loss and top-1 of at least one epoch, with a line wherever one phase gave way to another.

    Returns:
        The content of a PNG file.
    """
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in history]
    mark = "o" if len(epochs) == 1 else None
    splits = {"train": "#8a8f98", "validation": "#3b8f5a", "test": "#1f6fb4"}
    splits = {split: color for split, color in splits.items() if all(f"{split}_loss" in row for row in history)}
    switches = [(a["epoch"] + 0.5, phase_name(a), phase_name(b)) for a, b in pairwise(history)]
    switches = [(x, f"{a} → {b}") for x, a, b in switches if a != b]
    figure = new_figure(10, 4.2)
    left, right = figure.subplots(1, 2)
    for axes, name, label in ((left, "loss", "cross-entropy"), (right, "top1", "top-1 (%)")):
        for split, color in splits.items():
            axes.plot(epochs, [row[f"{split}_{name}"] for row in history], color=color, marker=mark, label=split)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        for (x, label), style in zip(switches, ("--", ":", "-."), strict=False):
            axes.axvline(x, color="#c2571a", linestyle=style, linewidth=1.2, label=label)
    losses = [row[f"{split}_loss"] for row in history for split in splits]
    if 0 < 20 * min(losses) < max(losses):
        left.set_yscale("log")
    by = "validation" if "validation" in splits else "test"
    best = best_row(history, f"{by}_top1")
    label = f"best: {best[f'{by}_top1']:.2f} %, epoch {best['epoch']}"
    right.plot(best["epoch"], best[f"{by}_top1"], "o", color=splits[by], markersize=6, label=label)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(plot_text(title))
    return figure_png(figure)


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of this size in inches. It does not use pyplot, whose state belongs to the user."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def figure_png(figure: "Figure") -> bytes:
    """Return the content of a PNG file with the figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def plot_text(text: str) -> str:
    """Return text that matplotlib draws as it is: without formulas, and with escapes for what its font lacks."""
    glyphs = _glyphs()
    text = "".join(c if ord(c) in glyphs else c.encode("unicode_escape").decode() for c in printable(text))
    return text.replace("$", r"\$")


@cache
def _glyphs() -> frozenset[int]:
    """The characters of matplotlib's font."""
    from matplotlib import font_manager

    return frozenset(font_manager.get_font(font_manager.findfont(None)).get_charmap())


# --- TensorBoard


class TensorBoard:
    """Event files in ``folder``, a point for each epoch.

    They start anew with the epochs that a resumed run has behind it: the checkpoint's history is the truth.
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
