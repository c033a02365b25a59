"""``cxv predict`` and ``cxv eval`` on image files."""

import csv
import io
import json
import os
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from cli_support import TINY, assert_error, call
from PIL import Image, ImageOps

import cxv
from cxv.data import decode_image, normalize

CLASSES = ["$5", "猫", "b\nad", "four", "five", "six", "seven"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    model = cxv.create_model("cltv-1/2", embed_dim=16, num_classes=7, img_size=8)
    cxv.save_safetensors(model, path, classes=CLASSES, img_size=8)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for i, name in enumerate(("a.png", "b[1].jpg", "sub/c.webp", ".hidden/d.png", "sub/e.png")):
        path = root / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 12), (50 * i, 255 - 50 * i, 90)).save(path)
    (root / "notes.txt").write_text("no image")
    (root / "empty").mkdir()
    return root


def predicted(capsys, checkpoint, *args, code=0):
    """The entries that --format json prints, and the lines of stderr."""
    got, out, err = call(capsys, "predict", "--checkpoint", checkpoint, "--format", "json", *args)
    assert got == code, err
    return json.loads(out), err.splitlines()


def test_folders_patterns_and_files(capsys, checkpoint, photos):
    names = ["a.png", "b[1].jpg", "sub/c.webp", "sub/e.png"]
    entries, err = predicted(capsys, checkpoint, photos)
    assert [entry["file"] for entry in entries] == [str(photos / name) for name in names]
    assert err == [f"cxv: {photos}: passed over 1 files that are no images"]
    entries, _ = predicted(capsys, checkpoint, photos / "*.png", photos / "**" / "*.webp", photos / "b[1].jpg")
    assert [entry["file"] for entry in entries] == [str(photos / names[i]) for i in (0, 2, 1)]


def test_probabilities_are_those_of_the_model(capsys, checkpoint, photos):
    (entry,), _ = predicted(capsys, checkpoint, photos / "a.png", "--top-k", 100)
    model = cxv.create_model("cltv-1/2", checkpoint=checkpoint).eval()
    with torch.no_grad():
        expected = model(normalize(decode_image(photos / "a.png", 3, 8))[None])[0].softmax(0)
    values = {pair["class"]: pair["probability"] for pair in entry["predictions"]}
    assert values == pytest.approx(dict(zip(CLASSES, expected.tolist(), strict=True)), abs=1e-6)
    assert list(values.values()) == sorted(values.values(), reverse=True)


def test_formats(capsys, checkpoint, photos):
    (entry,), _ = predicted(capsys, checkpoint, photos / "a.png", "--top-k", 2)
    pairs = [(pair["class"], pair["probability"]) for pair in entry["predictions"]]
    assert len(pairs) == 2
    _, out, _ = call(capsys, "predict", "--checkpoint", checkpoint, photos / "a.png", "--top-k", 2, "--format", "csv")
    header, *rows = csv.reader(io.StringIO(out))
    assert header == ["file", "rank", "class", "probability"]
    assert [(row[:3], float(row[3])) for row in rows] == [
        ([str(photos / "a.png"), str(rank), name], pytest.approx(p, abs=1e-6))
        for rank, (name, p) in enumerate(pairs, 1)
    ]
    _, out, _ = call(capsys, "predict", "--checkpoint", checkpoint, photos / "a.png")
    name, *lines = out.splitlines()  # the class with a line end, too
    assert (name, len(lines)) == (str(photos / "a.png"), 5)
    assert lines[0] == f"  {100 * pairs[0][1]:6.2f} %  {pairs[0][0]}".replace("\n", "\\n")
    assert_error(call(capsys, "predict", "--checkpoint", checkpoint, "--top-k", 0, "a"), "--top-k", "at least 1", "'0'")


def test_bad_files_are_reported_and_the_rest_is_predicted(capsys, checkpoint, photos, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes((photos / "a.png").read_bytes()[:40])
    missing, pattern, empty = tmp_path / "missing.png", tmp_path / "*.gif", photos / "empty"
    bad = [str(path) for path in (broken, missing, pattern, empty)]
    entries, err = predicted(capsys, checkpoint, *bad, photos / "a.png", code=1)
    assert [entry["file"] for entry in entries] == [str(photos / "a.png"), *bad]
    assert [set(entry) for entry in entries] == [{"file", "predictions"}] + [{"file", "error"}] * 4
    assert all(line.startswith(f"cxv: error: {file}: ") for line, file in zip(err, bad, strict=True))
    code, out, _ = call(capsys, "predict", "--checkpoint", checkpoint, broken, photos / "a.png")
    assert code == 1
    assert len(out.splitlines()) == 6


def test_files_of_several_pages_are_reported_once(capsys, checkpoint, photos, tmp_path):
    still, moving = Image.open(photos / "a.png").convert("RGB"), tmp_path / "moving.gif"
    still.save(moving, save_all=True, append_images=[ImageOps.invert(still)])
    _, err = predicted(capsys, checkpoint, moving, photos / "a.png", moving)
    names = f"{moving}, {moving}"
    assert err == [f"cxv: the first page or frame is read of 2 files that have several ({names})"]


def test_standard_input_and_urls(capsys, checkpoint, photos, monkeypatch):
    (expected,), _ = predicted(capsys, checkpoint, photos / "a.png")
    content = (photos / "a.png").read_bytes()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    entries, _ = predicted(capsys, checkpoint, "-")
    assert entries == [expected | {"file": "-"}]
    entries, err = predicted(capsys, checkpoint, "-", code=1)  # nothing is left of it
    assert "standard input: cannot read the image" in err[0]

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=photos)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        entries, err = predicted(capsys, checkpoint, f"{url}/a.png", f"{url}/none.png", f"{url}/notes.txt", code=1)
        server.shutdown()
    assert entries[0] == expected | {"file": f"{url}/a.png"}
    assert err[0].startswith(f"cxv: error: {url}/none.png: cannot be downloaded (HTTP Error 404")
    assert err[1].startswith(f"cxv: error: {url}/notes.txt: cannot read the image")


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes")
def test_a_file_name_that_is_not_utf8(capsys, checkpoint, photos, tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff.png"
    with open(name, "wb") as file:
        file.write((photos / "a.png").read_bytes())
    entries, _ = predicted(capsys, checkpoint, tmp_path)
    assert [os.fsencode(entry["file"]) for entry in entries] == [name]
    _, out, _ = call(capsys, "predict", "--checkpoint", checkpoint, tmp_path)
    assert out.startswith(f"{tmp_path}/\\udcff.png\n")


def test_eval_writes_a_row_for_each_image(capsys, checkpoint, photos, tmp_path):
    for i in range(3):
        folder = tmp_path / "images" / "test" / ("four", "猫")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (80 * i, 0, 9)).save(folder / f"{i}.png")
    args = ["eval", "--checkpoint", checkpoint, "--data", tmp_path / "images"]
    code, out, err = call(capsys, *args, "--predictions", tmp_path / "a.csv", "--report", tmp_path / "a.html")
    assert code == 0, err
    assert all(name in out for name in ("top-1", "top-5", "macro-F1", "balanced accuracy", "(3 images"))
    assert f"predictions in {tmp_path / 'a.csv'}" in out
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    entries, _ = predicted(capsys, checkpoint, *(row["file"] for row in rows))
    assert [(row["predicted"], float(row["probability_of_predicted"])) for row in rows] == [
        (entry["predictions"][0]["class"], pytest.approx(entry["predictions"][0]["probability"], abs=1e-5))
        for entry in entries
    ]
    assert sorted(row["class"] for row in rows) == ["four", "four", "猫"]
    wrong = [row["file"] for row in rows if row["class"] != row["predicted"]]
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert wrong
    assert all(file in page for file in wrong)
    for flag in ("--predictions", "--report"):
        assert_error(call(capsys, *args, flag, tmp_path / "none" / "a.html"), "cannot write", "none is not a directory")


def test_eval_of_another_split(capsys, tmp_path):
    output = tmp_path / "a"
    assert (
        call(capsys, "train", *TINY, "--validation", 20, "--epochs", 1, "--sgd-epochs", 0, "--output", output)[0] == 0
    )
    for split, count in (("train", 96), ("val", 20), ("test", 40)):
        code, out, err = call(capsys, "eval", "--checkpoint", output, "--split", split)
        assert code == 0, err
        assert f"({count} images" in out
    row = json.loads((output / "metrics.jsonl").read_text())
    out = call(capsys, "eval", "--checkpoint", output, "--split", "val")[1]
    assert f"on the validation images of digits: top-1 {row['validation_top1']:.2f} %" in out
    refused = call(capsys, "eval", "--checkpoint", output, "--split", "val", "--limit-test", 5)
    assert_error(refused, "--limit-test", "--split is val")
    refused = call(capsys, "eval", "--checkpoint", output / "best.pt", "--which", "last")
    assert_error(refused, "--which: last", "not the directory of one")
    args = ("export", "--checkpoint", output, "--format", "safetensors", tmp_path / "a.safetensors")
    for flag in ("--no-fused", "--data=digits", "--data-dir=.", "--threads=1"):
        assert_error(call(capsys, *args, flag), flag.partition("=")[0].replace("no-", ""), "--format safetensors")
