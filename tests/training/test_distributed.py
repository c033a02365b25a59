"""Several processes train as one does, and end together. They are forked from one process that has imported torch."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_support import AUGMENTED, TINY, assert_same_run, curve, run

import cxv
from cxv.checkpoint import read_checkpoint
from cxv.training import TrainConfig, evaluate, load_data, load_model, train
from cxv.training.distributed import World

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks and sends signals")

ENV = {
    **os.environ,
    "PYTHONPATH": str(Path(cxv.__file__).parent.parent),
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
}
# 33 images: a batch of 32 and one of a single image, of which the second process has none; 41 to test and to select
UNEVEN = {**TINY, **AUGMENTED, "limit_train": 33, "limit_test": 41, "validation": 41}

_FORK = """
import json, os, socket, sys, time, traceback
import sklearn.datasets, sklearn.model_selection  # once, not in every process
import torch, torch._dynamo, torchvision.transforms.functional
from cxv import cli
from cxv.training import engine, trainer
torch.set_num_threads(1)
trainer.plot_curves = lambda *_: b""

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])

def worker(rank, port, job):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        file = os.open(f"{job['log']}.{rank}.{number}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    if "code" in job and job.get("rank", rank) == rank:
        exec(job["code"], globals())
    return cli.main(job["args"]) if "args" in job else 0

ends = []
for job in json.loads(sys.argv[1]):
    port, pids, start = free_port(), [], time.time()
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                code = worker(rank, port, job)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    ends.append([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])
    print(job["log"], time.time() - start, file=sys.stderr)
print(json.dumps(ends))
"""

# in the process that it is for: a signal before a batch of an epoch
_SIGNAL = """
batches, epochs = engine.batches, [0]
def signaled(data, batch_size, device, generator=None, **kwargs):
    epochs[0] += generator is not None
    for i, pair in enumerate(batches(data, batch_size, device, generator, **kwargs)):
        if generator is not None and epochs[0] == {epoch} and i == 1:
            os.kill(os.getpid(), {signal})
        yield pair
engine.batches = signaled
"""

_BROKEN_DISK = """
def full(path, *args):
    raise trainer.InputError(f"cannot write {path}: No space left on device")
trainer.atomic_write = full
"""

_OTHER_DATA = """
load_data = trainer.load_data
def altered(*args, **kwargs):
    data = load_data(*args, **kwargs)
    data.train.pixels = data.train.pixels + 1
    return data
trainer.load_data = altered
"""

# each process its part of the batch, the dropout on; a process alone the whole batch
_GRADIENTS = """
import copy
from cxv.models.blocks import ResidualBranch
from cxv.training.distributed import World, process_group
def gradients(model, world, x, y):
    torch.manual_seed(1)
    part = world.shard(len(x))
    for module in model.modules():
        if isinstance(module, ResidualBranch):
            module.first_image = part.start
    x, y = x[part.start : part.stop], y[part.start : part.stop]
    parallel = world.wrap(model)
    loss = torch.nn.functional.cross_entropy(parallel(x), y)
    (loss * (world.size * len(y) / 5)).backward()
    return [p.grad for p in model.parameters()]
with process_group():
    for name in ("cpv-2/2", "cnv-2/2", "cltv-2/2", "hybrid-vip-2/2"):
        for checkpointing in (False, True)[: 1 if name.startswith("hybrid") else 2]:
            torch.manual_seed(0)
            model = trainer.build_model(name, dict(embed_dim=16, img_size=8, use_fused=True)).double()
            if checkpointing:
                model.set_grad_checkpointing()
            x, y = torch.randn(5, 3, 8, 8, dtype=torch.float64), torch.arange(5)
            ours = gradients(copy.deepcopy(model), World.current(), x, y)
            for a, b in zip(ours, gradients(model, World(), x, y), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
            print(name, checkpointing, "ok")
"""


def arguments(output, **config):
    args = ["train", "--output", str(output)]
    for name, value in config.items():
        flag = "--" + name.replace("_", "-")
        args += (
            [flag] if value is True else [flag, ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
        )
    return args


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Every scenario, one after the other: the folder of its outputs, and by its name how its two processes ended."""
    root = tmp_path_factory.mktemp("distributed")
    signaled = {"epoch": 3, "signal": int(signal.SIGTERM)}
    killed = {"epoch": 3, "signal": int(signal.SIGKILL)}  # the third of those that it resumes
    plan = {
        "whole": {"args": arguments(root / "whole", **UNEVEN)},
        "signaled": {"args": arguments(root / "parts", **UNEVEN), "rank": 1, "code": _SIGNAL.format(**signaled)},
        "killed": {"args": arguments(root / "parts", resume=True), "rank": 1, "code": _SIGNAL.format(**killed)},
        "resumed": {"args": arguments(root / "parts", resume=True)},
        "disk": {"args": arguments(root / "disk", **UNEVEN), "rank": 0, "code": _BROKEN_DISK},
        "data": {"args": arguments(root / "data", **UNEVEN), "rank": 1, "code": _OTHER_DATA},
        "batch": {"args": arguments(root / "batch", **{**UNEVEN, "batch_size": 1})},
        "gradients": {"code": _GRADIENTS},
    }
    # accumulation, clipping, a batch norm of its own statistics in each process
    steps = {"optimizer": "sgd", "lr": 0.05, "epochs": 2, "limit_train": 37, "limit_test": 41, "batch_size": 8}
    steps |= {"model": "cpv-1/2", "embed_dim": 16, "accumulate": 2, "clip_grad": 0.5, "threads": 1}
    plan["accumulated"] = {"args": arguments(root / "accumulated", **steps)}
    plan["wavemix"] = {"args": arguments(root / "wavemix", **{**steps, "model": "wavemix-1", "img_size": 16})}
    for name, job in plan.items():
        job["log"] = str(root / f"{name}.log")
    done = subprocess.run(
        [sys.executable, "-c", _FORK, json.dumps(list(plan.values()))], env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    print(done.stderr)
    return root, dict(zip(plan, json.loads(done.stdout.splitlines()[-1]), strict=True)), steps


def log(root, name, rank, stream=1):
    return Path(f"{root / name}.log.{rank}.{stream}").read_text()


def test_two_processes_train_as_one_does(jobs, tmp_path):
    """Same batches, same masks of dropout, same augmentation: the same run within rounding, through every phase."""
    root, ends, _ = jobs
    assert ends["whole"] == [0, 0], log(root, "whole", 0, 2)
    run(tmp_path / "one", **{k: v for k, v in UNEVEN.items() if k not in TINY or v != TINY[k]})
    assert len(curve(root / "whole")) == 6
    for one, two in zip(curve(tmp_path / "one"), curve(root / "whole"), strict=True):
        assert one.pop("phase") == two.pop("phase")
        assert one == pytest.approx(two, rel=1e-4)
    for name in ("last.pt", "best.pt"):
        one, two = read_checkpoint(tmp_path / "one" / name), read_checkpoint(root / "whole" / name)
        assert torch.equal(one["sampler"], two["sampler"])
        assert torch.equal(one["rng"]["torch"], two["rng"]["torch"])
        for key, value in one["model"].items():
            torch.testing.assert_close(two["model"][key], value, rtol=0, atol=1e-4)
    assert "in each of 2 processes" in log(root, "whole", 0)
    # one of them speaks, but for what torch 2.10's Gloo says itself
    assert [line for line in log(root, "whole", 1).splitlines() if not line.startswith("[Gloo]")] == []


def test_a_step_of_accumulated_and_clipped_batches_is_shared_too(jobs, tmp_path):
    root, ends, steps = jobs
    assert ends["accumulated"] == [0, 0], log(root, "accumulated", 0, 2)
    run(tmp_path / "one", **steps, sgd_epochs=None)
    one, two = (read_checkpoint(path / "last.pt")["model"] for path in (tmp_path / "one", root / "accumulated"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-6)
    for output in (tmp_path / "one", root / "accumulated"):  # the number of processes may change
        train(TrainConfig(output=str(output), resume=True, epochs=3), log=str)
    one, two = (read_checkpoint(path / "last.pt")["model"] for path in (tmp_path / "one", root / "accumulated"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-5)


def test_gradients_of_the_fused_models_are_those_of_one_process(jobs):
    root, ends, _ = jobs
    assert ends["gradients"] == [0, 0], log(root, "gradients", 0, 2) + log(root, "gradients", 1, 2)
    assert log(root, "gradients", 0).count("ok") == log(root, "gradients", 1).count("ok") == 7


def test_a_signal_to_one_process_stops_all_after_the_same_batch(jobs):
    root, ends, _ = jobs
    assert ends["signaled"] == [128 + signal.SIGTERM] * 2
    assert "interrupted; epoch 2 and 1 batches of the next is saved" in log(root, "signaled", 0)
    assert log(root, "signaled", 0, 2).count("cxv: interrupted") == 1
    assert log(root, "signaled", 1, 2) == ""


def test_killed_and_resumed_processes_train_to_the_same_bits(jobs):
    root, ends, _ = jobs
    assert ends["killed"][1] == -signal.SIGKILL
    assert ends["killed"][0] == 2  # the other one does not wait for ever
    assert "cxv: error: process 0 of 2: another one has ended" in log(root, "killed", 0, 2)
    assert ends["resumed"] == [0, 0]
    assert "resumed after epoch 4" in log(root, "resumed", 0)
    assert_same_run(root / "whole", root / "parts")


@pytest.mark.parametrize(
    ("name", "reporter", "message"),
    [
        ("disk", 0, "last.pt: No space left on device"),
        ("data", 1, "--data: the images that process 1 finds are not those of process 0"),
        ("batch", 0, "--batch-size: 1, of all processes, and there are 2 of them"),
    ],
)
def test_an_error_of_one_process_ends_all_and_is_reported_once(jobs, name, reporter, message):
    root, ends, _ = jobs
    assert ends[name] == [2, 2]
    assert message in log(root, name, reporter, 2)
    assert log(root, name, reporter, 2).count("\n") == 1
    assert log(root, name, 1 - reporter, 2) == ""


def test_sharded_evaluation_scores_the_saved_model(jobs):
    """With a batch norm, whose statistics differ between processes while they train."""
    root, ends, _ = jobs
    assert ends["wavemix"] == [0, 0], log(root, "wavemix", 0, 2)
    model, checkpoint = load_model(root / "wavemix", "last")
    data = load_data("digits", img_size=16, limit_test=41, splits=("test",))
    loss, top1 = evaluate(model, data.test, 8)
    assert (loss, top1) == pytest.approx([checkpoint["history"][-1][f"test_{k}"] for k in ("loss", "top1")], rel=1e-5)


@pytest.mark.parametrize(("n", "size"), [(0, 3), (1, 3), (7, 3), (9, 3), (5, 1)])
def test_parts_cover_a_batch_once(n, size):
    parts = [World(rank, size).shard(n) for rank in range(size)]
    assert [i for part in parts for i in part] == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    rows = torch.arange(10, 10 + 2 * n)
    shares = [World(rank, size).shard_rows(rows, max(n, 1)) for rank in range(size)]
    assert torch.cat(shares).unique().tolist() == rows.tolist()


def test_torchrun_stopped_by_sigterm_saves_what_is_done(tmp_path):
    output = tmp_path / "a"
    args = arguments(output, **{**UNEVEN, "epochs": 100_000, "patience": 100_000})
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "cxv",
        *args,
    ]
    with subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 300
        while not (output / "best.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert f"go on with  cxv train --resume {output}" in out, err
    assert read_checkpoint(output / "last.pt")["resume_state"] is not None
