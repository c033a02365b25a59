"""The report of ``cxv eval``."""

import base64
import io
import re

import numpy
import pytest
import torch
from PIL import Image

from cxv.cli.report import Report, check_suffix
from cxv.data.loader import ImageSet
from cxv.errors import InputError


def report(labels, predicted, classes, channels=3):
    """One whose image i is predicted with a confidence that falls with i."""
    labels, predicted = torch.tensor(labels), torch.tensor(predicted)
    images = torch.randint(0, 256, (len(labels), channels, 5, 5), dtype=torch.uint8)
    logits = torch.zeros(len(labels), len(classes))
    logits[torch.arange(len(labels)), predicted] = 10 - torch.arange(len(labels)) / len(labels)
    return Report("a title & more", classes, ImageSet(images, labels), logits)


def test_figures_of_a_report():
    found = report([0, 0, 0, 1, 1, 2], [0, 1, 0, 1, 0, 0], ["cat", "dog", "<b>", "never"])
    assert found.confusion.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert found.accuracy[:3].tolist() == pytest.approx([200 / 3, 50, 0])
    assert found.precision[:2].tolist() == [50, 50]
    assert found.accuracy[3].isnan()
    assert found.precision[2].isnan()
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
    confusion, *pictures = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    assert decoded(confusion).size[0] > 200
    for i, picture in zip([1, 4, 5], pictures, strict=True):
        pixels = numpy.asarray(decoded(picture)).reshape(5, 5, channels)
        assert torch.equal(torch.tensor(pixels).permute(2, 0, 1), found.data.images[i])
    rows = re.findall(r"<tr><td>(.*?)</td>", page)
    assert rows == ["&lt;b&gt;", "dog", "cat", "never"]  # the least accurate first
    assert "taken for dog (100 %)" in page


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
        check_suffix("a.pdf")
    with pytest.raises(InputError, match=r"cannot write .*nowhere"):
        report([0, 1], [0, 0], ["a", "b"]).write(tmp_path / "nowhere" / "a.html")
