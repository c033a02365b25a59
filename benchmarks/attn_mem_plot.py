"""The picture of attn_mem.py, drawn from its JSON alone."""

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullLocator

COLOURS = {"performer": "#d1495b", "linear": "#1b7f9e", "nystrom": "#e0a100", "sdpa": "#5a5a5a"}
LABELS = {"performer": "Performer", "linear": "linear", "nystrom": "Nyström", "sdpa": "softmax (SDPA)"}
MODEL_COLOURS = {"cpv": COLOURS["performer"], "cnv": COLOURS["nystrom"], "cltv": COLOURS["linear"]}
STYLES = {"torch": "-", "reference": "--", "fused": "-"}
GREY = "#444444"


def draw(results: dict[str, Any], path: Path) -> None:
    """Two panels into a PNG: peak memory of attention against N (MB), and of a training step per model (GB)."""
    env = results["environment"]
    panels = [panel for panel, rows in ((_attention, "attention"), (_models, "models")) if results[rows]]
    with rc_context({"font.size": 12.5, "axes.titlesize": 12.5, "legend.fontsize": 11.5, "legend.frameon": False}):
        figure = Figure(figsize=(6 * max(len(panels), 1), 5), dpi=160, layout="constrained")
        for i, panel in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), i + 1)
            panel(results, axes)
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(f"Peak memory, {env['dtype']}, on {env['device_name']}", fontweight="bold")
        figure.savefig(path)


def _attention(results: dict[str, Any], axes: Axes) -> None:
    settings = results["settings"]
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in results["attention"]:
        if row["status"] == "ok":
            point = (row["tokens"], row["peak_bytes"] / 1e6)
            lines.setdefault((row["name"], row["implementation"]), []).append(point)
    for (name, implementation), points in sorted(lines.items(), key=lambda item: item[0][0] != "sdpa"):
        axes.plot(*zip(*points, strict=True), STYLES[implementation], ms=5, **_line(name))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(settings["lengths"])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n / 1024:g}k" if n % 1024 == 0 else f"{n:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda megabytes, _: f"{megabytes:g}"))
    axes.set_xlabel("tokens N")
    axes.set_ylabel("MB")
    axes.set_title(
        f"Attention, forward + backward\nbatch {settings['batch']}, {settings['heads']} heads of {settings['head_dim']}"
    )
    axes.grid(alpha=0.25)
    names = [name for name in COLOURS if any(name == measured for measured, _ in lines)]
    handles = []
    for name in names:  # dashed where there is no fused line
        style = STYLES["reference" if (name, "reference") in lines and (name, "fused") not in lines else "fused"]
        handles.append(Line2D([], [], label=LABELS[name], ls=style, **_line(name) | {"marker": ""}))
    for implementation in ("reference", "fused"):
        if any(implementation == measured for _, measured in lines):
            handles.append(Line2D([], [], color=GREY, ls=STYLES[implementation], lw=2.2, label=implementation))
    axes.legend(handles=handles, loc="upper left")


def _line(name: str) -> dict[str, Any]:
    """SDPA is a broad band under the others, so that they show where they meet it."""
    if name == "sdpa":
        return {"color": COLOURS[name], "lw": 8, "alpha": 0.3, "solid_capstyle": "butt"}
    return {"color": COLOURS[name], "lw": 2.2, "marker": "o"}


def _models(results: dict[str, Any], axes: Axes) -> None:
    settings, rows = results["settings"], results["models"]
    names = list(dict.fromkeys(row["name"] for row in rows))
    comparable = settings["model_batch"] == 32 and settings["image_size"] == 32
    heights = [(row["peak_bytes"] or 0) / 1e9 for row in rows]
    top = max([*heights, *(row["table1_gb"] for row in rows if comparable), 1e-9])
    for row, height in zip(rows, heights, strict=True):
        fused = row["implementation"] == "fused"
        x = names.index(row["name"]) + (0.2 if fused else -0.2)
        colour = MODEL_COLOURS[row["name"].partition("-")[0]]
        if comparable and not fused:
            axes.plot([x - 0.2, x + 0.6], [row["table1_gb"]] * 2, color="black", lw=2.5)
            axes.text(x + 0.6, row["table1_gb"] + 0.012 * top, f"{row['table1_gb']}", ha="right", va="bottom")
        if row["peak_bytes"] is None:
            words = "no fused kernel here" if row["status"] == "= reference" else row["status"]
            axes.text(x, 0.02 * top, words, rotation=90, ha="center", va="bottom", color=GREY)
            continue
        look = {"color": colour} if fused else {"facecolor": "none", "edgecolor": colour, "hatch": "//", "ls": "--"}
        axes.bar(x, height, 0.36, lw=1.5, **look)
        axes.text(x, height + 0.012 * top, f"{height:.2f}", ha="center", va="bottom")
    axes.set_xticks(range(len(names)), [name.upper() for name in names])
    axes.set_ylim(0, 1.4 * top)
    axes.set_ylabel("GB")
    size = settings["image_size"]
    axes.set_title(f"Training step with AdamW\nbatch {settings['model_batch']}, 3×{size}×{size}")
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    handles = [Patch(facecolor="none", edgecolor=GREY, hatch="//", ls="--", label="reference")]
    if any(row["implementation"] == "fused" and row["peak_bytes"] for row in rows):
        handles.append(Patch(color=GREY, label="fused"))
    if comparable:
        handles.append(Line2D([], [], color="black", lw=2.5, label="paper, Table 1 (float32)"))
    axes.legend(handles=handles, loc="upper right")
