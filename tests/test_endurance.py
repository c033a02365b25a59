"""What a run survives: signals in mid-epoch, a full disk, a damaged checkpoint, overflows of fp16."""

import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from test_training import AUGMENTED, TINY, Probe, assert_same_run, curve, run

import cxv
from cxv.training import InputError, TrainConfig, train
from cxv.training import checkpoint as checkpoint_module
from cxv.training import loop as loop_module
from cxv.training.checkpoint import read_checkpoint
from cxv.training.interrupt import Interrupted

ENV = {**os.environ, "PYTHONPATH": str(Path(cxv.__file__).parent.parent), "OMP_NUM_THREADS": "1"}


def resume(output, **kwargs):
    lines = []
    result = train(TrainConfig(output=str(output), resume=True, **kwargs), log=lines.append)
    return result, "\n".join(lines)


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize(
    ("number", "epoch", "split", "batch"),
    [
        (signal.SIGTERM, 1, "train", 1),
        (signal.SIGINT, 3, "train", 2),
        (signal.SIGTERM, 5, "train", 0),
        (signal.SIGTERM, 4, "test", 0),
    ],
    ids=["first", "sgd", "post-training", "evaluation"],
)
def test_a_signal_saves_the_batches_done_and_resume_is_bit_exact(
    augmented,
    tmp_path,
    monkeypatch,
    number,
    epoch,
    split,
    batch,
):
    output, epochs, batches = tmp_path / "a", [0], loop_module.batches

    def signalled(data, batch_size, device, generator=None, **kwargs):
        epochs[0] += generator is not None
        here = epochs[0] == epoch and (generator is not None) == (split == "train")
        for i, pair in enumerate(batches(data, batch_size, device, generator, **kwargs)):
            if here and i == batch:
                signal.raise_signal(number)
            yield pair

    monkeypatch.setattr(loop_module, "batches", signalled)
    with pytest.raises(Interrupted) as caught:
        run(output, **AUGMENTED)
    assert caught.value.signal == number
    monkeypatch.undo()
    step = {"train": batch, "test": 3}[split]
    checkpoint = read_checkpoint(output / "last.pt")
    assert (checkpoint["epoch"], checkpoint["position"]["step"]) == (epoch - 1, step)
    torch.manual_seed(99)
    _, log = resume(output)
    assert f"resumed after epoch {epoch - 1} and {step} batches of the next" in log
    assert_same_run(output, augmented[0])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


_LIMITED = """
import resource, sys
from cxv.training import InputError, TrainConfig, loop, train
def limited(*args):
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))  # bytes a file may have
    return evaluate(*args)
evaluate, loop.evaluate = loop.evaluate, lambda *a: (limited if epochs.pop() == int(sys.argv[2]) else evaluate)(*a)
epochs = list(range(9, 0, -1))
try:
    train(eval(sys.argv[1]))
except InputError as error:
    print("refused:", error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_write_that_fails_keeps_the_checkpoint_before_it_and_says_so(augmented, tmp_path):
    output = tmp_path / "a"
    config = TrainConfig(**{**TINY, "output": str(output), **AUGMENTED, "validation": None})
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED, repr(config), "3"], env=ENV, capture_output=True, text=True, check=True
    )
    assert f"refused: cannot write {output}/" in done.stdout
    assert "File too large" in done.stdout
    assert f"; what {output / 'last.pt'} has is kept, and --resume goes on from it" in done.stdout
    assert read_checkpoint(output / "last.pt")["epoch"] == 2
    assert not list(output.glob(".*"))  # no half file
    resume(output)
    run(tmp_path / "b", **{**AUGMENTED, "validation": None})
    assert_same_run(output, tmp_path / "b")


def test_a_disk_without_room_is_reported_before_the_epoch(tmp_path, monkeypatch):
    output, usage = tmp_path / "a", shutil.disk_usage(tmp_path)
    free = [10**9]
    monkeypatch.setattr(checkpoint_module.shutil, "disk_usage", lambda path: usage._replace(free=free[-1]))
    evaluate = loop_module.evaluate

    def filling(*args):
        free.append(200_000)
        return evaluate(*args)

    monkeypatch.setattr(loop_module, "evaluate", filling)
    with pytest.raises(InputError, match=r"--output: .*a has 0\.2 MB free, and the next checkpoints need 0\.\d MB"):
        run(output)
    assert read_checkpoint(output / "last.pt")["epoch"] == len(curve(output)) == 1
    with pytest.raises(InputError, match=r"b has 0\.2 MB free, and the next checkpoints need 1\.\d MB"):
        run(tmp_path / "b")
    assert not list((tmp_path / "b").iterdir())
    monkeypatch.undo()
    size = max(path.stat().st_size for path in output.glob("*.pt"))
    run(tmp_path / "c")
    needed = 4 * size  # last, previous, best, and the one that is being written
    assert sum(path.stat().st_size for path in (tmp_path / "c").glob("*.pt")) <= needed


@pytest.mark.parametrize("damage", ["bit", "truncated", "missing"])
def test_a_damaged_last_checkpoint_falls_back_to_the_previous_one(augmented, tmp_path, damage):
    output = tmp_path / "a"
    shutil.copytree(augmented[0], output)
    path = output / "last.pt"
    content = bytearray(path.read_bytes())
    if damage == "bit":
        weights = max(read_checkpoint(path)["model"].values(), key=torch.numel)
        content[content.index(weights.numpy().tobytes()) + 5] ^= 4  # torch.load sees nothing of it
    path.write_bytes(content if damage == "bit" else content[: len(content) // 2])
    if damage == "missing":
        path.unlink()
    _, log = resume(output)
    assert f"{path}: " + ("no such checkpoint" if damage == "missing" else "truncated or corrupt") in log
    assert "going on from previous.pt, which is one save older" in log
    assert "resumed after epoch 5" in log
    assert_same_run(output, augmented[0])


def test_two_damaged_checkpoints_are_an_error(augmented, tmp_path):
    shutil.copytree(augmented[0], tmp_path / "a")
    for name in ("last.pt", "previous.pt"):
        (tmp_path / "a" / name).write_bytes(b"x")
    with pytest.raises(InputError, match=r"last\.pt: truncated or corrupt"):
        resume(tmp_path / "a")


def test_steps_that_overflow_in_fp16_are_counted_and_shown(tmp_path, monkeypatch):
    # fp16 is for CUDA; the CPU's half arithmetic is slow but runs the same lines
    monkeypatch.setattr(loop_module, "autocast_for", lambda *a: lambda: torch.autocast("cpu", dtype=torch.float16))
    monkeypatch.setattr(checkpoint_module, "create_model", lambda name, **kwargs: Probe(**kwargs))
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**24)
    monkeypatch.setattr(loop_module.torch.amp, "GradScaler", scaler)
    _, log = run(tmp_path / "a", precision="fp16", embed_dim=None, epochs=4, sgd_epochs=0)
    skipped = [row["skipped_steps"] for row in curve(tmp_path / "a")]
    assert skipped[0] == 3  # every step of the first epoch
    assert skipped[-1] == 0
    assert read_checkpoint(tmp_path / "a" / "last.pt")["scaler"]["scale"] == 2.0 ** (24 - sum(skipped))
    assert "  3 steps skipped (fp16 overflow)" in log
    assert log.count("skipped") == sum(n > 0 for n in skipped)
