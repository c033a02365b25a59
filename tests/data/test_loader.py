"""Datasets in memory, mapped or on a device, their subsets and batches."""

import re
import sys

import pytest
import torch

from cxv.data import cache as cache_module
from cxv.data import loader as loader_module
from cxv.data.augment import RandAugment
from cxv.data.datasets import balanced_subset
from cxv.data.loader import MEAN, STD, ImageSet, batches, load_data, normalize, to_device
from cxv.errors import InputError

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


@pytest.mark.parametrize("splits", ["test", ("val",), (), (["test"],)], ids=str)
def test_unknown_splits_are_named(splits):
    with pytest.raises(InputError, match=r"^splits: expected a sequence of 'train', 'validation', 'test', got "):
        load_data("digits", splits=splits)
    with pytest.raises(InputError, match=r"^`validation`: taken from the training images, and splits are \('test',\)"):
        load_data("digits", splits=("test",), validation=5)


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
    assert torch.equal(plain, normalize(data.images))
    assert not torch.equal(shuffled, plain)
    assert torch.equal(shuffled.flatten(1).sum(1).sort().values, plain.flatten(1).sum(1).sort().values)
    assert not torch.equal(shuffled, torch.cat([x for x, _ in batches(data, 16, generator=generator)]))
    generator.set_state(state)
    assert torch.equal(shuffled, torch.cat([x for x, _ in batches(data, 16, generator=generator)]))


def test_normalize_is_the_papers():
    x = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert torch.allclose(normalize(x), torch.tensor([-1.0, -0.6, 1.0]))
    assert x.tolist() == [0, 51, 255]


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


def test_limit_train_excludes_validation_images(folder):
    data = load_data("digits", limit_train=100, validation=50)
    assert (len(data.train), len(data.validation)) == (100, 50)
    data = load_data("folder", folder, validation=3)
    assert data.train.labels.bincount().tolist() == [3, 3, 3]
    assert data.validation.labels.bincount().tolist() == [1, 1, 1]
    with pytest.raises(InputError, match="`validation`: 10 of 12 training images leave a class without one to train"):
        load_data("folder", folder, validation=10)
    with pytest.raises(InputError, match=r"`validation`: expected a whole number of at least 1, or a share .* got 0"):
        load_data("folder", folder, validation=0)


def test_held_out_images_are_not_copied(folder):
    data = load_data("folder", folder, validation=3)
    assert data.train.pixels.data_ptr() == data.validation.pixels.data_ptr()
    whole = load_data("folder", folder).train
    rows = data.validation.rows
    assert torch.equal(data.validation.images, whole.images[rows])
    expected = ImageSet(whole.images[rows].clone(), whole.labels[rows]).fingerprint()
    assert data.validation.fingerprint() == data.validation.subset(torch.arange(3)).fingerprint() == expected
    assert torch.equal(data.validation.subset(torch.tensor([2, 0])).images, whole.images[rows[[2, 0]]])


# --- normalization, the device


def test_each_dataset_has_its_normalization_and_batches_apply_it(folder):
    own = {"mean": [0.1, 0.5, 0.25], "std": [0.5, 1.0, 2.0]}
    assert load_data("digits", limit_train=20, limit_test=20).normalization == {"mean": MEAN, "std": STD}
    data = load_data("folder", folder, normalization=own, validation=3)
    assert data.validation.normalization == own
    x = torch.cat([x for x, _ in batches(data.validation, 2)])
    pixels = data.validation.images / 255
    for c in range(3):
        assert torch.allclose(x[:, c], (pixels[:, c] - own["mean"][c]) / own["std"][c])


def test_a_set_on_the_device_gives_the_same_batches(folder):
    data = load_data("folder", folder, validation=3)
    placed = to_device(data, torch.device("cpu"), True)
    assert placed.train.pixels.shape[0] == len(placed.train) == 9  # those held out are not in it
    assert placed.train.rows is None
    assert to_device(data, torch.device("cpu"), None) is data
    for split in ("train", "validation", "test"):
        one, other = (
            list(batches(d.splits[split], 2, generator=torch.Generator().manual_seed(1))) for d in (data, placed)
        )
        assert all(torch.equal(x, v) and torch.equal(y, w) for (x, y), (v, w) in zip(one, other, strict=True))


def test_groups_of_batches_give_the_same_as_one_at_a_time(monkeypatch):
    data = load_data("digits", limit_train=50, splits=("train",)).train

    def drawn(group_bytes, skip):
        monkeypatch.setattr(loader_module, "GROUP_BYTES", group_bytes)
        augment, generator = RandAugment(2, 9), torch.Generator().manual_seed(3)
        return list(batches(data, 8, generator=generator, augment=augment, epoch=2, skip=skip))

    for skip in (0, 2, 3, 7):
        one, three = drawn(1, skip), drawn(3 * 8 * 64, skip)
        assert [len(y) for _, y in three] == [8, 8, 8, 8, 8, 8, 2][skip:]
        assert all(torch.equal(a, b) for x, y in zip(one, three, strict=True) for a, b in zip(x, y, strict=True))


def test_a_set_that_the_device_cannot_hold_is_refused(monkeypatch):
    data = load_data("digits", limit_train=20, limit_test=20)
    monkeypatch.setattr(cache_module, "available_memory", lambda: 1000)
    with pytest.raises(InputError, match="available"):
        to_device(data, torch.device("cpu"), True)
