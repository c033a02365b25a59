"""reproduce_cifar10.py: slices, wherever they are cut, are one run that can be carried away; training_speed.py."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_image
from test_benchmarks import BENCHMARKS

import cxv
from cxv import cli
from cxv.training import load_model
from cxv.training import loop as loop_module

sys.path.insert(0, str(BENCHMARKS))
import reproduce_cifar10
import training_speed

TINY = [
    "--embed-dim",
    "16",
    "--batch-size",
    "4",
    "--epochs",
    "3",
    "--sgd-epochs",
    "2",
    "--threads",
    "1",
    "--img-size",
    "8",
]
TIMES = ("images_per_second", "seconds")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for split, n in (("train", 6), ("test", 3)):
        for c in range(2):
            for i in range(n):
                write_image(root / split / f"class{c}" / f"{i}.png", seed=100 * (split == "test") + 10 * c + i)
    return root


class InProcess:
    """``subprocess.Popen`` of ``cxv train``, run here and stopped by SIGTERM after so many batches."""

    batches_left = 10**9

    def __init__(self, command):
        assert command[1:4] == ["-m", "cxv.cli", "train"]
        self.arguments = command[3:]

    def wait(self, timeout=None):
        return cli.main(self.arguments)


@pytest.fixture
def stopping(monkeypatch):
    batches = loop_module.batches

    def counted(data, batch_size, device, generator=None, **kwargs):
        for pair in batches(data, batch_size, device, generator, **kwargs):
            if generator is not None:
                InProcess.batches_left -= 1
                if InProcess.batches_left == -1:
                    signal.raise_signal(signal.SIGTERM)
            yield pair

    monkeypatch.setattr(loop_module, "batches", counted)
    monkeypatch.setattr(reproduce_cifar10.subprocess, "Popen", InProcess)


def call(images, out, *arguments, models="cpv-1/2,cltv-1/2", batches=10**9):
    InProcess.batches_left = batches
    command = ["reproduce_cifar10.py", "--data-dir", str(images), "--checkpoint-out", str(out), "--models", models]
    sys.argv = [*command, *map(str, arguments), "--", *TINY]
    return reproduce_cifar10.main()


def epochs(out):
    models = json.loads((out / reproduce_cifar10.RESULTS).read_text())["runs"]
    return {m: [{k: v for k, v in e.items() if k not in TIMES} for e in row["epochs"]] for m, row in models.items()}


@pytest.mark.skipif(not hasattr(signal, "SIGTERM"), reason="sends signals")
def test_slices_equal_the_unbroken_run_bit_for_bit(images, tmp_path, stopping, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    whole = tmp_path / "whole"
    assert call(images, whole) == 0
    before, statuses = None, []
    for n in range(12):
        out = tmp_path / f"slice{n}"
        statuses.append(call(images, out, *(() if before is None else ("--checkpoint-in", before)), batches=5))
        if before is not None:
            shutil.rmtree(before)  # another machine has no more than what it was given
        before = out
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        assert size < reproduce_cifar10.LARGEST
        assert not list(out.rglob("previous.pt"))
        if statuses[-1] == 0:
            break
    assert statuses == [reproduce_cifar10.MORE_TO_DO] * 5 + [0]  # 2 models of 15 batches each
    assert epochs(out) == epochs(whole)
    assert [len(rows) for rows in epochs(out).values()] == [5, 5]
    for run in ("cpv-1-2", "cltv-1-2"):
        one, other = (load_model(root / run / reproduce_cifar10.WEIGHTS)[0].state_dict() for root in (out, whole))
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert "class1" in (out / run / reproduce_cifar10.CARD).read_text()
        assert not list((out / run).glob("*.pt"))
    results = json.loads((out / reproduce_cifar10.RESULTS).read_text())
    assert len(results["slices"]) == len(statuses)
    table = reproduce_cifar10.table(results)
    best = max(row["test_top1"] for row in epochs(out)["cpv-1/2"])
    assert f"| cpv-1/2 | 5 | {best:.2f} |" in table


def test_the_papers_accuracies_stand_beside():
    row = {"epoch": 7, "test_top1": 91.5}
    models = {
        "cpv-5/4": {"paper_top1": 91.42, "epochs": [row | {"epoch": 6, "test_top1": 92.0}, row], "finished": False}
    }
    assert "| cpv-5/4 | 7 so far | 92.00 | 6 | 91.50 | 91.42 | +0.58 |" in reproduce_cifar10.table({"runs": models})


def test_what_does_not_fit_is_refused(images, tmp_path, stopping, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", sys.argv)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    for arguments, message in (
        ((tmp_path / "other",), "holds something else"),
        ((tmp_path / "new", "--checkpoint-in", tmp_path / "other"), "was not left by this script"),
    ):
        with pytest.raises(SystemExit):
            call(images, *arguments)
        assert message in capsys.readouterr().err
    assert call(images, tmp_path / "a", batches=2) == reproduce_cifar10.MORE_TO_DO
    with pytest.raises(SystemExit):
        call(images, tmp_path / "a", "--seed", 3)
    assert "argument --seed: 0 in the slices before, 3 now" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        call(images, tmp_path / "other", "--checkpoint-in", tmp_path / "a")
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_the_clock_stops_a_real_process(images, tmp_path):
    command = [
        sys.executable,
        str(BENCHMARKS / "reproduce_cifar10.py"),
        "--data-dir",
        str(images),
        "--models",
        "cpv-1/2",
    ]
    command += ["--checkpoint-out", str(tmp_path / "a"), "--slice-minutes", "0.1", "--", *TINY, "--patience", "100000"]
    command[command.index("--epochs") + 1] = "100000"
    env = {"PYTHONPATH": str(Path(cxv.__file__).parent.parent), "OMP_NUM_THREADS": "1", "CXV_CACHE": "none"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == reproduce_cifar10.MORE_TO_DO, done.stderr
    assert "cxv train --resume" in done.stdout
    assert epochs(tmp_path / "a")["cpv-1/2"]


def test_training_speed_measures_every_part(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training_speed, "LOADED", 8)
    command = ["training_speed.py", "--data-dir", str(images), "--out", str(tmp_path), "--models", "cpv-1/2"]
    monkeypatch.setattr(
        sys, "argv", [*command, "--images", "8", "--batch-size", "4", "--rounds", "1", "--device", "cpu"]
    )
    assert training_speed.main() == 0
    parts = json.loads((tmp_path / "training_speed-cpu.json").read_text())["parts"]
    row = parts["epoch"]["rows"]["cpv-1/2"]
    assert len(row["fused"]["samples_s"]) == len(row["reference"]["samples_s"]) == 1
    assert row["speedup"] == pytest.approx(row["reference"]["median_s"] / row["fused"]["median_s"])
    assert parts["loader"]["rows"].keys() == training_speed.AUGMENTS.keys()
    assert 0 < parts["resume"]["rows"]["median_s"] < 10
    out = capsys.readouterr().out
    assert f"| {row['speedup']:.2f}× |" in out
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--parts", "loader,rest"])
    with pytest.raises(SystemExit):
        training_speed.main()
    assert "must be some of loader, epoch, resume, got 'rest'" in capsys.readouterr().err
