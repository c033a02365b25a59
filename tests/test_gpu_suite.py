"""The GPU suite without a GPU: every task it could run, what becomes of tasks that die, what counts as met."""

import contextlib
import dataclasses
import inspect
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu_checks  # noqa: E402
import gpu_models  # noqa: E402
import gpu_report  # noqa: E402
import gpu_speed  # noqa: E402
import gpu_suite  # noqa: E402
import memory  # noqa: E402
import plots  # noqa: E402
from gpu_worker import Worker  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))

from interpreter_support import INTERPRETER_BROKEN  # noqa: E402

from cxv_kernels import backends  # noqa: E402
from cxv_kernels.checks import cases  # noqa: E402

CPP = gpu_speed.Settings("cpu", ("cpp",), quick=True)
GPU = gpu_speed.Settings("cuda", ("triton", "cuda"))


# --- the whole of it ---


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A quick run on the CPU, by Triton's interpreter and the C++ kernels; test_host_gpu.py has one of CUDA's side."""
    if INTERPRETER_BROKEN:
        pytest.skip(INTERPRETER_BROKEN)
    out = tmp_path_factory.mktemp("suite")
    command = [sys.executable, str(BENCHMARKS / "gpu_suite.py"), "--quick", "--device", "cpu", "--no-build"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(out)], env=environment, capture_output=True, text=True, check=False, cwd=out
    )
    return done, json.loads((out / "gpu_suite.json").read_text()), out


@pytest.mark.slow
def test_a_quick_run_does_everything(quick):
    done, results, out = quick
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(t["label"], t["error"]) for t in results["tasks"] if t["status"] != "ok"] == []
    assert {t["section"] for t in results["tasks"]} >= set(gpu_suite.SECTIONS) - {
        *("build", "graphs", "ptx", "sanitizer"),  # need nvcc or a GPU
        *(() if gpu_suite._installed() else ("peers",)),
    }
    for task in results["tasks"]:
        assert task["rows"], task["label"]
        for row in task["rows"]:
            assert row.get("status", "ok") in ("ok", "not served", "not installed"), row
    checks = gpu_report.rows_of(results, "checks")
    for backend in ("triton", "cpp"):
        mine = [row for row in checks if row["backend"] == backend and row["status"] == "ok"]
        assert {"performer_attention", "linear_attention", "dropout"} <= {row["op"] for row in mine}
        assert all(0 < row["of_tolerance"] <= 1 for row in mine)
    own = [row for row in checks if row["backend"] == gpu_speed.IMPLICIT_GEMM]
    assert [(row["case"], row["status"]) for row in own] == [("channels_last", "ok")]
    convolutions = {row["implementation"]: row for row in gpu_report.rows_of(results, "conv_norm")}
    assert {"triton", gpu_speed.IMPLICIT_GEMM, "conv2d alone"} <= set(convolutions)
    assert convolutions[gpu_speed.IMPLICIT_GEMM]["forward"]["median_s"] > 0
    assert results["environment"]["device"] == "cpu"
    assert {line["verdict"] for line in results["verdicts"]} == {"not measured"}  # its sizes are nobody's targets
    assert (out / "gpu_suite.md").read_text().strip() == gpu_report.markdown(results)


@pytest.mark.slow
def test_tables_and_pictures_come_from_the_json(quick, tmp_path, capsys):
    _, results, out = quick
    assert gpu_suite.main(["--markdown", str(out / "gpu_suite.json")]) == 0
    assert capsys.readouterr().out.strip() == gpu_report.markdown(results)
    (tmp_path / "gpu_suite.json").write_text(json.dumps(results))
    assert plots.main([str(tmp_path)]) == 0
    assert (tmp_path / "gpu_suite.png").stat().st_size > 10_000


def test_pictures_need_results(tmp_path, capsys):
    (tmp_path / "half.json").write_text('{"benchmark": ')
    with pytest.raises(SystemExit) as stopped:
        plots.main([str(tmp_path)])
    assert stopped.value.code == 2
    assert "no results of attn_mem, model_mem, table1, gpu_suite" in capsys.readouterr().err


# --- the plan ---


@pytest.mark.parametrize("size", gpu_checks.SIZES)
def test_no_check_is_of_a_size_that_a_backend_does_not_serve(size):
    """It would be one check fewer, or a failed one, which bars the op from all measurement."""
    *shape, ragged = gpu_checks.SIZES[size]
    for case in cases(*shape, ragged=ragged):
        for backend in ("triton", "cuda"):
            of_any, of_this = (
                backends.explain_backend(case.op, "cuda", torch.float16, dim)[backend] for dim in (32, case.dim)
            )
            assert of_this == of_any, (case.op, case.label, backend)


@pytest.mark.parametrize(
    "settings", [GPU, dataclasses.replace(GPU, quick=True), dataclasses.replace(GPU, backends=("triton",))]
)
def test_every_planned_task_can_be_called(settings):
    """The full plan needs a GPU: its calls at least fit."""
    tasks = gpu_suite.plan(settings)
    for task in tasks:
        assert task.section in gpu_suite.SECTIONS
        if task.function:
            signature = inspect.signature(gpu_suite.FUNCTIONS[task.function])
            signature.bind(settings, print, **task.arguments)
        else:
            assert task.section in ("ptx", "sanitizer")
        json.dumps(dataclasses.asdict(task))
        assert task.label or not task.function
    assert len({(task.section, task.label) for task in tasks}) == len(tasks)
    called = {task.function for task in tasks} - {""}
    assert called == set(gpu_suite.FUNCTIONS)
    # what is not right is known before anything is timed
    first = next(i for i, task in enumerate(tasks) if task.section == "attention")
    small = {(t.arguments["op"], t.arguments["backend"]) for t in tasks[:first] if t.section == "checks"}
    assert small == {(op, backend) for op in gpu_suite.backends.OPS for backend in settings.backends}
    own = [task.arguments.get("backend") == gpu_speed.IMPLICIT_GEMM for task in tasks]
    assert first < own.index(True) < next(i for i, task in enumerate(tasks) if task.section == "conv_norm")


def test_the_targets_are_planned():
    planned = [(t.section, t.arguments) for t in gpu_suite.plan(GPU)]
    shapes = [a["shape"] for section, a in planned if section == "attention" and a["op"] == "performer_attention"]
    assert {*gpu_speed.SHAPES, tuple(gpu_report.LONG)} <= set(shapes)
    assert shapes[0] == tuple(gpu_report.MAIN) == gpu_speed.SHAPES[0]
    assert max(a["shape"][2] for section, a in planned if section == "sweep") == 1 << 20
    modes = {
        m for s, a in planned if s == "models" and (a["model"], a["batch"]) == ("cpv-5/4", 256) for m in a["modes"]
    }
    assert {"eager", "eager + compile", "triton", "triton + compile", "cuda"} <= modes
    trained = {(a["model"], a["dtype"], a["batch"]) for section, a in planned if section == "models"}
    every = set(itertools.product(("cpv-5/4", "cnv-5/4", "cltv-5/4"), ("float16", "bfloat16"), (32, 256, 1024)))
    assert every <= trained
    for name in ("eager", "triton"):
        compiled = [a for s, a in planned if s == "models" and f"{name} + compile" in a["modes"]]
        assert {(a["model"], a["dtype"], a["batch"]) for a in compiled} == every
    compiled = [a for s, a in planned if s == "attention" and "torch.compile" in a["rivals"]]
    shapes, dtypes = ({a[key] for a in compiled} for key in ("shape", "dtype"))
    assert shapes == {*gpu_speed.SHAPES, tuple(gpu_report.LONG)}
    assert dtypes == {"float16", "bfloat16", "float32"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required: --out"),
        (["--out", "x", "--only", "all"], "argument --only: must be some of"),
        (["--out", "x", "--budget", "0"], "argument --budget: must be a positive number of seconds"),
        (["--markdown", "none.json"], "argument --markdown: no such file"),
    ],
)
def test_bad_values(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu_suite.main(arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


# --- tasks that die ---


def start_tasks(lost):
    """For the worker's process: tasks by name, one of which takes the device with it."""
    state = {"alive": True}

    def perform(task, emit):
        emit({"task": task, "process": os.getpid()})
        if task == "raise":
            raise ValueError("something")
        if task == "lose":
            state["alive"] = False
            raise RuntimeError(lost)
        if task == "die":
            os.kill(os.getpid(), 11)
        if task == "hang":
            time.sleep(60)

    def alive():
        if not state["alive"]:
            raise RuntimeError(lost)

    return perform, alive


def test_a_task_that_dies_takes_no_other_along():
    worker = Worker(start_tasks, "the device is lost")
    outcomes = {task: worker.run(task, 5.0 if task != "hang" else 0.5) for task in ("a", "raise", "b")}
    outcomes |= {
        task: worker.run(task, 0.5 if task == "hang" else 5.0) for task in ("lose", "c", "die", "d", "hang", "e")
    }
    worker.close()
    status = {task: outcome.status for task, outcome in outcomes.items()}
    assert status == {
        **dict.fromkeys("abcde", "ok"),
        **{"raise": "failed", "lose": "failed", "die": "crashed", "hang": "out of time"},
    }
    assert all(outcome.rows[0]["task"] == task for task, outcome in outcomes.items())  # rows survive
    assert "ValueError: something" in outcomes["raise"].error
    assert "the device is lost" in outcomes["lose"].error
    assert "exit code -11" in outcomes["die"].error
    process = {task: outcome.rows[0]["process"] for task, outcome in outcomes.items()}
    assert process["a"] == process["raise"] == process["b"] == process["lose"]
    assert process["c"] == process["die"]
    assert len({process[task] for task in "acde"}) == 4


def start_nothing():
    """For a worker whose process does not even start."""
    raise SystemExit(3)


def test_a_process_that_does_not_start():
    worker = Worker(start_nothing)
    outcome = worker.run("anything", 5.0)
    assert (outcome.status, outcome.rows) == ("not started", [])  # whatever it was to do is not why
    assert "exit code 3" in outcome.error


# --- what a failed check means ---


def task(section, rows=(), status="ok", error=None, **arguments):
    return {
        "section": section,
        "label": "it",
        "arguments": arguments,
        "rows": list(rows),
        "status": status,
        "error": error,
        "wall_s": 0.0,
    }


def test_a_failed_check_bars_the_kernel_and_fails_the_run():
    wrong = {"op": "dropout", "backend": "cuda", "dtype": "float16", "case": "p=0.3", "status": "failed", "note": "x"}
    right = wrong | {"op": "conv_norm", "status": "ok", "of_tolerance": 0.5}
    asked = {"op": "kv_state", "backend": "triton", "size": "small", "dtypes": ("float16", "float32")}
    tasks = [task("checks", [wrong, right]), task("checks", [], "crashed", "exit code -11", **asked)]
    assert gpu_suite.barred(tasks, ()) == {
        ("dropout", "cuda", "float16"),
        ("kv_state", "triton", "float16"),
        ("kv_state", "triton", "float32"),
    }
    words = gpu_report.failures({"tasks": tasks})
    assert len(words) == 2
    assert "dropout p=0.3 cuda float16" in words[0]
    assert "crashed exit code -11" in words[1]
    assert gpu_report.failures({"tasks": [task("checks", [right]), task("models", [], "failed", "x")]}) == []


def test_wrong_gradients_bar_the_model():
    wrong = {"model": "cpv-5/4", "backend": "cuda", "dtype": "float16", "status": "failed"}
    asked = {"model": "cnv-5/4", "dtype": "float16"}
    alone = task("gradients", [], "crashed", **asked) | {"backends": ["triton"]}
    tasks = [task("gradients", [wrong]), alone, task("gradients", [], "crashed", **asked) | {"backends": []}]
    found = {("cpv-5/4", "cuda", "float16"), ("cnv-5/4", "triton", "float16")}
    assert gpu_suite.barred(tasks, ("triton", "cuda")) == found  # one of two is to be tried alone
    assert gpu_suite.barred(tasks, ("cuda",)) == found | {("cnv-5/4", "cuda", "float16")}


def test_what_a_later_check_finds_wrong_loses_its_numbers(monkeypatch, tmp_path):
    """And the targets that were met by it."""
    checked = {"op": "performer_attention", "backend": "triton", "dtype": "float16", "case": "softmax"}
    timed = [row("triton", 1.0), row("cuda", 1.0), row("torch.compile", 4.0)]
    served = {"triton": "triton", "triton + compile": "triton", "cuda": "cuda", "eager": "none"}
    models = [
        model_row(mode, 2500, 1e9) | {"train": {"median_s": 0.1}, "served": {"performer_attention": by}}
        for mode, by in served.items()
    ]
    given = Given(
        attention=gpu_suite.Outcome("ok", timed),
        models=gpu_suite.Outcome("ok", models),
        check_op=gpu_suite.Outcome("ok", [checked | {"status": "failed"}]),
    )
    sections = {"attention": "attention", "models": "models", "checks": "check_op"}
    order = [gpu_suite.Task(section, function, {"op": "it"}) for section, function in sections.items()]
    first = suite(monkeypatch, tmp_path, given, *order[:2])
    assert [line["verdict"] for line in first["verdicts"]].count("met") == 4
    results = suite(monkeypatch, tmp_path, given, *order)
    triton, cuda, compiled = gpu_report.rows_of(results, "attention")
    note = "a later check failed: performer_attention"
    assert (triton["status"], triton["note"]) == ("failed", note)
    numbers = [key for key, value in cuda.items() if value is not None and value != triton[key]]
    assert set(numbers) >= {"status", "forward", "gpu_forward_backward", "forward_bytes_per_s", "peak_bytes"}
    assert not any(isinstance(triton[key], float) for key in numbers)
    assert cuda["status"] == compiled["status"] == "ok"
    rows = {row["mode"]: row for row in gpu_report.rows_of(results, "models")}
    assert {mode: row["train_images_per_s"] for mode, row in rows.items()} == {
        **{"triton": None, "triton + compile": None, "cuda": 2500, "eager": 2500}
    }
    verdicts = {line["target"]: (line["verdict"], line["found"]) for line in results["verdicts"]}
    assert [v for target, v in verdicts.items() if "× torch.compile(reference)" in target] == [
        ("failed", None),
        ("met", 4.0),
    ]
    assert verdicts["triton: CPV-5/4 training, batch 256, AMP float16, images/s × eager"] == ("failed", None)
    assert note in gpu_report.verdict_table(results).text()


def test_what_was_not_reached_is_neither_right_nor_wrong():
    asked = {"op": "kv_state", "backend": "triton", "size": "small", "dtypes": ("float16", "float32")}
    right = {"op": "kv_state", "backend": "triton", "dtype": "float16", "status": "ok", "of_tolerance": 0.5}
    cut = [task("checks", [right], "not measured", **asked), task("checks", [], "not started", "exit code 1", **asked)]
    assert gpu_suite.barred(cut, ()) == set()
    assert gpu_suite.barred([task("checks", [right], "out of time", **asked)], ()) == {
        ("kv_state", "triton", "float32")
    }
    assert gpu_report.failures({"tasks": cut[:1]}) == []
    assert gpu_report.checked({"tasks": cut[:1]}) == [
        "Every check that was run passed.",
        "Not reached, so neither right nor wrong: 1 of 1 tasks of checks, gradients, graphs.",
    ]
    assert gpu_report.checked({"tasks": []}) == ["No check was run."]
    assert gpu_report.checked({"tasks": cut})[:2] == ["FAILED:", "checks it: not started exit code 1"]


class Given:
    """In place of the worker: each task ends as is said of its function; ``asked`` are those that were begun."""

    def __init__(self, **ends):
        self.ends, self.asked = ends, []

    def __call__(self, *_):
        return self

    def run(self, message, limit):
        if message["function"] == "environment":
            return gpu_suite.Outcome("ok", [{"device_name": "a card", "capability": [9, 0]}])
        self.asked.append((message["function"], message["backends"]))
        return self.ends.get(message["function"], gpu_suite.Outcome("ok"))

    def close(self):
        pass


def suite(monkeypatch, out, given, *tasks, options=("--no-build",)):
    """The JSON of a run whose plan are these tasks."""
    monkeypatch.setattr(gpu_suite, "Worker", given)
    monkeypatch.setattr(gpu_suite, "plan", lambda settings: list(tasks))
    monkeypatch.setattr(gpu_suite.Parser, "check_shared", lambda *_: None)
    gpu_suite.main(["--out", str(out), *map(str, options)])
    return json.loads((out / "gpu_suite.json").read_text())


@pytest.mark.parametrize(
    ("limit", "status", "bars"), [(90.0, "not measured", []), (20.0, "out of time", [["dropout", "cuda", "float16"]])]
)
def test_what_the_budget_cuts_off_is_not_held_against_it(monkeypatch, tmp_path, limit, status, bars):
    check = gpu_suite.Task("checks", "check_op", {"op": "dropout", "backend": "cuda", "dtypes": ["float16"]}, limit)
    late = Given(check_op=gpu_suite.Outcome("out of time", error="stopped"))
    results = suite(monkeypatch, tmp_path, late, check, options=("--no-build", "--budget", 30))
    (record,) = results["tasks"]
    assert (record["status"], results["settings"]["barred"]) == (status, bars)
    assert record["limit"] == pytest.approx(min(limit, 30), abs=1)


def test_a_backend_that_serves_nothing_has_not_passed():
    right = {"op": "dropout", "backend": "triton", "status": "ok", "of_tolerance": 0.5}
    idle = {"op": "conv_norm", "backend": "cuda", "status": "not served", "note": "was built but does not load"}
    assert gpu_report.unserved({"tasks": [task("checks", [right, idle | {"backend": "triton"}])]}) == []
    (words,) = gpu_report.unserved({"tasks": [task("checks", [right, idle]), task("checks", [idle])]})
    assert words == "Nothing is known of cuda, which serves no op here: was built but does not load"


def test_a_task_that_failed_for_all_is_tried_for_each():
    planned = next(task for task in gpu_suite.plan(GPU) if task.section == "attention")
    again = gpu_suite.one_by_one(planned, "crashed", GPU)
    assert [task.backends for task in again] == [("triton",), ("cuda",)]
    assert len({planned.label, *(task.label for task in again)}) == 3
    assert all(task.arguments == planned.arguments for task in again)
    slow = gpu_suite.one_by_one(planned, "out of time", GPU)
    assert {task.arguments["rivals"] for task in slow} == {("reference", "sdpa")}  # torch.compile may be what is slow
    convolution = next(task for task in gpu_suite.plan(GPU) if task.section == "conv_norm")
    assert [t.arguments["compiled"] for t in gpu_suite.one_by_one(convolution, "out of time", GPU)] == [False, False]
    assert gpu_suite.one_by_one(again[0], "crashed", GPU) == []
    assert gpu_suite.one_by_one(planned, "ok", GPU) == []
    assert gpu_suite.one_by_one(planned, "failed", CPP) == []


def test_a_peer_that_is_slow_to_tune_costs_itself_alone(monkeypatch):
    monkeypatch.setattr(gpu_suite.peers, "version_of", lambda package: "1.0")
    tasks = gpu_suite.plan(GPU)
    peers = [task for task in tasks if task.section == "peers"]
    assert {(task.arguments["variant"], task.limit) for task in peers} == {("softmax", 60.0), ("elu", 240.0)}
    assert all(gpu_suite.one_by_one(task, "out of time", GPU) == [] for task in peers)
    assert len(gpu_suite.one_by_one(peers[0], "crashed", GPU)) == 2
    targets = [i for i, task in enumerate(tasks) if task.section in gpu_report.JUDGED or task.section == "sweep"]
    assert tasks.index(peers[0]) > max(targets)
    versions = gpu_suite.peers.versions()
    assert set(versions) >= {"flash_bla", "flash-linear-attention", "performer-pytorch"}


def test_a_compiled_model_that_is_slow_to_compile_costs_itself_alone():
    models = [task for task in gpu_suite.plan(GPU) if task.section == "models"]
    compiled = [task for task in models if any("compile" in mode for mode in task.arguments["modes"])]
    assert {task.arguments["modes"] for task in compiled} == {
        ("eager", "eager + compile"),
        ("eager", "triton + compile"),
    }
    assert max(task.limit for task in models) <= 90
    assert all(gpu_suite.one_by_one(task, "out of time", GPU) == [] for task in models)
    assert all(gpu_suite.one_by_one(task, "crashed", GPU) == [] for task in compiled)  # of one backend at most
    assert len(gpu_suite.one_by_one(models[0], "crashed", GPU)) == 2


def test_a_run_goes_on_where_an_earlier_one_ended(tmp_path, capsys):
    out = tmp_path / "out"
    command = [
        "--quick",
        "--device",
        "cpu",
        "--no-build",
        "--backend",
        "cpp",
        "--only",
        "largest_batch",
        "--out",
        str(out),
    ]
    assert gpu_suite.main([*command, "--budget", "1"]) == 0  # too little to begin with anything
    first = json.loads((out / "gpu_suite.json").read_text())["tasks"]
    assert {task["status"] for task in first} == {"not measured"}
    done = first[0] | {"status": "ok", "wall_s": 7.0}
    (tmp_path / "earlier.json").write_text(json.dumps({"benchmark": "gpu_suite", "tasks": [done, *first[1:]]}))
    assert gpu_suite.main([*command, "--resume", str(tmp_path / "earlier.json"), "--budget", "1"]) == 0
    second = json.loads((out / "gpu_suite.json").read_text())["tasks"]
    assert [task["label"] for task in second] == [task["label"] for task in first]
    assert second[0] == done
    assert "Not measured, the budget was spent" in capsys.readouterr().out


ATTENTION = gpu_suite.Task("attention", "attention", {"op": "linear_attention"})
DROPOUT = gpu_suite.Task("checks", "check_op", {"op": "dropout", "backend": "cuda", "dtypes": ["float16"]})
PTX = gpu_suite.Task("ptx", "", {}, 90.0)


@pytest.mark.parametrize("options", [("--no-build",), ()])
def test_a_run_with_nothing_left_loses_nothing(monkeypatch, tmp_path, options):
    built = []
    monkeypatch.setattr(gpu_suite.Programs, "build", lambda self, limit, sections: built.append(sections) or [])
    first = suite(monkeypatch, tmp_path, Given(check_op=gpu_suite.Outcome("crashed")), DROPOUT)
    file = tmp_path / "gpu_suite.json"
    file.write_text(json.dumps(first | {"wall_s": 400.0}))
    second = suite(monkeypatch, tmp_path, Given(), DROPOUT, options=(*options, "--resume", file))
    assert second["environment"]["capability"] == [9, 0]
    assert second["settings"]["barred"] == first["settings"]["barred"] == [["dropout", "cuda", "float16"]]
    assert second["wall_s"] == 400.0 or options == ()
    assert [task["section"] for task in second["tasks"]] == ["checks", *(["build"] if options == () else [])]
    assert built == ([set()] if options == () else [])


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("reached", [1, 2])
def test_a_later_run_tries_each_backend_that_the_first_had_no_time_for(monkeypatch, tmp_path, reached, killed):
    died, well = Given(attention=gpu_suite.Outcome("crashed")), Given()
    first = suite(monkeypatch, tmp_path, died, ATTENTION)
    calls = [("attention", ()), ("attention", ("triton",)), ("attention", ("cuda",))]
    assert died.asked == calls
    rest = [] if killed else [task | {"status": "not measured"} for task in first["tasks"][reached:]]
    file = tmp_path / "gpu_suite.json"
    file.write_text(json.dumps(first | {"tasks": first["tasks"][:reached] + rest}))
    second = suite(monkeypatch, tmp_path, well, ATTENTION, options=("--no-build", "--resume", file))
    assert well.asked == calls[reached:]
    assert [task["status"] for task in second["tasks"]] == ["crashed"] * reached + ["ok"] * (3 - reached)


@pytest.mark.parametrize(("build", "again"), [("ok", ["ptx"]), ("out of time", ["checks", "ptx"])])
def test_a_later_run_does_what_an_unfinished_build_did_not_serve(build, again):
    """A CUDA library that is missing serves nothing, and would not until the JSON is thrown away."""
    absent = {"op": "dropout", "backend": "cuda", "dtype": "float16", "status": "not served"}
    done = [
        task("build", [{"program": "build", "status": build}]),
        task("checks", [absent]) | {"label": DROPOUT.label},
        task("ptx", [{"program": "library of compute_75", "status": "not built"}]) | {"label": ""},
    ]
    left = gpu_suite.unfinished([DROPOUT, PTX], {"tasks": done}, GPU)
    assert [task.section for task in left] == again


@pytest.mark.parametrize(
    ("sections", "beside"),
    [
        (set(), set()),
        ({"sanitizer"}, set()),
        ({"ptx"}, {"PTX library"}),
        ({"checks", "ptx"}, {"PTX library", "Triton"}),
    ],
)
def test_only_what_is_needed_is_built(monkeypatch, tmp_path, sections, beside):
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-lineinfo")
    (command, environment), others, _ = building(monkeypatch, tmp_path, lambda name, **_: f"/bin/{name}", sections)
    assert "nice" not in command
    assert environment["TORCH_CUDA_ARCH_LIST"] == "7.5+PTX;9.0"
    assert environment["NVCC_APPEND_FLAGS"] == "--threads 2 -lineinfo"
    assert set(others) == beside
    for command, environment in others.values():
        assert command[0] == "nice"
        assert "NVCC_APPEND_FLAGS" not in environment


def building(monkeypatch, tmp_path, which, sections=frozenset()):
    """How it would build for these sections: the first command, the others, the first's row."""
    seen = {}
    monkeypatch.setattr(gpu_suite, "first_line", lambda *_: "9.0")
    monkeypatch.setattr(gpu_suite.shutil, "which", which)
    monkeypatch.setattr(gpu_suite.Programs, "run", lambda self, commands, *_: seen.update(commands) or [{"note": None}])
    programs = gpu_suite.Programs(GPU, tmp_path / "log")
    (row,) = programs.build(100.0, sections)
    programs.close()
    return seen.pop("build"), seen, row


def test_ninja_is_found_where_no_environment_is_activated(monkeypatch, tmp_path):
    packaged = SimpleNamespace(BIN_DIR="/venv/bin")
    monkeypatch.setitem(sys.modules, "ninja", packaged)
    (_, environment), _, row = building(monkeypatch, tmp_path, lambda name, path=None: path and f"{path}/{name}")
    assert environment["PATH"].split(os.pathsep)[-1] == "/venv/bin"
    assert row["note"] is None
    monkeypatch.setitem(sys.modules, "ninja", None)
    _, _, row = building(monkeypatch, tmp_path, lambda name, path=None: None)
    assert row["note"] == "without ninja, which was not found: file after file"


def test_what_is_built_aside_ends_with_the_build(tmp_path):
    programs = gpu_suite.Programs(CPP, tmp_path / "log")
    begin = time.perf_counter()
    build, aside = programs.run({"build": (["true"], {}), "aside": (["sleep", "60"], {})}, 60.0, 0.1)
    programs.close()
    assert (build["status"], aside["status"]) == ("ok", "out of time")
    assert time.perf_counter() - begin < 30


def collected(function, settings, **arguments):
    rows = []
    function(settings, rows.append, **arguments)
    return rows


SMALL = {"op": "linear_attention", "variant": "elu", "shape": (1, 2, 40, 16), "dtype": "float32"}


def test_a_barred_kernel_is_not_timed():
    settings = dataclasses.replace(CPP, barred=frozenset({("linear_attention", "cpp", "float32")}))
    fused, reference = collected(gpu_speed.attention, settings, **SMALL, rivals=("reference",))
    assert (fused["status"], fused["note"], fused["forward"]) == ("failed", "its check failed", None)
    assert reference["status"] == "ok"
    (row,) = collected(gpu_speed.attention, dataclasses.replace(settings, backends=("cuda",)), **SMALL, rivals=())
    assert row["status"] == "not served"
    assert row["note"] == gpu_suite.backends.explain_backend("linear_attention", "cpu")["cuda"]


IMAGE = {"shape": (1, 8, 4, 4), "dtype": "float32", "compiled": False}


def test_the_convolution_of_its_own_is_judged_alone(monkeypatch):
    """By "cpp" in Triton's place, which the flag makes wrong."""
    flag = SimpleNamespace(implicit_gemm=False)
    monkeypatch.setitem(sys.modules, "cxv_kernels.conv_norm.triton", flag)
    monkeypatch.setattr(gpu_speed, "explain", lambda *_: "serves")
    right = gpu_speed.cxv_kernels.conv_norm
    fake = SimpleNamespace(conv_norm=lambda *x, backend: right(*x, backend="cpp") * (1.01 if flag.implicit_gemm else 1))
    monkeypatch.setattr(gpu_speed, "cxv_kernels", fake)
    settings = dataclasses.replace(CPP, backends=("triton",))
    rows = collected(gpu_speed.convolution, settings, layout="channels_last", **IMAGE)
    found = {row["implementation"]: row["status"] for row in rows}
    assert found == {
        "triton": "ok",
        gpu_speed.IMPLICIT_GEMM: "failed",
        "conv2d, layer_norm": "ok",
        "conv2d alone": "ok",
    }
    assert not flag.implicit_gemm
    rows = collected(gpu_speed.convolution, settings, layout="NCHW", **IMAGE)
    assert gpu_speed.IMPLICIT_GEMM not in {row["implementation"] for row in rows}


def test_the_convolution_of_its_own_is_served_where_it_can_be(monkeypatch):
    monkeypatch.setattr("cxv_kernels._triton.TRITON_MISSING", None)
    monkeypatch.setattr("cxv_kernels._triton.interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (7, 5))

    def explain(dim):
        return gpu_speed.explain("conv_norm", gpu_speed.IMPLICIT_GEMM, "cuda", torch.float16, dim)

    assert explain(128) == "serves matrix products from sm_80 on, not sm_75"
    assert explain(300) == "serves at most 256 channels, not 300"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    assert explain(128) == "serves"


def test_a_wrong_kernel_is_not_timed_and_leaves_the_others(monkeypatch):
    right = gpu_speed.attend
    scale = {"cpp": 1.01}
    monkeypatch.setattr(gpu_speed, "attend", lambda o, v, p, b: lambda *x: right(o, v, p, b)(*x) * scale.get(b, 1))
    fused, reference = collected(gpu_speed.attention, CPP, **SMALL, rivals=("reference",))
    assert (fused["status"], fused["forward"]) == ("failed", None)
    assert fused["max_relative_error"] == pytest.approx(0.01, rel=0.1)
    assert reference["forward"]["median_s"] > 0


def test_what_raises_is_a_row(monkeypatch):
    right = gpu_speed.attend

    def broken(op, variant, projection, backend):
        def attend(*inputs):
            if backend == "cpp":
                raise RuntimeError("CUDA out of memory. Tried" if op == "linear_attention" else "no such\nkernel")
            return right(op, variant, projection, backend)(*inputs)

        return attend

    monkeypatch.setattr(gpu_speed, "attend", broken)
    fused, reference = collected(gpu_speed.attention, CPP, **SMALL, rivals=("reference",))
    assert (fused["status"], reference["status"]) == ("out of memory", "ok")
    other = SMALL | {"op": "performer_attention", "variant": "relu"}
    fused, _ = collected(gpu_speed.attention, CPP, **other, rivals=("reference",))
    assert (fused["status"], fused["note"]) == ("fails", "RuntimeError: no such kernel")


def test_a_wrong_model_gets_no_number(monkeypatch):
    arguments = {"model": "cltv-1/4", "dtype": "float32", "batch": 1, "modes": ("cpp",), "side": 8}
    settings = dataclasses.replace(CPP, barred=frozenset({("conv_norm", "cpp", "float32")}))
    (row,) = collected(gpu_models.models, settings, **arguments)
    assert (row["status"], row["note"], row["train"]) == ("failed", "a check failed: conv_norm", None)
    monkeypatch.setattr(gpu_models, "check_model", lambda *_: ({"conv_norm": "cpp"}, 0.5))
    (row,) = collected(gpu_models.models, CPP, **arguments)
    assert (row["status"], row["train"]) == ("failed", None)


def test_a_model_whose_gradients_are_wrong_gets_no_number():
    arguments = {"model": "cltv-1/4", "dtype": "float32", "batch": 1, "modes": ("cpp",), "side": 8}
    settings = dataclasses.replace(CPP, barred=frozenset({("cltv-1/4", "cpp", "float32")}))
    (row,) = collected(gpu_models.models, settings, **arguments)
    assert (row["status"], row["note"], row["train"]) == ("failed", "a check failed: cltv-1/4", None)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [(1.0, ("ok", "ok")), (1.01, ("failed", "differs"))],
)
def test_a_compiled_model_is_checked_and_whole(monkeypatch, scale, expected):
    wholes = []

    def compile(function, fullgraph, **_):
        wholes.append(fullgraph)
        return lambda images: function(images) * scale

    monkeypatch.setattr(torch, "compile", compile)
    arguments = {"model": "cltv-1/4", "dtype": "float32", "batch": 1, "side": 8}
    rows = collected(gpu_models.models, CPP, **arguments, modes=("cpp + compile", "eager + compile"))
    assert tuple(row["status"] for row in rows) == expected
    assert wholes == [True, True, False, False]
    for row in rows:
        assert row["compiled_error"] == pytest.approx(scale - 1, abs=1e-4)
        assert (row["train"] is None) == (row["status"] != "ok")


def test_a_graph_that_breaks_is_no_fused_compiled_model(monkeypatch):
    torch.compiler.reset()
    right = gpu_models.build

    def breaking(name, mode):
        model = right(name, mode)
        model.register_forward_hook(lambda *_: torch._dynamo.graph_break())
        return model

    monkeypatch.setattr(gpu_models, "build", breaking)
    arguments = {"model": "cltv-1/4", "dtype": "float32", "batch": 1, "side": 8, "modes": ("cpp + compile",)}
    (row,) = collected(gpu_models.models, CPP, **arguments)
    assert (row["status"], row["train"]) == ("fails", None)
    assert "graph_break" in row["note"]
    torch.compiler.reset()


def test_a_model_s_speed_is_over_what_took_turns_with_it(monkeypatch):
    times = iter([(4.0, 2.0), (3.0, 1.0)])
    monkeypatch.setattr(gpu_models, "interleaved", lambda *_, **__: [gpu_models.Timing((t,)) for t in next(times)])
    monkeypatch.setattr(gpu_models, "_prepare", lambda *_: (print, print))
    arguments = {"model": "cltv-1/4", "dtype": "float32", "batch": 8, "modes": ("eager", "cpp"), "side": 8}
    eager, fused = collected(gpu_models.models, CPP, **arguments)
    assert (eager["train_speedup"], fused["train_speedup"], fused["infer_speedup"]) == (1, 2, 3)
    assert fused["train_images_per_s"] == 4


def test_wrong_gradients_are_seen(monkeypatch):
    arguments = {"model": "cltv-1/4", "dtype": "float32", "batch": 1, "side": 8}
    (row,) = collected(gpu_checks.check_model, CPP, **arguments)
    assert row["status"] == "ok"
    assert row["error"] < 1e-5
    assert set(row["served"].values()) == {"cpp"}
    right = gpu_checks.model_gradients
    calls = []

    def wrong(*of):
        found = right(*of)
        calls.append(found)
        if len(calls) == 3:  # after the reference in float64 and as it is
            found["stem.0.weight"] = found["stem.0.weight"] * 1.01
        return found

    monkeypatch.setattr(gpu_checks, "model_gradients", wrong)
    (row,) = collected(gpu_checks.check_model, CPP, **arguments)
    assert (row["status"], row["worst"]) == ("failed", "stem.0.weight")


def test_checks_on_their_own(tmp_path):
    file = tmp_path / "checks.json"
    command = [
        "--backend",
        "cpp",
        "--device",
        "cpu",
        "--size",
        "tiny",
        "--ops",
        "dropout,conv_norm",
        "--json",
        str(file),
    ]
    assert gpu_checks.main(command) == 0
    rows = json.loads(file.read_text())["rows"]
    assert {(row["op"], row["dtype"]) for row in rows} == {
        (op, dtype) for op in ("dropout", "conv_norm") for dtype in ("float32", "float16")
    }
    assert all(row["status"] == "ok" for row in rows)


def test_programs_have_a_row_each(tmp_path):
    programs = gpu_suite.Programs(CPP, tmp_path / "log")
    late = tmp_path / "late"
    commands = {
        "well": ([sys.executable, "-c", "print('hello')"], {}),
        "badly": ([sys.executable, "-c", "raise SystemExit(7)"], {}),
        "for ever": (["sh", "-c", f"(sleep 3; touch {late}) & sleep 60"], {}),
    }
    rows = {row["program"]: row for row in programs.run(commands, 2.0)}
    assert programs.ptx_checks(1.0) == [{"program": "library of compute_75", "status": "not built"}]
    programs.close()
    time.sleep(1.5)
    assert not late.exists()  # what a program has started ends with it
    assert {name: row["status"] for name, row in rows.items()} == {
        "well": "ok",
        "badly": "failed",
        "for ever": "out of time",
    }
    assert rows["badly"]["exit_code"] == 7
    assert "hello" in (tmp_path / "log").read_text()
    assert not programs.ptx.exists()


# --- targets ---


def row(implementation, milliseconds, shape=gpu_report.MAIN, op="performer_attention", **more):
    timing = {"median_s": milliseconds / 1e3, "q1_s": 0, "q3_s": 0, "samples_s": [milliseconds / 1e3]}
    called = timing | {"median_s": 1.0}  # launching counts: not what is compared
    return {
        **{"op": op, "variant": "softmax", "shape": shape, "dtype": "float16", "implementation": implementation},
        **{"status": "ok", "forward": called, "forward_backward": called, "gpu_forward": timing},
        **{"gpu_forward_backward": timing, "forward_bytes_per_s": 1e12, "forward_backward_flop_per_s": 1e12},
        **{"tokens": shape[2], "peak_bytes": 1e6, "max_relative_error": 1e-3, "note": None, **more},
    }


def model_row(mode, rate, peak, eager=1000):
    return {
        "train_speedup": rate / eager,  # over eager as it ran in turn with it
        **{"model": "cpv-5/4", "dtype": "float16", "batch": 256, "mode": mode, "status": "ok", "note": None},
        **{"train_images_per_s": rate, "infer_images_per_s": rate, "train_peak_bytes": peak, "infer_peak_bytes": peak},
    }


def test_verdicts_compare_the_gpus_own_times():
    fast = [row("triton", 1.0), row("cuda", 1.2), row("torch.compile", 4.0), row("sdpa, flash", 1.4)]
    long = [row("triton", 1.0, gpu_report.LONG), row("sdpa, flash", 12.0, gpu_report.LONG)]
    linear = [row("triton", 1.0, op="linear_attention")]
    peers = [row("triton", 1.0, op="linear_attention"), row("flash_bla", 1.5, op="linear_attention")]
    models = [model_row("eager", 1000, 16e9), model_row("triton", 2100, 1e9)]
    compiled = [model_row("eager", 500, 16e9, 500), model_row("eager + compile", 1000, 9e9, 500)]  # the GPU was slower
    results = {
        "environment": {"device_name": "a card"},
        "tasks": [
            task(
                "ceilings",
                [{"dtype": "float16", "bandwidth": 1.5e12, "flops": 1e14, "bandwidth_by": "a", "flops_by": "b"}],
            ),
            task("attention", [*fast, *long, *linear]),
            task("peers", peers),
            task("models", models),
            task("models", compiled),
            task("models", [model_row("triton + compile", 2500, 1e9)]),
        ],
    }
    results["verdicts"] = gpu_report.verdicts(results)
    assert [(line["verdict"], line["found"] and round(line["found"], 2)) for line in results["verdicts"]] == [
        ("met", 4.0),
        ("missed", 1.4),
        ("met", 12.0),
        ("met", 0.67),
        ("met", 1.5),
        ("met", 0.67),
        ("met", 2.5),
        ("missed", 1.25),
        ("met", 16.0),
        ("met", 3.33),
        ("met", 0.83),
    ]
    right = {"op": "dropout", "backend": "cuda", "dtype": "float16", "status": "ok"}
    results["tasks"] += [task("sweep", [], "not measured"), task("checks", [right])]
    text = gpu_report.summary(results)
    assert "Every check passed." in text
    assert "Not measured, the budget was spent:\n  sweep it" in text
    assert "1.000" in text  # ms of the GPU
    assert "matrices in float32" in text
    text = gpu_report.markdown(results)
    assert text.count("| met") == 9
    assert "matrices in float32" in text
    assert text.count("| eager |") == 1
    assert "| eager + compile | 1,000 | 2.00× |" in text
    assert gpu_report.verdicts({"tasks": []})[0]["verdict"] == "not measured"


# --- timing the GPU alone ---


class Card:
    """A GPU of the imagination: work is queued, time passes when something waits, launching takes the CPU time."""

    def __init__(self, launching):
        self.now = self.done = 0.0  # what the CPU's clock says; when the GPU will have done all that is queued
        self.launching = launching

    def work(self, duration):
        self.now += self.launching
        self.done = max(self.now, self.done) + duration

    def event(self, enable_timing):
        event = SimpleNamespace()
        event.record = lambda: setattr(event, "at", max(self.now, self.done))
        event.synchronize = lambda: setattr(self, "now", max(self.now, event.at))
        event.query = lambda: event.at <= self.now
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event

    def synchronize(self, device=None):
        self.now = max(self.now, self.done)


@pytest.mark.parametrize("launching", [1e-6, 1e-3])
def test_launching_does_not_count(monkeypatch, launching):
    card = Card(launching)
    fake = SimpleNamespace(
        Event=card.event,
        synchronize=card.synchronize,
        _sleep=lambda cycles: card.work(cycles / 1e9),
        get_device_properties=lambda _: SimpleNamespace(L2_cache_size=1024),
    )
    monkeypatch.setattr(torch, "cuda", fake)
    queue = memory.Queue(torch.device("cpu"))
    assert queue._clock == pytest.approx(1e9, rel=0.2)

    def run():
        for _ in range(5):
            card.work(2e-6)

    assert queue.seconds(run, 4) == pytest.approx(10e-6)
    # what its caller waits for
    seconds = memory._seconds(run, torch.device("cuda"), 4)
    assert seconds == pytest.approx(max(5 * launching, 10e-6), rel=0.3)


def test_a_replay_that_differs_is_seen(monkeypatch):
    """With a graph that replays nothing."""

    @contextlib.contextmanager
    def nothing(*_):
        yield

    stream = SimpleNamespace(wait_stream=lambda _: None)
    fake = SimpleNamespace(
        Stream=lambda: stream,
        current_stream=lambda: stream,
        stream=nothing,
        graph=nothing,
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: None),
        synchronize=lambda: None,
    )
    monkeypatch.setattr(torch, "cuda", fake)
    rows = collected(gpu_checks.check_graph, CPP, op="dropout", backend="cpp", dtype="float32")
    assert [(r["status"], r["note"]) for r in rows] == [("failed", "a replay gives other bits")]


# --- the tuner's card ---


@pytest.mark.parametrize(
    ("capability", "arch", "words"),
    [
        ((9, 0), None, None),
        ((9, 0), "90", None),
        ((9, 0), "80", "argument --arch: time tunes this GPU's alone, 90"),
        ((7, 5), None, "argument --rank-by: time tunes sm_80 and sm_90, not sm_75"),
        ((8, 9), None, "argument --rank-by: time tunes sm_80 and sm_90, not sm_89"),
        ((12, 0), "90", "argument --rank-by: time tunes sm_80 and sm_90, not sm_120"),
    ],
)
def test_the_tuner_writes_of_its_own_card_alone(monkeypatch, capsys, capability, arch, words):
    import tune

    monkeypatch.setattr(tune._triton, "TRITON_MISSING", None)
    monkeypatch.setattr(tune._triton, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)
    command = ["--arch", arch] if arch else []
    if words is None:
        assert tune.parse(command).arch == [90]
        return
    with pytest.raises(SystemExit) as stopped:
        tune.parse(command)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
