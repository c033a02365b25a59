"""A smoke test of each benchmark and tool that a user runs: ``--quick``, its table, its CSV file."""

import csv
import json
import re
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import ROOT, needs_cpp, write_image

import cxv_kernels
from cxv.models.registry import has_fused_ops

sys.path.insert(0, str(ROOT / "tools"))

import gpu_run

QUICK = ["--quick", "--device", "cpu", "--threads", "1"]


@pytest.fixture(autouse=True)
def _environment_of_children(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@needs_cpp
@pytest.mark.slow
def test_attn_mem_quick(run_script, tmp_path):
    """Every mechanism has a row for the reference and the fused op; a second run replaces the rows of the first."""
    printed = run_script("benchmarks/attn_mem.py", *QUICK, "--output", tmp_path)
    assert max(len(line) for line in printed.splitlines() if str(tmp_path) not in line) <= 120
    rows = rows_of(tmp_path / "attn_mem-cpu.csv")
    attention = [row for row in rows if row["section"] == "attention"]
    measured = [(r["name"], r["implementation"]) for r in attention if r["size"] == "128"]
    both = ("reference", "fused")
    assert measured == [(m, i) for m in ("performer", "linear", "nystrom") for i in both] + [("sdpa", "torch")]
    for row in rows:
        assert row["status"] == "ok"
        assert int(row["peak_bytes"]) > 0
        if row["implementation"] == "fused":
            assert row["backend"] != "reference"
            assert float(row["error"]) <= float(row["tolerance"])
    assert {row["name"] for row in rows if row["section"] == "model"} == {"cpv-5/4", "cnv-5/4", "cltv-5/4"}
    assert (tmp_path / "attn_mem-cpu.png").read_bytes().startswith(b"\x89PNG")
    picture = (tmp_path / "attn_mem-cpu.png").read_bytes()
    assert str(tmp_path) in run_script("benchmarks/plots.py", tmp_path)
    assert (tmp_path / "attn_mem-cpu.png").read_bytes() == picture
    run_script("benchmarks/attn_mem.py", *QUICK, "--no-models", "--lengths", "64", "--output", tmp_path)
    assert len(rows_of(tmp_path / "attn_mem-cpu.csv")) == 7


@needs_cpp
@pytest.mark.slow
def test_attn_speed_quick(run_script, tmp_path):
    printed = run_script("benchmarks/attn_speed.py", *QUICK, "--no-compile", "--output", tmp_path)
    rows = rows_of(tmp_path / "attn_speed-cpu.csv")
    cases = dict.fromkeys((row["name"], row["variant"]) for row in rows if row["section"] == "op")
    maps = [("linear", name) for name in ("softmax", "elu", "relu")]
    layouts = [("conv_norm", name) for name in ("channels_last", "NCHW")]
    assert list(cases) == [("performer", ""), *maps, ("nystrom", ""), *layouts]
    fused = [row for row in rows if row["implementation"] == "fused"]
    assert all(row["status"] == "ok" and float(row["error"]) <= float(row["tolerance"]) for row in fused)
    assert all(float(row["training_ms"]) > 0 for row in rows if row["status"] == "ok" and row["section"] != "roofline")
    assert "beats softmax from N" in printed
    assert "GFLOP/s" in printed


@needs_cpp
@pytest.mark.slow
def test_model_step_quick(run_script, tmp_path, monkeypatch):
    dropout, rates = torch.nn.functional.dropout, set()
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, rate: rates.add(rate) or dropout(x, rate))
    options = ["--models", "cltv-5/4", "--dtype", "float32", "--output", tmp_path]
    printed = run_script("benchmarks/model_step.py", *QUICK, *options)
    assert "(predicted)" in printed
    assert rates == {0.5}  # the eager model uses PyTorch's
    rows = rows_of(tmp_path / "model_step-cpu.csv")
    saved = {r["implementation"]: int(r["saved_bytes"]) for r in rows if (r["section"], r["batch"]) == ("memory", "4")}
    assert saved["checkpointed"] < saved["fused"] < saved["eager"] / 3
    assert [row["implementation"] for row in rows if row["section"] == "time"] == list(saved)
    assert (tmp_path / "model_step-cpu.png").read_bytes().startswith(b"\x89PNG")


@needs_cpp
@pytest.mark.slow
def test_integrations_quick(run_script, tmp_path):
    pytest.importorskip("timm")
    options = ["--no-compile", "--models", "efficientvit_b0", "--output", tmp_path]
    assert "efficientvit_b0" in run_script("benchmarks/integrations.py", *QUICK, *options)
    rows = rows_of(tmp_path / "integrations-cpu.csv")
    assert {(row["section"], row["variant"], row["implementation"]) for row in rows} == {
        (section, variant, implementation)
        for section in ("attention", "model")
        for variant in ("inference", "training")
        for implementation in ("eager", "fused")
    }
    for _ in range(2):  # another part adds rows, and the same part replaces its own
        run_script("benchmarks/integrations.py", *QUICK, *options, "--pixels", "32")
        sizes = [row["size"] for row in rows_of(tmp_path / "integrations-cpu.csv") if row["section"] == "model"]
        assert sizes == ["64"] * 4 + ["32"] * 4
    for eager, fused in zip(rows[::2], rows[1::2], strict=True):
        assert float(fused["error"]) <= float(fused["tolerance"])
        if eager["section"] == "model":  # alone the state of the op outweighs four tokens
            assert int(fused["peak_bytes"]) <= int(eager["peak_bytes"])


@needs_cpp
@pytest.mark.slow
def test_integrations_of_single_layers(run_script, tmp_path):
    packages = {"performer-pytorch": "performer_pytorch", "nystrom-attention": "nystrom_attention"}
    for package in packages.values():
        pytest.importorskip(package)
    options = ["--no-compile", "--models", ",".join(packages), "--output", tmp_path]
    run_script("benchmarks/integrations.py", *QUICK, *options)
    rows = rows_of(tmp_path / "integrations-cpu.csv")
    assert [row["name"] for row in rows] == [name for name in packages for _ in range(4)]
    assert all(float(row["error"]) <= float(row["tolerance"]) for row in rows if row["implementation"] == "fused")


@needs_cpp
def test_integrations_with_a_package_that_runs_out_of_memory(run_script, tmp_path, monkeypatch):
    package = pytest.importorskip("performer_pytorch.performer_pytorch")
    right = package.linear_attention

    def full(q, k, v):
        if q.shape[-2] == 64:  # of the benchmark, not of accelerate's comparison
            raise torch.OutOfMemoryError("full")
        return right(q, k, v)

    monkeypatch.setattr(package, "linear_attention", full)
    options = ["--no-compile", "--models", "performer-pytorch", "--output", tmp_path]
    printed = run_script("benchmarks/integrations.py", *QUICK, *options).splitlines()
    lines = [line for line in printed if line.startswith("performer-pytorch")]
    assert len(lines) == 2
    for line in lines:
        assert re.search(r"out of memory +\d+\.\d+ ms +\d+\.\d+ MB$", line)
    assert [row["status"] for row in rows_of(tmp_path / "integrations-cpu.csv")] == ["out of memory", "ok"] * 2


@needs_cpp
@pytest.mark.parametrize(("failure", "status"), [("wrong", "failed"), ("oom", "out of memory")])
def test_attn_mem_with_a_failing_kernel(run_script, tmp_path, monkeypatch, failure, status):
    """A fused result outside its tolerance has no speed and fails the run; running out of memory is only a row."""
    right = cxv_kernels.linear_attention

    def wrong(*arguments, backend):
        if backend == "reference":
            return right(*arguments, backend=backend)
        if failure == "oom":
            raise torch.OutOfMemoryError("full")
        return right(*arguments, backend=backend) * 1.001

    monkeypatch.setattr(cxv_kernels, "linear_attention", wrong)
    options = [*QUICK, "--no-models", "--lengths", "64", "--mechanisms", "linear,sdpa", "--output", tmp_path]
    printed = run_script("benchmarks/attn_mem.py", *options, status=int(failure == "wrong"))
    assert ("FAILED" if failure == "wrong" else "out of memory") in printed
    _, row, sdpa = rows_of(tmp_path / "attn_mem-cpu.csv")
    assert (row["status"], row["forward_ms"]) == (status, "")
    assert sdpa["status"] == "ok"


# torchsummary's parameters and all (M); multiply-adds by the counters of the time and of all products (G)
TABLE_1 = {
    "resnet-18": (11.174, 11.174, 0.5567, 0.555),
    "resnet-34": (21.282, 21.282, 1.1615, 1.159),
    "fnet-10": (1.324, 1.456, 1.3439, 1.344),
    "mlp-mixer-5": (21.321, 21.321, 3.0223, 3.020),
    "wavemix-5": (1.433, 1.294, 1.2930, 0.067),
    "convmixer-16": (1.339, 1.339, 1.3692, 1.343),
    "vit-10/4": (1.323, 1.454, 1.3439, 4.03),
    "hybrid-vin-6/8": (1.282, 1.413, 1.4093, 2.36),
    "hybrid-vip-6/8": (1.285, 1.417, 1.3046, 2.00),
    "hybrid-vilt-6/8": (1.282, 1.285, 1.3114, 1.40),
    "cct-6/4": (1.301, 1.432, 1.3231, 2.93),
    "cvt-5/4": (1.300, 1.303, 1.3297, 4.01),
    "cnv-5/4": (1.343, 1.345, 1.3948, 1.772),
    "cltv-5/4": (1.345, 1.346, 1.3758, 1.412),
    "cpv-5/4": (1.345, 1.346, 1.3732, 1.661),
}
# Nyström attention multiplies A⁺(softmax(q̃kᵀ)v) before softmax(qk̃ᵀ): layers · heads · (N·m² − m²·d) products fewer
REORDERED = {"cnv-5/4": 5 * 4 * (1024 - 32) * 64**2, "hybrid-vin-6/8": 6 * 8 * (1088 - 32) * 64**2}


def test_table1_counts_match_the_paper(run_script, tmp_path):
    pytest.importorskip("timm")
    pytest.importorskip("vit_pytorch")
    options = ["--counts-only", "--dtype", "float32", "--threads", "1", "--output", tmp_path]
    run_script("benchmarks/paper/table1.py", *options)
    written = rows_of(tmp_path / "table1-cpu.csv")
    rows = {row["name"]: row for row in written}
    assert list(rows) == list(TABLE_1)
    assert Counter(row["name"] for row in written) == {n: 1 + has_fused_ops(n) for n in TABLE_1}
    for name, (summed, total, macs, true) in TABLE_1.items():
        row = {key: int(rows[name][key]) for key in ("torchsummary", "parameters", "macs", "true_macs")}
        assert round(row["torchsummary"] / 1e6, 3) == summed, name
        assert round(row["parameters"] / 1e6, 3) == total, name
        assert row["macs"] / 1e9 == pytest.approx(macs, rel=0.01), name
        assert (row["true_macs"] + REORDERED.get(name, 0)) / 1e9 == pytest.approx(true, rel=0.01), name


@pytest.mark.slow
def test_table1_quick(run_script, tmp_path):
    """A model without fused ops, which takes one process; test_model_step_quick has a fused model."""
    options = ["--models", "fnet-10", "--dtype", "float32", "--output", tmp_path]
    assert "1.3 / 1.324" in run_script("benchmarks/paper/table1.py", *QUICK, *options)
    (row,) = rows_of(tmp_path / "table1-cpu.csv")
    assert (row["mode"], row["status"]) == ("eager", "ok")
    assert 0 < int(row["saved_bytes"]) < int(row["peak_bytes"])
    assert float(row["train_images_per_s"]) > 0
    assert float(row["inference_images_per_s"]) > 0


TINY = ["--embed-dim", "16", "--batch-size", "20", "--epochs", "2"]


@pytest.mark.slow
def test_ablations_resume(run_script, tmp_path):
    """A finished run is not repeated, an incomplete last line is dropped, other settings are refused."""
    options = ["--data", "digits", "--limit-train", "40", "--limit-test", "40", "--tables", "3", "--models", "cpv-1/2"]
    options += ["--seeds", "0", "--device", "cpu", "--threads", "1", "--runs", tmp_path / "runs", "--output", tmp_path]
    run_script("benchmarks/paper/ablations.py", *TINY, *options, "--quick")
    path = tmp_path / "ablations-cpu.jsonl"
    assert [json.loads(line)["run"]["optimizer"] for line in path.read_text().splitlines()] == ["adamw"]
    with path.open("a") as file:
        file.write('{"run": {"model"')
    printed = run_script("benchmarks/paper/ablations.py", *TINY, *options)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["run"]["optimizer"] for line in lines] == ["adamw", "sgd", "dualopt"]
    assert [line["epochs"] for line in lines] == [2, 2, 2]
    assert printed.count("run 1 of 3") == 0
    assert "Table 3: the optimizer" in printed
    message = run_script("benchmarks/paper/ablations.py", *TINY, *options, "--batch-size", "10", status=2)
    assert "have batch_size = 20, now it is 10" in message


@pytest.mark.slow
def test_cifar10_continues_in_slices(run_script, tmp_path):
    """A slice that ends early exits with 3; the next call completes the run and prints its accuracy."""
    for split, count in (("train", 6), ("test", 3)):
        for label in range(2):
            for i in range(count):
                write_image(tmp_path / "images" / split / f"class{label}" / f"{i}.png", seed=10 * label + i)
    options = ["--data-dir", tmp_path / "images", "--runs", tmp_path / "runs", "--models", "cltv-5/4"]
    options += ["--device", "cpu", "--output", tmp_path]
    flags = ["--", "--embed-dim", "16", "--batch-size", "4", "--sgd-epochs", "1", "--threads", "1", "--img-size", "8"]
    run_script("benchmarks/paper/cifar10.py", *options, "--minutes", "0", *flags, status=3)
    printed = run_script("benchmarks/paper/cifar10.py", *options, "--quick", *flags)
    assert "cltv-5/4" in printed
    assert "86.99" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch", "0"], "argument --batch: must be an integer of at least 1, got '0'"),
        (["--lengths", "256,x"], "argument --lengths: must be an integer of at least 1, got 'x'"),
        (["--mechanisms", "linear,magic"], "must be some of performer, linear, nystrom, sdpa, got 'magic'"),
        (["--dtype", "int8"], "must be some of float64, float32, float16, bfloat16, got 'int8'"),
        (["--device", "cuda"], "argument --device: cuda is not available"),
        (["--output", __file__], "argument --output: cannot create"),
    ],
)
def test_attn_mem_with_bad_arguments(run_script, arguments, words):
    message = run_script("benchmarks/attn_mem.py", *arguments, status=2)
    assert words in message
    assert message.count("\n") == 1


def test_gpu_run_reports_each_step(tmp_path, monkeypatch, capsys):
    """One that works, one that fails and one that hangs: each has a log and a line in the table.

    The one that hangs loses no output, can clean up, and leaves no process behind.
    """
    hangs = (
        "import subprocess, sys, time\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid)\n"
        "try:\n    time.sleep(600)\nexcept KeyboardInterrupt:\n    print('saved')"
    )
    codes = {"works": (0.5, "print('fine')"), "fails": (0.5, "exit(2)"), "hangs": (0.05, hangs)}
    steps = [(name, share, [sys.executable, "-c", code]) for name, (share, code) in codes.items()]
    monkeypatch.setattr(gpu_run, "steps", lambda *_: steps)
    assert gpu_run.main(["--minutes", "1", "--no-build", "--output", str(tmp_path)]) == 1
    table = capsys.readouterr().out.rpartition("seconds  outcome")[2].splitlines()
    outcomes = [" ".join(line.split()[2:]) for line in table[1:4]]
    assert outcomes == ["ok", "exit status 2", "stopped at its time limit"]
    works, fails, hangs = ((tmp_path / f"{name}.log").read_text() for name in codes)
    assert (works, fails) == ("fine\n", "")
    child, saved = hangs.split()
    assert saved == "saved"
    deadline = time.monotonic() + 10  # a signal takes a moment
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def is_running(pid):
    """False for a process that has ended, also if nobody has reaped it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("gpus", "built"), [("7.5", "7.5+PTX"), ("9.0 7.5 9.0", "7.5+PTX;9.0"), ("", "7.5+PTX")])
def test_gpu_run_builds_for_the_gpus_of_the_machine(tmp_path, gpus, built):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {gpus}\n")
    python.chmod(0o755)
    assert gpu_run.architectures(str(python)) == built


def test_gpu_run_starts_scripts_with_flags_that_exist(run_script, tmp_path):
    scripts = [command[1:] for _, _, command in gpu_run.steps(tmp_path, "python", "data") if "-m" not in command]
    assert len(scripts) == 4
    for script, *arguments in scripts:
        known = run_script(script, "--help")
        assert [flag for flag in arguments if flag.startswith("--") and flag not in known] == []
