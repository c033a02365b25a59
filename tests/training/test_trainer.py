"""The trainer and its checkpoints: the files of a run, accidents and resuming, refusals, steps."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from training_support import TIMES, TINY, Probe, assert_same_run, curve, run

import cxv
from cxv.checkpoint import atomic_write, pack_checkpoint, read_checkpoint
from cxv.data.loader import load_data
from cxv.models import registry
from cxv.training import InputError, TrainConfig, evaluate, load_model, train
from cxv.training import engine as engine_module
from cxv.training.interrupt import deferred_interrupts, interruptible


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupts."""
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("runs") / "whole"
    result, log = run(output)
    return output, result, log


# --- what a run writes


def test_files_of_a_run(whole):
    output, result, log = whole
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["phase"] for row in rows] == ["adamw"] * 3 + ["sgd"] * 2
    assert [row["lr"] for row in rows] == [3e-3] * 3 + [1e-3] * 2
    keys = {"train_loss", "train_top1", "test_loss", "test_top1", "best_top1", *TIMES}
    assert all(keys <= row.keys() for row in rows)
    assert rows[-1]["best_top1"] == max(row["test_top1"] for row in rows) == result.best_top1
    assert json.loads((output / "args.json").read_text())["batch_size"] == 32
    assert (output / "curves.png").read_bytes() == b"5 epochs of cpv-1/2 on digits"  # in place of the picture
    assert not list(output.glob(".*.tmp"))  # no temporary file is left
    assert f"best top-1 {result.best_top1:.2f} % at epoch {result.best_epoch} of 5" in log
    assert str(output) in log
    best = max(rows[:3], key=lambda row: (row["test_top1"], row["epoch"]))
    assert (
        f"switch to SGD after epoch 3: AdamW has reached `epochs` 3; reloaded the best weights, of epoch "
        f"{best['epoch']} ({best['test_top1']:.2f} %)"
    ) in log


def test_checkpoint_is_complete_and_loads_weights_only(whole):
    checkpoint = torch.load(whole[0] / "last.pt", weights_only=True)
    expected = {
        "model",
        "model_name",
        "model_kwargs",
        "classes",
        "img_size",
        "normalization",
        "optimizer",
        "rng",
    }
    assert expected | {"sampler", "scaler", "epoch", "history", "args"} <= checkpoint.keys()
    assert checkpoint["normalization"] == {"mean": 0.5, "std": 0.5}
    assert checkpoint["model_kwargs"]["use_fused"] is True
    assert checkpoint["optimizer"]["phase"] == "sgd"


def test_load_model_gives_the_reported_top1(whole):
    output, result, _ = whole
    model, checkpoint = load_model(output)
    assert not model.training
    assert checkpoint["epoch"] == result.best_epoch
    data = load_data("digits", limit_test=40, splits=("test",))
    assert evaluate(model, data.test, 32)[1] == result.best_top1
    assert evaluate(model, data.test, 7)[1] == result.best_top1  # exact, whatever the batches
    with torch.no_grad():
        logits = model(data.test.images.float() / 127.5 - 1)
    assert 100 * (logits.argmax(1) == data.test.labels).float().mean().item() == pytest.approx(result.best_top1)


def test_evaluate_takes_a_dataloader(whole):
    model, _ = load_model(whole[0])
    test = load_data("digits", limit_test=40, splits=("test",)).test
    loader = DataLoader(TensorDataset(test.images.float() / 127.5 - 1, test.labels), batch_size=16)
    assert evaluate(model.train(), loader) == pytest.approx(evaluate(model, test))
    assert model.training
    with pytest.raises(InputError, match=r"^data: expected a split, as load_data.* got a Data$"):
        evaluate(model, load_data("digits"))
    with pytest.raises(InputError, match=r"^data: expected at least one batch"):
        evaluate(model, [])


def test_unfused_is_passed_to_the_model_and_can_be_changed_on_loading(tmp_path, monkeypatch):
    seen = []
    create = registry.create_model
    monkeypatch.setattr(registry, "create_model", lambda name, **kw: (seen.append(kw), create(name, **kw))[1])
    run(tmp_path / "a", fused=False, epochs=1, sgd_epochs=0)
    load_model(tmp_path / "a", use_fused=True)
    assert [kw["use_fused"] for kw in seen] == [False, True]
    assert {"num_classes": 10, "in_chans": 1, "img_size": 8, "embed_dim": 16}.items() <= seen[0].items()


def test_switch_after_patience_is_logged_with_its_reason(tmp_path, monkeypatch):
    scripted = iter([(1.0, 50.0), (1.0, 60.0), (1.0, 40.0), (1.0, 40.0), (1.0, 61.0), (1.0, 0.0), (1.0, 0.0)])
    monkeypatch.setattr(engine_module, "evaluate", lambda *a: next(scripted))
    result, log = run(tmp_path / "a", patience=2, epochs=50, sgd_epochs=50)
    assert (
        "switch to SGD after epoch 4: AdamW has not improved top-1 for 2 epochs; "
        "reloaded the best weights, of epoch 2 (60.00 %)"
    ) in log
    assert "finished: SGD has not improved top-1 for 2 epochs" in log
    assert (result.best_top1, result.best_epoch, result.epochs) == (61.0, 5, 7)


def test_bf16_runs_the_forward_inside_autocast_and_the_loss_in_fp32(tmp_path, monkeypatch):
    made, losses = [], []
    cross_entropy = torch.nn.functional.cross_entropy

    def create(name, **kwargs):
        made.append(Probe(**kwargs))
        return made[-1]

    def recorded(logits, *args, **kwargs):
        losses.append(logits.dtype)
        return cross_entropy(logits, *args, **kwargs)

    monkeypatch.setattr(registry, "create_model", create)
    monkeypatch.setattr(engine_module.F, "cross_entropy", recorded)
    run(tmp_path / "a", precision="bf16", embed_dim=None, epochs=1, sgd_epochs=0)
    assert made[0].seen == {(t, torch.float32, torch.bfloat16) for t in (True, False)}
    assert set(losses) == {torch.float32}


# --- accidents

RANDOM = {
    "hflip": True,
    "rand_augment": (1, 1),
    "color_jitter": 0.4,
    "random_erasing": 0.5,
    "mixup": 0.4,
    "cutmix": 1.0,
}
RANDOM |= {"balanced_sampling": True, "class_weights": "balanced", "batch_size": 8, "accumulate": 4}


KILLS = {"first": ({}, 1, 0), "sgd": ({}, 5, 4), "random": (RANDOM, 2, 1)}  # options, epoch, finished epochs
# Forks a training for each case, which is killed before the second batch of its epoch. The tests' own process will not
# do: PyTorch refuses a backward pass in a fork of a process in which backward passes have started threads.
_KILLED = """
import os, signal, sys
import sklearn.datasets, sklearn.model_selection, torch._dynamo  # once
from pytest import MonkeyPatch
from training_support import before_batch, run
torch.set_num_threads(1)
for name, (options, epoch, _) in eval(sys.argv[1]).items():
    pid = os.fork()
    if pid == 0:
        before_batch(MonkeyPatch(), epoch, 1, lambda: os.kill(os.getpid(), signal.SIGKILL))
        run(f"{sys.argv[2]}/{name}", **options)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL, name
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder with the runs of ``KILLS`` as SIGKILL left them."""
    folder, tests = tmp_path_factory.mktemp("killed"), Path(__file__).parent.parent
    path = os.pathsep.join([str(tests), str(Path(cxv.__file__).parent.parent)])
    command = [sys.executable, "-c", _KILLED, repr(KILLS), str(folder)]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=True)
    return folder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("name", KILLS)
def test_kill_9_in_mid_epoch_then_resume_equals_the_unbroken_run(whole, killed, tmp_path, name):
    (options, _, left), output, unbroken = KILLS[name], killed / name, whole[0]
    if options:
        unbroken = tmp_path / "unbroken"
        run(unbroken, **options)
    assert len(curve(output)) == left
    with open(output / "metrics.jsonl", "a") as f:
        f.write('{"epoch": 99, "test_')  # a line cut short: the checkpoint is the truth
    lines = []
    train(TrainConfig(output=str(output), resume=True), log=lines.append)
    assert f"resumed after epoch {left}" in "\n".join(lines)
    assert_same_run(output, unbroken)


def test_interrupt_says_where_to_go_on_and_a_raised_cap_is_honored(whole, tmp_path, monkeypatch):
    output = tmp_path / "a"
    run(output, epochs=2, sgd_epochs=0)
    evaluate_, calls = engine_module.evaluate, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate_(*args)

    monkeypatch.setattr(engine_module, "evaluate", interrupted)
    lines = []
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(output=str(output), resume=True, epochs=3, sgd_epochs=2), log=lines.append)
    assert f"interrupted; epoch 3 is saved: go on with  cxv train --resume {output}" in lines
    monkeypatch.undo()
    train(TrainConfig(output=str(output), resume=True), log=lines.append)
    assert_same_run(output, whole[0])
    lines.clear()
    train(TrainConfig(output=str(output), resume=True), log=lines.append)
    assert "nothing left to train" in "\n".join(lines)
    assert_same_run(output, whole[0])


def test_a_run_with_the_older_keys_goes_on(whole, tmp_path):
    """Checkpoints from before version 0.1.0 was released have other names for five keys."""
    output = tmp_path / "a"
    run(output, sgd_epochs=1)
    older = {"normalization": "normalisation", "optimizer": "optimiser", "resume_state": "position"}
    older_state = {"num_bad_epochs": "stale"}
    for path in output.glob("*.pt"):
        checkpoint = {older.get(key, key): value for key, value in read_checkpoint(path).items()}
        assert set(older.values()) <= checkpoint.keys()
        state = {older_state.get(key, key): value for key, value in checkpoint["optimiser"].items()}
        reasons = {"patience": "stale", "max_epochs": "capped"}
        checkpoint["optimiser"] = state | {"switch_reason": reasons.get(state["switch_reason"])}
        path.write_bytes(pack_checkpoint(checkpoint))
    assert load_model(output)[1]["normalization"] == {"mean": 0.5, "std": 0.5}
    train(TrainConfig(output=str(output), resume=True, sgd_epochs=2), log=str)
    assert_same_run(output, whole[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, value):
    output, calls = tmp_path / "a", []
    cross_entropy = torch.nn.functional.cross_entropy

    def broken(logits, y, **kwargs):
        calls.append(torch.is_grad_enabled())
        loss = cross_entropy(logits, y, **kwargs)
        return loss * value if sum(calls) == 5 else loss

    monkeypatch.setattr(engine_module.F, "cross_entropy", broken)
    message = rf"the loss is {value} at epoch 2, batch 2 of 3; the last good .*last\.pt \(after epoch 1\)"
    with pytest.raises(InputError, match=message):
        run(output)
    monkeypatch.undo()
    checkpoint = read_checkpoint(output / "last.pt")
    assert checkpoint["epoch"] == len(curve(output)) == 1
    assert all(t.isfinite().all() for t in checkpoint["model"].values())


def test_out_of_memory_in_a_fused_op_is_reported(tmp_path, monkeypatch):
    """Of which PyTorch's class of exception is lost in the C++ library."""

    def full(*_, **__):
        raise RuntimeError("cxv_kernels: aten::convolution has failed: CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(engine_module.F, "cross_entropy", full)
    with pytest.raises(InputError, match=r"`batch_size` 32: out of memory on cpu .*a smaller one .*last\.pt"):
        run(tmp_path / "a")


def test_weights_broken_by_the_last_step_are_not_saved(tmp_path, monkeypatch):
    def break_weights(scaler, optimizer):
        for p in optimizer.param_groups[0]["params"]:
            p.data.fill_(float("nan"))

    monkeypatch.setattr(torch.amp.GradScaler, "step", break_weights)
    with pytest.raises(InputError, match=r"the test loss is nan at epoch 1, after batch 1 of 1; .*after epoch 0"):
        run(tmp_path / "a", batch_size=96)
    assert all(t.isfinite().all() for t in read_checkpoint(tmp_path / "a" / "last.pt")["model"].values())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x"
    atomic_write(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=re.escape(f"cannot write {path}: No space left on device")):
        atomic_write(path, b"newer")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"


# --- refusals


def test_a_directory_with_a_run_is_refused_without_resume_or_overwrite(whole, tmp_path):
    output = tmp_path / "a"
    run(output, epochs=2, sgd_epochs=0)
    before = (output / "last.pt").read_bytes()
    with pytest.raises(InputError, match=r"`output`: .* holds another run .*`resume`.*`overwrite`"):
        run(output)
    with pytest.raises(InputError, match="exclude each other"):
        run(output, resume=True, overwrite=True)
    with pytest.raises(InputError, match="unknown dataset"):
        run(output, overwrite=True, data="nothing")
    assert (output / "last.pt").read_bytes() == before  # an argument error deletes nothing
    run(output, overwrite=True)
    assert_same_run(output, whole[0])


CHANGED = {
    "model": "cnv-1/2",
    "data": "cifar10",
    "seed": 1,
    "batch_size": 64,
    "precision": "bf16",
    "fused": False,
    "embed_dim": 32,
    "drop_rate": 0.1,
    "drop_path_rate": 0.2,
    "img_size": 16,
    "limit_train": 50,
    "lr": 1.0,
    "patience": 3,
    "optimizer": "sgd",
    "recipe": "paper",
    "rand_augment": (1, 1),
    "validation": 10,
    "hflip": True,
    "random_crop": 1,
    "weight_decay": 0.5,
    "ema_decay": 0.5,
    "label_smoothing": 0.5,
    "warmup_epochs": 1.0,
    "progressive": ((8, 3),),
    "freeze": 1,
    "mixup": 0.2,
    "color_jitter": 0.2,
    "class_weights": "balanced",
    "balanced_sampling": True,
}


def test_resume_refuses_changed_arguments_by_name(whole):
    output = str(whole[0])
    for name, value in CHANGED.items():
        pattern = re.escape(f"other arguments: `{name}` (") + f"{TINY.get(name, '.*')} in the run, "
        with pytest.raises(InputError, match=pattern + re.escape(f"{value} now)")):
            train(TrainConfig(output=output, resume=True, **{name: value}))
    with pytest.raises(InputError, match="`epochs`: 2, but the run has done 3"):
        train(TrainConfig(output=output, resume=True, epochs=2))


def test_output_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"`output`: .*file is not a directory"):
        run(tmp_path / "file")
    with pytest.raises(InputError, match=r"`output`: cannot create .*file/a"):
        run(tmp_path / "file" / "a")


def rewrite(output, **changes):
    checkpoint = read_checkpoint(output / "last.pt")
    (output / "last.pt").write_bytes(pack_checkpoint({**checkpoint, **changes}))


def test_resume_refuses_other_classes_other_images_and_another_models_weights(tmp_path):
    output = tmp_path / "a"
    run(output, epochs=1, sgd_epochs=1)
    saved = read_checkpoint(output / "last.pt")
    again = TrainConfig(output=str(output), resume=True)
    rewrite(output, classes=["cat", "dog"])
    with pytest.raises(InputError, match="has the classes cat, dog, the data has 0, 1, 2"):
        train(again)
    rewrite(output, classes=saved["classes"], data_fingerprint={**saved["data_fingerprint"], "test": 1})
    with pytest.raises(InputError, match="the test images of digits are not those"):
        train(again)
    rewrite(output, data_fingerprint={"train": saved["data_fingerprint"]["train"]})
    with pytest.raises(InputError, match="the test images of digits are not those"):
        train(again)
    rewrite(output, data_fingerprint={**saved["data_fingerprint"], "validation": 1})
    with pytest.raises(InputError, match="the validation images of digits are not those"):
        train(again)
    other = cxv.create_model("cpv-1/2", num_classes=10, in_chans=1, img_size=8, embed_dim=8)
    rewrite(output, data_fingerprint=saved["data_fingerprint"], model=other.state_dict())
    with pytest.raises(InputError, match=r"weights of cpv-1/2 in it do not fit CPV: .* tensors differ"):
        train(again)
    with pytest.raises(InputError, match=r"last\.pt: the weights of cpv-1/2 in it do not fit CPV"):
        load_model(output, "last")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "text", "foreign", "missing"])
def test_damaged_checkpoints_are_named(whole, tmp_path, damage):
    path, content = tmp_path / "best.pt", bytearray((whole[0] / "best.pt").read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-1000])
    elif damage == "flipped":
        content[:60] = bytes(60)
        path.write_bytes(content)
    elif damage == "text":
        path.write_text("not a checkpoint")
    elif damage == "foreign":
        torch.save({"state_dict": {}}, path)
    messages = {"foreign": "not a checkpoint of cxv", "missing": "no such checkpoint"}
    message = messages.get(damage, "truncated or corrupt")
    with pytest.raises(InputError, match=f"{re.escape(str(path))}: {message}"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"precision": "fp8"}, "`precision`: expected one of fp32, bf16, fp16, got 'fp8'"),
        ({"precision": "fp16", "device": "cpu"}, "`precision`: fp16 needs a CUDA device"),
        ({"device": "gpu"}, "`device`: 'gpu' is not a device; allowed: auto, cpu, cuda"),
        ({"model": "cpw-5/4"}, "`model` cpw-5/4: .*cpv-5/4"),
        ({"batch_size": 0}, "`batch_size`: expected at least 1, got 0"),
        ({"lr": -1.0}, "`lr`: expected a finite number above 0, got -1.0"),
        ({"sgd_lr": float("nan")}, "`sgd_lr`: expected a finite number above 0, got nan"),
        ({"drop_rate": 1.0}, "`drop_rate`: expected at least 0 and less than 1"),
        ({"drop_path_rate": -0.1}, "`drop_path_rate`: expected at least 0 and less than 1"),
        ({"patience": 0}, "`patience`: expected at least 1"),
        ({"epochs": 0, "sgd_epochs": 0}, "both 0"),
        ({"accumulate": 0}, "`accumulate`: expected at least 1, got 0"),
        ({"clip_grad": 0.0}, "`clip_grad`: expected a finite number above 0, got 0.0"),
        ({"threads": 0}, "`threads`: expected at least 1"),
        ({"model": "cpv-1/2", "model_args": {"mlp_ratio": -1}}, "`model` cpv-1/2: .*-1"),
        ({"model": "vit-1/0"}, "`model` vit-1/0: .*zero"),
        ({"model_args": {"attn_kernel": torch}}, "`model_args`: expected numbers and strings, got .*module"),
    ],
)
def test_bad_arguments_are_named_and_write_nothing(tmp_path, kwargs, message):
    with pytest.raises(InputError, match=message):
        run(tmp_path / "a", **kwargs)
    assert not (tmp_path / "a").exists()


def test_model_that_refuses_an_image_writes_nothing(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("a kernel's many words\non several lines")

    monkeypatch.setattr(cxv.CPV, "forward", refuse)
    with pytest.raises(InputError, match=r"`model` cpv-1/2: refuses an image of 1×8×8: a kernel's many words$"):
        run(tmp_path / "a")
    fixed = {"recipe": "modern", "model": "hybrid-vip-1/2", "epochs": 3, "sgd_epochs": None}
    with pytest.raises(InputError, match=r"refuses an image of 1×4×4: .*; `progressive` 8:3 keeps one size"):
        run(tmp_path / "a", **fixed)
    assert not (tmp_path / "a").exists()


def test_paths_a_device_and_numbers_of_numpy(tmp_path):
    output = tmp_path / "a"
    config = TrainConfig(
        **TINY | {"lr": np.float64(3e-3), "epochs": np.int64(1), "model_args": {"stem_convs": np.int8(1)}}
    )
    config.output, config.cache_dir, config.device = output, tmp_path, torch.device("cpu")
    train(config, log=str)
    train(TrainConfig(output=output, cache_dir=tmp_path / "b", sgd_epochs=3, resume=True), log=str)
    assert load_model(output)[1]["args"]["output"] == str(output)
    assert json.loads((output / "args.json").read_text())["device"] == "cpu"


def test_the_log_says_which_model_is_the_default(tmp_path):
    _, log = run(tmp_path / "a", model=None, embed_dim=None, epochs=1, sgd_epochs=0)
    assert "no `model` given: cpv-2/4 with `embed_dim` 64, the default for digits" in log
    _, log = run(tmp_path / "b", epochs=1, sgd_epochs=0)
    assert "no `model`" not in log


@pytest.mark.slow
def test_digits_reach_95_per_cent_in_few_epochs_and_switch_to_sgd(tmp_path):
    """The default but for the epochs and the batch, which is small so that there are enough steps."""
    lines, few = [], {"batch_size": 16, "epochs": 2, "sgd_epochs": 1}
    result = train(TrainConfig(output=str(tmp_path / "a"), threads=1, **few), log=lines.append)
    assert result.best_top1 >= 95
    assert "switch to SGD" in "\n".join(lines)


def test_an_interrupt_waits_for_the_next_batch():
    """Ctrl-C in the middle of a step is raised between two; a second one at once."""
    reached = []

    def steps():
        with deferred_interrupts():
            for i in interruptible(range(5)):
                if i == 2:
                    signal.raise_signal(signal.SIGINT)
                reached.append(i)

    with pytest.raises(KeyboardInterrupt):
        steps()
    assert reached == [0, 1, 2]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    @deferred_interrupts()
    def two_signals():
        signal.raise_signal(signal.SIGINT)
        reached.append("goes on")
        signal.raise_signal(signal.SIGINT)
        reached.append("not reached")

    with pytest.raises(KeyboardInterrupt):
        two_signals()
    assert reached[-1] == "goes on"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with deferred_interrupts():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # somebody else's business
    finally:
        signal.signal(signal.SIGINT, before)


# --- steps


def weights(output):
    return read_checkpoint(output / "last.pt")["model"]


@pytest.mark.parametrize("class_weights", [None, "balanced"], ids=["plain", "class-weights"])
def test_accumulated_batches_are_the_large_batch(tmp_path, class_weights):
    # 90 images: the last step is smaller, and so is its last batch
    same = {"optimizer": "sgd", "lr": 0.1, "sgd_epochs": None, "drop_rate": 0.0, "limit_train": 90, "epochs": 2}
    same |= {"class_weights": class_weights}
    run(tmp_path / "large", batch_size=32, **same)
    run(tmp_path / "parts", batch_size=8, accumulate=4, **same)
    run(tmp_path / "small", batch_size=8, **same)
    large, parts, small = (weights(tmp_path / name) for name in ("large", "parts", "small"))
    for name, value in large.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=2e-6)
    assert max((small[name] - value).abs().max() for name, value in large.items()) > 1e-3
    for a, b in zip(curve(tmp_path / "large"), curve(tmp_path / "parts"), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-6)


def test_clip_grad_limits_the_norm_and_is_off_by_default(tmp_path, monkeypatch):
    norms, step = [], torch.amp.GradScaler.step

    def recorded(scaler, optimizer):
        grads = [p.grad for p in optimizer.param_groups[0]["params"]]
        norms.append(torch.linalg.vector_norm(torch.stack([g.norm() for g in grads])).item())
        return step(scaler, optimizer)

    monkeypatch.setattr(torch.amp.GradScaler, "step", recorded)
    run(tmp_path / "a", epochs=1, sgd_epochs=0)
    free, norms[:] = list(norms), []
    run(tmp_path / "b", epochs=1, sgd_epochs=0, clip_grad=0.01)
    assert min(free) > 0.1
    assert norms == pytest.approx([0.01] * 3, rel=1e-3)


def test_compile_runs_the_model_compiled_and_changes_no_name(tmp_path, monkeypatch):
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()  # an eager backend: no compiler is needed
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: compile_(f, backend=counter, **kwargs))
    monkeypatch.setattr(registry, "create_model", lambda name, **kwargs: Stacked(**kwargs))
    _, log = run(tmp_path / "a", compile=True, embed_dim=None)
    assert "fp32, compiled" in log
    assert counter.frame_count > 0
    run(tmp_path / "b", compile=False, embed_dim=None)
    assert_same_run(tmp_path / "a", tmp_path / "b")


class Stacked(nn.Sequential):
    def __init__(self, num_classes, in_chans, img_size, use_fused):
        super().__init__(nn.Flatten(), nn.Linear(in_chans * img_size**2, 8), nn.GELU(), nn.Linear(8, num_classes))

    def forward(self, x):  # torch.compile of 2.11 leaves alone a module whose forward is nn.Sequential's
        return super().forward(x)


@pytest.mark.parametrize("name", ["hybrid-vilt-1/2", "wavemix-1", "vit-1/2"])
def test_models_of_table_1_train(tmp_path, name):
    """One with fused ops, one without and one of another library; test_table1.py has the gradients of them all."""
    if name == "vit-1/2":
        pytest.importorskip("timm")
    small = {"model": name, "embed_dim": None, "limit_train": 12, "limit_test": 10, "batch_size": 6, "img_size": 16}
    result, log = run(tmp_path / "a", **small, epochs=1, sgd_epochs=0)
    assert result.epochs == 1
    fused = name.startswith("hybrid")
    assert ("fused, fp32" in log) == fused
    assert ("plain PyTorch (it has no fused ops), fp32" in log) == (not fused)


def test_arguments_that_a_baseline_lacks_are_named(tmp_path):
    with pytest.raises(InputError, match="`drop_rate`: resnet-18 has no such argument"):
        run(tmp_path / "a", model="resnet-18", embed_dim=None, drop_rate=0.1)
