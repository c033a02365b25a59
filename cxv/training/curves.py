"""The picture of a run."""

import io
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..checkpoint import atomic_write


def phase_name(row: dict[str, Any]) -> str:
    """The phase of an epoch, e.g. ``"RA-AdamW"`` where RandAugment was on."""
    return ("RA-" if row.get("augmented") else "") + {"adamw": "AdamW", "sgd": "SGD"}[row["phase"]]


def plot_curves(history: list[dict[str, Any]], path: str | Path, title: str = "") -> bool:
    """Draw loss and top-1 by epoch into a PNG, with a line wherever one phase gave way to another.

    Returns:
        False, with nothing drawn, when matplotlib is not installed or there is no epoch to draw.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return False
    if not history:
        return False
    epochs = [row["epoch"] for row in history]
    mark = "o" if len(epochs) == 1 else None
    splits = {"train": "#8a8f98", "validation": "#3b8f5a", "test": "#1f6fb4"}
    splits = {split: color for split, color in splits.items() if f"{split}_loss" in history[0]}
    switches = [(a["epoch"] + 0.5, phase_name(a), phase_name(b)) for a, b in pairwise(history)]
    switches = [(x, f"{a} → {b}") for x, a, b in switches if a != b]
    figure = Figure(figsize=(10, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot: its backend and its figures belong to the user
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
    best = max(history, key=lambda row: (row[f"{by}_top1"], row["epoch"]))
    label = f"best: {best[f'{by}_top1']:.2f} %, epoch {best['epoch']}"
    right.plot(best["epoch"], best[f"{by}_top1"], "o", color=splits[by], markersize=6, label=label)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    atomic_write(path, buffer.getvalue())
    return True
