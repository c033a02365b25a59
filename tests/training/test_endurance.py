"""Accidents that a run survives: signals in mid-epoch, a full disk, a damaged checkpoint, overflows of fp16."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import file_limit
from training_support import AUGMENTED, TINY, Probe, assert_same_run, before_batch, curve, cut_power, resume, run

import cxv
from cxv.checkpoint import read_checkpoint
from cxv.models import registry
from cxv.training import InputError, TrainConfig
from cxv.training import engine as engine_module
from cxv.training import trainer as trainer_module
from cxv.training.interrupt import Interrupted

ENV = {**os.environ, "PYTHONPATH": str(Path(cxv.__file__).parent.parent), "OMP_NUM_THREADS": "1"}


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
    augmented, tmp_path, monkeypatch, number, epoch, split, batch
):
    output = tmp_path / "a"
    before_batch(monkeypatch, epoch, batch, lambda: signal.raise_signal(number), split)
    with pytest.raises(Interrupted) as caught:
        run(output, **AUGMENTED)
    assert caught.value.signal == number
    monkeypatch.undo()
    step = {"train": batch, "test": 3}[split]
    checkpoint = read_checkpoint(output / "last.pt")
    assert (checkpoint["epoch"], checkpoint["resume_state"]["step"]) == (epoch - 1, step)
    torch.manual_seed(99)
    _, log = resume(output)
    assert f"resumed after epoch {epoch - 1}{f' and {step} batches of the next' if step else ''}, in the" in log
    assert_same_run(output, augmented[0])
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_write_that_fails_keeps_the_checkpoint_before_it_and_says_so(tmp_path, monkeypatch):
    output, options, evaluate = tmp_path / "a", {**AUGMENTED, "validation": None}, engine_module.evaluate
    evaluations = []
    with contextlib.ExitStack() as limits:

        def limiting(*args):
            evaluations.append(args)
            if len(evaluations) == 3:
                limits.enter_context(file_limit(10_000))
            return evaluate(*args)

        monkeypatch.setattr(engine_module, "evaluate", limiting)
        message = rf"^cannot write {output}/.*File too large; what {output}/last\.pt has is kept, and `resume` goes on"
        with pytest.raises(InputError, match=message):
            run(output, **options)
    monkeypatch.undo()
    assert read_checkpoint(output / "last.pt")["epoch"] == 2
    assert not list(output.glob(".*.tmp"))  # no half file
    resume(output)
    run(tmp_path / "b", **options)
    assert_same_run(output, tmp_path / "b")


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files")
def test_a_limit_or_quota_that_no_checkpoint_fits_is_reported_before_the_epoch(tmp_path, monkeypatch):
    output, epochs = tmp_path / "a", []
    run(output, epochs=1, sgd_epochs=0)
    monkeypatch.setattr(engine_module, "batches", lambda *args, **kwargs: epochs.append(args))
    message = r"`output`: .*a has no room for a checkpoint of 0\.\d MB: File too large"
    with file_limit(200_000), pytest.raises(InputError, match=message):  # the next one fits, not what it may grow to
        resume(output, epochs=2)
    assert not epochs
    monkeypatch.undo()
    resume(output, epochs=2)
    assert [row["epoch"] for row in curve(output)] == [1, 2]


@pytest.fixture
def tmpfs(tmp_path):
    """A file system of two megabytes."""
    folder = tmp_path / "tmpfs"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_file_system_that_fills_up_or_becomes_read_only(augmented, tmpfs, monkeypatch):
    output, evaluate, filler = tmpfs / "a", engine_module.evaluate, tmpfs / "filler"

    def filling(model, data, *args):
        if read_checkpoint(output / "last.pt")["epoch"] == 2 and not filler.exists():  # the third finds no room
            filler.write_bytes(bytes(shutil.disk_usage(tmpfs).free))
        return evaluate(model, data, *args)

    monkeypatch.setattr(engine_module, "evaluate", filling)
    with pytest.raises(InputError, match=r"cannot write .*: No space left on device; what .*last\.pt has is kept"):
        run(output, **AUGMENTED)
    monkeypatch.undo()
    assert read_checkpoint(output / "last.pt")["epoch"] == 2
    with pytest.raises(InputError, match=r"cannot write .*: No space left on device"):
        resume(output)
    filler.unlink()
    steps = []
    monkeypatch.setattr(engine_module.Engine, "_train_step", lambda *args: steps.append(args))
    subprocess.run(["mount", "-o", "remount,ro", str(tmpfs)], check=True)
    with pytest.raises(InputError, match=r"cannot write .*: Read-only file system"):
        resume(output)
    with pytest.raises(InputError, match=r"`output`: cannot create .*b \(Read-only file system\)"):
        run(tmpfs / "b")
    assert not steps
    monkeypatch.undo()
    subprocess.run(["mount", "-o", "remount,rw", str(tmpfs)], check=True)
    resume(output)
    assert_same_run(output, augmented[0])


def test_a_disk_without_room_is_reported_before_the_epoch(tmp_path, monkeypatch):
    output, usage = tmp_path / "a", shutil.disk_usage(tmp_path)
    free = [10**9]
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=free[-1]))
    evaluate = engine_module.evaluate

    def filling(*args):
        free.append(200_000)
        return evaluate(*args)

    monkeypatch.setattr(engine_module, "evaluate", filling)
    with pytest.raises(InputError, match=r"`output`: .*a has 0\.2 MB free, and the next checkpoints need 0\.\d MB"):
        run(output)
    assert read_checkpoint(output / "last.pt")["epoch"] == len(curve(output)) == 1
    with pytest.raises(InputError, match=r"b has 0\.2 MB free, and the next checkpoints need 1\.\d MB"):
        run(tmp_path / "b")
    assert [path.name for path in (tmp_path / "b").iterdir()] == [".lock"]
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
    (output / "best.pt").unlink()  # which is not older than last.pt here
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


_SHORT = {"epochs": 2, "sgd_epochs": 0, "limit_train": 32, "limit_test": 20, "validation": None}


# forks a training for each call that writes to the disk, which ends it just before that call
_EVERY_WRITE = """
import os, signal, sys
import sklearn.datasets, sklearn.model_selection, torch._dynamo  # once
from cxv.training import TrainConfig, train
torch.set_num_threads(1)
for fatal in map(int, sys.argv[2].split(",")):
    pid = os.fork()
    if pid == 0:
        calls = [0]
        def deadly(call):
            def counted(*args):
                calls[0] += 1
                if calls[0] == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args)
            return counted
        os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
        train(eval(sys.argv[1].replace("NUMBER", str(fatal))), log=str)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_kill_9_at_every_step_of_every_write(tmp_path):
    config = repr(TrainConfig(**{**TINY, **_SHORT, "output": str(tmp_path / "run-NUMBER")}))
    # before the first epoch 3 of last.pt and 9 of smaller files; after it 3 of best.pt and 4 of last.pt
    fatal = [1, 2, 3, *range(13, 21)]
    command = [sys.executable, "-c", _EVERY_WRITE, config, ",".join(map(str, fatal))]
    subprocess.run(command, env=ENV, check=True)
    run(tmp_path / "whole", **_SHORT)
    resumed = 0
    for number in fatal:
        output = tmp_path / f"run-{number}"
        if (output / "last.pt").exists() or (output / "previous.pt").exists():
            resume(output)
            resumed += 1
        else:
            run(output, **_SHORT)  # nothing of it is there: the same command again
        assert_same_run(output, tmp_path / "whole")
        assert not list(output.glob(".*.tmp")), number
    assert resumed == len(fatal) - 2


@pytest.mark.parametrize("moved", [False, True], ids=["last is older", "last is previous"])
def test_a_kill_between_best_and_last_goes_on_from_best(tmp_path, monkeypatch, moved):
    """A GPU can compute the epoch again with another result, which ``best.pt`` must not contradict."""
    output, write = tmp_path / "a", trainer_module.atomic_write

    def dying(path, *args):
        best = output / "best.pt"
        if path.name == "last.pt" and best.exists() and read_checkpoint(best)["epoch"] == 2:
            cut_power()
        write(path, *args)

    monkeypatch.setattr(trainer_module, "atomic_write", dying)
    with pytest.raises(RuntimeError, match="power"):
        run(output, lr=1e-9)  # each epoch has the same top-1, and is the best
    monkeypatch.undo()
    assert read_checkpoint(output / "last.pt")["epoch"] == 1
    if moved:
        (output / "last.pt").rename(output / "previous.pt")
    _, log = resume(output)
    reason = ": no such checkpoint" if moved else " was not written after epoch 2"
    assert f"{output / 'last.pt'}{reason}; going on from best.pt" in log
    assert "resumed after epoch 2" in log
    run(tmp_path / "b", lr=1e-9)
    assert_same_run(output, tmp_path / "b")


# kills a run again and again, each time a little later, and goes on with it
_AT_RANDOM = """
import os, random, signal, sys, time
import sklearn.datasets, sklearn.model_selection, torch._dynamo  # once
from cxv.training import TrainConfig, train
torch.set_num_threads(1)
config, delays = eval(sys.argv[1]), random.Random(0)
kills, ended = 0, False
while not ended:
    pid = os.fork()
    if pid == 0:
        begun = any(os.path.exists(f"{config.output}/{name}.pt") for name in ("last", "previous"))
        train(TrainConfig(output=config.output, resume=True) if begun else config, log=str)
        os._exit(0)
    deadline = time.monotonic() + delays.uniform(0.05, 0.2 + 0.3 * kills)
    while not ended and time.monotonic() < deadline:
        time.sleep(0.001)
        ended = os.waitpid(pid, os.WNOHANG)[0] == pid
    if not ended:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills += 1
print(kills)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_kill_9_at_any_instant(augmented, tmp_path):
    output = tmp_path / "a"
    config = repr(TrainConfig(**{**TINY, **AUGMENTED, "output": str(output)}))
    done = subprocess.run(
        [sys.executable, "-c", _AT_RANDOM, config], env=ENV, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) >= 3
    assert_same_run(output, augmented[0])


def test_resumed_run_starts_within_two_seconds(tmp_path, monkeypatch):
    """The full CPV-5/4, in CPU time, as the machine may be busy."""
    small = {"model": "cpv-5/4", "embed_dim": None, "limit_train": 4, "limit_test": 4, "batch_size": 4}
    run(tmp_path / "a", **small, epochs=1, sgd_epochs=0)
    at_work, step = [], engine_module.Engine._train_step
    monkeypatch.setattr(
        engine_module.Engine, "_train_step", lambda *args: (at_work.append(time.process_time()), step(*args))
    )
    start = time.process_time()
    resume(tmp_path / "a", epochs=2)
    assert at_work[0] - start < 2


def test_steps_that_overflow_in_fp16_are_counted_and_shown(tmp_path, monkeypatch):
    # fp16 is for CUDA; the CPU's half arithmetic is slow but runs the same lines
    monkeypatch.setattr(trainer_module, "autocast_for", lambda *a: lambda: torch.autocast("cpu", dtype=torch.float16))
    monkeypatch.setattr(registry, "create_model", lambda name, **kwargs: Probe(**kwargs))
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**24)
    monkeypatch.setattr(engine_module.torch.amp, "GradScaler", scaler)
    _, log = run(tmp_path / "a", precision="fp16", embed_dim=None, epochs=4, sgd_epochs=0)
    skipped = [row["skipped_steps"] for row in curve(tmp_path / "a")]
    assert skipped[0] == 3  # every step of the first epoch
    assert skipped[-1] == 0
    assert read_checkpoint(tmp_path / "a" / "last.pt")["scaler"]["scale"] == 2.0 ** (24 - sum(skipped))
    assert "  3 steps skipped (fp16 overflow)" in log
    assert log.count("skipped") == sum(n > 0 for n in skipped)


def test_a_signal_in_fp16_saves_the_scaler(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "autocast_for", lambda *a: lambda: torch.autocast("cpu", dtype=torch.float16))
    monkeypatch.setattr(registry, "create_model", lambda name, **kwargs: Probe(**kwargs))
    monkeypatch.setattr(engine_module.torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**20))
    half = {"precision": "fp16", "embed_dim": None, "epochs": 2, "sgd_epochs": 1, "clip_grad": 0.1}
    run(tmp_path / "whole", **half)
    steps, step = [], engine_module.Engine._train_step

    def signaled(epoch, *args):
        step(epoch, *args)
        steps.append(1)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(engine_module.Engine, "_train_step", signaled)
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", **half)
    saved = read_checkpoint(tmp_path / "parts" / "last.pt")
    assert saved["resume_state"]["step"] == 2
    assert saved["resume_state"]["skipped"] > 0
    resume(tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
