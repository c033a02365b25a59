"""The report of ``cxv eval --report``: curves, confusion matrix, accuracy by class and worst mistakes, in one file."""

import base64
import html
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from ..checkpoint import atomic_write
from ..data.loader import ImageSet
from ..errors import InputError, printable
from ..training.logging import figure_png, new_figure, plot_curves, plot_text
from .scores import Scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".html", ".png")
_MISTAKES = 40  # shown, at most
_NAMED = 30  # classes whose names fit beside the confusion matrix
_PAIRS = 40  # most confused pairs shown, where the names do not fit


@dataclass
class Report:
    """The predictions of a model on a split.

    Args:
        title: One line.
        classes: Names in label order.
        data: The split, N images.
        logits: Shape (N, classes), float32, on the CPU.
        files: The file of each image, or another name.
        history: Lines of ``metrics.jsonl`` of the run, for its curves.
    """

    title: str
    classes: list[str]
    data: ImageSet
    logits: Tensor
    files: Sequence[str]
    history: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        labels = self.data.labels
        self.classes = [printable(name) for name in self.classes]
        self.scores = Scores(self.logits, labels)
        wrong = (self.scores.predicted != labels).nonzero().flatten()
        of_truth = self.logits.log_softmax(1)[wrong, labels[wrong]]
        self.mistakes = wrong[of_truth.argsort(stable=True)]
        """Indices of the images that are not recognized, the largest cross-entropy first."""
        self.worst_first = self.scores.accuracy.nan_to_num(101).argsort(stable=True).tolist()
        self.share = self.scores.confusion / self.scores.confusion.sum(1, keepdim=True).clamp(min=1)
        """The confusion matrix, each row divided by its sum."""

    def write(self, path: str | Path) -> None:
        """Write one self-contained file, HTML or PNG by its suffix, or raise ``InputError``."""
        path = Path(path)
        check_report(path)
        atomic_write(path, self._html().encode() if path.suffix == ".html" else figure_png(self._figure()))

    def _html(self) -> str:
        pictures = []
        for i in self.mistakes[:_MISTAKES].tolist():
            lines = [html.escape(line) for line in self._caption(i)]
            image = f'<img alt="{lines[0]}" src="{_image_url(self._image(i))}">'
            pictures.append(f"<figure>{image}<figcaption>{'<br>'.join(lines)}</figcaption></figure>")
        curves = ""
        if self.history:
            png = _data_url(plot_curves(self.history))
            curves = f'<h2>Training</h2>\n<img class="wide" alt="curves" src="{png}">'
        return _PAGE.substitute(
            title=html.escape(printable(self.title)),
            curves=curves,
            confusion=self._confusion_table() if len(self.classes) <= _NAMED else self._confused_pairs(),
            rows=_rows(map(self._class_cells, self.worst_first)),
            shown=self._shown(),
            pictures="\n".join(pictures),
        )

    def _class_cells(self, i: int) -> list[str]:
        scores, others = self.scores, self.scores.confusion[i].clone()
        count, others[i] = others.sum(), 0
        j = int(others.argmax())
        often = f"{self.classes[j]} ({others[j]})" if others[j] else ""
        return [self.classes[i], f"{count}", _percent(scores.accuracy[i]), _percent(scores.precision[i]), often]

    def _confusion_table(self) -> str:
        names = [html.escape(_shortened(name)) for name in self.classes]
        lines = ["<tr><th>true \\ predicted" + "".join(f"<th class=up><span>{name}</span>" for name in names)]
        for i, name in enumerate(names):
            cells = (
                f'<td style="background:rgb(8 81 156/{p:.2f});color:{"#fff" if p > 0.5 else "#222"}">{count or ""}'
                for p, count in zip(self.share[i].tolist(), self.scores.confusion[i].tolist(), strict=True)
            )
            lines.append(f"<tr><th>{name}{''.join(cells)}")
        return f'<table class="confusion">\n{"</tr>".join(lines)}</tr>\n</table>'

    def _confused_pairs(self) -> str:
        """The matrix as a picture, and the pairs with the most confusions by name."""
        pixels = torch.stack([255 - (255 - c) * self.share.sqrt() for c in (8, 81, 156)]).round().to(torch.uint8)
        rank = (self.scores.confusion + self.share / 2).fill_diagonal_(0)  # by count, then by share
        pairs = []
        for pair in rank.flatten().argsort(descending=True, stable=True)[:_PAIRS].tolist():
            true, predicted = divmod(pair, len(self.classes))
            if count := int(self.scores.confusion[true, predicted]) * (true != predicted):
                percent = f"{100 * self.share[true, predicted]:.1f}"
                pairs.append([self.classes[true], f"{count}", percent, "", self.classes[predicted]])
        return (
            "<p>Rows: true classes, columns: predicted classes, in the order of the labels; dark: a large share of the "
            f'true class.</p>\n<img class="matrix" alt="confusion matrix" src="{_image_url(pixels)}">\n'
            "<h2>Most confused pairs</h2>\n<table>\n<tr><th>true class<th class=n>images<th class=n>% of the class<th>"
            f"<th>taken for</tr>\n{_rows(pairs)}\n</table>"
        )

    def _figure(self) -> "Figure":
        columns = 8
        mistakes = self.mistakes[:_MISTAKES].tolist()
        lines = max(1, -(-len(mistakes) // columns))
        figure = new_figure(13, 7 + 1.9 * lines)
        figure.suptitle(plot_text(self.title))
        top, bottom = figure.subfigures(2, 1, height_ratios=[6.5, 1.9 * lines + 0.5])
        left, right = top.subplots(1, 2, width_ratios=[3, 2])
        self._draw_confusion(top, left)
        self._draw_accuracy(right)
        bottom.suptitle(self._shown(), fontsize=10)
        for axes in bottom.subplots(lines, columns, squeeze=False).flat:
            axes.set_axis_off()
        for axes, i in zip(bottom.axes, mistakes, strict=False):
            image = self._image(i).permute(1, 2, 0).numpy()
            axes.imshow(image if image.shape[-1] == 3 else image[..., 0], cmap="gray", vmin=0, vmax=255)
            axes.set_title("\n".join(map(plot_text, self._caption(i, _shortened))), fontsize=7)
        return figure

    def _draw_confusion(self, figure, axes) -> None:
        names = [plot_text(_shortened(name)) for name in self.classes]
        picture = axes.imshow(100 * self.share.numpy(), cmap="Blues", vmin=0, vmax=100)
        axes.set(xlabel="predicted", ylabel="true")
        figure.colorbar(picture, ax=axes, label="% of the true class", shrink=0.8)
        n = len(names)
        if n > _NAMED:
            return
        axes.set_xticks(range(n), names, rotation=90)
        axes.set_yticks(range(n), names)
        for true, predicted in self.scores.confusion.nonzero().tolist():
            color = "white" if self.share[true, predicted] > 0.5 else "black"
            count = int(self.scores.confusion[true, predicted])
            axes.text(predicted, true, count, ha="center", va="center", fontsize=7, color=color)

    def _draw_accuracy(self, axes) -> None:
        worst, accuracy = self.worst_first[:_NAMED], self.scores.accuracy
        bars = axes.barh(range(len(worst)), accuracy[worst].nan_to_num().tolist(), color="#1f6fb4")
        axes.set_yticks(range(len(worst)), [plot_text(_shortened(self.classes[i])) for i in worst])
        axes.bar_label(bars, [_percent(accuracy[i]) for i in worst], fontsize=7, padding=2)
        axes.invert_yaxis()
        which = "the lowest accuracies" if len(worst) < len(self.classes) else "accuracy"
        axes.set(xlim=(0, 112), xlabel=f"{which} by class (%)")
        axes.spines[["top", "right"]].set_visible(False)

    def _image(self, i: int) -> Tensor:
        return self.data.take(torch.tensor([i]), torch.device("cpu"))[0][0]

    def _caption(self, i: int, shorten: Callable[[str], str] = str) -> tuple[str, str, str]:
        true, predicted = int(self.data.labels[i]), int(self.scores.predicted[i])
        p = 100 * self.scores.probabilities[i]
        return (
            shorten(printable(self.files[i])),
            f"{shorten(self.classes[true])} ({p[true]:.1f} %)",
            f"taken for {shorten(self.classes[predicted])} ({p[predicted]:.0f} %)",
        )

    def _shown(self) -> str:
        if not len(self.mistakes):
            return "No mistakes"
        return f"The {min(_MISTAKES, len(self.mistakes))} worst of {len(self.mistakes):,} mistakes, by cross-entropy"


def check_report(path: str | Path) -> None:
    """Raise ``InputError`` unless a report can have this name, which ends on .html or .png."""
    if Path(path).suffix not in SUFFIXES:
        raise InputError(f"`report`: expected a file name that ends on {' or '.join(SUFFIXES)}, got {str(path)!r}")


def _percent(value: Tensor) -> str:
    return "" if value.isnan() else f"{value:.1f}"


def _shortened(text: str, length: int = 24) -> str:
    """The text without its middle if it is longer: names differ at the start, and files at the end."""
    return text if len(text) <= length else f"{text[: length // 2 - 1]}…{text[-length // 2 :]}"


def _rows(rows: Iterable[Sequence[str]]) -> str:
    """Lines of a table: a name, three numbers, a name."""
    start = ("<td>", *["<td class=n>"] * 3, "<td>")
    lines = ("".join(s + html.escape(cell) + "</td>" for s, cell in zip(start, row, strict=True)) for row in rows)
    return "\n".join(f"<tr>{line}</tr>" for line in lines)


def _image_url(image: Tensor) -> str:
    buffer = io.BytesIO()
    pixels = image.permute(1, 2, 0).numpy()
    Image.fromarray(pixels if len(image) == 3 else pixels[..., 0]).save(buffer, format="png")
    return _data_url(buffer.getvalue())


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
img.matrix { width: 40rem; max-width: 100%; image-rendering: pixelated; border: 1px solid #ddd }
table { border-collapse: collapse }
th, td { padding: .15rem .8rem; border-bottom: 1px solid #ddd; text-align: left }
th { white-space: nowrap }
td { overflow-wrap: anywhere }
.n { text-align: right; font-variant-numeric: tabular-nums }
.scroll { max-height: 40rem; overflow: auto }
.confusion { font-size: .8rem }
.confusion td { text-align: center; padding: .15rem .2rem; min-width: 1.4rem; border: 1px solid #eee }
.confusion th { font-weight: normal; text-align: right; padding: .15rem .4rem }
.up { vertical-align: bottom }
.up span { writing-mode: vertical-rl; transform: rotate(180deg) }
.mistakes { display: flex; flex-wrap: wrap; gap: 1rem }
figure { margin: 0; width: 8rem }
figure img { width: 8rem; height: 8rem; image-rendering: pixelated; object-fit: contain; background: #eee }
figcaption { font-size: .75rem; overflow-wrap: anywhere }
</style>
<h1>$title</h1>
$curves
<h2>Confusion matrix</h2>
$confusion
<h2>Classes, the least accurate first</h2>
<div class="scroll">
<table>
<tr><th>class<th class=n>images<th class=n>accuracy, %<th class=n>precision, %<th>most often taken for</tr>
$rows
</table>
</div>
<h2>$shown</h2>
<div class="mistakes">
$pictures
</div>
</html>
""")
