"""The paper's Fig. 2, accuracy against memory, with what was measured here: from table1.py's JSON alone."""

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from table1_report import PAPER

STYLES = {"paper": ("o", "none", "#5a5a5a"), "eager": ("o", "#5a5a5a", "#5a5a5a"), "fused": ("o", "#1b7f9e", "#1b7f9e")}


def draw(results: dict[str, Any], path: Path) -> None:
    """The paper's top-1 on CIFAR-10 against the peak of a training step in float32, printed and measured."""
    env, settings = results["environment"], results["settings"]
    with rc_context({"font.size": 11, "legend.frameon": False}):
        figure = Figure(figsize=(8.2, 5.4), dpi=140, layout="constrained")
        axes = figure.subplots()
        for row in results["rows"]:
            accuracy, peak = PAPER[row["name"]][3], row["peak"].get("float32")
            if row["status"] != "ok" or peak is None:
                continue
            kind = "fused" if row["fused"] else "eager"
            _point(axes, kind, peak / 1e9, accuracy)
            if row["fused"]:
                continue
            _point(axes, "paper", PAPER[row["name"]][2], accuracy)
            axes.annotate(row["name"], (peak / 1e9, accuracy), (5, 4), textcoords="offset points", fontsize=9)
        axes.set_xscale("log")
        axes.set_xlabel(f"peak of a training step at batch {settings['batch']}, float32, GB")
        axes.set_ylabel("top-1 on CIFAR-10 as the paper reports it, %")
        axes.set_title(f"Accuracy (paper) against memory (measured on {env['device_name']})")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(handles=[_legend(kind) for kind in STYLES], loc="lower left")
        figure.savefig(path)


def _point(axes: Any, kind: str, x: float, y: float) -> None:
    marker, face, edge = STYLES[kind]
    axes.plot([x], [y], marker, markerfacecolor=face, markeredgecolor=edge, ms=7)


def _legend(kind: str) -> Line2D:
    marker, face, edge = STYLES[kind]
    label = {"paper": "memory as the paper reports it", "eager": "measured, eager", "fused": "measured, fused"}[kind]
    return Line2D([], [], ls="", marker=marker, markerfacecolor=face, markeredgecolor=edge, ms=7, label=label)
