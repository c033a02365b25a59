"""The arguments for short training: flips and crops, schedules, weight decay, averages of weights, growing images."""

import json
import math
import signal

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_support import assert_same_run, before_batch, curve, cut_power, resume, run

import cxv
from cxv.checkpoint import read_checkpoint
from cxv.data import load_data
from cxv.data.augment import Chain, FlipCrop, RandAugment, default_stages, image_size_of, resize_batch
from cxv.models.registry import create_model
from cxv.training import InputError, TrainConfig, load_model, train
from cxv.training import engine as engine_module
from cxv.training.config import fit_to_data, resolve, to_dict
from cxv.training.optim import make_average, make_scheduler, weight_decay_groups

SGD = {"optimizer": "sgd", "sgd_epochs": None, "epochs": 3, "schedule": "cosine", "warmup_epochs": 0.5}
MODERN = {
    "recipe": "modern",
    "sgd_epochs": None,
    "hflip": True,
    "random_crop": 2,
    "limit_test": 40,
    "validation": 40,
    "precision": "fp32",
    "ema_decay": 0.9,
    "epochs": None,
    "progressive": ((4, 1), (8, 2)),
    "rand_augment": (1, 1),
    "recompute": False,
    "model_args": {"attn_eps": 0.0},
}
TUNED = {
    "init": True,
    "freeze": 0,
    "color_jitter": 0.4,
    "random_erasing": 0.5,
    "mixup": 0.4,
    "cutmix": 1.0,
    "class_weights": "balanced",
    "balanced_sampling": True,
    "batch_size": 8,
    "accumulate": 4,
    "epochs": 2,
    "sgd_epochs": 1,
}
RUNS = {"modern": MODERN, "sgd-cosine": SGD, "tuned": TUNED}


def resolved(**kwargs):
    return resolve(TrainConfig(output="there/is/nothing", **kwargs))[0]


@pytest.fixture(scope="module", params=RUNS, ids=str)
def whole(request, tmp_path_factory):
    """A run that nothing interrupts, and its arguments."""
    torch.set_num_threads(1)
    folder, options = tmp_path_factory.mktemp("runs"), RUNS[request.param]
    if "init" in options:
        run(folder / "first", epochs=1, sgd_epochs=0)
        options = options | {"init": str(folder / "first")}
    return folder / "whole", options, *run(folder / "whole", **options)


# --- flips and crops


@pytest.mark.parametrize(("hflip", "padding"), [(True, 0), (False, 2), (True, 3)], ids=["flip", "crop", "both"])
def test_flip_crop_equals_torchvision_for_each_image(hflip, padding):
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    images = torch.randint(256, (40, 3, 9, 7), dtype=torch.uint8)
    augment = FlipCrop(hflip, padding, seed=3)
    draws = augment.draws(40, epoch=2)
    result = augment(images, draws)
    for image, (flip, top, left), found in zip(images, draws.tolist(), result, strict=True):
        image = functional.horizontal_flip(image) if flip else image
        torch.testing.assert_close(found, functional.crop(functional.pad(image, padding), top, left, 9, 7))
    assert draws[:, 0].unique().tolist() == ([0, 1] if hflip else [0])
    assert draws[:, 1:].unique().tolist() == list(range(2 * padding + 1))


def test_flip_crop_draws_are_a_function_of_seed_and_epoch():
    draws = FlipCrop(True, 4, seed=1).draws(100, 1)
    assert torch.equal(draws, FlipCrop(True, 4, seed=1).draws(100, 1))
    assert not torch.equal(draws, FlipCrop(True, 4, seed=1).draws(100, 2))
    assert not torch.equal(draws, FlipCrop(True, 4, seed=2).draws(100, 1))


def test_chain_runs_its_steps_in_order():
    images = torch.randint(256, (8, 3, 9, 9), dtype=torch.uint8)
    first, second = FlipCrop(True, 2, seed=5), RandAugment(2, 9, seed=5)
    chain = Chain((first, second))
    expected = second(first(images, first.draws(8, 1)), second.draws(8, 1))
    assert torch.equal(chain(images, chain.draws(8, 1)), expected)


# --- the optimizer's groups, schedules, averages


@pytest.mark.parametrize(
    ("name", "kwargs", "still"),
    [("cpv-1/2", {"positions": "learned"}, {"pos_embed"}), ("hybrid-vip-1/2", {}, {"pos_embed", "cls_token"})],
    ids=["cpv", "hybrid"],
)
def test_weight_decay_is_of_matrices_alone(name, kwargs, still):
    model = create_model(name, embed_dim=16, img_size=8, **kwargs)
    decay, rest = weight_decay_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert decay["weight_decay"] == 0.1
    assert rest["weight_decay"] == 0.0
    decaying, still_ones = ({names[id(p)] for p in group["params"]} for group in (decay, rest))
    assert decaying | still_ones == set(names.values())
    modules = dict(model.named_modules())
    expected = {f"{n}.weight" for n, m in modules.items() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert decaying == expected
    assert still <= {name.rpartition(".")[2] for name in still_ones}


def rates(schedule, steps, **kwargs):
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=2.0)
    config = TrainConfig(schedule=schedule, lr=2.0, epochs=steps, **kwargs)
    scheduler, found = make_scheduler(optimizer, config, steps), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_schedules_rise_to_the_peak_and_fall():
    assert (
        make_scheduler(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1), TrainConfig(schedule="constant"), 9)
        is None
    )
    cosine = [1 + math.cos(math.pi * i / 8) for i in range(8)]
    assert rates("cosine", 8) == pytest.approx(cosine)
    warm = rates("cosine", 12, warmup_epochs=4.0)
    assert warm == pytest.approx([2 * (0.01 + 0.99 * i / 4) for i in range(4)] + cosine)
    one = rates("onecycle", 20)
    assert one.index(max(one)) == 5
    assert max(one) == pytest.approx(2.0)
    assert (one[0], one[-1]) == pytest.approx((2 / 25, 2 / 25e4))
    assert max(range(20), key=rates("onecycle", 20, warmup_epochs=11.0).__getitem__) == 10
    for schedule in ("cosine", "onecycle"):  # a warm-up that rounds up to all steps still leaves one after the peak
        assert max(rates(schedule, 3, warmup_epochs=2.6)) == pytest.approx(2.0)


def test_average_is_the_exponential_moving_average_and_copies_buffers():
    model = nn.BatchNorm1d(2)
    average, expected = make_average(model, 0.75), None
    for i in range(4):
        with torch.no_grad():
            model.weight.fill_(2.0**i)
            model.running_mean.fill_(i)
        average.update_parameters(model)
        expected = 2.0**i if expected is None else 0.75 * expected + 0.25 * 2.0**i
    assert average.module.weight.tolist() == pytest.approx([expected] * 2)
    assert average.module.running_mean.tolist() == [3.0, 3.0]
    assert make_average(model, None) is None


# --- growing images


def test_stages_cover_the_epochs():
    assert default_stages(32, 30) == ((16, 15), (24, 6), (32, 9))
    assert default_stages(8, 3) == ((4, 1), (8, 2))
    assert default_stages(8, 1) == ((8, 1),)
    assert [image_size_of(((4, 1), (8, 2)), epoch) for epoch in (1, 2, 3)] == [4, 8, 8]
    assert image_size_of(None, 1) is None


def test_resize_is_antialiased_and_keeps_the_range():
    images = torch.rand(2, 3, 8, 8)
    assert resize_batch(images, 8) is images
    expected = F.interpolate(images, size=(4, 4), mode="bilinear", antialias=True)
    assert torch.equal(resize_batch(images, 4), expected)
    torch.testing.assert_close(resize_batch(torch.ones(1, 1, 8, 8), 5), torch.ones(1, 1, 5, 5))


def test_stages_of_rectangles_keep_the_aspect_ratio(tmp_path):
    assert resize_batch(torch.ones(1, 1, 8, 12), 4).shape == (1, 1, 4, 6)
    assert resize_batch(torch.ones(1, 1, 30, 7), 1).shape == (1, 1, 4, 1)
    options = {"img_size": (8, 12), "recipe": "modern", "sgd_epochs": None, "epochs": 2, "precision": "fp32"}
    _, log = run(tmp_path / "a", **options)
    assert "random crops with 1 pixels of padding" in log
    assert json.loads((tmp_path / "a" / "args.json").read_text())["progressive"] == [[4, 1], [8, 1]]
    assert [row["img_size"] for row in read_checkpoint(tmp_path / "a" / "last.pt")["history"]] == [4, 8]
    with pytest.raises(InputError, match=r"`progressive`: 12 pixels, and the images have 8 \(`img_size`\)"):
        run(tmp_path / "b", **options | {"epochs": None, "progressive": ((12, 1),)})


# --- whole runs


def test_modern_run_trains_at_the_sizes_with_the_average_as_its_result(tmp_path, monkeypatch):
    sizes, smoothing = [], []
    forward, cross_entropy = cxv.CPV.forward, F.cross_entropy

    def seen(model, x):
        sizes.extend([x.shape[-1]] if model.training else [])
        return forward(model, x)

    def recorded(logits, y, **kwargs):
        smoothing.extend([kwargs["label_smoothing"]] if logits.requires_grad else [])
        return cross_entropy(logits, y, **kwargs)

    monkeypatch.setattr(cxv.CPV, "forward", seen)
    monkeypatch.setattr(engine_module.F, "cross_entropy", recorded)
    result, log = run(tmp_path / "a", **MODERN)
    rows = curve(tmp_path / "a")
    assert sizes == [4] * 3 + [8] * 6
    assert smoothing == [0.1] * 9
    assert [row["img_size"] for row in rows] == [4, 8, 8]
    assert [row["phase"] for row in rows] == ["muon"] * 3
    assert rows[0]["lr"] == pytest.approx(3e-3 / 25)
    for part in ("onecycle learning rate", "EMA 0.9", "1 epoch at 4 px", "horizontal flips", "at 8 px"):
        assert part in log
    last = read_checkpoint(tmp_path / "a" / "last.pt")
    assert last["num_averaged"] == 9
    assert any(not torch.equal(last["model"][k], last["training_model"][k]) for k in last["model"])
    assert torch.equal(last["model"]["layers.0.attn.projection"], last["training_model"]["layers.0.attn.projection"])
    groups = last["optimizer"]["optimizer"]["param_groups"]
    assert [(group["weight_decay"], group.get("muon", False)) for group in groups] == [
        (0.05, True),
        (0.05, False),
        (0.0, False),
    ]
    model, checkpoint = load_model(tmp_path / "a")
    data = load_data("digits", limit_train=96, limit_test=40, validation=40)
    assert engine_module.evaluate(model, data.validation)[1] == pytest.approx(result.best_top1)
    assert checkpoint["model_kwargs"]["recompute"] is False
    assert json.loads((tmp_path / "a" / "args.json").read_text())["progressive"] == [[4, 1], [8, 2]]


@pytest.mark.parametrize("stop", [0, 2])
def test_resume_is_bit_exact_after_a_kill_in_the_first_and_the_last_epoch(whole, tmp_path, monkeypatch, stop):
    output = tmp_path / "a"
    before_batch(monkeypatch, stop + 1, 1, cut_power)
    with pytest.raises(RuntimeError, match="the power is cut"):
        run(output, **whole[1])
    monkeypatch.undo()
    torch.manual_seed(99)
    resume(output)
    assert_same_run(output, whole[0])


def test_resume_is_bit_exact_after_an_interrupt_between_two_steps(whole, tmp_path, monkeypatch):
    output = tmp_path / "a"
    before_batch(monkeypatch, 2, 1, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run(output, **whole[1])
    monkeypatch.undo()
    assert read_checkpoint(output / "last.pt")["resume_state"]["step"] == 1
    resume(output)
    assert_same_run(output, whole[0])


def test_init_starts_from_the_weights_of_a_file(tmp_path, monkeypatch):
    """The arguments of the file's model hold where none are given, also after ``--resume`` without the file."""
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda optimizer, closure=None: None)
    one = {"optimizer": "adamw", "epochs": 1, "sgd_epochs": None, "seed": 5}
    run(tmp_path / "a", **one, model_args={"attn_eps": 0.0}, recompute=False)
    first = tmp_path / "first.safetensors"
    cxv.save_safetensors(tmp_path / "a", first)
    run(tmp_path / "b", **one | {"seed": 6}, embed_dim=None, init=first)
    first.unlink()
    train(TrainConfig(output=str(tmp_path / "b"), resume=True, epochs=2), log=str)
    a, b = (read_checkpoint(tmp_path / name / "last.pt") for name in "ab")
    assert all(torch.equal(b["model"][k], a["model"][k]) for k in a["model"])
    assert b["model_kwargs"] == a["model_kwargs"] | {"recompute": True}
    with pytest.raises(InputError, match=r"`init`: .*first\.safetensors: no such file or directory"):
        run(tmp_path / "c", **one, init=first)
    with pytest.raises(InputError, match=r"`init`: .*a checkpoint of cpv-1/2, and not of cltv-1/2"):
        run(tmp_path / "c", **one, init=tmp_path / "a", model="cltv-1/2")


def test_init_keeps_the_name_of_a_pretrained_model(tmp_path, monkeypatch):
    """A run of several seeds reads it again in another directory."""
    monkeypatch.chdir(tmp_path)
    assert to_dict(TrainConfig(init="cltv-5/4"))["init"] == "cltv-5/4"
    assert to_dict(TrainConfig(init="a.pt"))["init"] == str(tmp_path / "a.pt")


@pytest.mark.parametrize("whole", ["modern", "sgd-cosine"], indirect=True)
def test_resume_of_a_schedule_refuses_more_epochs(whole):
    with pytest.raises(InputError, match="other arguments: `epochs` "):
        train(TrainConfig(output=str(whole[0]), resume=True, epochs=9))


# --- arguments


def test_modern_recipe_is_a_preset():
    config = resolved(recipe="modern", data="cifar10", model="cltv-5/4")
    assert (config.optimizer, config.schedule, config.drop_rate) == ("muon", "onecycle", 0.0)
    assert (config.epochs, config.patience) == (30, 30)
    assert (config.hflip, config.precision) == (True, "bf16")
    fit_to_data(config, 32, 45000)
    assert (config.random_crop, config.ema_decay) == (4, 0.999)
    assert config.progressive == ((16, 15), (24, 6), (32, 9))
    assert resolved(recipe="modern", model="resnet-18").drop_rate is None
    digits = resolved(recipe="modern", data="digits", epochs=10)
    fit_to_data(digits, 8, 640)
    assert (digits.hflip, digits.random_crop, digits.ema_decay) == (False, 1, pytest.approx(0.8))
    assert resolved(recipe="modern", progressive=((8, 4), (16, 3))).epochs == 7
    assert resolved(recipe="modern", epochs=12, lr=0.1, patience=3).patience == 3
    assert resolved(recipe="modern", optimizer="sgd").weight_decay is None
    for phases in ({"optimizer": "dualopt"}, {"post_train": True, "rand_augment": (2, 9)}):
        config = resolved(recipe="modern", data="cifar10", schedule="constant", **phases)
        fit_to_data(config, 32, 45000)
        assert (config.random_crop, config.ema_decay, config.progressive) == (4, None, None)


def test_defaults_are_the_papers():
    config = resolved(data="cifar10")
    assert (config.schedule, config.hflip, config.label_smoothing, config.recompute) == ("constant", False, 0.0, True)
    for name in ("warmup_epochs", "weight_decay", "ema_decay", "progressive", "random_crop", "drop_rate"):
        assert getattr(config, name) is None
    assert config.patience == 20


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"schedule": "step"}, "`schedule`: expected one of constant, cosine, onecycle, got 'step'"),
        (
            {"schedule": "cosine", "optimizer": "dualopt"},
            "`schedule`: .*`optimizer` is dualopt: give adamw, muon or sgd",
        ),
        ({"ema_decay": 0.9, "optimizer": "dualopt"}, "`ema_decay`: .*`optimizer` is dualopt"),
        ({"progressive": ((8, 1),), "optimizer": "dualopt"}, "`progressive`: .*`optimizer` is dualopt"),
        ({"ema_decay": 0.9, "rand_augment": (1, 1), "post_train": True}, "`ema_decay`: .*`post_train` adds one"),
        ({"warmup_epochs": 1}, "`warmup_epochs`: .*give `schedule` cosine or onecycle"),
        ({"warmup_epochs": 5, "schedule": "cosine", "epochs": 5}, "`warmup_epochs`: .*less than `epochs` 5, got 5"),
        ({"weight_decay": -1.0}, "`weight_decay`: expected a finite number, at least 0, got -1.0"),
        ({"weight_decay": 0.1, "optimizer": "sgd"}, "`weight_decay`: AdamW's and Muon's, and `optimizer` is sgd"),
        ({"label_smoothing": 1.0}, "`label_smoothing`: expected at least 0 and less than 1, got 1.0"),
        ({"ema_decay": 1.0}, "`ema_decay`: expected more than 0 and less than 1, got 1.0"),
        ({"random_crop": 0}, "`random_crop`: expected at least 1, got 0"),
        ({"progressive": ((0, 1),)}, r"`progressive`: expected pairs .* at least 1 each, got \(\(0, 1\),\)"),
        ({"progressive": ((8, 1),), "epochs": 2}, "`progressive`: its 1 epochs are not `epochs` 2"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(InputError, match=message):
        resolved(**{"optimizer": "adamw", **kwargs})


def test_stages_that_the_data_or_the_model_cannot_have_are_named(tmp_path):
    with pytest.raises(InputError, match=r"`progressive`: 16 pixels, and the images have 8 \(`img_size`\)"):
        run(tmp_path / "a", optimizer="adamw", sgd_epochs=None, epochs=None, progressive=((16, 1),))
    learned = {"model_args": {"positions": "learned"}, "progressive": ((4, 1), (8, 1))}
    with pytest.raises(InputError, match="refuses an image of 1×4×4: learned positions"):
        run(tmp_path / "a", optimizer="adamw", sgd_epochs=None, epochs=None, **learned)
    assert not (tmp_path / "a").exists()
