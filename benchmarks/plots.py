"""Redraws every picture of the README from the JSON files beside it. ``python benchmarks/plots.py [FOLDER]``"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attn_mem_plot
import gpu_report
import model_mem_plot
import table1_plot
from common import Parser
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

OPS = {"performer_attention": ("Performer", "#d1495b"), "linear_attention": ("linear", "#1b7f9e")}
STYLES = {"triton": "-", "cuda": "--", "cpp": "-", "sdpa": ":"}
GREY = "#5a5a5a"


def draw_gpu(results: dict[str, Any], path: Path) -> None:
    """Up to three panels into a PNG: time over N, the rivals at the paper's size, a training step of the models."""
    panels = [panel for panel in (_sweep, _rivals, _training) if panel(results, None)]
    with rc_context({"font.size": 11.5, "axes.titlesize": 12, "legend.fontsize": 10.5, "legend.frameon": False}):
        figure = Figure(figsize=(5.6 * max(len(panels), 1), 4.8), dpi=150, layout="constrained")
        for i, panel in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), i + 1)
            panel(results, axes)
            axes.grid(alpha=0.25, axis="both" if panel is _sweep else "x")
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(f"On {results['environment'].get('device_name')}", fontweight="bold")
        figure.savefig(path)


def _measured(results: dict[str, Any], *sections: str) -> list[dict[str, Any]]:
    return [row for row in gpu_report.rows_of(results, *sections) if row["status"] == "ok"]


def _sweep(results: dict[str, Any], axes: Axes | None) -> bool:
    """Forward + backward against N."""
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in _measured(results, "sweep"):
        if row["implementation"] in STYLES:
            point = (row["tokens"], 1e3 * gpu_report.seconds(row, "forward_backward"))
            # softmax attention is the same beside either op
            lines.setdefault(("" if row["implementation"] == "sdpa" else row["op"], row["implementation"]), []).append(
                point
            )
    if axes is None or not lines:
        return bool(lines)
    for (op, implementation), points in lines.items():
        name, colour = OPS.get(op, ("softmax (SDPA)", GREY))
        label = f"{name}, {implementation}" if op else name
        axes.plot(
            *zip(*sorted(dict(points).items()), strict=True),
            STYLES[implementation],
            color=colour,
            lw=2.2,
            marker="o",
            label=label,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 1024:g}k" if n >= 1024 else f"{n:g}"))
    batch, heads, _, dim = _measured(results, "sweep")[0]["shape"]
    axes.set_title(f"Forward + backward, batch {batch}, {heads} heads of {dim}")
    axes.set_xlabel("tokens N")
    axes.set_ylabel("ms")
    axes.legend(loc="upper left")
    return True


def _rivals(results: dict[str, Any], axes: Axes | None) -> bool:
    """Forward + backward of every implementation at the first size of the run."""
    rows = _measured(results, "attention")
    same = ("op", "variant", "shape", "dtype")
    rows = [row for row in rows if all(row[key] == rows[0][key] for key in same)]
    rows = list({row["implementation"]: row for row in reversed(rows)}.values())[::-1]  # measured twice: the first
    if axes is None or not rows:
        return bool(rows)
    fused = ("triton", "cuda", "cpp")
    name, colour = OPS[rows[0]["op"]]
    times = [1e3 * gpu_report.seconds(row, "forward_backward") for row in rows]
    colours = [colour if row["implementation"] in fused else GREY for row in rows]
    _bars(axes, [row["implementation"] for row in rows], times, colours, "ms", "{:.3g}")
    shape, dtype = ", ".join(f"{n:,}" for n in rows[0]["shape"]), rows[0]["dtype"]
    axes.set_title(f"{name}, forward + backward\n({shape}), {dtype}")
    return True


def _training(results: dict[str, Any], axes: Axes | None) -> bool:
    """Images per second of the first model's modes, with the peak beside each bar."""
    rows = [row for row in gpu_report.model_rows(results) if row["status"] == "ok"]
    rows = [row for row in rows if all(row[key] == rows[0][key] for key in ("model", "dtype", "batch"))]
    if axes is None or not rows:
        return bool(rows)
    colours = [GREY if row["mode"].startswith("eager") else OPS["performer_attention"][1] for row in rows]
    labels = [f"{row['mode']}\n{row['train_peak_bytes'] / 1e9:.3g} GB" for row in rows]
    _bars(axes, labels, [row["train_images_per_s"] for row in rows], colours, "images/s", "{:,.0f}")
    axes.set_title(f"Training {rows[0]['model'].upper()}, batch {rows[0]['batch']}, {rows[0]['dtype']}; with its peak")
    return True


def _bars(
    axes: Axes, labels: Sequence[str], values: Sequence[float], colours: Sequence[str], unit: str, form: str
) -> None:
    places = range(len(labels))
    bars = axes.barh(places, values, color=colours, height=0.66)
    axes.bar_label(bars, [form.format(value) for value in values], padding=3)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.margins(x=0.16)
    axes.set_xlabel(unit)


DRAW: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "attn_mem": attn_mem_plot.draw,
    "model_mem": model_mem_plot.draw,
    "table1": table1_plot.draw,
    "gpu_suite": draw_gpu,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Draw; 0, or 2 if there is nothing to draw from."""
    parser = Parser("plots", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent / "results")
    folder = parser.parse_args(argv).folder
    found = {path: gpu_report.read(path) for path in sorted(folder.glob("*.json"))}
    pictures = {path: results for path, results in found.items() if results.get("benchmark") in DRAW}
    if not pictures:
        parser.error(f"no results of {', '.join(DRAW)} in {folder}")
    for path, results in pictures.items():
        DRAW[results["benchmark"]](results, path.with_suffix(".png"))
        print(path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
