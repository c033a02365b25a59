"""Modules that ``accelerate`` refuses or skips, and lazy imports of other packages."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import cxv_kernels
from cxv_kernels.integrations.accelerate import _WRAPPERS, _disagreement, _qualified

PACKAGES = ("timm", "transformers", "diffusers", "performer_pytorch", "nystrom_attention")


@pytest.fixture
def lite_mla():
    return pytest.importorskip("timm.models.efficientvit_mit").LiteMLA


def test_nothing_is_imported_before_it_is_needed():
    code = (
        "import sys, torch, cxv_kernels\n"
        "try: cxv_kernels.accelerate(torch.nn.Linear(1, 1))\n"
        "except ValueError: pass\n"
        f"print([name for name in {PACKAGES} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_model_without_supported_attention_is_an_error():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    with pytest.raises(ValueError, match=r"Sequential has no attention .* classes: Conv2d, ReLU, Sequential"):
        cxv_kernels.accelerate(model)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        cxv_kernels.accelerate(lambda x: x)
    assert cxv_kernels.accelerate(model, undo=True) == []


def test_a_compiled_or_wrapped_model_is_an_error(lite_mla):
    model = lite_mla(8, 8, dim=4)
    with pytest.raises(ValueError, match=r"it is compiled by torch\.compile: call accelerate before that"):
        cxv_kernels.accelerate(torch.compile(model))
    outer = nn.Sequential(copy.deepcopy(model))
    outer[0].compile()
    with pytest.raises(ValueError, match=r"its module 0 is compiled by Module\.compile"):
        cxv_kernels.accelerate(outer)
    exported = torch.export.export(model, (torch.randn(1, 8, 4, 4),)).module()
    with pytest.raises(ValueError, match=r"traced by torch\.fx or torch\.export"):
        cxv_kernels.accelerate(exported)
    assert type(model) is lite_mla


def test_fsdp_classes_have_the_names_that_are_refused():
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    assert {_qualified(cls) for cls in (fsdp.FullyShardedDataParallel, fsdp.FSDPModule)} <= _WRAPPERS.keys()


def test_subclasses_and_other_forwards_are_left_alone(lite_mla):
    class Sharper(lite_mla):
        def _attn(self, q, k, v):
            return super()._attn(q * q, k, v)

    model = nn.ModuleDict({name: lite_mla(8, 8, dim=4) for name in ("own_forward", "own_attn", "plain")})
    model["subclass"] = Sharper(8, 8, dim=4)
    model["own_forward"].forward = lambda x: x
    model["own_attn"]._attn = lambda q, k, v: v
    names, reasons = cxv_kernels.accelerate(model, return_reasons=True)
    assert names == ["plain"]
    assert "has its own forward" in reasons["own_forward"]
    assert "has its own _attn" in reasons["own_attn"]
    assert "is a Sharper, a subclass of LiteMLA" in reasons["subclass"]
    del model["plain"]
    with pytest.raises(ValueError, match="subclass is a Sharper"):
        cxv_kernels.accelerate(model)


def test_a_version_that_computes_something_else_is_left_alone(lite_mla, monkeypatch):
    model = nn.ModuleList([lite_mla(8, 8, dim=4)])
    original = lite_mla._attn
    monkeypatch.setattr(lite_mla, "_attn", lambda self, q, k, v: original(self, q, k, v) * 1.01)
    with pytest.raises(
        ValueError, match=r"0 comes from a version of timm .* not supported: it computes something else"
    ):
        cxv_kernels.accelerate(model)
    monkeypatch.setattr(lite_mla, "_attn", lambda self, q, k, v: 1 / 0)
    with pytest.raises(ValueError, match="not supported: division by zero"):
        cxv_kernels.accelerate(model)
    monkeypatch.undo()
    assert cxv_kernels.accelerate(model) == ["0"]
    assert _disagreement.cache_info().currsize >= 3


def test_a_version_without_the_classes_is_left_alone(lite_mla, monkeypatch):
    sources = sys.modules[_disagreement.__module__]._SOURCES
    monkeypatch.setitem(sources, "timm.models.efficientvit_mit.LiteMLA", "timm_without_lite_mla")
    with pytest.raises(ValueError, match=r"comes from a version of timm .* not supported: No module named"):
        cxv_kernels.accelerate(lite_mla(8, 8, dim=4))


def test_the_check_of_a_version_is_exact_under_autocast(lite_mla):
    _disagreement.cache_clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert cxv_kernels.accelerate(lite_mla(8, 8, dim=4)) == [""]


def test_the_check_of_a_version_leaves_the_random_state_alone(lite_mla):
    _disagreement.cache_clear()
    state = torch.get_rng_state()
    cxv_kernels.accelerate(lite_mla(8, 8, dim=4).to("meta"))
    torch.set_rng_state(state)
    model = lite_mla(8, 8, dim=4)
    state = torch.get_rng_state()
    _disagreement.cache_clear()
    cxv_kernels.accelerate(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_second_call_changes_nothing(lite_mla):
    shared = lite_mla(8, 8, dim=4)
    model = nn.ModuleDict({"a": shared, "b": shared})
    assert cxv_kernels.accelerate(model) == ["a"]
    assert cxv_kernels.accelerate(model, return_reasons=True) == ([], {})
    assert cxv_kernels.accelerate(model, undo=True) == ["a"]
    assert cxv_kernels.accelerate(model, undo=True) == []


def test_copies_and_pickles_stay_accelerated(lite_mla):
    model = lite_mla(8, 8, dim=4).eval()
    cxv_kernels.accelerate(model)
    x = torch.randn(1, 8, 4, 4)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert torch.equal(other(x), model(x))


def test_torchscript_needs_the_original(lite_mla):
    model = lite_mla(8, 8, dim=4)
    cxv_kernels.accelerate(model)
    with pytest.raises(RuntimeError, match="undo=True"):
        torch.jit.script(model)
