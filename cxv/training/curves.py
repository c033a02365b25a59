"""The picture of a run."""

import io
from pathlib import Path
from typing import Any

from .checkpoint import atomic_write


def plot_curves(history: list[dict[str, Any]], path: str | Path, title: str = "", switch: int | None = None) -> bool:
    """Draw loss and top-1 by epoch into a PNG, with a line where AdamW gave way to SGD (after epoch
    ``switch``).

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
    figure = Figure(figsize=(10, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)  # not pyplot: its backend and its figures belong to the user
    left, right = figure.subplots(1, 2)
    for axes, name, label in ((left, "loss", "cross-entropy"), (right, "top1", "top-1 (%)")):
        axes.plot(epochs, [row[f"train_{name}"] for row in history], color="#8a8f98", marker=mark, label="train")
        axes.plot(epochs, [row[f"test_{name}"] for row in history], color="#1f6fb4", marker=mark, label="test")
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if switch is not None:
            axes.axvline(switch + 0.5, color="#c2571a", linestyle="--", linewidth=1.2, label="AdamW → SGD")
    losses = [row[f"{split}_loss"] for row in history for split in ("train", "test")]
    if 0 < 20 * min(losses) < max(losses):
        left.set_yscale("log")
    best = max(history, key=lambda row: (row["test_top1"], row["epoch"]))
    label = f"best: {best['test_top1']:.2f} %, epoch {best['epoch']}"
    right.plot(best["epoch"], best["test_top1"], "o", color="#1f6fb4", markersize=6, label=label)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    atomic_write(path, buffer.getvalue())
    return True
