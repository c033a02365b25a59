"""The self-check of GPU kernels on their first use, with a fake GPU; on emulated kernels: on_fake_device.py."""

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import needs_cpp
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import cxv_kernels
from cxv_kernels import dispatch, self_check, testing

HALF, WIDE = torch.float16, torch.float32
PERFORMER = "performer_attention"
GPU = torch.device("cuda", 0)


def restart(monkeypatch):
    """Forget everything, as a new process does."""
    monkeypatch.setattr(dispatch, "_announced", set())
    monkeypatch.setattr(self_check, "_verdicts", {})
    monkeypatch.setattr(self_check, "_cached", None)
    monkeypatch.setattr(self_check, "_shown", set())


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A fake GPU of sm_80 whose kernels support everything.

    ``broken``: (op, backend) → the error in float16, where 1 is tolerated, or an exception; ``runs``: the cases that
    ran; ``unusable``, ``capturing``: the state of the GPU.
    """
    monkeypatch.setattr("cxv_kernels.dispatch.CUDA_MISSING", None)
    monkeypatch.setattr("cxv_kernels.dispatch.cuda_compiled_for", lambda _: 80)
    monkeypatch.setattr("cxv_kernels._triton.TRITON_MISSING", None)
    monkeypatch.setattr("cxv_kernels._triton.interpreting", lambda: False)
    state = SimpleNamespace(broken={}, runs=[], unusable=False, capturing=False, name="a card")
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_capability": lambda _=None: (8, 0),
        "get_device_name": lambda _=None: state.name,
        "is_current_stream_capturing": lambda: state.capturing,
        "device": lambda _: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setenv("CXV_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CXV_SELF_CHECK", raising=False)
    monkeypatch.setattr(self_check, "_environment", lambda device: state.name)
    restart(monkeypatch)

    def run(case, backend, device, dtype):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert not torch.is_autocast_enabled("cpu")
        assert not _get_current_dispatch_mode_stack()
        state.runs.append((case.op, backend, dtype, case.label))
        error = state.broken.get((case.op, backend), 0.5)
        if isinstance(error, Exception):
            raise error
        return testing.Result(case, backend, dtype, error if dtype == HALF else 0.5, 1.0)

    def synchronize(_):
        if state.unusable:
            raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(testing, "run", run)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    return state


def selected(op=PERFORMER, dtype=HALF, dim=32, backend=None):
    return dispatch.resolve(op, SimpleNamespace(device=GPU, dtype=dtype), backend, dim)


def verdicts(tmp_path):
    return json.loads((tmp_path / "cache" / "self_check.json").read_text())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("op", cxv_kernels.OPS)
def test_first_use_runs_the_cases_of_the_op_and_dtype_once(op, card, capsys):
    assert [selected(op), selected(op), selected(op, dim=0)] == ["triton"] * 3
    assert {run[:3] for run in card.runs} == {(op, "triton", HALF)}
    assert [label for *_, label in card.runs] == [case.label for case in self_check._cases(op)]
    assert {label for *_, label in card.runs} == {case.label for case in testing.cases() if case.op == op}
    assert capsys.readouterr().err == f"validating {op}, float16, on a card: first use only\n"
    assert selected(op, WIDE) == "triton"
    assert {run[:3] for run in card.runs} == {(op, "triton", dtype) for dtype in (HALF, WIDE)}


@needs_cpp
@pytest.mark.parametrize("op", cxv_kernels.OPS)
def test_cases_pass_with_kernels_that_are_right(op):
    results = [testing.run(case, "cpu", "cpu", HALF) for case in self_check._cases(op)]
    assert len({result.case.shapes for result in results}) > 1
    assert [result for result in results if not result.passed] == []


@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16, WIDE], ids=["float16", "bfloat16", "float32"])
def test_cases_keep_the_features_of_relu_away_from_0(dtype):
    """A sign that is rounded changes the gradient, also of a kernel that is right."""
    for case in self_check._cases(PERFORMER):
        if case.label == "relu":
            dim, generator = case.shapes[0][-1], torch.Generator().manual_seed(0)
            features = cxv_kernels.num_random_features(dim)
            projection = cxv_kernels.orthogonal_projection(features, dim, generator=generator, dtype=torch.float64)
            generator = torch.Generator().manual_seed(1)  # as in testing.run
            for shape in case.shapes[:2]:
                x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).double()
                assert (x @ projection.T).abs().min() > 2e-5


@pytest.mark.filterwarnings("error")
def test_first_use_is_logged_where_the_logger_shows_it(card, capsys, caplog):
    with caplog.at_level(logging.INFO, "cxv_kernels"):
        selected()
    assert caplog.messages[0] == "validating performer_attention, float16, on a card: first use only"
    assert "triton passed in" in caplog.messages[1]
    assert capsys.readouterr().err == ""


@pytest.mark.filterwarnings("error")
def test_second_process_reads_the_verdict(card, monkeypatch, tmp_path):
    selected()
    assert verdicts(tmp_path) == {"a card": {"performer_attention, float16, triton": None}}
    restart(monkeypatch)
    card.runs.clear()
    assert selected() == "triton"
    assert card.runs == []
    card.name = "another card"  # or another version of something
    restart(monkeypatch)
    assert selected() == "triton"
    assert card.runs
    assert set(verdicts(tmp_path)) == {"a card", "another card"}


def test_failing_kernel_is_replaced_with_one_warning(card, monkeypatch, tmp_path):
    """Also in the next process, which reads the verdict."""
    card.broken = {(PERFORMER, "triton"): 7.25, (PERFORMER, "cuda"): OSError("no space")}
    for process in range(2):
        with pytest.warns(UserWarning, match="is not used") as caught:
            assert [selected(), selected()] == ["reference"] * 2
        assert [str(w.message) for w in caught] == [
            f"performer_attention: {backend} is not used on a card, because it failed its self-check in float16 "
            f"(softmax: {details}). Run `python -m cxv_kernels` for details. (This warning is shown once.)"
            for backend, details in (("triton", "error 7.2e+00, tolerance 1.0e+00"), ("cuda", "OSError: no space"))
        ]
        assert len(card.runs) == 2 + process  # a verdict is kept, an exception is not
        restart(monkeypatch)
    assert [*verdicts(tmp_path)["a card"]] == ["performer_attention, float16, triton"]
    assert selected(dtype=WIDE, backend="triton") == "triton"


def test_next_backend_of_the_table_is_used_after_a_failure(card):
    card.broken = {("conv_norm", "triton"): float("nan")}
    with pytest.warns(UserWarning, match="conv_norm: triton is not used on a card") as caught:
        assert selected("conv_norm") == "cuda"
    assert len(caught) == 1
    assert cxv_kernels.explain_backend("conv_norm", "cuda", HALF)["auto"] == "cuda"
    assert cxv_kernels.explain_backend("conv_norm", "cuda", HALF)["triton"] == "supported"


@pytest.mark.filterwarnings("error")
def test_nothing_is_checked_for_a_named_backend_or_an_explanation(card):
    assert selected(backend="triton") == selected(backend="triton,cuda") == "triton"
    assert selected(backend="reference") == "reference"
    assert cxv_kernels.explain_backend(PERFORMER, "cuda", HALF)["auto"] == "triton"
    assert card.runs == []


@pytest.mark.filterwarnings("error")
def test_environment_variable_skips_the_check(card, monkeypatch):
    card.broken = {(PERFORMER, "triton"): 7.0}
    monkeypatch.setenv("CXV_SELF_CHECK", "0")
    assert selected() == "triton"
    assert card.runs == []


def test_capture_uses_the_verdict_or_the_reference(card):
    card.capturing = True
    with pytest.warns(UserWarning, match="triton cannot run its self-check during CUDA graph capture"):
        assert selected() == "reference"
    assert card.runs == []
    card.capturing = False
    assert selected() == "triton"
    card.capturing = True
    assert selected() == "triton"


def test_backward_pass_uses_the_verdict_or_the_reference(card):
    """A check there would wait for the thread of the autograd engine that waits for it."""
    x, found = torch.ones(1, requires_grad=True), []
    loss = x * 2
    loss.register_hook(lambda _: found.append(selected()))
    with pytest.warns(UserWarning, match="triton cannot run its self-check in a backward pass"):
        loss.backward(retain_graph=True)
    assert card.runs == []
    assert selected() == "triton"
    loss.backward()
    assert found == ["reference", "triton"]


@pytest.mark.filterwarnings("error")
def test_modes_and_random_state_of_the_caller_are_left_alone(card, monkeypatch):
    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            raise AssertionError("the check runs under the caller's mode")

    state = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), Mode():
        assert selected() == "triton"
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("error")
def test_threads_wait_for_one_check(card, monkeypatch):
    run = testing.run
    monkeypatch.setattr(testing, "run", lambda *a: (time.sleep(0.02), run(*a))[1])
    found = []
    threads = [threading.Thread(target=lambda: found.append(selected())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["triton"] * 4
    assert len(card.runs) == len(self_check._cases(PERFORMER))


def test_kernel_that_leaves_the_gpu_unusable(card, monkeypatch, tmp_path):
    """This process cannot go on; the next one does not use the kernel."""
    card.broken, card.unusable = {(PERFORMER, "triton"): RuntimeError("launch failed")}, True
    with pytest.raises(RuntimeError, match=r"self-check of triton in float16 has made cuda:0 unusable .*illegal"):
        selected()
    restart(monkeypatch)
    with pytest.warns(UserWarning, match=r"triton is not used on a card, because .*an illegal memory access"):
        assert selected() == "cuda"


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"a card": 1}', '{"a card": {"dropout, float16, triton": 1}}', b"\xff\xfe"]
)
def test_corrupt_file_is_ignored_with_one_warning(content, card, monkeypatch, tmp_path):
    path = tmp_path / "cache" / "self_check.json"
    path.parent.mkdir()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(
        UserWarning, match="ignoring the self-check verdicts in .*self_check.json, which cannot"
    ) as caught:
        assert [selected(), selected("dropout")] == ["triton"] * 2
    assert len(caught) == 1
    assert len(verdicts(tmp_path)["a card"]) == 2


def test_folder_that_cannot_be_written_is_ignored_with_one_warning(card, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.warns(UserWarning, match="cannot write the self-check verdicts .*Set CXV_CACHE") as caught:
        assert [selected(), selected("dropout"), selected()] == ["triton"] * 3
    assert len(caught) == 1


@pytest.mark.filterwarnings("error")
def test_no_file_without_a_cache(card, monkeypatch, tmp_path):
    monkeypatch.setenv("CXV_CACHE", "none")
    assert selected() == "triton"
    assert self_check.cache_file() is None
    assert not (tmp_path / "cache").exists()
    monkeypatch.delenv("CXV_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert self_check.cache_file() == tmp_path / "cxv" / "self_check.json"


@pytest.mark.parametrize("known", [False, True], ids=["no-verdict", "verdict"])
@pytest.mark.parametrize("passes", [False, True], ids=["fails", "passes"])
def test_compiled_code_is_checked_while_it_is_traced(known, passes, card, monkeypatch):
    card.broken = {} if passes else {("dropout", "triton"): 7.0}
    monkeypatch.setattr(self_check, "torch", SimpleNamespace(cuda=SimpleNamespace(**vars(torch.cuda)), _C=torch._C))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # Dynamo would use the fake GPU
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def function(x):
        name, _ = dispatch._first("dropout", None, GPU, HALF, 32)
        return x + 1 if name == "triton" else x - 1

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if known:
            selected("dropout")
            runs = len(card.runs)
        assert function(torch.zeros(1)).item() == (1 if passes else -1)
        assert function(torch.zeros(1)).item() == (1 if passes else -1)
    assert len([w for w in caught if "dropout: triton is not used" in str(w.message)]) == (not passes)
    assert len(card.runs) == (runs if known else len(self_check._cases("dropout")) if passes else 1)


def test_no_gpu_to_check_on(monkeypatch):
    """A fake tensor on a machine without a GPU, as for an export."""
    monkeypatch.setattr("cxv_kernels._triton.TRITON_MISSING", None)
    restart(monkeypatch)
    with pytest.warns(UserWarning, match="triton cannot run its self-check, because PyTorch finds no GPU"):
        assert selected("dropout") == "reference"


def test_environment_names_what_a_verdict_depends_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    text = self_check._environment.__wrapped__(GPU)
    for part in ("a card, driver ", f"torch {torch.__version__}, triton ", f"cxv {cxv_kernels.__version__}, files "):
        assert part in text
    assert self_check._environment.__wrapped__(GPU) == text


TF32 = {  # a setting → the flags of convolutions and products before the block, and inside
    "pass": ["tf32", "none"],
    "torch.set_float32_matmul_precision('high')": ["tf32", "tf32"],
    "torch.backends.fp32_precision = 'tf32'": ["tf32", "tf32"],
    "torch.backends.cudnn.conv.fp32_precision = 'ieee'": ["ieee", "none"],
    "torch.backends.cudnn.allow_tf32 = False": ["none", "none"],
}
EVERY_SETTING = f"""
import os, torch
from cxv_kernels.testing import without_tf32
flags = torch.backends.cudnn.conv, torch.backends.cuda.matmul
read = lambda: [flag.fp32_precision for flag in flags]
for setting in {list(TF32)}:
    if os.fork() == 0:
        exec(setting)
        before = read()
        with without_tf32():
            print(before, read(), end=" ")
        print(read() == before, flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process for every setting")
def test_checks_are_in_float32_however_it_is_set():
    """PyTorch has two ways to allow TF32, and refuses to read the one after the other was used."""
    done = subprocess.run([sys.executable, "-c", EVERY_SETTING], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{before} ['ieee', 'ieee'] True" for before in TF32.values()]
