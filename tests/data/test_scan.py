"""Which files of a folder or of a CSV file are images of which class and split, and the report on the others."""

import os
import shutil
import sys
import unicodedata
from types import SimpleNamespace

import pytest
import torch
from conftest import write_image
from PIL import Image

from cxv.data import decode as decode_module
from cxv.data.loader import load_data, locate
from cxv.errors import InputError
from cxv.training.config import TrainConfig, resolve

CLASSES = ("ant", "bee", "cow")


def load(*args, **kwargs):
    log = []
    return load_data(*args, log=log.append, **kwargs), "\n".join(log)


def classes_of(data, split="train"):
    """The class of each file by its folder, as against its label."""
    images = data.splits[split]
    return [
        (os.path.basename(os.path.dirname(path)), data.classes[label])
        for path, label in zip(images.paths, images.labels.tolist(), strict=True)
    ]


@pytest.fixture
def unsplit(tmp_path):
    """Folders of three classes with 20 images each."""
    for c, name in enumerate(CLASSES):
        for i in range(20):
            write_image(tmp_path / name / f"{i}.png", seed=100 * c + i)
    return tmp_path


# --- which dataset


def test_data_dir_alone_and_a_path_mean_a_folder(folder, monkeypatch):
    """``--data-dir DIR`` without ``--data`` trained on the digits."""
    for arguments in ({"data_dir": folder}, {"data": "folder", "data_dir": folder}, {"data": folder}):
        config, *_ = resolve(TrainConfig(**arguments))
        assert (config.data, config.data_dir, config.model) == ("folder", str(folder), "cpv-5/4")
    for data in (load_data(data_dir=folder), load_data(folder), load_data(str(folder))):
        assert data.classes == list(CLASSES)
    monkeypatch.chdir(folder.parent)
    assert locate(folder.name, None) == ("folder", folder.name, None)
    assert locate(None, None) == ("digits", None, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("photos", None), r"`data`: unknown dataset 'photos'; allowed: digits, .*path of an existing directory"),
        (("./photos", None), r"`data`: \./photos is neither a directory nor a \.csv file"),
        (
            ("digits", "photos"),
            r"`data_dir`: the digits have no directory; for the images in photos",
        ),
        ((".", "photos"), r"`data_dir`: `data` \. is a directory already, got photos"),
        (("cifar10", None, "a.csv"), r"`labels`: for `data` folder alone, got cifar10"),
    ],
    ids=["unknown name", "missing path", "digits with a directory", "two directories", "labels of cifar10"],
)
def test_contradictory_arguments_are_errors(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        locate(*arguments)
    with pytest.raises(InputError, match=message):
        resolve(TrainConfig(**dict(zip(("data", "data_dir", "labels"), arguments, strict=False))))


# --- layouts


@pytest.mark.parametrize("names", ["train val test", "Train valid Test", "TRAIN Validation TEST"])
def test_validation_folder_selects_and_test_folder_reports(folder, names):
    names = names.split()
    (folder / "train").rename(folder / names[0])
    (folder / "test").rename(folder / names[2])
    for name in CLASSES:
        write_image(folder / names[1] / name / "0.png", seed=7)
    data, log = load(folder)
    assert [len(data.splits[split]) for split in ("train", "validation", "test")] == [12, 3, 6]
    assert log == ""
    assert list(load(folder, splits=("validation",))[0].splits) == ["validation"]
    assert list(load(folder, splits=("test",))[0].splits) == ["test"]
    with pytest.raises(InputError, match=r"`validation`: .* has its own validation images"):
        load_data(folder, validation=3)


def test_validation_folder_without_a_test_folder_is_the_test_set_and_said(folder):
    (folder / "test").rename(folder / "Val")
    data, log = load(folder)
    assert (len(data.test), data.validation) == (6, None)
    assert "has no test images: its validation images are the test set" in log


def test_two_folders_of_one_split_are_an_error(folder):
    shutil.copytree(folder / "test", folder / "val")
    shutil.copytree(folder / "test", folder / "valid")
    with pytest.raises(InputError, match=r"has two folders of validation images: val, valid"):
        load_data(folder)


def test_class_folders_without_splits_are_divided_by_class(unsplit):
    data, log = load(unsplit)
    counts = {split: data.splits[split].labels.bincount().tolist() for split in ("train", "validation", "test")}
    assert counts == {"train": [16] * 3, "validation": [2] * 3, "test": [2] * 3}
    assert "has no splits: its images are divided by class and seed 0 into 48 train, 6 validation, 6 test" in log
    paths = {split: set(data.splits[split].paths) for split in counts}
    assert len(set.union(*paths.values())) == 60
    again, _ = load(unsplit, seed=3, splits=("test",))  # the seed of a run does not move images between splits
    assert set(again.test.paths) == paths["test"]
    held_out, _ = load(unsplit, validation=0.2)
    assert [len(held_out.splits[split]) for split in ("train", "validation", "test")] == [43, 11, 6]
    assert set(held_out.test.paths) == paths["test"]
    whole, log = load(unsplit, splits=("test",), divide=False)
    assert len(whole.test) == 60
    assert "all of its 60 images are used" in log


def test_a_folder_without_class_folders_is_an_error(tmp_path):
    write_image(tmp_path / "0.png")
    log = []
    with pytest.raises(InputError, match=r"no class folders in it; expected .*CLASS.IMAGE"):
        load_data(tmp_path, log=log.append)
    assert "passed over: .png outside of the class folders: 1" in log[0]


def test_too_few_images_to_divide_are_an_error(tmp_path):
    for name in CLASSES:
        write_image(tmp_path / name / "0.png")
    with pytest.raises(InputError, match="3 images are too few to divide"):
        load_data(tmp_path)


def test_a_class_named_like_a_split_is_a_class(unsplit):
    """CIFAR-100 has the class "train", and photographs are valid or invalid."""
    (unsplit / "ant").rename(unsplit / "train")
    (unsplit / "bee").rename(unsplit / "valid")
    assert load(unsplit)[0].classes == ["cow", "train", "valid"]


def test_validation_as_a_fraction(folder):
    data = load_data(folder, validation=0.25)
    assert (len(data.train), len(data.validation)) == (9, 3)
    data = load_data("digits", validation=0.2, limit_train=100)
    assert (len(data.train), len(data.validation)) == (100, 25)
    for share in (-0.1, 1.5, True, float("nan")):
        with pytest.raises(InputError, match=r"`validation`: expected a (whole )?number"):
            load_data("digits", validation=share)
        with pytest.raises(InputError, match=r"`validation`: expected a (whole )?number"):
            resolve(TrainConfig(validation=share))


def test_a_split_that_is_a_link_to_another_one_is_reported(folder):
    shutil.rmtree(folder / "test")
    (folder / "test").symlink_to(folder / "train")
    assert "the test and the train images are the same" in load(folder)[1]


# --- links


def test_a_link_loop_gives_every_image_once_with_its_own_class(folder):
    for name in CLASSES:
        (folder / "train" / name / "loop").symlink_to(folder / "train")
        (folder / "train" / name / "up").symlink_to(folder)
    (folder / "train" / "all").symlink_to(folder)
    (folder / "train" / "ant" / "self").symlink_to(folder / "train" / "ant" / "self")
    data, log = load(folder)
    assert len(data.train) == 12
    assert all(own == label for own, label in classes_of(data))
    assert "links to folders that are read already: 7, without extension: 1" in log


def test_a_link_into_another_class_or_split_leaves_the_images_there(folder):
    write_image(folder / "train" / "bee" / "more" / "0.png", seed=5)
    (folder / "train" / "ant" / "link").symlink_to(folder / "train" / "bee" / "more")
    (folder / "train" / "ant" / "other").symlink_to(folder / "test" / "ant")
    data, log = load(folder)
    assert data.train.labels.bincount().tolist() == [4, 5, 4]
    assert "links to folders that are read already: 2" in log


def test_links_to_folders_and_files_elsewhere_are_followed(folder, tmp_path_factory):
    pool = tmp_path_factory.mktemp("pool")
    write_image(pool / "dog" / "0.png", seed=1)
    write_image(pool / "more" / "1.png", seed=2)
    (folder / "train" / "dog").symlink_to(pool / "dog")  # a class that is a link
    (folder / "train" / "dog" / "more").symlink_to(pool / "more")
    (folder / "train" / "ant" / "9.png").symlink_to(pool / "more" / "1.png")
    data, log = load(folder)
    assert data.classes == [*CLASSES, "dog"]
    assert data.train.labels.bincount().tolist() == [5, 4, 4, 2]
    assert log == ""


def test_two_classes_that_are_one_folder_are_an_error(folder):
    (folder / "train" / "dog").symlink_to(folder / "train" / "ant")
    with pytest.raises(InputError, match="the classes ant and dog are one folder"):
        load_data(folder)


def test_a_broken_link_is_named_or_skipped(folder):
    link = folder / "train" / "ant" / "x.png"
    link.symlink_to(folder / "gone.png")
    with pytest.raises(InputError, match=r"x\.png: cannot read the image .*`on_corrupt` skip"):
        load_data(folder)
    data, log = load(folder, on_corrupt="skip")
    assert (len(data.train), data.train.skipped) == (12, [str(link)])
    assert "skipped 1 of 13 images" in log


# --- what is passed over


def test_files_that_are_passed_over_are_reported_by_reason(folder):
    train = folder / "train"
    for path in ("ant/a.heic", "ant/b.HEIC", "bee/notes.txt", "bee/README", "ant/._0.webp", "loose.jpg", "bee/x.pdf"):
        (train / path).write_bytes(b"")
    for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX", ".Trash-1000"):
        write_image(train / "cow" / "deep" / name / "0.png")
    write_image(train / ".net" / "0.png")
    write_image(folder / "extra" / "dog" / "0.png")
    if hasattr(os, "mkfifo"):
        os.mkfifo(train / "ant" / "pipe.png")  # opening it would wait forever
    data, log = load(folder)
    assert len(data.train) == 12
    parts = log.partition("passed over: ")[2].split(", ")
    assert log.startswith(f"train: 12 images, 3 classes in {train}; passed over: ")
    assert {
        ".heic: 2 (pip install pillow-heif)",
        ".jpg outside of the class folders: 1",
        ".net/ (images): 1",
        ".pdf: 1",
        ".txt: 1",
        "without extension: 1",
        "hidden files: 1",
        "@eaDir/ (images): 1",
        "__MACOSX/ (images): 1",
        ".ipynb_checkpoints/ (images): 1",
        ".Trash-1000/ (images): 1",
        "extra/ beside the splits (images): 1",
        *(("neither files nor folders: 1",) if hasattr(os, "mkfifo") else ()),
    } == set(parts)
    assert log.count("\n") == 0


def test_a_class_folder_without_images_says_what_is_in_it(folder):
    for path in (folder / "train" / "bee").iterdir():
        path.rename(path.with_suffix(".heic"))
    with pytest.raises(InputError, match=r"bee: this class folder has no image .*\.heic: 4 .pip install pillow-heif"):
        load_data(folder)


def test_files_of_several_pages_are_reported_once(folder):
    red, blue = (Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    names = ("a.gif", "b.tiff", "c.webp", "d.png")
    for name in names:
        red.save(folder / "train" / "ant" / name, save_all=True, append_images=[blue], lossless=True)
    red.save(folder / "train" / "ant" / "one.gif", save_all=True)
    data, log = load(folder)
    assert log == (
        "train: the first page or frame is read of 4 files that have several (a.gif, b.tiff, c.webp, … and 1 more)"
    )
    rows = [i for i, path in enumerate(data.train.paths) if os.path.basename(path) in names]
    assert data.train.images[rows].float().mean((0, 2, 3)).tolist() == pytest.approx([255, 0, 0], abs=2)


def test_heic_is_read_if_pillow_heif_is_installed(folder, monkeypatch):
    path = folder / "train" / "ant" / "0.heic"
    (folder / "train" / "ant" / "0.webp").rename(path)
    decode_module.register_heif.cache_clear()
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert ".heic: 1 (pip install pillow-heif)" in load(folder)[1]
    (folder / "a.heic").write_bytes(b"?")
    with pytest.raises(InputError, match=r"a\.heic: cannot read .*; pip install pillow-heif"):
        decode_module.decode_image(folder / "a.heic")
    extensions = dict(Image.registered_extensions())
    monkeypatch.setattr(Image, "EXTENSION", extensions)
    opener = SimpleNamespace(register_heif_opener=lambda: Image.register_extension("WEBP", ".heic"))
    monkeypatch.setitem(sys.modules, "pillow_heif", opener)
    decode_module.register_heif.cache_clear()
    data, log = load(folder)
    decode_module.register_heif.cache_clear()
    assert str(path) in data.train.paths
    assert log == ""


def test_a_folder_that_cannot_be_read_is_an_error(folder, monkeypatch):
    scandir, closed = os.scandir, str(folder / "train" / "bee" / "closed")
    os.mkdir(closed)

    def refuse(path):
        if str(path) == closed:
            raise PermissionError(13, "Permission denied", closed)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r"`data_dir`: cannot read .*closed .Permission denied"):
        load_data(folder)


# --- names


def test_classes_with_unusual_names_are_kept_and_printable(tmp_path):
    names = ["a$b$", "line\nbreak", "猫", "cafe\u0301", "\udcff"]
    for split in ("train", "test"):
        for i, name in enumerate(names):
            try:
                write_image(tmp_path / split / name / f"{name}.png", seed=i)
            except OSError:
                pytest.skip("this file system has no such names")
    write_image(tmp_path / "train" / "caf\u00e9" / "0.png")  # the same word, composed
    data, log = load(tmp_path, cache_dir=tmp_path / "cache")
    assert set(data.classes) == {"a$b$", "line\\nbreak", "猫", "caf\u00e9", "\\udcff"}
    assert data.train.labels.bincount().tolist() == [1 + (name == "caf\u00e9") for name in data.classes]
    assert all(name.isprintable() and unicodedata.is_normalized("NFC", name) for name in data.classes)
    again, _ = load(tmp_path, cache_dir=tmp_path / "cache")
    assert again.train.fingerprint() == data.train.fingerprint()
    assert log == ""


# --- CSV files


def write_csv(folder, *lines, name="labels.csv"):
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    return folder / name


def test_csv_file_with_splits(folder):
    files = {split: sorted((folder / split).glob("*/*")) for split in ("train", "test")}
    rows = {split: [(path.relative_to(folder), f"{path.parent.name}ish") for path in files[split]] for split in files}
    file = write_csv(folder, "label,split,path", *(f"{label},Test,{path}" for path, label in rows["test"]))
    with pytest.raises(InputError, match=r"labels\.csv has no train images"):
        load_data(labels=file)
    assert load_data(labels=file, splits=("test",)).test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    lines = [f"{path},{label},train" for path, label in rows["train"]]
    lines += [f"{path},{label},VAL" for path, label in rows["test"]]
    file = write_csv(folder, "Path,Label,Split", *lines)
    for data in (load_data(labels=file), load_data(file), load_data(data_dir=folder, labels=file)):
        assert data.classes == ["antish", "beeish", "cowish"]
        assert (len(data.train), len(data.test)) == (12, 6)
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    file = file.rename(elsewhere / "labels.csv")
    with pytest.raises(InputError, match="cannot read the image"):
        load_data(labels=file, img_size=8)
    assert len(load_data(data_dir=folder, labels=file).train) == 12


def test_csv_file_of_two_columns_is_divided(unsplit):
    rows = [f'"{name}/{i}.png", {name}' for name in CLASSES for i in range(20)]
    for header in ([], ["file,class"]):
        data, log = load(labels=write_csv(unsplit, *header, *rows, rows[0]))
        assert [len(data.splits[split]) for split in ("train", "validation", "test")] == [48, 6, 6]
        assert all(own == label for own, label in classes_of(data))
        assert "passed over: repeated lines: 1" in log


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a,b,c"], r"needs the columns path and label, and its first line is a,b,c"),
        (["path,label", "x.png,"], r"line 2: expected path, label, got x\.png,"),
        (["path,label,split", "x.png,ant,other"], r"line 2: expected path, label, split \(train, validation, test\)"),
        (
            ["path,label", "x.png,ant", "x.png,bee"],
            r"line 3: x\.png is bee in train here and ant in train ",
        ),
        ([], r"needs the columns path and label"),
        (["path,label"], r"has no lines of images"),
    ],
)
def test_csv_errors_name_the_line(tmp_path, lines, message):
    with pytest.raises(InputError, match=rf"`labels`: .*{message}"):
        load_data(labels=write_csv(tmp_path, *lines))


def test_csv_file_that_is_missing_or_no_text(tmp_path):
    with pytest.raises(InputError, match=r"`labels`: cannot read .*none\.csv .No such file"):
        load_data(labels=tmp_path / "none.csv")
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"`labels`: cannot read .*a\.csv"):
        load_data(labels=tmp_path / "a.csv")


# --- classes by name


def test_classes_of_an_evaluation_set_are_matched_by_name(folder):
    whole, _ = load(folder, splits=("test",))
    given, log = load(folder, splits=("test",), classes=["cow", "dog", "ant", "bee"])
    assert given.classes == ["cow", "dog", "ant", "bee"]
    assert given.test.labels.tolist() == [2, 2, 3, 3, 0, 0]
    assert "3 of the model's 4 classes (not dog) in another order; classes are matched by name" in log
    assert torch.equal(given.test.images, whole.test.images)
    shutil.rmtree(folder / "test" / "bee")
    subset, log = load(folder, splits=("test",), classes=list(CLASSES))
    assert (subset.classes, subset.test.labels.tolist()) == (list(CLASSES), [0, 0, 2, 2])
    assert "2 of the model's 3 classes (not bee)" in log
    with pytest.raises(InputError, match=r"`data`: its classes ant, cow are not among those of the model \(0, 1\)"):
        load(folder, splits=("test",), classes=["0", "1"])
    assert (
        load_data("digits", splits=("test",), classes=list("9876543210")).test.labels[0]
        == 9 - (load_data("digits", splits=("test",)).test.labels[0])
    )


def test_a_test_set_may_lack_classes(folder):
    shutil.rmtree(folder / "test" / "bee")
    data = load_data(folder)
    assert (data.classes, data.test.labels.tolist()) == (list(CLASSES), [0, 0, 2, 2])
