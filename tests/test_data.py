"""Datasets: what is in memory after loading, and the error for each thing that can be wrong."""

import hashlib
import pickle
import re
import socket
import sys
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from cxv.training import data as data_module
from cxv.training.data import balanced_subset, batches, decode_image, load_data, normalise
from cxv.training.errors import InputError


def write_image(path, seed=0, size=(8, 8), mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path, **({"lossless": True} if path.suffix == ".webp" else {}))
    return pixels


@pytest.fixture
def folder(tmp_path):
    for split, n in (("train", 4), ("test", 2)):
        for c, name in enumerate(("ant", "bee", "cow")):
            for i in range(n):
                suffix = ("webp", "png", "bmp")[c]
                write_image(tmp_path / split / name / f"{i}.{suffix}", seed=100 * (split == "test") + 10 * c + i)
    return tmp_path


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


# --- digits


def test_digits_are_the_17_levels_of_the_scans_with_a_fixed_fifth_held_out():
    data = load_data("digits", seed=0)
    assert data.train.images.shape == (1437, 1, 8, 8)
    assert data.test.images.shape == (360, 1, 8, 8)
    assert data.train.images.dtype == torch.uint8
    assert data.classes == [str(i) for i in range(10)]
    assert (data.in_chans, data.img_size) == (1, 8)
    levels = torch.cat([data.train.images, data.test.images]).unique()
    assert levels.tolist() == [round(i / 16 * 255) for i in range(17)]
    counts = data.test.labels.bincount()
    assert counts.min() >= 34
    assert counts.max() <= 38
    other = load_data("digits", seed=1)
    assert other.test.fingerprint() == data.test.fingerprint()
    train, test = ({x.numpy().tobytes() for x in s.images} for s in (data.train, data.test))
    assert not train & test


def test_digits_resized():
    data = load_data("digits", img_size=12, limit_train=20, limit_test=10)
    assert data.train.images.shape == (20, 1, 12, 12)
    assert data.img_size == 12
    assert data.train.images.float().std() > 50


def test_missing_scikit_learn_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=re.escape("pip install 'cxv[train]'")):
        load_data("digits")


# --- subsets and batches


def test_balanced_subset():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 4)
    keep = balanced_subset(labels, 12, seed=3)
    assert labels[keep].bincount().tolist() == [4, 4, 4]
    assert torch.equal(keep, keep.unique())
    assert torch.equal(keep, balanced_subset(labels, 12, seed=3))
    assert not torch.equal(keep, balanced_subset(labels, 12, seed=4))
    assert labels[balanced_subset(labels, 20, seed=0)].bincount().tolist() == [
        8,
        8,
        4,
    ]  # the third has no more
    assert max(labels[balanced_subset(labels, 2, seed=0)].bincount()) == 1
    assert len(balanced_subset(labels, None, seed=0)) == len(balanced_subset(labels, 999, seed=0)) == 84


def test_batches_cover_every_image_once_and_go_on_from_the_generators_state():
    data = load_data("digits", limit_train=50, splits=("train",)).train
    generator = torch.Generator().manual_seed(5)
    state = generator.get_state()
    first = list(batches(data, 16, generator=generator))
    assert [len(y) for _, y in first] == [16, 16, 16, 2]
    shuffled = torch.cat([x for x, _ in first])
    plain = torch.cat([x for x, _ in batches(data, 16)])
    assert torch.equal(plain, normalise(data.images))
    assert not torch.equal(shuffled, plain)
    assert torch.equal(shuffled.flatten(1).sum(1).sort().values, plain.flatten(1).sum(1).sort().values)
    assert not torch.equal(shuffled, torch.cat([x for x, _ in batches(data, 16, generator=generator)]))
    generator.set_state(state)
    assert torch.equal(shuffled, torch.cat([x for x, _ in batches(data, 16, generator=generator)]))


def test_normalise_is_the_papers():
    x = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert torch.allclose(normalise(x), torch.tensor([-1.0, -0.6, 1.0]))
    assert x.tolist() == [0, 51, 255]


# --- folders


def test_folder_keeps_every_pixel_and_sorts_the_classes(folder):
    data = load_data("folder", folder)
    assert data.classes == ["ant", "bee", "cow"]
    assert data.train.images.shape == (12, 3, 8, 8)
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for i, (c, suffix) in enumerate((("ant", "webp"), ("bee", "png"), ("cow", "bmp"))):
        expected = np.asarray(Image.open(folder / "train" / c / f"1.{suffix}"))
        assert torch.equal(data.train.images[4 * i + 1], torch.from_numpy(expected.copy()).permute(2, 0, 1))


def test_val_serves_as_test_and_other_files_are_passed_over(folder):
    (folder / "test").rename(folder / "val")
    (folder / "train" / "ant" / "notes.txt").write_text("not an image")
    (folder / "train" / "ant" / "._0.webp").write_text("what macOS leaves behind")
    (folder / "train" / ".cache").mkdir()
    data = load_data("folder", folder)
    assert (len(data.train), len(data.test), data.classes) == (12, 6, ["ant", "bee", "cow"])


def test_limits_decode_only_what_they_keep(folder, monkeypatch):
    seen = []
    decode = data_module.decode_image
    monkeypatch.setattr(data_module, "decode_image", lambda *a: (seen.append(str(a[0])), decode(*a))[1])
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


def test_16_bit_grey_keeps_its_shades(tmp_path):
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024).save(tmp_path / "x.png")
    assert decode_image(tmp_path / "x.png", in_chans=1).flatten().tolist() == list(range(0, 256, 4))


def test_other_sizes_are_cropped_about_the_centre_and_resized(tmp_path):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :10] = 255  # outside the central 20×20
    pixels[:, 20:30] = 100
    Image.fromarray(pixels).save(tmp_path / "x.png")
    image = decode_image(tmp_path / "x.png", img_size=10)
    assert image.shape == (3, 10, 10)
    assert image[:, :, 1:4].max() < 10  # column 0 is blended with its neighbours
    assert (image[:, :, 6:].int() - 100).abs().max() < 10


def test_default_size_is_the_first_images_shorter_side_up_to_64(folder):
    write_image(folder / "train" / "ant" / "0.webp", size=(14, 12))
    assert load_data("folder", folder).img_size == 12
    write_image(folder / "train" / "ant" / "0.webp", size=(300, 200))
    data = load_data("folder", folder)
    assert data.img_size == 64
    assert data.test.images.shape == (6, 3, 64, 64)


def test_a_damaged_image_is_named_or_skipped(folder, capsys):
    bad = folder / "train" / "bee" / "2.png"
    truncate(bad)
    with pytest.raises(InputError, match=re.escape(str(bad)) + ".*--on-corrupt skip"):
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
    with pytest.raises(InputError, match="cow: not one image"):
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
            lambda d: [p.unlink() for p in (d / "train" / "bee").iterdir()],
            "bee: this class folder has no image",
        ),
        (
            lambda d: (d / "test" / "bee").rename(d / "test" / "fly"),
            r"only in \S+train: bee; only in \S+test: fly",
        ),
        (lambda d: (d / "train" / "cow").rename(d / "cow"), r"only in \S+test: cow"),
        (
            lambda d: [(d / s / c).rename(d / f"{s}{c}") for s in ("train", "test") for c in ("ant", "bee")],
            r"one class \(cow\)",
        ),
        (
            lambda d: [(d / "train" / c).rename(d / f"{c}") for c in ("ant", "bee", "cow")],
            "train: no class folders in it",
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
    with pytest.raises(InputError, match="--data-dir: needed"):
        load_data("folder")
    with pytest.raises(InputError, match="--on-corrupt"):
        load_data("folder", folder, on_corrupt="ignore")
    for name in ("img_size", "limit_train", "limit_test"):
        with pytest.raises(InputError, match=f"--{name.replace('_', '-')}: expected at least 1, got 0"):
            load_data("digits", **{name: 0})


def test_a_set_that_does_not_fit_the_memory_is_refused_before_decoding(folder, monkeypatch):
    monkeypatch.setattr(data_module, "available_memory", lambda: 2 * 2**30)
    monkeypatch.setattr(data_module, "_decode", None)
    with pytest.raises(InputError, match=r"take 14\.06 GiB .* 2\.00 GiB is available: use a smaller --img-size"):
        load_data("folder", folder, img_size=16720)


def test_available_memory_is_plausible():
    free = data_module.available_memory()
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


# --- held-out training images


def test_validation_takes_each_class_by_its_share_from_the_training_images_alone():
    whole = load_data("digits", seed=3)
    data = load_data("digits", seed=3, validation=287)  # a fifth
    assert (len(data.train), len(data.validation)) == (1437 - 287, 287)
    assert data.test.fingerprint() == whole.test.fingerprint()
    shares = data.validation.labels.bincount() / whole.train.labels.bincount()
    assert (shares - 0.2).abs().max() < 0.01
    train, held, all_ = ({x.numpy().tobytes() for x in s.images} for s in (data.train, data.validation, whole.train))
    assert not train & held
    assert train | held == all_
    assert load_data("digits", seed=3, validation=287).validation.fingerprint() == data.validation.fingerprint()
    assert load_data("digits", seed=4, validation=287).validation.fingerprint() != data.validation.fingerprint()
    assert whole.validation is None


def test_limit_train_counts_what_is_left_to_train_on(folder):
    data = load_data("digits", limit_train=100, validation=50)
    assert (len(data.train), len(data.validation)) == (100, 50)
    data = load_data("folder", folder, validation=3)
    assert data.train.labels.bincount().tolist() == [3, 3, 3]
    assert data.validation.labels.bincount().tolist() == [1, 1, 1]
    with pytest.raises(InputError, match="--validation: 10 of 12 training images leave a class without one to train"):
        load_data("folder", folder, validation=10)
    with pytest.raises(InputError, match="--validation: expected at least 1, got 0"):
        load_data("folder", folder, validation=0)
