"""The commands on a folder of photographs: the same preprocessing from training to prediction."""

import json

import numpy as np
import pytest
import torch
from cli_support import assert_error, call
from conftest import write_image
from PIL import Image

from cxv.cli.checkpoints import load_run_data, open_checkpoint
from cxv.data import Preprocessing, load_data, normalize
from cxv.training import load_model

TRAIN = ["train", "--model", "cpv-1/2", "--embed-dim", 16, "--epochs", 1, "--sgd-epochs", 0, "--threads", 1]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes of 20 images of several sizes and modes, in folders without splits."""
    root = tmp_path_factory.mktemp("photos")
    for c, name in enumerate(("猫$", "dog")):
        for i in range(20):
            suffix, mode = (("png", "RGBA"), ("jpg", "L"), ("webp", "RGB"), ("tif", "RGB"))[i % 4]
            write_image(root / name / f"{i}.{suffix}", seed=100 * c + i, size=(20 + i, 16 + i % 5), mode=mode)
    return root


@pytest.fixture(scope="module")
def output(photos, tmp_path_factory):
    from cxv.cli import main

    output = tmp_path_factory.mktemp("run") / "photos"
    options = ["--data", photos, "--img-size", "12x16", "--resize", "pad", "--background", "#204060", "--in-chans", 1]
    assert main([str(a) for a in (*TRAIN, *options, "--output", output)]) == 0
    return output


def test_checkpoint_has_the_preprocessing(output):
    _, checkpoint = load_model(output)
    expected = Preprocessing((12, 16), 1, "pad", background="#204060")
    assert Preprocessing.from_dict(checkpoint) == expected
    assert checkpoint["model_kwargs"]["img_size"] == (12, 16)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert "validation_top1" in rows[0]  # a part of the folder selects, another one reports


def test_predict_sees_the_pixels_of_training(capsys, output, photos):
    model, checkpoint = load_model(output)
    data = load_data(photos, splits=("test",), **Preprocessing.from_dict(checkpoint).of_pixels())
    path = data.test.paths[0]
    with torch.no_grad():
        p = model(normalize(data.test.images[:1], **data.normalization))[0].softmax(0)
    code, out, _ = call(capsys, "predict", "--checkpoint", output, path)
    assert code == 0
    assert f"{100 * p.max():6.2f} %  {checkpoint['classes'][p.argmax()]}" in out


def test_eval_takes_the_test_images_of_the_run_or_all_of_another_folder(capsys, output, photos, tmp_path):
    summary = json.loads((output / "summary.json").read_text())
    code, out, _ = call(capsys, "eval", "--checkpoint", output)
    assert code == 0
    assert "(4 images" in out
    assert f"top-1 {summary['best_validation']['test_top1']:.2f} %" in out
    assert "(4 images" in call(capsys, "eval", "--checkpoint", output, "--data", photos)[1]
    write_image(tmp_path / "dog" / "a.png", seed=1, size=(30, 30))
    code, out, _ = call(capsys, "eval", "--checkpoint", output, "--data", tmp_path)
    assert code == 0
    assert "(1 images" in out
    assert "1 of the model's 2 classes (not 猫$)" in out
    write_image(tmp_path / "cow" / "a.png", seed=1)
    assert_error(call(capsys, "eval", "--checkpoint", output, "--data", tmp_path), "--data", "cow", "dog, 猫$")


def test_eval_says_that_the_images_have_changed(capsys, output, photos):
    """A new file moves images of a folder without splits from training to test."""
    new = photos / "dog" / "new.png"
    write_image(new, seed=5, size=(20, 20))
    _, out, _ = call(capsys, "eval", "--checkpoint", output)
    new.unlink()
    assert "the test images are not those of the run: files were added, removed or changed" in out
    assert "not those of the run" not in call(capsys, "eval", "--checkpoint", output)[1]


def test_evaluated_splits_are_those_of_the_run(output):
    class Arguments:
        checkpoint, which, threads = output, "best", None
        data = data_dir = None

    _, checkpoint = open_checkpoint(Arguments, "cpu", None)
    seen = set()
    for split, count in (("train", 32), ("validation", 4), ("test", 4)):
        images = load_run_data(Arguments, checkpoint, split).splits[split]
        assert len(images) == count
        assert seen.isdisjoint(images.paths)
        seen.update(images.paths)


def test_exported_file_describes_the_preprocessing(capsys, output, tmp_path):
    file = tmp_path / "a.pt2"
    code, _, _ = call(capsys, "export", "--checkpoint", output, "--format", "torch", file)
    assert code == 0
    extra = {"cxv": ""}
    torch.export.load(file, extra_files=extra)
    metadata = json.loads(extra["cxv"])
    assert Preprocessing.from_dict(metadata) == Preprocessing((12, 16), 1, "pad", background="#204060")


def test_a_shared_file_keeps_the_preprocessing(capsys, output, tmp_path, photos):
    file = tmp_path / "a.safetensors"
    assert call(capsys, "export", "--checkpoint", output, "--format", "safetensors", file)[0] == 0
    _, checkpoint = load_model(file)
    assert Preprocessing.from_dict(checkpoint).resize == "pad"
    image = str(photos / "dog" / "0.png")
    expected = call(capsys, "predict", "--checkpoint", output, image)
    assert call(capsys, "predict", "--checkpoint", file, image) == expected
    assert str(photos) not in json.dumps(checkpoint["args"])


def test_data_dir_without_data_does_not_train_on_the_digits(capsys, photos, tmp_path):
    code, out, _ = call(capsys, *TRAIN, "--data-dir", photos, "--img-size", 8, "--output", tmp_path / "a")
    assert code == 0
    assert "folder: 32 training, 4 validation and 4 test images, 2 classes, 3×8×8" in out
    assert_error(call(capsys, *TRAIN, "--data", photos / "none"), "--data", "neither a directory nor a .csv file")
    assert_error(call(capsys, *TRAIN, "--data", "digits", "--data-dir", photos), "--data-dir", "digits")
    assert_error(call(capsys, *TRAIN, "--validation", "1.5"), "--validation", "whole number of at least 1, or a share")
    assert_error(call(capsys, *TRAIN, "--img-size", "8x"), "--img-size", "HEIGHTxWIDTH")
    assert_error(call(capsys, *TRAIN, "--img-size", "0x8"), "--img-size", "'0x8'")


def test_resumed_run_finds_its_folder_again(capsys, photos, output, tmp_path):
    run = tmp_path / "a"
    options = ["--data", photos, "--img-size", 8]
    assert call(capsys, *TRAIN, *options, "--output", run)[0] == 0
    moved = photos.rename(tmp_path / "moved")
    code, out, _ = call(capsys, "train", "--resume", "--output", run, "--epochs", 2, "--data-dir", moved)
    moved.rename(photos)
    assert code == 0, out
    assert "finished" in out
    assert_error(call(capsys, "train", "--resume", "--output", run, "--img-size", 16), "--resume", "--img-size (8")


def test_labels_of_a_csv_file(capsys, photos, tmp_path):
    rows = [f"{path},{'hund' if path.parent.name == 'dog' else 'katze'}" for path in sorted(photos.glob("*/*"))]
    file = tmp_path / "labels.csv"
    file.write_text("path,label\n" + "\n".join(rows))
    code, out, _ = call(capsys, *TRAIN, "--labels", file, "--img-size", 8, "--output", tmp_path / "a")
    assert code == 0
    assert "folder: 32 training, 4 validation and 4 test images, 2 classes, 3×8×8" in out
    assert "(4 images" in call(capsys, "eval", "--checkpoint", tmp_path / "a")[1]


def test_white_level_is_part_of_the_checkpoint(capsys, tmp_path):
    for split in ("train", "test"):
        for c, name in enumerate(("dark", "light")):
            for i in range(3):
                (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
                values = np.full((8, 8), 500 + 3000 * c + i, np.uint16)
                Image.fromarray(values).save(tmp_path / split / name / f"{i}.png")
    options = ["--data", tmp_path, "--in-chans", 1, "--output", tmp_path / "a"]
    assert_error(call(capsys, *TRAIN, *options), "dark/0.png", "mode I;16", "--white-level")
    assert call(capsys, *TRAIN, *options, "--white-level", 4095)[0] == 0
    image = tmp_path / "test" / "dark" / "0.png"
    assert call(capsys, "predict", "--checkpoint", tmp_path / "a", image)[0] == 0
