"""Draw a layer of CXV, docs/_static/layer.png, with the tensors that it saves for the backward pass.

python docs/layer_picture.py
"""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

SAVED, COMPUTED, FRAME, TEXT = "#d1495b", "#1b7f9e", "#444444", "#222222"
HEIGHT = 1.0


def box(axes: Axes, x: float, width: float, text: str, color: str) -> None:
    """A rounded box whose left side is at x, around y = 0."""
    shape = FancyBboxPatch((x, -HEIGHT / 2), width, HEIGHT, boxstyle="round,pad=0,rounding_size=0.12", lw=1.8)
    shape.set(facecolor=color + "1a", edgecolor=color)
    axes.add_patch(shape)
    axes.text(x + width / 2, 0, text, ha="center", va="center", color=TEXT)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0) -> None:
    """An arrow; with bend, an arc around the box between its ends."""
    style = f"arc3,rad={bend}"
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, lw=1.6, color=FRAME,
                                   connectionstyle=style, shrinkA=0, shrinkB=0))  # fmt: skip


def draw(path: Path) -> None:
    """Write the picture to path."""
    with rc_context({"font.size": 12}):
        figure = Figure(figsize=(11.5, 2.9), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        axes.set(xlim=(-1.0, 15.2), ylim=(-1.9, 1.6), aspect="equal")
        axes.axis("off")
        blocks = [
            (0.6, 2.5, "3×3\nconvolution"),
            (3.7, 2.2, "LayerNorm\nover C"),
            (7.1, 2.5, "linear\nattention"),
            (11.3, 1.9, "MLP"),
        ]
        for x, width, text in blocks:
            box(axes, x, width, text, COMPUTED)
        sums = (10.2, 13.8)
        for x in sums:
            frame = {"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": FRAME, "lw": 1.6}
            axes.text(x, 0, "+", ha="center", va="center", fontsize=17, color=TEXT, bbox=frame)
        lines = [(-0.7, 0.6), (3.1, 3.7), (5.9, 7.1), (9.6, 9.9), (10.5, 11.3), (13.2, 13.5), (14.1, 15.0)]
        for start, end in lines:
            arrow(axes, (start, 0), (end, 0))
        arrow(axes, (6.5, 0), (sums[0], 0.33), bend=-0.6)
        arrow(axes, (10.85, 0), (sums[1], 0.33), bend=-0.7)
        axes.text(-0.9, 0.28, "(B, C, H, W)", ha="left", va="bottom", fontsize=10, color=TEXT)
        saved = [(-0.15, "input of the\nconvolution"), (6.5, "output of\nthe norm"), (10.9, "input of\nthe MLP")]
        for x, text in saved:
            axes.plot([x], [0], "o", ms=10, color=SAVED, zorder=5)
            axes.plot([x, x], [-0.15, -1.0], ":", color=SAVED, lw=1.6)
            axes.text(x, -1.08, text, ha="center", va="top", color=SAVED)
        axes.text(1.6, -1.35, "● saved for the backward pass", ha="left", va="center", color=SAVED)
        figure.savefig(path)


if __name__ == "__main__":
    draw(Path(__file__).parent / "_static" / "layer.png")
