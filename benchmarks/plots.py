"""Redraw every picture of the benchmarks from their CSV files, and training curves from JSON lines.

python benchmarks/plots.py
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from _harness import RESULTS, TABLE1_GB, Row, read_rows
from _report import BUDGET_BYTES, by_host, latest
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullLocator

from cxv.training.logging import plot_curves

COLORS = {"performer": "#d1495b", "linear": "#1b7f9e", "nystrom": "#e0a100", "sdpa": "#5a5a5a"}
LABELS = {"performer": "Performer", "linear": "linear", "nystrom": "Nyström", "sdpa": "softmax (SDPA)"}
MODEL_COLORS = {"cpv": COLORS["performer"], "cnv": COLORS["nystrom"], "cltv": COLORS["linear"]}
MODE_COLORS = {"eager": "#5a5a5a", "fused": "#1b7f9e", "checkpointed": "#d1495b"}
STYLES = {"torch": "-", "reference": "--", "fused": "-"}
GRAY = "#444444"
FONTS = {"font.size": 12, "axes.titlesize": 12.5, "legend.fontsize": 11, "legend.frameon": False}


def draw_memory(rows: Sequence[Row], path: Path) -> None:
    """Two panels: peak memory of attention against N, and of a training step per model."""
    dtype = rows[0].dtype
    rows = [row for row in rows if row.dtype == dtype]
    panels = [
        (panel, mine)
        for panel, section in ((_attention, "attention"), (_models, "model"))
        if (mine := [row for row in rows if row.section == section])
    ]
    with rc_context(FONTS):
        figure = Figure(figsize=(6 * len(panels), 5), dpi=110, layout="constrained")
        for i, (panel, mine) in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), i + 1)
            panel(mine, axes)
            axes.spines[["top", "right"]].set_visible(False)
        name = rows[0].environment["device_name"]
        figure.suptitle(f"Peak memory, {dtype}, on {name}", fontweight="bold")
        figure.savefig(path)


def _attention(rows: Sequence[Row], axes: Axes) -> None:
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rows:
        if row.status == "ok":
            lines.setdefault((row.name, row.implementation), []).append((row.size, row.peak_bytes / 1e6))
    for (name, implementation), points in sorted(lines.items(), key=lambda item: item[0][0] != "sdpa"):
        axes.plot(*zip(*points, strict=True), STYLES[implementation], ms=5, **_line(name))
    _token_axes(axes, sorted({row.size for row in rows}), "MB")
    axes.set_title(f"Attention, forward + backward\nbatch {rows[0].batch}, 4 heads of 32 channels")
    names = [name for name in COLORS if any(name == measured for measured, _ in lines)]
    handles = [Line2D([], [], label=LABELS[name], **_line(name) | {"marker": ""}) for name in names]
    for implementation in ("reference", "fused"):
        if any(implementation == measured for _, measured in lines):
            handles.append(Line2D([], [], color=GRAY, ls=STYLES[implementation], lw=2.2, label=implementation))
    axes.legend(handles=handles, loc="upper left")


def _token_axes(axes: Axes, lengths: Sequence[int], unit: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 1024:g}k" if n % 1024 == 0 else f"{n:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("tokens N")
    axes.set_ylabel(unit)
    axes.grid(alpha=0.25)


def _line(name: str) -> dict:
    """Softmax attention is a broad band under the other lines, which it may hide otherwise."""
    if name == "sdpa":
        return {"color": COLORS[name], "lw": 8, "alpha": 0.3, "solid_capstyle": "butt"}
    return {"color": COLORS[name], "lw": 2.2, "marker": "o"}


def _models(rows: Sequence[Row], axes: Axes) -> None:
    names = list(dict.fromkeys(row.name for row in rows))
    comparable = rows[0].batch == 32 and rows[0].size == 32
    top = max([*((row.peak_bytes or 0) / 1e9 for row in rows), *(TABLE1_GB.values() if comparable else (1e-9,))])
    for row in rows:
        fused = row.implementation == "fused"
        x = names.index(row.name) + (0.2 if fused else -0.2)
        color = MODEL_COLORS[row.name.partition("-")[0]]
        if comparable and not fused:
            paper = TABLE1_GB[row.name]
            axes.plot([x - 0.2, x + 0.6], [paper] * 2, color="black", lw=2.5)
            axes.text(x + 0.6, paper + 0.012 * top, f"{paper}", ha="right", va="bottom")
        if row.peak_bytes is None:
            axes.text(x, 0.02 * top, row.status, rotation=90, ha="center", va="bottom", color=GRAY)
            continue
        height = row.peak_bytes / 1e9
        style = {"color": color} if fused else {"facecolor": "none", "edgecolor": color, "hatch": "//", "ls": "--"}
        axes.bar(x, height, 0.36, lw=1.5, **style)
        axes.text(x, height + 0.012 * top, f"{height:.2f}", ha="center", va="bottom")
    axes.set_xticks(range(len(names)), [name.upper() for name in names])
    axes.set_ylim(0, 1.4 * top)
    axes.set_ylabel("GB")
    axes.set_title(f"Training step with AdamW\nbatch {rows[0].batch}, 3×{rows[0].size}×{rows[0].size}")
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    handles = [Patch(facecolor="none", edgecolor=GRAY, hatch="//", ls="--", label="reference")]
    if any(row.implementation == "fused" and row.peak_bytes for row in rows):
        handles.append(Patch(color=GRAY, label="fused"))
    if comparable:
        handles.append(Line2D([], [], color="black", lw=2.5, label="paper, Table 1 (float32)"))
    axes.legend(handles=handles, loc="upper right")


def draw_steps(rows: Sequence[Row], path: Path) -> None:
    """A panel per model and dtype: the peak of a training step against the batch, up to 16 GB."""
    rows = [row for row in rows if row.section == "memory" and row.implementation in MODE_COLORS]
    names, dtypes = (list(dict.fromkeys(getattr(row, key) for row in rows)) for key in ("name", "dtype"))
    with rc_context(FONTS):
        size = (4.4 * len(names), 3.9 * len(dtypes) + 0.9)
        figure = Figure(figsize=size, dpi=88, layout="constrained")
        panels = figure.subplots(len(dtypes), len(names), sharex=True, sharey=True, squeeze=False)
        for dtype, line in zip(dtypes, panels, strict=True):
            for name, axes in zip(names, line, strict=True):
                _steps(axes, name, dtype, [row for row in rows if (row.name, row.dtype) == (name, dtype)])
        for axes in panels[-1]:
            axes.set_xlabel("batch")
        for axes in panels[:, 0]:
            axes.set_ylabel("GB")
        figure.legend(handles=_step_legend(rows), loc="outside lower center", ncols=3)
        side, name = rows[0].size, rows[0].environment["device_name"]
        figure.suptitle(f"Peak of a training step, 3×{side}×{side}, on {name}", fontweight="bold")
        figure.savefig(path)


def _steps(axes: Axes, name: str, dtype: str, rows: Sequence[Row]) -> None:
    budget = BUDGET_BYTES / 1e9
    for mode, color in MODE_COLORS.items():
        points = [(row.batch, row.peak_bytes / 1e9) for row in rows if row.implementation == mode and row.peak_bytes]
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), color=color, lw=2.2, marker="o", ms=4.5)
        (b0, m0), (b1, m1) = points[0], points[-1]
        if b1 > b0 and m1 > m0:
            largest = b1 + (budget - m1) * (b1 - b0) / (m1 - m0)
            axes.plot([b1, largest], [m1, budget], ":", color=color, lw=2)
            offset = (0, 16 if mode == "checkpointed" else 4)
            axes.annotate(
                f"{largest:,.0f}", (largest, budget), offset, textcoords="offset points", ha="center", color=color
            )
    axes.axhline(budget, color="black", lw=1)
    if rows and rows[0].size == 32:
        axes.plot([32], [TABLE1_GB[name]], "*", color="black", ms=12)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([8 * 4**n for n in range(6)])
    axes.xaxis.set_minor_locator(NullLocator())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_title(f"{name.upper()}, {dtype}")
    axes.margins(x=0.09, y=0.16)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _step_legend(rows: Sequence[Row]) -> list[Line2D]:
    handles = [Line2D([], [], color=color, lw=2.2, marker="o", label=mode) for mode, color in MODE_COLORS.items()]
    handles.append(Line2D([], [], color=GRAY, ls=":", lw=2, label="predicted, up to the largest batch"))
    handles.append(Line2D([], [], color="black", lw=1, label=f"{BUDGET_BYTES / 1e9:g} GB"))
    if rows and rows[0].size == 32:
        handles.append(Line2D([], [], color="black", ls="", marker="*", ms=12, label="paper, Table 1 (float32, GPU)"))
    return handles


def draw_speed(rows: Sequence[Row], path: Path) -> None:
    """Two panels: the time of forward + backward against N, by batch."""
    rows = [row for row in rows if row.section == "length" and row.training_ms]
    batches = sorted({row.batch for row in rows})
    with rc_context(FONTS):
        figure = Figure(figsize=(6 * len(batches), 4.6), dpi=110, layout="constrained")
        for axes, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
            mine = [row for row in rows if row.batch == batch]
            for name in sorted({row.name for row in mine}, key=lambda name: name != "sdpa"):
                points = sorted((row.size, row.training_ms) for row in mine if row.name == name)
                axes.plot(*zip(*points, strict=True), ms=5, label=LABELS[name], **_line(name))
            lengths = sorted({row.size for row in mine})
            _token_axes(axes, lengths if len(lengths) < 8 else lengths[::2], "ms")
            axes.set_title(f"batch {batch}")
            axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper left")
        name = rows[0].environment["device_name"]
        figure.suptitle(f"Forward + backward, 4 heads of 32 channels, {rows[0].dtype}, on {name}", fontweight="bold")
        figure.savefig(path)


def draw_curves(path: Path) -> None:
    """Loss and top-1 by epoch, from lines like those of a run's ``metrics.jsonl``."""
    history = [{"phase": "adamw", **json.loads(line)} for line in path.read_text().splitlines()]
    path.with_suffix(".png").write_bytes(plot_curves(history))


DRAW = {"attn_mem": draw_memory, "attn_speed": draw_speed, "model_step": draw_steps}


def main(argv: Sequence[str] | None = None) -> int:
    """Draw a picture for each CSV file in the folder, from its newest run, and for each training on CIFAR-10."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS, help="folder of the CSV files")
    folder = parser.parse_args(argv).folder
    paths = [path for path in sorted(folder.glob("*.csv")) if path.stem.partition("-")[0] in DRAW]
    if not paths:
        parser.error(f"folder: no results of {', '.join(DRAW)} in {folder}")
    for path in paths:
        rows = read_rows(path)
        DRAW[path.stem.partition("-")[0]](latest(rows), path.with_suffix(".png"))
        print(path.with_suffix(".png"), f"({len(by_host(rows))} runs in {path.name})")
    for path in sorted(folder.glob("cifar10-*.jsonl")):
        draw_curves(path)
        print(path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
