"""verify(): what "auto" does on a GPU once its kernels have been checked there. On kernels: host_gpu/test_ops.py."""

import contextlib
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import cxv
import cxv_kernels
from cxv.training.errors import InputError
from cxv.training.verify import verify_kernels
from cxv_kernels import backends, checks

HALF, WIDE = torch.float16, torch.float32
PERFORMER = "performer_attention"


@pytest.fixture
def card(monkeypatch):
    """As if there were one GPU of sm_80, whose kernels serve everything; `broken`: (op, backend) → what is wrong."""
    monkeypatch.setattr("cxv_kernels.autograd.CUDA_MISSING", None)
    monkeypatch.setattr("cxv_kernels.autograd.cuda_compiled_for", lambda _: 80)
    monkeypatch.setattr("cxv_kernels._triton.TRITON_MISSING", None)
    monkeypatch.setattr("cxv_kernels._triton.interpreting", lambda: False)
    found = SimpleNamespace(broken={}, dead=False)
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": (8, 0),
        "get_device_name": "a card",
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(backends, "_announced", set())
    monkeypatch.setattr(backends, "_verified", {})

    def run(case, backend, device, dtype):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        wrong = found.broken.get((case.op, backend), 0.5)
        if isinstance(wrong, Exception):
            raise wrong
        return checks.Result(case, backend, dtype, 0.25, wrong if dtype == HALF else 0.5)

    def synchronize(_):
        if found.dead:
            raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(checks, "run", run)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    return found


def serving(op=PERFORMER, dtype=HALF, dim=32):
    return backends.resolve(op, SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype), None, dim)


@pytest.mark.filterwarnings("error")
def test_what_is_right_serves(card):
    with torch.inference_mode():
        results = cxv_kernels.verify()
    assert all(result.passed for result in results)
    assert {r.dtype for r in results} == {HALF, torch.bfloat16, WIDE}
    assert {(r.case.op, r.backend) for r in results} == {
        (op, name) for op in backends.OPS for name in ("triton", "cuda") if name in backends._checks[op]
    }
    assert [serving(op) for op in backends.OPS] == ["triton"] * len(backends.OPS)


def test_what_nobody_has_checked_does_not_serve(card):
    assert {r.case.dim for r in cxv_kernels.verify("cuda", [HALF], [64], ["conv_norm", PERFORMER])} == {61, 64}
    assert (serving(), serving("conv_norm")) == ("triton", "triton")
    with pytest.warns(UserWarning, match="triton has not been validated on this GPU yet .call cxv_kernels.verify"):
        assert serving(dtype=WIDE) == "reference"
    assert serving("linear_attention") == "reference"


def test_what_has_failed_does_not_serve(card):
    card.broken = {(PERFORMER, "triton"): 7.0, ("dropout", "triton"): OSError("no space"), ("conv_norm", "cuda"): 2.0}
    with pytest.warns(UserWarning, match="has failed on cuda:0") as said:
        results = cxv_kernels.verify(dtypes=[HALF, WIDE])
    assert len(said) == 3
    assert any("performer_attention by triton has failed on cuda:0" in str(w.message) for w in said)
    assert any("softmax, torch.float16: differs from float64 by 2.5e-01, 7.0 × what" in str(w.message) for w in said)
    assert any("OSError: no space" in str(w.message) for w in said)
    failed = {(r.case.op, r.backend, r.dtype) for r in results if not r.passed}
    assert len(failed) == 4  # dropout's in both dtypes
    assert (serving(), serving(dtype=WIDE), serving("conv_norm")) == ("cuda", "triton", "triton")
    assert serving("conv_norm", dtype=WIDE) == "triton"
    with pytest.warns(UserWarning, match="triton has not passed its check on this GPU"):
        assert serving("dropout") == "reference"


def test_a_later_check_is_of_what_it_checks(card, monkeypatch):
    cxv_kernels.verify(dtypes=[HALF])
    monkeypatch.setattr(backends, "dispatch_order", lambda device: ("cuda",))
    cxv_kernels.verify(dtypes=[HALF], dims=[256])  # which no backend has of the Performer
    assert serving() == "cuda"
    card.broken = {(PERFORMER, "cuda"): 2.0}
    with pytest.warns(UserWarning, match="by cuda has failed"):
        cxv_kernels.verify(dtypes=[HALF])
    with pytest.warns(UserWarning, match="cuda has not passed its check on this GPU"):
        assert serving() == "reference"


def test_a_kernel_that_takes_the_gpu_along(card):
    card.broken, card.dead = {(PERFORMER, "cuda"): RuntimeError("launch failed")}, True
    with pytest.raises(RuntimeError, match=r"performer_attention \(softmax, torch.float16\) by cuda has left"):
        cxv_kernels.verify()
    model = cxv.create_model("cpv-1/2", embed_dim=32, use_fused=True)
    with pytest.raises(InputError, match=r"--fused: .*an illegal memory access.*; --no-fused trains"):
        verify_kernels(model, torch.device("cuda", 0), HALF)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("cpu",), "device must be a GPU that PyTorch can use, got 'cpu'"),
        (("cuda:1",), "device must be a GPU that PyTorch can use, got 'cuda:1'"),
        (("cuda", [torch.int8]), "dtypes must be some of torch.float64, .*got torch.int8"),
        (("cuda", [HALF], [0]), "dims must be 1 or more, got 0"),
        (("cuda", [HALF], [32], ["attention"]), "ops must be some of 'linear_attention', .*got 'attention'"),
    ],
)
def test_bad_arguments(card, arguments, words):
    with pytest.raises(ValueError, match=words):
        cxv_kernels.verify(*arguments)


def test_without_a_gpu():
    with pytest.raises(ValueError, match="device must be a GPU that PyTorch can use, got 'cuda'"):
        cxv_kernels.verify()


def test_before_a_run(card):
    """Of the model's ops and heads alone, in the dtypes that its step has."""
    model = cxv.create_model("cltv-1/2", embed_dim=32, use_fused=True)
    card.broken = {("conv_norm", "triton"): 3.0}
    with pytest.warns(UserWarning, match="conv_norm by triton"):
        line = verify_kernels(model, torch.device("cuda", 0), HALF)
    assert line == (
        "checked against float64 on a card in 0 s: triton is right for linear_attention, dropout, gelu_dropout; "
        "triton has failed for conv_norm; cuda is right for linear_attention, conv_norm"
    )
    assert {key[1:] for key in backends._verified} == {
        (op, dtype)
        for op in ("linear_attention", "conv_norm", "dropout", "gelu_dropout")
        for dtype in ("float16", "float32")
    }


def test_not_before_a_run_that_asks_for_none(card):
    device = torch.device("cuda", 0)
    assert verify_kernels(cxv.create_model("cltv-1/2", embed_dim=32), device, HALF) is None
    fused = cxv.create_model("cltv-1/2", embed_dim=32, use_fused=True)
    assert verify_kernels(fused, torch.device("cpu"), WIDE) is None
    with cxv_kernels.use_backend("cuda,reference"):
        assert verify_kernels(fused, device, HALF) is None
    assert backends._verified == {}


@pytest.mark.parametrize(
    ("names", "op"),
    [
        (("cpv", "hybrid-vip"), "performer_attention"),
        (("cnv", "hybrid-vin"), "nystrom_attention"),
        (("cltv", "hybrid-vilt"), "linear_attention"),
    ],
)
def test_before_a_run_of_any_model(card, names, op):
    for name in names:
        model = cxv.create_model(f"{name}-1/2", use_fused=True)
        line = verify_kernels(model, torch.device("cuda", 0), HALF)
        assert f"triton is right for {op}, conv_norm, dropout, gelu_dropout" in line


TF32 = {  # a setting → the flags of convolutions and products before the block, and inside
    "pass": ["tf32", "none"],
    "torch.set_float32_matmul_precision('high')": ["tf32", "tf32"],
    "torch.backends.fp32_precision = 'tf32'": ["tf32", "tf32"],
    "torch.backends.cudnn.conv.fp32_precision = 'ieee'": ["ieee", "none"],
    "torch.backends.cudnn.allow_tf32 = False": ["none", "none"],
}
EVERY_SETTING = f"""
import os, torch
from cxv_kernels.checks import without_tf32
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
