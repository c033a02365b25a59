"""The report of ``cxv eval --report``: confusion matrix, accuracy by class and worst mistakes, in one file."""

import base64
import html
import io
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checkpoint import atomic_write
from ..data.datasets import need
from ..data.loader import ImageSet
from ..errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".html", ".png")
_MISTAKES = 40  # shown, at most
_NAMED = 30  # classes whose names fit beside a picture


@dataclass
class Report:
    """The predictions of a model on a split.

    Args:
        title: one line.
        classes: names in label order.
        data: the split, N images.
        logits: (N, classes) float32, on the CPU.
    """

    title: str
    classes: list[str]
    data: ImageSet
    logits: Tensor

    def __post_init__(self) -> None:
        labels, n = self.data.labels, len(self.classes)
        self.predicted = self.logits.argmax(1)
        self.probabilities = self.logits.softmax(1)
        self.confusion = torch.bincount(labels * n + self.predicted, minlength=n * n).view(n, n)
        """(true, predicted) counts."""
        self.accuracy = 100 * self.confusion.diag() / self.confusion.sum(1)
        """Per cent of the images of each class that are predicted as it; nan for a class without images."""
        self.precision = 100 * self.confusion.diag() / self.confusion.sum(0)
        """Per cent of the images predicted as each class that belong to it; nan if there are none."""
        wrong = (self.predicted != labels).nonzero().flatten()
        of_truth = self.logits.log_softmax(1)[wrong, labels[wrong]]
        self.mistakes = wrong[of_truth.argsort(stable=True)]
        """Indices of the images that are not recognized, the largest cross-entropy first."""

    def write(self, path: str | Path) -> None:
        """Write one self-contained file, HTML or PNG by its suffix.

        Raises:
            InputError: another suffix, or the file cannot be written.
        """
        path = Path(path)
        check_suffix(path)
        atomic_write(path, self._html().encode() if path.suffix == ".html" else _png(self._figure()))

    def _html(self) -> str:
        figure = _new_figure(0.22 * min(len(self.classes), 40) + 3.5, 0.22 * min(len(self.classes), 40) + 3)
        self._draw_confusion(figure, figure.subplots())
        rows = []
        for i in sorted(range(len(self.classes)), key=lambda i: _nan_last(self.accuracy[i].item())):
            others = self.confusion[i].clone()
            others[i] = 0
            j = int(others.argmax())
            often = f"{html.escape(self.classes[j])} ({others[j]})" if others[j] else ""
            cells = (f"{self.confusion[i].sum()}", _percent(self.accuracy[i]), _percent(self.precision[i]))
            numbers = "".join(f"<td class=n>{cell}</td>" for cell in cells)
            rows.append(f"<tr><td>{html.escape(self.classes[i])}</td>{numbers}<td>{often}</td></tr>")
        pictures = []
        for i in self.mistakes[:_MISTAKES].tolist():
            lines = self._caption(i)
            pictures.append(
                f'<figure><img alt="image {i}" src="{_data_url(_image_png(self._image(i)))}">'
                f"<figcaption>{'<br>'.join(map(html.escape, lines))}</figcaption></figure>"
            )
        return _PAGE.substitute(
            title=html.escape(self.title),
            confusion=_data_url(_png(figure)),
            rows="\n".join(rows),
            shown=self._shown(),
            pictures="\n".join(pictures),
        )

    def _figure(self) -> "Figure":
        columns = 8
        mistakes = self.mistakes[:_MISTAKES].tolist()
        lines = max(1, -(-len(mistakes) // columns))
        figure = _new_figure(13, 7 + 1.75 * lines)
        figure.suptitle(self.title)
        top, bottom = figure.subfigures(2, 1, height_ratios=[6.5, 1.75 * lines + 0.5])
        left, right = top.subplots(1, 2, width_ratios=[3, 2])
        self._draw_confusion(top, left)
        self._draw_accuracy(right)
        bottom.suptitle(self._shown(), fontsize=10)
        for axes in bottom.subplots(lines, columns, squeeze=False).flat:
            axes.set_axis_off()
        for axes, i in zip(bottom.axes, mistakes, strict=False):
            image = self._image(i).permute(1, 2, 0).numpy()
            axes.imshow(image if image.shape[-1] == 3 else image[..., 0], cmap="gray", vmin=0, vmax=255)
            axes.set_title("\n".join(self._caption(i)), fontsize=7)
        return figure

    def _draw_confusion(self, figure, axes) -> None:
        share = self.confusion / self.confusion.sum(1, keepdim=True).clamp(min=1)
        picture = axes.imshow(100 * share.numpy(), cmap="Blues", vmin=0, vmax=100)
        axes.set(xlabel="predicted", ylabel="true")
        figure.colorbar(picture, ax=axes, label="% of the true class", shrink=0.8)
        n = len(self.classes)
        if n > _NAMED:
            return
        axes.set_xticks(range(n), self.classes, rotation=90)
        axes.set_yticks(range(n), self.classes)
        for true, predicted in self.confusion.nonzero().tolist():
            color = "white" if share[true, predicted] > 0.5 else "black"
            count = int(self.confusion[true, predicted])
            axes.text(predicted, true, count, ha="center", va="center", fontsize=7, color=color)

    def _draw_accuracy(self, axes) -> None:
        worst = sorted(range(len(self.classes)), key=lambda i: _nan_last(self.accuracy[i].item()))[:_NAMED]
        bars = axes.barh([self.classes[i] for i in worst], self.accuracy[worst].nan_to_num().tolist(), color="#1f6fb4")
        axes.bar_label(bars, [_percent(self.accuracy[i]) for i in worst], fontsize=7, padding=2)
        axes.invert_yaxis()
        which = "the lowest accuracies" if len(worst) < len(self.classes) else "accuracy"
        axes.set(xlim=(0, 112), xlabel=f"{which} by class (%)")
        axes.spines[["top", "right"]].set_visible(False)

    def _image(self, i: int) -> Tensor:
        return self.data.take(torch.tensor([i]), torch.device("cpu"))[0][0]

    def _caption(self, i: int) -> tuple[str, str]:
        true, predicted = int(self.data.labels[i]), int(self.predicted[i])
        p = 100 * self.probabilities[i]
        return f"{self.classes[true]} ({p[true]:.1f} %)", f"taken for {self.classes[predicted]} ({p[predicted]:.0f} %)"

    def _shown(self) -> str:
        if not len(self.mistakes):
            return "No mistakes"
        return f"The {min(_MISTAKES, len(self.mistakes))} worst of {len(self.mistakes):,} mistakes, by cross-entropy"


def check_suffix(path: str | Path) -> None:
    """See that a report can be of this name.

    Raises:
        InputError: it ends on something else than .html or .png.
    """
    if Path(path).suffix not in SUFFIXES:
        raise InputError(f"`report`: expected a file name that ends on {' or '.join(SUFFIXES)}, got {str(path)!r}")


def _nan_last(value: float) -> float:
    return value if value == value else 101.0


def _percent(value: Tensor) -> str:
    return "" if value.isnan() else f"{value:.1f}"


def _new_figure(width: float, height: float) -> "Figure":
    figure = need("matplotlib.figure").Figure(figsize=(width, height), dpi=110, layout="constrained")
    need("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)  # not pyplot, which is the user's
    return figure


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _image_png(image: Tensor) -> bytes:
    buffer = io.BytesIO()
    pixels = image.permute(1, 2, 0).numpy()
    need("PIL.Image").fromarray(pixels if len(image) == 3 else pixels[..., 0]).save(buffer, format="png")
    return buffer.getvalue()


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


_PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>$title</title>
<style>
body { font: 15px/1.4 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.4rem }
h2 { font-size: 1.1rem; margin-top: 2rem }
img.wide { max-width: 100% }
table { border-collapse: collapse }
th, td { padding: .15rem .8rem; border-bottom: 1px solid #ddd; text-align: left }
.n { text-align: right; font-variant-numeric: tabular-nums }
.mistakes { display: flex; flex-wrap: wrap; gap: 1rem }
figure { margin: 0; width: 8rem }
figure img { width: 8rem; height: 8rem; image-rendering: pixelated; object-fit: contain; background: #eee }
figcaption { font-size: .75rem; overflow-wrap: anywhere }
</style>
<h1>$title</h1>
<h2>Confusion matrix</h2>
<img class="wide" alt="confusion matrix" src="$confusion">
<h2>Classes, the least accurate first</h2>
<table>
<tr><th>class<th class=n>images<th class=n>accuracy, %<th class=n>precision, %<th>most often taken for</tr>
$rows
</table>
<h2>$shown</h2>
<div class="mistakes">
$pictures
</div>
</html>
""")
