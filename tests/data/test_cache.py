"""The cache of decoded images: decoded once, noticed when damaged or stale, done without when it cannot be had."""

import json
import os
import pwd
import re
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import exit_status, file_limit, fork, write_image
from filelock import FileLock
from safetensors import safe_open

from cxv.cli import main
from cxv.data import Preprocessing
from cxv.data import cache as cache_module
from cxv.data.cache import cache_folder
from cxv.data.loader import load_data
from cxv.errors import InputError


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def decoded(monkeypatch):
    """The names of the images decoded so far."""
    names, decode = [], Preprocessing.decode
    monkeypatch.setattr(Preprocessing, "decode", lambda *a: (names.append(a[1].name), decode(*a))[1])
    return names


def load(folder, cache, **kwargs):
    log = []
    return load_data("folder", folder, cache_dir=cache, log=log.append, **kwargs), "\n".join(log)


def same(data, other):
    return all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        for a, b in zip(data.splits.values(), other.splits.values(), strict=True)
    )


def train_file(cache):
    return next(cache.glob("*-train-*.safetensors"))


def test_images_are_decoded_once_and_mapped_afterwards(folder, cache, decoded):
    plain = load_data("folder", folder, cache_dir="none")
    assert len(decoded) == 18
    assert not cache.exists()
    first, log = load(folder, cache)
    assert log == ""
    assert len(decoded) == 36
    second, _ = load(folder, cache)
    assert len(decoded) == 36
    assert same(first, plain)
    assert same(second, plain)
    for split in ("train", "test"):
        assert first.splits[split].fingerprint() == second.splits[split].fingerprint()
        assert plain.splits[split].subset(torch.arange(len(plain.splits[split]))).fingerprint() == (
            second.splits[split].fingerprint()
        )
    assert second.classes == plain.classes
    if sys.platform == "linux":
        assert str(train_file(cache)) in Path("/proc/self/maps").read_text()


def test_the_file_is_a_whole_safetensors_file(folder, cache):
    data, _ = load(folder, cache)
    with safe_open(train_file(cache), framework="pt") as file:
        assert torch.equal(file.get_tensor("images"), data.train.images)
        assert torch.equal(file.get_tensor("labels"), data.train.labels)
        assert json.loads(file.metadata()["cxv"])["classes"] == ["ant", "bee", "cow"]


def test_writing_to_the_tensor_does_not_change_the_file(folder, cache):
    data, _ = load(folder, cache)
    data.train.pixels.zero_()
    again, log = load(folder, cache)
    assert log == ""
    assert again.train.pixels.any()


@pytest.mark.parametrize(
    "change",
    [
        lambda train: write_image(train / "ant" / "0.webp", seed=77),
        lambda train: (train / "ant" / "3.webp").unlink(),
        lambda train: write_image(train / "ant" / "4.webp", seed=78),
        lambda train: (train / "bee" / "0.png").rename(train / "bee" / "9.png"),
    ],
    ids=["another image", "one less", "one more", "renamed"],
)
def test_a_changed_source_is_decoded_anew(folder, cache, decoded, change):
    load(folder, cache)
    files = sorted(cache.iterdir())
    change(folder / "train")
    data, log = load(folder, cache)
    assert f"train: the images in {folder} have changed, decoding them anew" == log
    assert same(data, load_data("folder", folder))
    assert sorted(cache.iterdir()) == files  # in the place of the old ones
    count = len(decoded)
    assert load(folder, cache)[1] == ""
    assert len(decoded) == count


@pytest.mark.parametrize("replace", ["rename", "overwrite"])
def test_a_replaced_file_of_the_same_size_and_time_is_noticed(folder, cache, replace):
    path, other = folder / "train" / "cow" / "0.bmp", folder / "other.bmp"
    write_image(other, seed=99)
    assert other.stat().st_size == path.stat().st_size
    before = path.stat()
    load(folder, cache)
    if replace == "rename":
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        other.replace(path)
    else:
        path.write_bytes(other.read_bytes())
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    data, log = load(folder, cache)
    assert "have changed" in log
    assert same(data, load_data("folder", folder))


def damages():
    yield "truncated", lambda content: content[: len(content) // 2]
    yield "empty", lambda content: b""
    yield "other", lambda content: b"something else" * 100
    for where, place in (("header", 40), ("classes", None), ("labels", -12 * 192 - 3), ("pixels", -1)):

        def flip(content, place=place):
            content = bytearray(content)
            content[content.index(b'"bee') + 1 if place is None else place] ^= 1
            return bytes(content)

        yield where, flip


@pytest.mark.parametrize("damage", [pytest.param(d, id=name) for name, d in damages()])
def test_a_damaged_cache_is_noticed_and_made_anew(folder, cache, damage):
    whole, _ = load(folder, cache)
    path = train_file(cache)
    before = path.read_bytes()
    path.unlink()  # what is mapped stays as it was
    path.write_bytes(damage(before))
    data, log = load(folder, cache)
    assert f"{path} is damaged (" in log
    assert "decoding the images anew" in log
    assert same(data, whole)
    assert path.read_bytes() == before
    assert load(folder, cache)[1] == ""


def test_choices_have_caches_of_their_own(folder, cache, decoded):
    whole, _ = load(folder, cache)
    some, _ = load(folder, cache, limit_train=6, seed=1)
    other, _ = load(folder, cache, limit_train=6, seed=2)
    large, _ = load(folder, cache, img_size=16)
    assert (len(some.train), large.img_size) == (6, 16)
    assert some.train.fingerprint() != other.train.fingerprint()
    count = len(decoded)
    assert same(load(folder, cache, limit_train=6, seed=1)[0], some)
    assert same(load(folder, cache, img_size=16)[0], large)
    held, _ = load(folder, cache, validation=3)
    assert held.train.pixels.shape[0] == 12
    assert len(decoded) == count
    assert same(load(folder, cache)[0], whole)


def test_cache_remembers_skipped_images(folder, cache):
    bad = folder / "train" / "bee" / "2.png"
    bad.write_bytes(b"")
    first, log = load(folder, cache, on_corrupt="skip")
    second, again = load(folder, cache, on_corrupt="skip")
    assert log == again == "train: skipped 1 of 12 images that could not be read"
    assert first.train.skipped == second.train.skipped == [str(bad)]
    assert second.train.labels.tolist() == [0] * 4 + [1] * 3 + [2] * 4
    assert same(first, second)
    assert second.train.pixels.shape[0] == 11
    with pytest.raises(InputError, match="`on_corrupt` skip"):
        load(folder, cache)


def test_new_labels_of_the_same_files_are_noticed(folder, cache):
    """A CSV file can give an image another class without a change of the image."""
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*.png"))[:4]

    def load_labels(labels):
        rows = [f"{path},{label},train" for path, label in zip(paths, labels, strict=True)]
        (folder / "labels.csv").write_text("\n".join(["path,label,split", *rows]))
        data = load_data(labels=folder / "labels.csv", splits=("train",), cache_dir=cache, img_size=8, log=str)
        return [data.classes[label] for label in data.train.labels]

    assert load_labels("abab") == list("abab")
    assert load_labels("bbaa") == list("bbaa")


def test_a_larger_limit_of_pixels_brings_skipped_images_back(folder, cache):
    write_image(folder / "train" / "bee" / "large.png", size=(40, 40))
    skip = {"on_corrupt": "skip", "img_size": 8}
    assert len(load(folder, cache, max_pixels=1000, **skip)[0].train) == 12
    assert len(load(folder, cache, max_pixels=2000, **skip)[0].train) == 13


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_two_processes_that_race_decode_once_between_them(folder, cache, decoded, monkeypatch, tmp_path_factory):
    decode = Preprocessing.decode
    monkeypatch.setattr(Preprocessing, "decode", lambda *a: (time.sleep(0.05), decode(*a))[1])

    def load_and_tell(path):
        data, _ = load(folder, cache, img_size=8)
        path.write_text(f"{len(decoded)} {data.train.fingerprint()} {data.test.fingerprint()}")

    told = [tmp_path_factory.mktemp("told") / str(i) for i in range(2)]
    processes = [fork(partial(load_and_tell, path)) for path in told]
    assert [exit_status(process) for process in processes] == [0, 0]
    (one, *prints), (other, *again) = (path.read_text().split() for path in told)
    assert int(one) + int(other) == 18
    data, log = load(folder, cache)
    assert log == ""
    assert [str(data.train.fingerprint()), str(data.test.fingerprint())] == prints == again


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_process_that_is_killed_leaves_nothing_in_the_way(folder, cache, decoded, monkeypatch):
    decode = Preprocessing.decode

    def deadly(*args):
        if len(decoded) >= 15:
            os.kill(os.getpid(), signal.SIGKILL)
        return decode(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Preprocessing, "decode", deadly)
        assert exit_status(fork(partial(load, folder, cache))) == -signal.SIGKILL
    assert any(path.suffix == ".tmp" for path in cache.iterdir())
    data, log = load(folder, cache)
    assert log == ""
    assert same(data, load_data("folder", folder))
    assert not any(path.suffix == ".tmp" for path in cache.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_cache_file_that_cannot_be_written_is_skipped(folder, cache):
    with file_limit(1500):
        limited, log = load(folder, cache)
    assert log.startswith(f"train: no cache of the decoded images in {cache} (File too large)")
    assert same(limited, load_data("folder", folder))
    assert not list(cache.glob("*train*.tmp"))
    assert not list(cache.glob("*train*.safetensors"))


def test_cache_on_a_full_disk_is_skipped_before_decoding(folder, cache, decoded, monkeypatch):
    usage = cache_module.shutil.disk_usage
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: usage(path)._replace(free=1000))
    data, log = load(folder, cache)
    assert "MB needed, 0.0 MB free); decoding into memory" in log
    assert len(data.train) == 12
    assert len(decoded) == 18


def test_cache_folder_that_cannot_be_made_is_skipped(folder, cache):
    cache.write_text("a file")
    data, log = load(folder, cache)
    assert f"train: no cache of the decoded images in {cache} (" in log
    assert len(data.train) == 12


def test_images_larger_than_the_memory_are_mapped(folder, cache, monkeypatch):
    monkeypatch.setattr(cache_module, "available_memory", lambda: 1000)
    with pytest.raises(InputError, match="available: give a `cache_dir` on a disk with room"):
        load(folder, "none")
    data, _ = load(folder, cache, validation=3)
    assert (len(data.train), len(data.validation), len(data.test)) == (9, 3, 6)


def test_cache_folder_defaults(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXV_CACHE")
    assert cache_folder(None) == tmp_path / "cxv"
    monkeypatch.setenv("CXV_CACHE", str(tmp_path / "own"))
    assert cache_folder(None) == tmp_path / "own"
    assert cache_folder("given") == Path("given")
    assert cache_folder("none") is None
    monkeypatch.setenv("CXV_CACHE", "none")
    assert cache_folder(None) is None


@pytest.mark.parametrize("home", [None, ""])
def test_without_a_home_directory_there_is_no_cache_and_one_line(folder, monkeypatch, home):
    for name in ("CXV_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])  # a container's user without a name
    log = []
    data = load_data("folder", folder, log=log.append)
    assert len(data.train) == 12
    assert log == ["no cache of the decoded images, as there is no home directory; `cache_dir` gives another one"]


# --- cxv cache


def test_cache_command_lists_and_clears(folder, cache, capsys):
    load(folder, cache)
    load(folder, cache, img_size=(4, 6))
    (cache / "notes.safetensors").write_text("someone else's")
    (cache / "x-train-4x6-0123abcd.tmp").write_text("of a process that was killed")
    assert main(["cache", "list", "--cache-dir", str(cache)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert sum(line.endswith(f": 12 train images of {folder}") for line in lines) == 2
    assert sum(line.endswith(f": 6 test images of {folder}") for line in lines) == 2
    assert re.fullmatch(rf"4 files, 0\.0 MB in {re.escape(str(cache))}", lines[-1])
    with FileLock(train_file(cache).with_suffix(".lock")):  # as a process that writes it
        assert main(["cache", "clear", "--cache-dir", str(cache)]) == 0
    assert "deleted 4 files, 0.0 MB, in" in (out := capsys.readouterr().out)
    assert "another process writes 1, which are kept" in out
    assert main(["cache", "clear", "--cache-dir", str(cache)]) == 0
    assert "deleted 1 files" in capsys.readouterr().out
    assert [path.name for path in cache.iterdir()] == ["notes.safetensors"]
    assert main(["cache", "list", "--cache-dir", "none"]) == 2
    assert "there is no cache" in capsys.readouterr().err
