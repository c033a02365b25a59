"""The picture of model_mem.py, drawn from its JSON alone."""

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

COLOURS = {"eager": "#5a5a5a", "fused": "#1b7f9e", "checkpointed": "#d1495b"}


def draw(results: dict[str, Any], path: Path) -> None:
    """One panel per model and dtype into a PNG: the peak of a training step against the batch, up to the budget."""
    env, rows = results["environment"], [row for row in results["memory"] if row["mode"] in COLOURS]
    names, dtypes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("name", "dtype"))
    with rc_context({"font.size": 11.5, "axes.titlesize": 12, "legend.fontsize": 11, "legend.frameon": False}):
        size = (4.4 * max(len(names), 1), 3.9 * max(len(dtypes), 1) + 0.9)
        figure = Figure(figsize=size, dpi=140, layout="constrained")
        panels = figure.subplots(max(len(dtypes), 1), max(len(names), 1), sharex=True, sharey=True, squeeze=False)
        for dtype, line in zip(dtypes, panels, strict=False):
            for name, axes in zip(names, line, strict=False):
                mine = [row for row in rows if (row["name"], row["dtype"]) == (name, dtype)]
                _panel(axes, f"{name.upper()}, {dtype}", mine, results["settings"])
        for axes in panels[-1]:
            axes.set_xlabel("batch")
        for axes in panels[:, 0]:
            axes.set_ylabel("GB")
        figure.legend(handles=_legend(results["settings"]), loc="outside lower center", ncols=3)
        side = results["settings"]["image_size"]
        figure.suptitle(f"Peak of a training step, 3×{side}×{side}, on {env['device_name']}", fontweight="bold")
        figure.savefig(path)


def _panel(axes: Axes, title: str, rows: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    budget, last = settings["budget_bytes"] / 1e9, settings["batch"]
    for row in rows:
        if not row["peaks"]:
            continue
        colour = COLOURS[row["mode"]]
        batches = [int(batch) for batch in row["peaks"]]
        axes.plot(batches, [nbytes / 1e9 for nbytes in row["peaks"].values()], color=colour, lw=2.2, marker="o", ms=4.5)
        if row["line"] and row["largest_batch"] and row["largest_batch"] > batches[-1]:
            ends = [batches[-1], row["largest_batch"]]
            axes.plot(ends, [(row["line"][0] + row["line"][1] * n) / 1e9 for n in ends], ":", color=colour, lw=2)
            axes.annotate(
                f"{row['largest_batch']:,}",
                (row["largest_batch"], budget),
                (0, 16 if row["mode"] == "checkpointed" else 4),
                textcoords="offset points",
                ha="center",
                color=colour,
            )
    axes.axhline(budget, color="black", lw=1)
    if rows and settings["image_size"] == 32:
        axes.plot([32], [settings["table1_gb"][rows[0]["name"]]], "*", color="black", ms=12)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([last // 4 * 4**n for n in range(6)] if last >= 4 else [last])
    axes.xaxis.set_minor_locator(NullLocator())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_title(title)
    axes.margins(x=0.09, y=0.16)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(settings: dict[str, Any]) -> list[Line2D]:
    handles = [Line2D([], [], color=colour, lw=2.2, marker="o", label=mode) for mode, colour in COLOURS.items()]
    handles.append(Line2D([], [], color="#444444", ls=":", lw=2, label="the line through them, to the largest batch"))
    handles.append(Line2D([], [], color="black", lw=1, label=f"{settings['budget_bytes'] / 1e9:g} GB"))
    if settings["image_size"] == 32:
        handles.append(Line2D([], [], color="black", ls="", marker="*", ms=12, label="paper, Table 1 (float32, GPU)"))
    return handles
