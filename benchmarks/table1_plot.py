"""The paper's Fig. 2, accuracy against memory, with what was trained and measured here: from table1.py's JSON alone."""

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from table1_report import PAPER

STYLES = {  # face, edge, label
    "paper": ("none", "#5a5a5a", "the paper"),
    "eager": ("#5a5a5a", "#5a5a5a", "here, eager: mean and sd over the seeds"),
    "fused": ("#1b7f9e", "#1b7f9e", "here, fused"),
}


def points(results: dict[str, Any]) -> list[tuple[str, str, float, float, float]]:
    """(kind, model, GB in float32, top-1 on CIFAR-10 in %, its deviation): the paper's, and what was trained here."""
    found = [("paper", name, gb, top1, 0.0) for name, (_, _, gb, top1, *_) in PAPER.items()]
    models = results.get("trained", {}).get("cifar10", {"models": {}})["models"]
    for row in results["rows"]:
        name, peak = row["name"], row["peak"].get("float32")
        if row["status"] == "ok" and peak is not None and name in models:
            top1 = models[name]["best_test"]
            found.append(("fused" if row["fused"] else "eager", name, peak / 1e9, top1["mean"], top1["sd"] or 0.0))
    return found


def draw(results: dict[str, Any], path: Path) -> None:
    """The paper's points hollow, ours filled: top-1 on CIFAR-10 against the peak of a training step in float32."""
    batch, machine = results["settings"]["batch"], results["environment"]["device_name"]
    drawn = points(results)
    with rc_context({"font.size": 11, "legend.frameon": False}):
        figure = Figure(figsize=(8.2, 5.4), dpi=140, layout="constrained")
        axes = figure.subplots()
        for kind, (face, edge, label) in STYLES.items():
            mine = [point[2:] for point in drawn if point[0] == kind]
            if mine:
                x, y, sd = zip(*mine, strict=True)
                bars = sd if any(sd) else None
                axes.errorbar(x, y, bars, fmt="o", mfc=face, mec=edge, ecolor=edge, ms=7, elinewidth=1, label=label)
        for kind, name, gb, top1, _ in drawn:
            axes.annotate(name, (gb, top1), (5, 4), textcoords="offset points", fontsize=9, color=STYLES[kind][1])
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(f"peak of a training step at batch {batch} (the paper: 32), float32, GB")
        axes.set_ylabel("top-1 on CIFAR-10, %")
        axes.set_title(f"Accuracy against memory; memory here on {machine}")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower left")
        figure.savefig(path)
