"""The report of ``cxv eval``."""

import base64
import io
import re

import numpy
import pytest
import torch
from PIL import Image

from cxv.cli.report import Report, check_report
from cxv.cli.scores import Scores
from cxv.data.loader import ImageSet
from cxv.errors import InputError

ROW = {"phase": "adamw", "lr": 1e-3, "train_loss": 1.0, "train_top1": 50.0, "test_loss": 1.0, "test_top1": 50.0}
HISTORY = [ROW | {"epoch": epoch} for epoch in (1, 2)]


def report(labels, predicted, classes, channels=3):
    """One whose image i is predicted with a confidence that falls with i."""
    labels, predicted = torch.tensor(labels), torch.tensor(predicted)
    images = torch.randint(0, 256, (len(labels), channels, 5, 5), dtype=torch.uint8)
    logits = torch.zeros(len(labels), len(classes))
    logits[torch.arange(len(labels)), predicted] = 10 - torch.arange(len(labels)) / len(labels)
    files = [f"dir/{i}.png" for i in range(len(labels))]
    return Report("a title & more", classes, ImageSet(images, labels), logits, files, HISTORY)


def test_figures_of_a_report():
    found = report([0, 0, 0, 1, 1, 2], [0, 1, 0, 1, 0, 0], ["cat", "dog", "<b>", "never"])
    scores = found.scores
    assert scores.confusion.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert scores.accuracy[:3].tolist() == pytest.approx([200 / 3, 50, 0])
    assert scores.precision[:2].tolist() == [50, 50]
    assert scores.accuracy[3].isnan()
    assert scores.precision[2].isnan()
    assert found.mistakes.tolist() == [1, 4, 5]  # the most confident first


def decoded(picture):
    return Image.open(io.BytesIO(base64.b64decode(picture)))


@pytest.mark.parametrize("channels", [1, 3])
def test_html_is_one_file_with_every_mistake(tmp_path, channels):
    found = report([0, 0, 0, 1, 1, 2], [0, 1, 0, 1, 0, 0], ["cat", "dog", "<b>", "never"], channels)
    found.write(tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert "<h1>a title &amp; more</h1>" in page
    assert "The 3 worst of 3 mistakes" in page
    assert "<b>" not in page  # a class is not markup
    assert not re.search(r"(src|href)=\"(?!data:)", page)  # nothing from elsewhere
    curves, *pictures = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    assert decoded(curves).size[0] > 800
    for i, picture in zip([1, 4, 5], pictures, strict=True):
        pixels = numpy.asarray(decoded(picture)).reshape(5, 5, channels)
        assert torch.equal(torch.tensor(pixels).permute(2, 0, 1), found.data.images[i])
    rows = re.findall(r"<tr><td>(.*?)</td>", page)
    assert rows == ["&lt;b&gt;", "dog", "cat", "never"]  # the least accurate first
    assert "taken for dog (100 %)" in page
    assert "dir/1.png<br>cat (0.0 %)<br>taken for dog" in page
    table = page.partition("true \\ predicted")[2].partition("</table>")[0]
    matrix = [re.sub("<[^>]*>", " ", row).split() for row in table.split("<tr>")[1:]]
    assert matrix == [["cat", "2", "1"], ["dog", "1", "1"], ["&lt;b&gt;", "1"], ["never"]]


@pytest.mark.parametrize(("classes", "wrong"), [(3, 0), (40, 20)])
def test_png_at_any_number_of_classes_and_mistakes(tmp_path, classes, wrong):
    labels = [i % classes for i in range(60)]
    predicted = [(label + (i < wrong)) % classes for i, label in enumerate(labels)]
    report(labels, predicted, [f"class {i}" for i in range(classes)]).write(tmp_path / "a.png")
    picture = Image.open(tmp_path / "a.png").convert("L")
    assert min(picture.size) > 500
    assert len(picture.getcolors()) > 2


def test_a_report_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(InputError, match=r"`report`: expected .* \.html or \.png, got 'a\.pdf'"):
        check_report("a.pdf")
    with pytest.raises(InputError, match=r"cannot write .*nowhere"):
        report([0, 1], [0, 0], ["a", "b"]).write(tmp_path / "nowhere" / "a.html")


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_scores_are_those_of_scikit_learn():
    """Also where a class has no image, or is never predicted."""
    metrics = pytest.importorskip("sklearn.metrics")
    logits = torch.randn(200, 12)
    labels = torch.randint(0, 10, (200,))
    logits[:, 11] = -100
    logits[labels == 3] = 0.0
    logits[torch.arange(200), labels] += 1
    scores, predicted = Scores(logits, labels), logits.argmax(1)
    assert scores.top1 == pytest.approx(100 * metrics.accuracy_score(labels, predicted))
    top5 = metrics.top_k_accuracy_score(labels, logits, k=5, labels=range(12))
    assert scores.top5 == pytest.approx(100 * top5)
    assert scores.f1 == pytest.approx(100 * metrics.f1_score(labels, predicted, average="macro"))
    assert scores.balanced == pytest.approx(100 * metrics.balanced_accuracy_score(labels, predicted))


def test_two_hundred_classes_are_shown_by_their_confused_pairs(tmp_path):
    labels = [i % 200 for i in range(400)] + [7] * 5
    predicted = labels[:400] + [150] * 5
    found = report(labels, predicted, [f"class {i}" for i in range(200)])
    found.write(tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    pairs = re.findall(r"<tr><td>(.*?)</td>.*?<td>(.*?)</td></tr>", page.partition("Most confused pairs")[2])
    assert pairs[0] == ("class 7", "class 150")
    _, matrix, *_ = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    assert decoded(matrix).size == (200, 200)
    red, green, blue = decoded(matrix).getpixel((150, 7))
    assert (red, green, blue) != (255, 255, 255)
    assert decoded(matrix).getpixel((151, 7)) == (255, 255, 255)


@pytest.mark.parametrize("suffix", [".html", ".png"])
def test_every_name_can_be_shown(tmp_path, suffix, recwarn):
    """In a file that is UTF-8, and in a plot neither as a formula nor with boxes for missing glyphs."""
    names = [r"$\bad{", "$x$", "猫", "a\nb", "e\u0301", "\udcff", "<script>"]
    found = report([0, 1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 0], names)
    found.files[2] = "dir/\udcff 猫.png"
    found.title = "$x_{$ \udcff"
    found.write(tmp_path / f"a{suffix}")
    assert not recwarn.list
    if suffix == ".html":
        page = (tmp_path / "a.html").read_text(encoding="utf-8")
        assert all(name in page for name in ("$x$", "猫", r"a\nb", "e\u0301", r"\udcff", "dir/\\udcff 猫.png"))
        assert "<script>" not in page
