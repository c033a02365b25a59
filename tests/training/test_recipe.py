"""The paper's recipe: optimizers, augmentation and post-training, what selects, seeds, presets."""

import json
import statistics

import pytest
import torch
from training_support import AUGMENTED, TINY, assert_same_run, before_batch, curve, cut_power, resume, run

from cxv.checkpoint import read_checkpoint
from cxv.data import RandAugment, load_data
from cxv.training import InputError, TrainConfig, load_model, train, train_seeds
from cxv.training import config as config_module
from cxv.training import engine as engine_module
from cxv.training import trainer as trainer_module
from cxv.training.config import resolve
from cxv.training.seeds import has_seeds


def test_post_training_repeats_dualopt_on_clean_images(augmented):
    output, result, log = augmented
    rows = curve(output)
    assert [row["phase"] for row in rows] == ["adamw", "adamw", "sgd"] * 2
    assert [row["augmented"] for row in rows] == [True] * 3 + [False] * 3
    assert "post-training on clean images after epoch 3: SGD has reached `sgd_epochs` 1; reloaded the best" in log
    assert "epoch   1 RA-AdamW" in log
    assert "epoch   4 AdamW" in log
    assert result.epochs == 6
    assert read_checkpoint(output / "last.pt")["post_training"] is True


def test_each_phase_sees_the_images_it_should(tmp_path, monkeypatch):
    seen, batches = [], engine_module.batches

    def recorded(data, batch_size, device, generator=None, **kwargs):
        if generator is not None:
            seen.append((kwargs["augment"], kwargs["epoch"]))
        return batches(data, batch_size, device, generator, **kwargs)

    monkeypatch.setattr(engine_module, "batches", recorded)
    run(tmp_path / "a", **AUGMENTED, seed=5)
    augment = RandAugment(2, 9, seed=5)
    assert seen == [(augment, 1), (augment, 2), (augment, 3), (None, 4), (None, 5), (None, 6)]


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_resume_is_bit_exact_at_every_switch(augmented, tmp_path, monkeypatch, stop):
    """Stopped in the first epoch of each phase but the first."""
    output = tmp_path / "a"
    before_batch(monkeypatch, stop + 1, 1, cut_power)
    with pytest.raises(RuntimeError, match="the power is cut"):
        run(output, **AUGMENTED)
    monkeypatch.undo()
    torch.manual_seed(99)
    resume(output)
    assert len(curve(output)) == 6
    assert_same_run(output, augmented[0])


def test_post_training_can_be_added_to_a_run_that_is_over(augmented, tmp_path):
    output = tmp_path / "a"
    run(output, **{**AUGMENTED, "post_train": None})
    assert len(curve(output)) == 3
    train(TrainConfig(output=str(output), resume=True, post_train=True), log=str)
    assert_same_run(output, augmented[0])
    with pytest.raises(InputError, match="`post_train`: the run is post-training already"):
        train(TrainConfig(output=str(output), resume=True, post_train=False), log=str)


def test_validation_selects_and_the_test_set_is_evaluated_once_at_the_end(tmp_path, monkeypatch):
    """With the weights of the selected epoch; also after an interruption, and never again."""
    output, scores, evaluated = tmp_path / "a", iter([50.0, 70.0, 60.0, 60.0, 65.0, 64.0]), []
    evaluate = engine_module.evaluate

    def scripted(model, data, *args):
        evaluated.append(len(data))
        if len(data) == 40 and len(evaluated) == 7:
            raise KeyboardInterrupt
        return (1.0, next(scores)) if len(data) == 30 else evaluate(model, data, *args)

    monkeypatch.setattr(engine_module, "evaluate", scripted)
    with pytest.raises(KeyboardInterrupt):
        run(output, validation=30, patience=2, epochs=50, sgd_epochs=50)
    assert evaluated == [30] * 6 + [40]
    lines = []
    result = train(TrainConfig(output=str(output), resume=True), log=lines.append)
    assert evaluated == [30] * 6 + [40] * 2
    rows = curve(output)
    assert [row["phase"] for row in rows] == ["adamw"] * 4 + ["sgd"] * 2  # patience counts validation's top-1
    assert (result.best_top1, result.best_epoch) == (70.0, 2)
    assert [row["epoch"] for row in rows if "test_top1" in row or "test_loss" in row] == [2]
    data = load_data("digits", limit_train=96, limit_test=40, validation=30)
    model, checkpoint = load_model(output)
    loss, top1 = evaluate(model, data.test, 32)
    assert (rows[1]["test_loss"], rows[1]["test_top1"]) == (loss, top1)
    assert (checkpoint["epoch"], curve(output)[1]["test_loss"]) == (2, checkpoint["history"][-1]["test_loss"])
    summary = {"best_validation": {"epoch": 2, "test_top1": top1, "validation_top1": 70.0}}
    assert result.summary == json.loads((output / "summary.json").read_text()) == summary
    log = "\n".join(lines)
    assert f"test top-1: {top1:.2f} % (epoch 2), evaluated once, at the best validation top-1 70.00 %" in log
    assert "96 training, 30 validation and 40 test images" in log
    train(TrainConfig(output=str(output), resume=True), log=str)
    assert len(evaluated) == 8


def test_validation_again_after_more_epochs_scores_the_new_selection_alone(tmp_path):
    run(tmp_path / "a", validation=30, epochs=1, sgd_epochs=0)
    assert "test_top1" in curve(tmp_path / "a")[0]
    train(TrainConfig(output=str(tmp_path / "a"), resume=True, epochs=3, sgd_epochs=2), log=str)
    run(tmp_path / "b", validation=30)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert sum("test_top1" in row for row in curve(tmp_path / "a")) == 1


@pytest.mark.parametrize(("optimizer", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_one_optimizer_alone_equals_torch(tmp_path, monkeypatch, optimizer, kind):
    made, make = [], trainer_module.make_optimizer
    monkeypatch.setattr(trainer_module, "make_optimizer", lambda *a: made.append(make(*a)) or made[-1])
    _, log = run(tmp_path / "a", optimizer=optimizer, lr=0.02, sgd_epochs=None)
    assert [(row["phase"], row["lr"]) for row in curve(tmp_path / "a")] == [(optimizer, 0.02)] * 3
    assert type(made[0].optimizer) is kind
    assert f"finished: {config_module.NAMES[optimizer]} has reached `epochs` 3" in log
    assert "reloaded" not in log
    train(TrainConfig(output=str(tmp_path / "a"), resume=True, epochs=4), log=str)
    assert len(curve(tmp_path / "a")) == 4
    with pytest.raises(InputError, match="`epochs`: 3, but the run has done 4 epochs of"):
        train(TrainConfig(output=str(tmp_path / "a"), resume=True, epochs=3), log=str)


# --- presets


def resolved(**kwargs):
    return resolve(TrainConfig(**kwargs))[0]


def test_recipes_are_presets_and_explicit_arguments_win():
    paper = resolved(recipe="paper", data="cifar10", model="cnv-5/4")
    assert (paper.optimizer, paper.epochs, paper.sgd_epochs, paper.patience) == ("dualopt", 300, 100, 20)
    assert (paper.batch_size, paper.lr, paper.sgd_lr, paper.precision) == (128, 1e-3, 1e-3, "fp32")
    assert (paper.rand_augment, paper.post_train, paper.validation) == (None, False, None)
    assert resolved(recipe="paper").epochs == 300  # digits' own 60 give way
    for model, pair in (("cnv-5/4", (1, 1)), ("CPV-2/4", (1, 1)), ("cltv-5/4", (3, 3))):
        config = resolved(recipe="paper-augmented", model=model, data="cifar10")
        assert (config.rand_augment, config.post_train) == (pair, True)
    own = {"rand_augment": (2, 5), "post_train": False, "epochs": 7, "lr": 0.1, "batch_size": 8, "patience": 3}
    config = resolved(recipe="paper-augmented", model="vit-10/4", **own)
    assert {k: getattr(config, k) for k in own} == own
    assert config.sgd_epochs == 100
    alone = resolved(recipe="paper", optimizer="adamw")
    assert (alone.epochs, alone.sgd_epochs, alone.sgd_lr) == (300, None, None)


def test_model_args_reach_the_model_and_its_checkpoint(tmp_path):
    own = {"stem_convs": 3, "norm": "batch"}
    run(tmp_path / "a", model_args=own, epochs=1, sgd_epochs=0)
    assert own.items() <= read_checkpoint(tmp_path / "a" / "best.pt")["model_kwargs"].items()
    model, _ = load_model(tmp_path / "a")
    assert (sum(isinstance(m, torch.nn.Conv2d) for m in model.stem), type(model.layers[0].conv_norm.norm).__name__) == (
        3,
        "BatchNorm2d",
    )
    again = TrainConfig(output=str(tmp_path / "a"), resume=True, epochs=2, model_args=own)
    assert train(again, log=str).epochs == 2
    with pytest.raises(InputError, match=r"`resume`: .* other arguments: `model_args` "):
        train(TrainConfig(output=str(tmp_path / "a"), resume=True, model_args={"stem_convs": 1}), log=str)


@pytest.mark.parametrize(
    ("model_args", "message"),
    [
        ({"stem": 3}, "`model_args` stem: cpv-1/2 has no such argument"),
        ({"stem_convs": 4}, "`model` cpv-1/2: stem_convs must be one of 1, 2, 3, got 4"),
        ({"stem_stride": "two"}, "`model` cpv-1/2: stem_stride must be .*'two'"),
        ({"num_classes": 3}, "`model_args` num_classes: it comes from the data"),
        ({"embed_dim": 3}, "`model_args` embed_dim: give `embed_dim`"),
    ],
)
def test_bad_model_args_are_named(tmp_path, model_args, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path / "a", model_args=model_args)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"recipe": "papr"}, "`recipe`: expected one of paper, paper-augmented, modern, got 'papr'"),
        (
            {"recipe": "paper-augmented", "model": "vit-10/4"},
            "`recipe` paper-augmented: .* vit-10/4: give `rand_augment`",
        ),
        ({"optimizer": "adam"}, "`optimizer`: expected one of dualopt, adamw, muon, sgd, got 'adam'"),
        ({"optimizer": "sgd", "sgd_lr": 0.1}, "`sgd_lr`: of DualOpT's second phase, .* is sgd, .*: give `lr`"),
        ({"optimizer": "adamw", "sgd_epochs": 3}, "`sgd_epochs`: .*: give `epochs`"),
        ({"optimizer": "sgd", "epochs": 0}, "`epochs` is 0: nothing to train"),
        ({"rand_augment": (0, 1)}, "`rand_augment`: expected OPS of at least 1 and MAGNITUDE from 0 to 30, got 0,1"),
        ({"rand_augment": (1, 31)}, "`rand_augment`: .* got 1,31"),
        ({"post_train": True}, "`post_train`: .*give `rand_augment` too"),
    ],
)
def test_bad_recipes_are_named(kwargs, message):
    with pytest.raises(InputError, match=message):
        resolved(**kwargs)


def test_a_run_from_before_these_arguments_goes_on(augmented, tmp_path):
    output = tmp_path / "a"
    run(output, epochs=2, sgd_epochs=0)
    checkpoint = torch.load(output / "last.pt", weights_only=True)
    del checkpoint["post_training"], checkpoint["scheduler"]
    new = ("recipe", "optimizer", "rand_augment", "post_train", "validation", "seeds", "init", "hflip", "random_crop")
    new += ("schedule", "warmup_epochs", "weight_decay", "label_smoothing", "ema_decay", "progressive", "recompute")
    checkpoint["args"] = {k: v for k, v in checkpoint["args"].items() if k not in new}
    checkpoint["history"] = [{k: v for k, v in row.items() if k != "augmented"} for row in checkpoint["history"]]
    torch.save(checkpoint, output / "last.pt")
    train(TrainConfig(output=str(output), resume=True, epochs=3, sgd_epochs=2, optimizer="dualopt"), log=str)
    assert [row["phase"] for row in curve(output)] == ["adamw"] * 3 + ["sgd"] * 2


# --- seeds


def test_seeds_train_in_folders_and_are_summarized(tmp_path):
    root, lines = tmp_path / "a", []
    config = TrainConfig(**{**TINY, "epochs": 1, "sgd_epochs": 1}, seeds=(0, 1, 5), output=str(root), validation=20)
    total = train_seeds(config, log=lines.append)
    assert total == json.loads((root / "summary.json").read_text())
    assert sorted(path.name for path in root.iterdir()) == ["seed-0", "seed-1", "seed-5", "summary.json"]
    for key in ("best_validation",):
        values = [total["runs"][seed][key]["test_top1"] for seed in ("0", "1", "5")]
        each = [json.loads((root / f"seed-{seed}" / "summary.json").read_text()) for seed in (0, 1, 5)]
        assert values == [summary[key]["test_top1"] for summary in each]
        assert total[key] == {"best": max(values), "mean": statistics.fmean(values), "sd": statistics.stdev(values)}
    run(tmp_path / "alone", epochs=1, sgd_epochs=1, seed=5, validation=20)
    assert_same_run(root / "seed-5", tmp_path / "alone")
    text = "\n".join(lines)
    found = total["best_validation"]
    assert (
        f"test top-1 over 3 seeds, at the best validation: mean {found['mean']:.2f} ± {found['sd']:.2f} %, "
        f"best {found['best']:.2f} %"
    ) in text
    with pytest.raises(InputError, match=r"`output`: .* holds other runs \(seed-0, seed-1, seed-5\); give `resume`"):
        train_seeds(config, log=str)
    with pytest.raises(InputError, match=r"`resume`: .* other arguments: `seeds`"):
        train_seeds(TrainConfig(output=str(root), resume=True, seeds=(0, 1)), log=str)
    with pytest.raises(InputError, match="`seeds`: expected different whole numbers, at least 0, got 0,0"):
        train_seeds(TrainConfig(output=str(tmp_path / "b"), seeds=(0, 0)), log=str)


def test_seeds_go_on_where_they_were_stopped(tmp_path, monkeypatch):
    small = {**TINY, "epochs": 2, "sgd_epochs": 0}
    evaluate, calls = engine_module.evaluate, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 4:  # in the second epoch of the second run
            raise KeyboardInterrupt
        return evaluate(*args)

    lines = []
    monkeypatch.setattr(engine_module, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_seeds(TrainConfig(**small, seeds=(3, 4, 5), output=str(tmp_path / "a")), log=lines.append)
    assert f"cxv train --resume {tmp_path / 'a'}" in lines[-1]
    monkeypatch.undo()
    assert not (tmp_path / "a" / "seed-5").exists()
    again = TrainConfig(output=str(tmp_path / "a"), resume=True)
    assert has_seeds(again)
    train_seeds(again, log=str)
    train_seeds(TrainConfig(**small, seeds=(3, 4, 5), output=str(tmp_path / "b")), log=str)
    for seed in (3, 4, 5):
        assert_same_run(tmp_path / "a" / f"seed-{seed}", tmp_path / "b" / f"seed-{seed}")
    assert (tmp_path / "a" / "summary.json").read_text() == (tmp_path / "b" / "summary.json").read_text()
