"""What "auto" takes on a GPU: the table that a gpu_suite's JSON makes, and its use. The JSONs are made here."""

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cxv_kernels
from cxv_kernels import backends

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import gpu_routes

HALF, WIDE = "float16", "float32"


def suite(capability, times, failed=(), gradients=()):
    """A gpu_suite's JSON in which every op passed its checks in two dtypes, but for ``failed``; times in seconds."""
    checks = [
        {"op": op, "backend": name, "dtype": dtype, "status": "failed" if (op, name, dtype) in failed else "ok"}
        for op, name, dtype in itertools.product(backends.OPS, ("triton", "cuda"), (HALF, WIDE))
    ]
    rows = [
        {"op": op, "variant": "softmax", "shape": [1, 2, 3, 4], "dtype": HALF, "implementation": name, "status": "ok"}
        | {"forward_backward": {"median_s": time}}
        for (op, name), time in times.items()
    ]
    sections = {"checks": checks, "attention": rows, "gradients": list(gradients)}
    return {
        "benchmark": "gpu_suite",
        "settings": {"barred": [list(one) for one in failed], "backends": ["triton", "cuda"]},
        "environment": {"capability": capability},
        "tasks": [task(name, "ok", rows=rows) for name, rows in sections.items()],
    }


def task(section, status, *names, rows=(), **arguments):
    return {
        **{"section": section, "status": status, "arguments": arguments | {"dtype": HALF}},
        **{"backends": list(names), "rows": list(rows)},
    }


def table_of(tmp_path, **files):
    paths = []
    for name, content in files.items():
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(content))
    out = tmp_path / "table"
    assert gpu_routes.main([*map(str, paths), "--out", str(out)]) == 0
    return json.loads(out.read_text())


def test_the_faster_comes_first_and_the_slower_than_pytorch_not_at_all(tmp_path, capsys):
    performer, linear, features = "performer_attention", "linear_attention", "performer_features"
    times = {(performer, "reference"): 5, (performer, "triton"): 2, (performer, "cuda"): 1}
    times |= {(linear, "reference"): 5, (linear, "triton"): 2, (linear, "cuda"): 9}
    entry = table_of(tmp_path, a100=suite([8, 0], times))["80"]
    assert entry.pop("evidence") == ["a100.json"]
    assert set(entry) == set(backends.OPS)
    assert entry[performer] == {HALF: ["cuda", "triton"], WIDE: ["triton", "cuda"]}  # float32 was not timed
    assert entry[linear][HALF] == ["triton"]
    assert entry[features] == {HALF: ["triton", "cuda"], WIDE: ["triton", "cuda"]}
    assert "sm_80 performer_attention float16: cuda, triton" in capsys.readouterr().out


def test_what_failed_is_out(tmp_path):
    failed = [("conv_norm", "cuda", HALF), ("dropout", "cuda", HALF), ("dropout", "triton", HALF)]
    gradients = [
        {"status": "failed", "backend": "triton", "dtype": WIDE, "served": {"performer_attention": "triton"}},
        {"status": "ok", "backend": "cuda", "dtype": WIDE, "served": {"linear_attention": "cuda"}},
    ]
    entry = table_of(tmp_path, t4=suite([7, 5], {}, failed, gradients))["75"]
    assert entry["conv_norm"] == {HALF: ["triton"], WIDE: ["cuda", "triton"]}
    assert entry["dropout"][HALF] == []
    assert entry["performer_attention"] == {HALF: ["cuda", "triton"], WIDE: ["cuda"]}
    assert entry["linear_attention"][WIDE] == ["cuda", "triton"]


@pytest.mark.parametrize(
    ("ended", "out"),
    [
        (task("attention", "crashed", "cuda", op="linear_attention"), {"linear_attention"}),
        (task("conv_norm", "out of time", "cuda"), {"conv_norm"}),
        (task("gradients", "failed", "cuda", model="cltv-5/4"), {"linear_attention", "dropout"}),
        (
            task("models", "crashed", modes=["eager", "cuda + compile"], model="cltv-5/4"),
            {"linear_attention", "dropout"},
        ),
        (task("gradients", "crashed", "cuda", model="cnv-5/4"), set(backends.OPS)),  # whatever it has
        (task("attention", "crashed", op="linear_attention"), set()),  # one of two
        (task("attention", "not measured", "cuda", op="linear_attention"), set()),
        (task("models", "out of time", modes=["eager", "cuda + compile"], model="cltv-5/4"), set()),  # compiling
        (task("models", "crashed", modes=["eager", "eager + compile"], model="cltv-5/4"), set()),
    ],
)
def test_what_did_not_live_to_tell_is_out(tmp_path, ended, out):
    served = {"linear_attention": "triton", "dropout": "triton"}
    right = {"status": "ok", "backend": "triton", "model": "cltv-5/4", "dtype": HALF, "served": served}
    results = suite([9, 0], {}, gradients=[right])
    results["tasks"].append(ended)
    entry = table_of(tmp_path, h200=results)["90"]
    assert {op for op in backends.OPS if entry[op][HALF] == ["triton"]} == out
    assert all(set(entry[op][WIDE]) == {"triton", "cuda"} for op in backends.OPS)


def test_what_no_check_found_right_is_out(tmp_path):
    """A CUDA graph that gives a direct call's bits may give wrong ones."""
    results = suite([9, 0], {})
    checks = results["tasks"][0]
    rows = [row for row in checks["rows"] if (row["op"], row["backend"]) == ("conv_norm", "cuda")]
    checks |= {"rows": [row for row in checks["rows"] if row not in rows], "status": "not measured"}
    results["tasks"].append(task("graphs", "ok", rows=rows))
    entry = table_of(tmp_path, h200=results)["90"]
    assert entry["conv_norm"][HALF] == ["triton"]
    assert set(entry["dropout"][HALF]) == {"triton", "cuda"}


def test_a_kernel_is_compared_with_what_took_turns_with_it():
    """Measured again in another task, when the GPU was slower: the rows of PyTorch's two do not mix."""
    performer = "performer_attention"
    results = suite([9, 0], {(performer, "reference"): 3, (performer, "triton"): 2})
    again = suite([9, 0], {(performer, "reference"): 9, (performer, "triton"): 6})
    results["tasks"] += [one for one in again["tasks"] if one["section"] == "attention"]
    assert gpu_routes.slowness([results], performer, HALF, "triton") == pytest.approx(2 / 3)


def test_several_cards_and_several_files_of_one(tmp_path):
    performer = "performer_attention"
    plain, slow, fast = {(performer, "reference"): 8}, {(performer, "cuda"): 4}, {(performer, "cuda"): 1}
    first = suite([9, 0], plain | slow | {(performer, "triton"): 3})
    second = suite([9, 0], plain | fast)
    table = table_of(tmp_path, one=first, two=second, three=suite([7, 5], {}))
    assert list(table) == ["75", "90"]
    assert table["90"]["evidence"] == ["one.json", "two.json"]
    assert table["90"][performer][HALF] == ["cuda", "triton"]  # √(1/2 · 1/8) = 1/4 < 3/8


@pytest.mark.parametrize(
    ("content", "words"),
    [({"benchmark": "model_mem"}, "is not a JSON of this benchmark"), (suite(None, {}), "is not of a GPU")],
)
def test_other_files(tmp_path, capsys, content, words):
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit) as stopped:
        gpu_routes.main([str(tmp_path / "x.json"), "--out", str(tmp_path / "table")])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "table").exists()


# --- what "auto" does with it ---


@pytest.fixture
def gpu(monkeypatch):
    """As if there were a GPU of a capability, whose kernels serve everything; and what serves a call there."""
    monkeypatch.setattr("cxv_kernels.autograd.CUDA_MISSING", None)
    monkeypatch.setattr("cxv_kernels.autograd.cuda_compiled_for", lambda _: 80)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("cxv_kernels._triton.TRITON_MISSING", None)
    monkeypatch.setattr("cxv_kernels._triton.interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backends, "_announced", set())

    def serving(capability, op, dtype=torch.float16, dim=32, backend=None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)
        return backends.resolve(op, SimpleNamespace(device=torch.device("cuda"), dtype=dtype), backend, dim)

    return serving


def test_nothing_serves_unasked_before_there_is_evidence(gpu):
    assert json.loads(gpu_routes.TABLE.read_text()) == backends._GPU_ROUTES
    if not backends._GPU_ROUTES:
        with pytest.warns(UserWarning, match="cuda has not been checked on such a GPU yet, which .* serves only when"):
            assert gpu((7, 5), "performer_attention") == "reference"
    assert gpu((7, 5), "performer_attention", backend="cuda") == "cuda"
    assert gpu((7, 5), "performer_attention", backend="triton,cuda") == "cuda"


def test_evidence_routes(gpu, monkeypatch, tmp_path):
    performer = "performer_attention"
    fast = {(performer, "reference"): 5, (performer, "triton"): 1, (performer, "cuda"): 2}
    table = table_of(tmp_path, t4=suite([7, 5], {}), a100=suite([8, 0], fast, [("conv_norm", "triton", HALF)]))
    monkeypatch.setattr(backends, "_GPU_ROUTES", table)
    assert gpu((7, 5), performer) == gpu((7, 5), "linear_attention") == gpu((7, 5), performer, torch.float32) == "cuda"
    assert gpu((7, 5), "dropout") == "triton"  # the only one that has it
    assert gpu((8, 0), performer) == gpu((8, 6), performer) == "triton"  # of one major: the same machine code
    assert gpu((8, 0), performer, dim=200) == "reference"  # neither can
    assert gpu((8, 0), "conv_norm") == "cuda"
    assert gpu((8, 0), performer, backend="cuda") == "cuda"
    backends._announced.clear()
    with pytest.warns(UserWarning, match="has not been checked on such a GPU yet"):
        assert gpu((9, 0), performer) == "reference"
    backends._announced.clear()
    with pytest.warns(UserWarning, match=r"bfloat16 on cuda|on such a GPU yet|no bfloat16 on sm_75"):
        assert gpu((7, 5), performer, torch.bfloat16) == "reference"


def test_slower_than_pytorch_gives_way(gpu, monkeypatch, tmp_path):
    slow = {("linear_attention", "reference"): 1, ("linear_attention", "triton"): 2, ("linear_attention", "cuda"): 3}
    monkeypatch.setattr(backends, "_GPU_ROUTES", table_of(tmp_path, card=suite([8, 0], slow)))
    with pytest.warns(UserWarning, match=r"triton gives way on card.json and serves only when it is named; cuda gives"):
        assert gpu((8, 0), "linear_attention") == "reference"


def test_fp16_operands_are_asked_for(gpu):
    performer, wide = "performer_attention", torch.float32
    assert gpu((7, 5), performer, wide, backend="cuda") == "cuda"
    with cxv_kernels.allow_fp16_operands():
        assert gpu((7, 5), performer, wide, backend="cuda") == backends.FP16_OPERANDS
        assert gpu((7, 5), "linear_attention", wide, 64, "cuda") == backends.FP16_OPERANDS
        assert gpu((7, 5), "linear_attention", wide, 65, "cuda") == "cuda"  # not on tensor cores
        assert gpu((7, 5), "conv_norm", wide, backend="cuda") == "cuda"
        assert gpu((7, 5), performer, torch.float16, backend="cuda") == "cuda"
        assert gpu((8, 0), performer, wide, backend="triton") == "triton"
        with cxv_kernels.allow_fp16_operands(False):
            assert gpu((7, 5), performer, wide, backend="cuda") == "cuda"
    assert gpu((7, 5), performer, wide, backend="cuda") == "cuda"
