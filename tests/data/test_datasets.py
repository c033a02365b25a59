"""Sources of images: the decoded images of each kind of dataset, and an error for each possible defect."""

import hashlib
import os
import pickle
import re
import shutil
import socket
from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import write_image
from PIL import Image

from cxv.cli import main
from cxv.data import Preprocessing, batches, decode_image
from cxv.data import cache as cache_module
from cxv.data import datasets as datasets_module
from cxv.data.loader import TINY_IMAGENET, load_data
from cxv.errors import InputError
from cxv.training import load_model


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


# --- folders


def test_folder_keeps_every_pixel_and_sorts_the_classes(folder):
    data = load_data("folder", folder)
    assert data.classes == ["ant", "bee", "cow"]
    assert data.train.images.shape == (12, 3, 8, 8)
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for i, (c, suffix) in enumerate((("ant", "webp"), ("bee", "png"), ("cow", "bmp"))):
        expected = np.asarray(Image.open(folder / "train" / c / f"1.{suffix}"))
        assert torch.equal(data.train.images[4 * i + 1], torch.from_numpy(expected.copy()).permute(2, 0, 1))


def test_limits_decode_only_selected_images(folder, monkeypatch):
    seen = []
    decode = Preprocessing.decode
    monkeypatch.setattr(Preprocessing, "decode", lambda *a: (seen.append(str(a[1])), decode(*a))[1])
    data = load_data("folder", folder, limit_train=6, limit_test=3, img_size=8, seed=1)
    assert data.train.labels.bincount().tolist() == [2, 2, 2]
    assert data.test.labels.bincount().tolist() == [1, 1, 1]
    assert len(seen) == 9


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "LA", "CMYK"])
def test_any_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    write_image(path, mode=mode)
    image = decode_image(path)
    assert image.shape == (3, 8, 8)
    assert image.float().std() > 10
    if mode == "L":
        assert torch.equal(image[0], image[1])
    assert decode_image(path, in_chans=1).shape == (1, 8, 8)


def test_default_size_is_the_median_of_the_shorter_sides_up_to_64(folder):
    """The first file, which is a thumbnail or a panorama, does not decide."""
    write_image(folder / "train" / "ant" / "0.webp", size=(300, 200))
    log = []
    assert load_data("folder", folder, log=log.append).img_size == 8
    assert "images of 8×8 to 200×300 pixels are cropped and resized to 8×8; `img_size` and `resize`" in log[0]
    for path in sorted((folder / "train").glob("*/*"))[:7]:
        write_image(path, size=(14, 12))
    assert load_data("folder", folder).img_size == 12
    for path in sorted((folder / "train").glob("*/*"))[:7]:
        write_image(path, size=(200, 300))
    data = load_data("folder", folder)
    assert data.img_size == 64
    assert data.test.images.shape == (6, 3, 64, 64)


def test_a_damaged_image_is_named_or_skipped(folder, capsys):
    bad = folder / "train" / "bee" / "2.png"
    truncate(bad)
    with pytest.raises(InputError, match=re.escape(str(bad)) + ".*`on_corrupt` skip"):
        load_data("folder", folder)
    data = load_data("folder", folder, on_corrupt="skip")
    assert data.train.labels.bincount().tolist() == [4, 3, 4]
    assert data.train.skipped == [str(bad)]
    out, err = capsys.readouterr()
    assert "train: skipped 1 of 12 images" in out
    assert str(bad) in err


def test_a_class_that_is_all_damaged_is_an_error(folder):
    for path in (folder / "test" / "cow").iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match="not one of the test images of cow could be read"):
        load_data("folder", folder, on_corrupt="skip")


@pytest.mark.parametrize("suffix", ["webp", "png", "jpg", "gif", "tif"])
def test_truncation_is_seen_in_every_format(tmp_path, suffix):
    path = tmp_path / f"x.{suffix}"
    write_image(path, size=(64, 64))
    decode_image(path)
    truncate(path)
    with pytest.raises(InputError, match=re.escape(str(path))):
        decode_image(path)


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (lambda d: d.rename(d.with_name("elsewhere")), "is not a directory"),
        (lambda d: (d / "train").rename(d / "x"), "has no directory train/"),
        (lambda d: (d / "test").rename(d / "x"), "has no directory test/ or val/"),
        (
            lambda d: (d / "test" / "bee").rename(d / "test" / "fly"),
            r"only in \S+train: bee; only in \S+test: fly",
        ),
        (lambda d: (d / "train" / "cow").rename(d / "cow"), r"only in \S+test: cow"),
        (
            lambda d: [(d / s / c).rename(d / f"{s}{c}") for s in ("train", "test") for c in ("ant", "bee")],
            r"one class \(cow\)",
        ),
    ],
)
def test_folder_errors(folder, breakage, message):
    breakage(folder)
    with pytest.raises(InputError, match=message):
        load_data("folder", folder)


def test_argument_errors(folder):
    with pytest.raises(InputError, match=r"'cifar11' \(did you mean cifar10\?\); allowed: digits, cifar10"):
        load_data("cifar11")
    with pytest.raises(InputError, match="`data_dir`: needed"):
        load_data("folder")
    with pytest.raises(InputError, match="`on_corrupt`"):
        load_data("folder", folder, on_corrupt="ignore")
    for name, more in (("img_size", r", or \(H, W\)"), ("limit_train", ""), ("limit_test", "")):
        with pytest.raises(InputError, match=f"`{name}`: expected a whole number, at least 1{more}, got 0"):
            load_data("digits", **{name: 0})


def test_a_set_that_does_not_fit_the_memory_is_refused_before_decoding(folder, monkeypatch):
    monkeypatch.setattr(cache_module, "available_memory", lambda: 2 * 2**30)
    monkeypatch.setattr(datasets_module, "_decoded", lambda *a: None)
    with pytest.raises(InputError, match=r"take 9\.37 GiB .* 2\.00 GiB is available: give a `cache_dir`"):
        load_data("folder", folder, img_size=16720)


def test_available_memory_is_plausible():
    free = cache_module.available_memory()
    assert free is None or 2**20 < free < 2**50


# --- CIFAR


def test_cifar_without_network_says_which_file_goes_where(tmp_path, monkeypatch):
    import torchvision.datasets.cifar as cifar

    timeouts = []

    def closed(*args, **kwargs):
        timeouts.append(socket.getdefaulttimeout())
        raise URLError("network is unreachable")

    monkeypatch.setattr(cifar, "download_and_extract_archive", closed)
    for name, file in (("cifar10", "cifar-10-python.tar.gz"), ("cifar100", "cifar-100-python.tar.gz")):
        with pytest.raises(InputError, match=f"unreachable.*put {file} .*into {re.escape(str(tmp_path))} "):
            load_data(name, tmp_path)
    assert timeouts == [30, 30]  # a firewall that drops packets does not hang it
    assert socket.getdefaulttimeout() is None


def test_cifar_that_is_there_is_used_without_the_network(tmp_path, monkeypatch):
    import torchvision.datasets.cifar as cifar

    base = tmp_path / cifar.CIFAR10.base_folder
    base.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)

    def write(name, content):
        (base / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((base / name).read_bytes()).hexdigest()]

    train = write("data_batch_1", {"data": pixels, "labels": [i % 10 for i in range(20)]})
    test = write("test_batch", {"data": pixels[:10], "labels": list(range(10))})
    names = [f"class{i}" for i in range(10)]
    meta = write("batches.meta", {"label_names": names})
    monkeypatch.setattr(cifar.CIFAR10, "train_list", [train])
    monkeypatch.setattr(cifar.CIFAR10, "test_list", [test])
    monkeypatch.setattr(cifar.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": meta[1]})
    monkeypatch.setattr(cifar, "download_and_extract_archive", None)
    data = load_data("cifar10", tmp_path, limit_test=5)
    assert data.classes == names
    assert torch.equal(data.train.images, torch.from_numpy(pixels).view(20, 3, 32, 32))
    assert data.train.labels.tolist() == [i % 10 for i in range(20)]
    assert len(data.test) == 5


# --- Tiny ImageNet

WNIDS = ("n01443537", "n01629819", "n01768244")


@pytest.fixture
def tiny(tmp_path):
    """Its layout, with three classes."""
    root = tmp_path / "tiny-imagenet-200"
    lines = []
    for c, wnid in enumerate(WNIDS):
        for i in range(4):
            write_image(
                root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", 10 * c + i, (64, 64), "L" if i == 2 else "RGB"
            )
        for i in range(2):
            write_image(root / "val" / "images" / f"val_{3 * i + c}.JPEG", 100 + 10 * c + i, (64, 64))
            lines.append((f"val_{3 * i + c}.JPEG", wnid))
    (root / "val" / "val_annotations.txt").write_text("".join(f"{f}\t{w}\t0\t32\t44\t62\n" for f, w in sorted(lines)))
    (root / "wnids.txt").write_text("\n".join(reversed(WNIDS)) + "\n")
    (root / "words.txt").write_text(
        "n00001740\tentity\nn01443537\tgoldfish, Carassius auratus\nn01629819\tsalamander\n"
    )
    return tmp_path


def test_tiny_imagenet_takes_val_by_its_annotations_as_test(tiny):
    data = load_data("tiny-imagenet", tiny)
    assert data.classes == ["goldfish, Carassius auratus", "salamander", "n01768244"]
    assert data.train.images.shape == (12, 3, 64, 64)
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    root = tiny / "tiny-imagenet-200"
    assert torch.equal(data.test.images[3], decode_image(root / "val" / "images" / "val_4.JPEG"))
    gray = data.train.images[2]
    assert torch.equal(gray[0], gray[1])
    assert data.normalization == TINY_IMAGENET
    one = load_data("tiny-imagenet", tiny, in_chans=1)
    assert next(batches(one.test, 2))[0].shape == (2, 1, 64, 64)
    assert load_data("tiny-imagenet", root, limit_train=3).train.labels.tolist() == [0, 1, 2]


def test_tiny_imagenet_is_downloaded_whole_or_not_at_all(tiny, tmp_path, monkeypatch):
    from torchvision.datasets import utils

    archive = shutil.make_archive(str(tmp_path / "a"), "zip", tiny, "tiny-imagenet-200")
    target = tmp_path / "elsewhere"
    target.mkdir()
    asked = []

    def download(url, root, md5):
        asked.append((url.rpartition("/")[2], md5))
        shutil.copy(archive, os.path.join(root, "tiny-imagenet-200.zip"))

    monkeypatch.setattr(utils, "download_url", download)
    extract = utils.extract_archive
    monkeypatch.setattr(utils, "extract_archive", lambda *a: (extract(*a), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        load_data("tiny-imagenet", target)
    assert [path.name for path in target.iterdir()] == ["tiny-imagenet-200.zip"]
    monkeypatch.setattr(utils, "extract_archive", extract)
    assert load_data("tiny-imagenet", target).test.fingerprint() == load_data("tiny-imagenet", tiny).test.fingerprint()
    assert asked == [("tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")] * 2


def test_tiny_imagenet_missing_or_incomplete_names_the_expected_files(tiny, tmp_path, monkeypatch):
    from torchvision.datasets import utils

    def closed(*args, **kwargs):
        raise URLError("network is unreachable")

    monkeypatch.setattr(utils, "download_url", closed)
    where = re.escape(str(tmp_path / "empty"))
    with pytest.raises(
        InputError, match=f"unreachable.*put tiny-imagenet-200.zip .*into {where}, or its content.*WNID"
    ):
        load_data("tiny-imagenet", tmp_path / "empty")
    root = tiny / "tiny-imagenet-200"
    with (root / "val" / "val_annotations.txt").open("a") as f:
        f.write("val_9.JPEG\tn00000000\t0\t0\t1\t1\n")
    with pytest.raises(InputError, match=r"is not Tiny ImageNet as it was published .*n00000000"):
        load_data("tiny-imagenet", tiny)
    shutil.rmtree(root / "train" / WNIDS[1] / "images")
    with pytest.raises(InputError, match=f"no image of a class .train: {WNIDS[1]}."):
        load_data("tiny-imagenet", tiny, splits=("train",))


def test_tiny_imagenet_is_trained_with_the_papers_stride_and_normalization(tiny, tmp_path, capsys):
    run = ["train", "--data", "tiny-imagenet", "--data-dir", str(tiny), "--epochs", "1", "--sgd-epochs", "0"]
    run += ["--embed-dim", "16", "--threads", "1"]
    for name, more, kwargs in (
        ("cpv-1/2", [], {"stem_stride": 2}),
        ("cltv-1/2", ["--stem-stride", "4"], {"stem_stride": 4}),
        ("fnet-1", [], {"patch_size": 2}),
    ):
        output = tmp_path / name.replace("/", "-")
        assert main([*run, "--model", name, "--output", str(output), *more]) == 0
        model, checkpoint = load_model(output)
        assert kwargs.items() <= checkpoint["model_kwargs"].items()
        assert checkpoint["normalization"] == TINY_IMAGENET
        top1 = checkpoint["history"][-1]["test_top1"]
        capsys.readouterr()
        assert main(["eval", "--checkpoint", str(output), "--threads", "1"]) == 0
        assert f"top-1 {top1:.2f} %" in capsys.readouterr().out
    image = tiny / "tiny-imagenet-200" / "val" / "images" / "val_0.JPEG"
    assert main(["predict", "--checkpoint", str(output), str(image), "--threads", "1"]) == 0
    mean, std = (torch.tensor(TINY_IMAGENET[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        shares = model((decode_image(image) / 255 - mean).div(std)[None])[0].softmax(0)
    assert f"{100 * shares.max():6.2f} %  {checkpoint['classes'][shares.argmax()]}" in capsys.readouterr().out
