"""The ``cxv`` command, from its arguments to what it prints."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cli_support import TINY, assert_error, call
from PIL import Image

import cxv
from cxv.cli import main
from cxv.cli import train as train_command
from cxv.cli.flags import cli_flag
from cxv.training.config import OPTIONS, resolve

ENV = {**os.environ, "PYTHONPATH": str(Path(cxv.__file__).parent.parent), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "digits"
    code = main(["train", *TINY, "--epochs", "2", "--sgd-epochs", "1", "--lr", "0.005", "--output", str(output)])
    assert code == 0
    return output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for split in ("train", "test"):
        for name, color in (("blue", (0, 0, 255)), ("green", (0, 255, 0)), ("red", (255, 0, 0))):
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                image = Image.new("RGB", (8, 8), tuple(max(0, c - 10 * i) for c in color))
                image.save(root / split / name / f"{i}.webp", lossless=True)
    return root


def test_train_prints_its_progress_and_result(capsys, tmp_path):
    output = tmp_path / "a"
    code, out, _ = call(capsys, "train", *TINY, "--epochs", 1, "--sgd-epochs", 1, "--output", output)
    assert code == 0
    assert "cpv-1/2: " in out
    assert "96 training and 40 test images, 10 classes, 1×8×8" in out
    assert "epoch   1 AdamW lr 0.001" in out
    assert "switch to SGD after epoch 1: AdamW has reached --epochs 1" in out
    assert "epoch   2 SGD   lr 0.001" in out
    assert f"in {output}: best.pt, last.pt, metrics.jsonl, metrics.csv, args.json, summary.json, curves.png" in out


def test_resume_takes_the_runs_arguments(capsys, run):
    code, out, _ = call(capsys, "train", "--resume", "--output", run)
    assert code == 0
    assert "cpv-1/2" in out
    assert "nothing left to train" in out


def test_eval_reproduces_the_runs_top1(capsys, run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    code, out, _ = call(capsys, "eval", "--checkpoint", run)
    assert code == 0
    assert f"top-1 {rows[-1]['best_top1']:.2f} %" in out
    assert "(40 images, fp32)" in out
    report = run / "report.html"
    assert call(capsys, "eval", "--checkpoint", run, "--report", report)[1] == f"{out}report in {report}\n"
    assert f"{40 - round(0.4 * rows[-1]['best_top1'])} mistakes" in report.read_text()
    assert_error(call(capsys, "eval", "--checkpoint", run, "--report", "report.txt"), "--report", ".html or .png")
    _, out, _ = call(capsys, "eval", "--checkpoint", run, "--which", "last")
    assert f"epoch 3 on digits: top-1 {rows[-1]['test_top1']:.2f} %" in out
    _, out, _ = call(capsys, "eval", "--checkpoint", run, "--limit-test", 30)
    assert "(30 images" in out


def test_train_eval_predict_on_a_folder(capsys, folder, tmp_path):
    output = tmp_path / "a"
    args = ["--model", "cpv-1/2", "--embed-dim", 16, "--drop-rate", 0, "--lr", 0.01, "--threads", 1]
    args += ["--data", "folder", "--data-dir", folder, "--epochs", 15, "--sgd-epochs", 0, "--output", output]
    code, out, _ = call(capsys, "train", *args)
    assert code == 0
    assert "12 training and 12 test images, 3 classes, 3×8×8" in out
    assert "best top-1 100.00 %" in out
    Image.new("L", (40, 20), 0).save(tmp_path / "gray.png")
    red = folder / "test" / "red" / "3.webp"
    code, out, _ = call(capsys, "predict", "--checkpoint", output, red, tmp_path / "gray.png")
    assert code == 0
    lines = out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [str(red), str(tmp_path / "gray.png")]
    assert len(lines) == 2 + 2 * 3  # three classes, so three and not five
    assert lines[1].split()[-1] == "red"
    first = [float(line.split()[0]) for line in lines[1:4]]
    assert first == sorted(first, reverse=True)
    assert sum(first) == pytest.approx(100, abs=0.02)
    assert_error(call(capsys, "eval", "--checkpoint", output, "--data", "digits"), "classes 0, 1, 2", "blue, green")


def test_models_lists_names_and_parameters(capsys):
    code, out, _ = call(capsys, "models")
    assert code == 0
    lines = dict(line.split()[:2] for line in out.splitlines()[1:-1])
    assert lines.keys() == set(cxv.list_models())
    assert lines["cpv-5/4"] == "1,345,994"  # the paper's 1.3 M


def test_version(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert not exit.value.code
    assert capsys.readouterr().out == f"cxv {cxv.__version__}, torch {torch.__version__}\n"


def test_train_help_has_groups_and_shows_every_default(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    _, *sections = re.split(r"^([a-z ]+):\n", capsys.readouterr().out, flags=re.MULTILINE)
    groups = dict(zip(sections[::2], sections[1::2], strict=True))
    assert list(groups) == ["options", "model", "data", "recipe", "precision and speed", "output"]
    for option in OPTIONS.values():
        (entry,) = re.findall(
            rf"^  {cli_flag(option.name)}(?=[ ,\n]).*\n(?:    .*\n)*", groups[option.metadata["group"]], re.MULTILINE
        )
        assert ("(default:" in entry) == (option.type is not bool), entry
        assert "`" not in entry.replace("`cxv models`", "")


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (
            ["train", "--data", "cifar"],
            ["--data", "'cifar'", "did you mean cifar10", "digits, cifar10, cifar100"],
        ),
        (
            ["train", "--data", "folder", "--data-dir", "nowhere"],
            ["--data-dir", "nowhere is not a directory"],
        ),
        (["train", "--model", "cpv"], ["--model cpv", "cpv-5/4"]),
        (["train", "--epochs", "ten"], ["--epochs", "whole number", "'ten'"]),
        (["train", "--precision", "fp8"], ["--precision", "fp8", "bf16"]),
        (["train", "--lr", "fast"], ["--lr", "fast"]),
        (["train", "--speed", "9"], ["--speed"]),
        (["train", "--resume", "--output", "nowhere"], ["nowhere holds no run"]),
        (["eval", "--checkpoint", "nowhere"], ["nowhere"]),
        (["eval"], ["--checkpoint"]),
        (["dance"], ["dance"]),
        ([], ["COMMAND"]),
    ],
)
def test_expected_errors_are_one_line_and_exit_2(capsys, tmp_path, monkeypatch, args, parts):
    monkeypatch.chdir(tmp_path)
    assert_error(call(capsys, *args), *parts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--post-train"], "--post-train: it follows training on augmented images: give --rand-augment too"),
        (["--model-arg", "use_fused=true"], "--model-arg use_fused: give --fused"),
        (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        (["--model", "`cpv`"], "--model `cpv`: "),
    ],
    ids=["two-flags", "renamed", "no-prefix", "other-words"],
)
def test_errors_have_flags_in_place_of_the_librarys_arguments(capsys, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    assert_error(call(capsys, "train", *args), f"cxv: error: {message}")


def test_bugs_show_their_traceback(monkeypatch):
    def bug(config, log):
        raise ValueError("a bug")

    monkeypatch.setattr(train_command, "train", bug)
    with pytest.raises(ValueError, match="a bug"):
        main(["train"])


def test_the_default_is_a_small_cpv_on_digits(monkeypatch):
    seen = []
    monkeypatch.setattr(train_command, "train", lambda config, log: seen.append(config))
    assert main(["train"]) == 0
    config, *_ = resolve(seen[0])
    assert (config.data, config.model, config.embed_dim) == ("digits", "cpv-2/4", 64)
    assert (config.epochs, config.sgd_epochs, config.patience) == (60, 20, 20)
    assert config.output == "runs/digits-cpv-2-4"
    assert main(["train", "--data", "cifar10", "--no-fused"]) == 0
    config, *_ = resolve(seen[1])
    assert (config.model, config.embed_dim, config.epochs, config.sgd_epochs) == ("cpv-5/4", None, 300, 100)
    assert config.fused is False


def test_train_flags_become_arguments(tmp_path, monkeypatch, capsys):
    configs = []
    monkeypatch.setattr(train_command, "train", lambda config, log: configs.append(config))
    words = "train --recipe modern --hflip --random-crop 2 --schedule cosine --warmup-epochs 0.5 --weight-decay 0.1"
    words += " --init a.pt --label-smoothing 0.2 --ema-decay 0.99 --progressive 4:1,8:2 --no-recompute"
    assert main([*words.split(), "--output", str(tmp_path)]) == 0
    expected = {
        "init": "a.pt",
        "hflip": True,
        "random_crop": 2,
        "schedule": "cosine",
        "warmup_epochs": 0.5,
        "weight_decay": 0.1,
    }
    expected |= {"label_smoothing": 0.2, "ema_decay": 0.99, "progressive": ((4, 1), (8, 2)), "recompute": False}
    assert {name: getattr(configs[0], name) for name in expected} == expected
    assert main(["train", "--progressive", "16-4"]) == 2
    assert "expected SIZE:EPOCHS,… like 16:10,24:4,32:6, got '16-4'" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_ctrl_c_exits_cleanly_and_says_where_to_go_on(tmp_path):
    """SIGTERM is sent in test_distributed.py."""
    output = tmp_path / "a"
    command = [sys.executable, "-m", "cxv", "train", *TINY, "--epochs", "100000", "--patience", "100000"]
    with subprocess.Popen(
        [*command, "--output", str(output)],
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 300
        while not (output / "best.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert f"go on with  cxv train --resume {output}" in out
    assert "Traceback" not in err
