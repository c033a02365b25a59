"""Fine-tuning, augmentation by torchvision, imbalanced classes, the time limit: each alone. How they resume: RUNS."""

import csv
import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import WeightedRandomSampler
from torchvision.transforms import v2
from training_support import TINY, assert_same_run, before_batch, curve, resume, run

from cxv import cli
from cxv.checkpoint import read_checkpoint
from cxv.data import load_data
from cxv.data.augment import BatchMix, PerImage, seeded
from cxv.training import InputError, TrainConfig, train, train_seeds
from cxv.training import engine as engine_module
from cxv.training import interrupt as interrupt_module
from cxv.training.config import seconds

ONE = {"optimizer": "adamw", "epochs": 1, "sgd_epochs": None}


# --- fine-tuning


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_frozen_layers_stay_as_they_are_and_have_no_gradient(tmp_path, monkeypatch, fused):
    """The statistics of a batch norm too, and the optimizer has no state of them."""
    small = ONE | {"model": "cpv-2/2", "model_args": {"norm": "batch"}, "fused": fused}
    run(tmp_path / "first", **small)
    modes, update = [], engine_module.Engine._update_weights

    def recorded(engine):
        modes.append({name: module.training for name, module in engine.model.named_modules()})
        frozen = [p for name, p in engine.model.named_parameters() if name.startswith(("stem", "layers.0"))]
        assert all(p.grad is None for p in frozen)
        update(engine)
        assert not any(p in engine.opt.state for p in frozen)
        assert len(engine.opt.state) == len(list(engine.model.parameters())) - len(frozen)

    monkeypatch.setattr(engine_module.Engine, "_update_weights", recorded)
    _, log = run(tmp_path / "tuned", **small, init=tmp_path / "first", freeze=1)
    assert "stem and 1 layers frozen" in log
    first, tuned = (read_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("first", "tuned"))
    same = {name for name in first if torch.equal(first[name], tuned[name])}
    assert same == {name for name in first if name.startswith(("stem", "layers.0"))} | {"layers.1.attn.projection"}
    norms = [(mode["layers.0.conv_norm.norm"], mode["layers.1.conv_norm.norm"]) for mode in modes]
    assert norms == [(False, True)] * 3


def test_freeze_of_a_hybrid_has_its_token_and_positions(tmp_path):
    small = ONE | {"model": "hybrid-vip-1/2", "seed": 1}
    run(tmp_path / "first", **small)
    run(tmp_path / "tuned", **small, init=tmp_path / "first", freeze=0)
    first, tuned = (read_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("first", "tuned"))
    same = {name.split(".")[0] for name in first if torch.equal(first[name], tuned[name])}
    assert {"stem", "cls_token", "pos_embed"} <= same
    assert "head" not in same


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"freeze": 1}, "`freeze`: .* random weights: give `init` too"),
        ({"freeze": 2, "init": True}, "`freeze`: expected at most 1, the layers of the model, got 2"),
        ({"freeze": 0, "init": True, "model": "fnet-1"}, "`freeze`: .* has no stem and layers of cxv"),
        ({"class_weights": "sqrt"}, "`class_weights`: expected one of balanced, got 'sqrt'"),
        ({"color_jitter": -1.0}, "`color_jitter`: expected a finite number above 0"),
        ({"random_erasing": 1.5}, "`random_erasing`: expected more than 0 and at most 1, got 1.5"),
        ({"mixup": 0.0}, "`mixup`: expected a finite number above 0"),
        ({"max_time": "8 hours"}, "`max_time`: expected seconds, or a number with s, m, h or d, as 90m or 8h, got 8 h"),
        ({"max_time": 0}, "`max_time`: expected seconds"),
    ],
)
def test_bad_arguments_are_named_and_write_nothing(tmp_path, kwargs, message):
    if "init" in kwargs:
        model = {name: value for name, value in kwargs.items() if name == "model"}
        run(tmp_path / "first", **ONE, **model)
        kwargs = kwargs | {"init": tmp_path / "first"}
    with pytest.raises(InputError, match=message):
        run(tmp_path / "a", **kwargs)
    assert not (tmp_path / "a").exists()


# --- augmentation


def test_each_image_is_transformed_by_its_own_draws():
    transform = v2.Compose([v2.ColorJitter(0.4, 0.4, 0.4), v2.RandomErasing(0.5, value=127.5)])
    images, augment = torch.randint(256, (30, 3, 12, 12), dtype=torch.uint8), PerImage(transform, seed=4)
    draws, state = augment.draws(30, epoch=2), torch.get_rng_state()
    found = augment(images, draws)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found, torch.cat([augment(images[i : i + 7], draws[i : i + 7]) for i in range(0, 30, 7)]))
    for image, seed, out in zip(images, draws.flatten().tolist(), found, strict=True):
        with seeded(seed):
            assert torch.equal(transform(image), out)
    erased = (found == 127).flatten(2).sum(-1).min(1).values >= 3
    assert 5 < erased.sum() < 25
    assert len(draws.unique()) == 30
    assert torch.equal(draws, augment.draws(30, epoch=2))
    for other in (augment.draws(30, epoch=3), PerImage(transform, seed=5).draws(30, epoch=2)):
        assert not (draws == other).any()


@pytest.mark.parametrize("kind", [v2.MixUp, v2.CutMix])
def test_mixed_batches_depend_on_their_number_alone(kind):
    mix, images, labels = BatchMix(kind(num_classes=5), seed=1), torch.rand(6, 1, 8, 8), torch.arange(6) % 5
    x, y = mix(images, labels, 3, 7)
    with seeded(0):
        again = mix(images, labels, 3, 7)
    assert torch.equal(x, again[0])
    assert torch.equal(y, again[1])
    assert torch.equal(y.sum(1), torch.ones(6))
    assert not torch.equal(x, mix(images, labels, 3, 8)[0])
    assert not torch.equal(x, BatchMix(kind(num_classes=5), seed=2)(images, labels, 3, 7)[0])


def test_a_run_augments_and_mixes_by_torchvision_and_post_training_does_not(tmp_path, monkeypatch):
    seen, cross_entropy = [], F.cross_entropy

    def recorded(logits, target, *args, **kwargs):
        if logits.requires_grad:
            seen.append(target.ndim)
        return cross_entropy(logits, target, *args, **kwargs)

    monkeypatch.setattr(engine_module.F, "cross_entropy", recorded)
    options = {"color_jitter": 0.4, "random_erasing": 0.25, "mixup": 0.2, "cutmix": 1.0, "epochs": 1, "sgd_epochs": 0}
    _, log = run(tmp_path / "a", **options, rand_augment=(1, 1), post_train=True)
    assert seen == [2] * 3 + [1] * 3
    assert "color jitter 0.4, random erasing 0.25, MixUp 0.2, CutMix 1.0" in log
    run(tmp_path / "b", epochs=1, sgd_epochs=0)
    for name, value in options.items():
        if name not in ("epochs", "sgd_epochs"):
            run(tmp_path / name, **{name: value}, epochs=1, sgd_epochs=0)
            assert curve(tmp_path / name)[0]["train_loss"] != curve(tmp_path / "b")[0]["train_loss"], name


# --- imbalanced classes


@pytest.fixture
def imbalanced(monkeypatch):
    """Digits of which one class has an eighth of its images."""

    def load(*args, **kwargs):
        data = load_data(*args, **kwargs)
        labels = data.train.labels
        zeros = (labels == 0).nonzero().flatten()
        keep = torch.ones(len(labels), dtype=torch.bool)
        keep[zeros[len(zeros) // 8 :]] = False
        data.splits["train"] = data.train.subset(keep.nonzero().flatten())
        return data

    monkeypatch.setattr("cxv.training.trainer.load_data", load)
    return load("digits", limit_train=400).train.labels


def test_balanced_class_weights_are_scikit_learns(imbalanced, tmp_path, monkeypatch):
    compute = pytest.importorskip("sklearn.utils.class_weight").compute_class_weight
    expected = torch.tensor(compute("balanced", classes=np.arange(10), y=imbalanced.numpy()))
    weights, cross_entropy = [], F.cross_entropy

    def recorded(logits, target, weight=None, **kwargs):
        loss = cross_entropy(logits, target, weight, **kwargs)
        if logits.requires_grad:
            each = cross_entropy(logits, target, reduction="none", label_smoothing=0.0)
            torch.testing.assert_close(loss, (each * weight[target]).sum())
            weights.append(weight)
        return loss

    monkeypatch.setattr(engine_module.F, "cross_entropy", recorded)
    run(tmp_path / "a", limit_train=400, class_weights="balanced", epochs=1, sgd_epochs=0)
    torch.testing.assert_close(weights[0].double(), expected, rtol=1e-6, atol=0)
    assert float((weights[0][imbalanced]).mean()) == pytest.approx(1)


def test_balanced_sampling_draws_as_torchs_sampler_and_augments_each_draw(imbalanced, tmp_path, monkeypatch):
    drawn, batches = [], engine_module.batches

    def recorded(data, *args, **kwargs):
        for x, y in batches(data, *args, **kwargs):
            if "augment" in kwargs:
                drawn.append((kwargs["epoch"], x, y))
            yield x, y

    monkeypatch.setattr(engine_module, "batches", recorded)
    run(tmp_path / "a", limit_train=400, balanced_sampling=True, random_crop=2, epochs=2, sgd_epochs=0)
    weights = 1 / imbalanced.bincount()[imbalanced]
    generator = torch.Generator().manual_seed(0)
    for epoch in (1, 2):
        order = list(WeightedRandomSampler(weights, len(imbalanced), generator=generator))
        labels = torch.cat([y for n, _, y in drawn if n == epoch])
        images = torch.cat([x for n, x, _ in drawn if n == epoch])
        assert torch.equal(labels, imbalanced[order])
        assert labels.bincount().min() > 15  # of 36; of the class with 5 images too
        assert len(images[labels == 0].unique(dim=0)) > 10


# --- the time limit


class Clock:
    """A clock that stands still, until it is set past every deadline."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(interrupt_module.time, "monotonic", lambda: self.now)

    def set(self):
        self.now = 1e9


def test_durations():
    found = [seconds(text) for text in ("3600", "90m", "8h", "1.5h", "2d", "20s", 3600, 0.5)]
    assert found == [3600, 5400, 28800, 5400, 172800, 20, 3600, 0.5]
    assert [seconds(text) for text in ("", "h", "-1", "8 h", "nan", "1h30m")] == [None] * 6


@pytest.mark.parametrize(
    ("epoch", "split", "batch", "done"),
    [
        (2, "train", 1, "1 and 1 batches of the next"),
        (2, "test", 0, "2"),
        (1, "train", 2, "0 and 2 batches of the next"),
    ],
    ids=["batch", "evaluation", "first"],
)
def test_max_time_saves_the_run_and_resume_is_bit_exact(tmp_path, monkeypatch, epoch, split, batch, done):
    run(tmp_path / "whole")
    clock = Clock(monkeypatch)
    before_batch(monkeypatch, epoch, batch, clock.set, split)
    result, log = run(tmp_path / "a", max_time="90m")
    assert not result.finished
    assert (result.best_top1 is None) == (epoch == 1)
    assert f"stopped by `max_time` 90m; epoch {done} is saved: go on with  cxv train --resume {tmp_path / 'a'}" in log
    monkeypatch.undo()
    assert resume(tmp_path / "a")[0].finished
    assert_same_run(tmp_path / "a", tmp_path / "whole")


def test_max_time_ends_the_command_without_an_error(tmp_path, capsys):
    flags = itertools.chain.from_iterable((f"--{k.replace('_', '-')}", str(v)) for k, v in TINY.items())
    assert cli.main(["train", *flags, "--output", str(tmp_path / "a"), "--max-time", "0.000001"]) == 0
    assert "stopped by --max-time 0.000001; epoch 0 is saved" in capsys.readouterr().out
    assert not curve(tmp_path / "a")


def test_max_time_is_of_all_seeds_together(tmp_path, monkeypatch):
    small = {**TINY, "epochs": 1, "sgd_epochs": 0, "seeds": (0, 1)}
    clock, lines = Clock(monkeypatch), []
    before_batch(monkeypatch, 2, 1, clock.set)
    config = TrainConfig(**small, output=str(tmp_path / "a"), max_time=3600)
    assert train_seeds(config, log=lines.append) == {}
    assert lines[-1].startswith("and the other seeds after it with  cxv train --resume")
    assert not (tmp_path / "a" / "summary.json").exists()
    monkeypatch.undo()
    assert train_seeds(TrainConfig(output=str(tmp_path / "a"), resume=True), log=str)["runs"].keys() == {"0", "1"}
    run(tmp_path / "b", epochs=1, sgd_epochs=0, seed=1)
    assert_same_run(tmp_path / "a" / "seed-1", tmp_path / "b")


# --- the table


def test_metrics_csv_has_the_numbers_of_metrics_jsonl(tmp_path):
    run(tmp_path / "a", validation=20, epochs=2, sgd_epochs=0)
    train(TrainConfig(output=str(tmp_path / "a"), resume=True, sgd_epochs=1), log=str)
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    table = list(csv.DictReader((tmp_path / "a" / "metrics.csv").read_text().splitlines()))
    assert len(table) == 3
    names = {name for row in rows for name in row}
    assert [row.keys() for row in table] == [names] * 3
    for row, line in zip(rows, table, strict=True):
        assert line == {name: str(row.get(name, "")) for name in names}
