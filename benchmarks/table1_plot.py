"""The paper's Fig. 2, accuracy against memory, with what was trained and measured here: from table1.py's JSON alone."""

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from table1_report import PAPER

STYLES = {  # face, edge, label
    "paper": ("none", "#5a5a5a", "the paper"),
    "eager": ("#5a5a5a", "#5a5a5a", "here, eager: mean and sd over the seeds"),
    "fused": ("#1b7f9e", "#1b7f9e", "here, fused"),
}
PLACES = (  # of a label, in points from its point
    ((6, 3), "left", "bottom"),
    ((6, -3), "left", "top"),
    ((-6, 3), "right", "bottom"),
    ((-6, -3), "right", "top"),
)


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
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(f"peak of a training step at batch {batch} (the paper: 32), float32, GB")
        axes.set_ylabel("top-1 on CIFAR-10, %")
        axes.set_title(f"Accuracy against memory; memory here on {machine}")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower left")
        figure.draw_without_rendering()  # the axes' place, for the labels'
        centres = axes.transData.transform([point[2:4] for point in drawn])
        taken = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in centres]
        for kind, name, gb, top1, _ in drawn:
            taken.append(_label(axes, name, (gb, top1), STYLES[kind][1], taken))
        figure.savefig(path)


def _label(axes: Axes, name: str, point: tuple[float, float], color: str, taken: list[Bbox]) -> Bbox:
    """Write the name beside its point, where no other is if that can be; gives its place."""
    for (x, y), side, base in PLACES:
        text = axes.annotate(name, point, (x, y), textcoords="offset points", fontsize=9, color=color, ha=side, va=base)
        text.set_in_layout(False)
        place = text.get_window_extent()
        if place.x1 < axes.figure.bbox.x1 - 10 and not any(place.overlaps(other) for other in taken):
            break
        text.remove()
    else:
        axes.add_artist(text)
    return place
