"""``accelerate`` on timm's EfficientViT (B and L)."""

import copy

import pytest
import torch
from conftest import needs_cpp
from torch import nn

import cxv_kernels
from cxv_kernels.testing import peak_memory, saved_bytes

from .comparing import check_compiled_and_exported, check_equal, check_half, image

timm = pytest.importorskip("timm")
from timm.models.efficientvit_mit import LiteMLA  # noqa: E402


def lite_mla(**options):
    torch.manual_seed(0)
    return LiteMLA(16, 16, dim=8, **options)


@pytest.mark.parametrize(
    ("size", "channels_last"), [((1, 1), False), ((7, 5), False), ((7, 5), True), ((16, 16), True)], ids=str
)
def test_lite_mla_is_equal(size, channels_last):
    check_equal(lite_mla(), [image(2, 16, *size, channels_last=channels_last)], [""], depth=size[0] * size[1])


@pytest.mark.parametrize("options", [{"scales": ()}, {"scales": (3, 5)}, {"eps": 1e-15}, {"use_bias": True}], ids=str)
def test_lite_mla_with_options_is_equal(options):
    check_equal(lite_mla(**options), [image(2, 16, 6, 6)], [""], depth=36)


def test_lite_mla_keeps_channels_last_without_copies():
    model = lite_mla()
    cxv_kernels.accelerate(model)
    seen = []
    model.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(image(2, 16, 6, 5, channels_last=True))
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


@needs_cpp
def test_lite_mla_needs_less_memory():
    """Neither q, k and v of all scales together nor their feature maps are stored."""
    model, x = lite_mla(), image(2, 16, 32, 32)
    fused = copy.deepcopy(model)
    cxv_kernels.accelerate(fused)
    qkv = 3 * x.nbytes
    peaks, saved = [], []
    for kind in (model, fused):
        with torch.no_grad():
            peaks.append(peak_memory(lambda kind=kind: kind(x)).peak)
        saved.append(saved_bytes(lambda kind=kind: kind(x), [x, *kind.parameters()]).beyond_inputs)
    assert peaks[0] - peaks[1] > 2 * qkv
    assert saved[0] - saved[1] > 1.5 * qkv


def test_lite_mla_in_bfloat16_and_under_autocast():
    check_half(lite_mla(), [image(2, 16, 8, 8)])
    model = lite_mla().eval()
    fused = copy.deepcopy(model)
    cxv_kernels.accelerate(fused)
    x = image(2, 16, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fused(x), model(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["efficientvit_b0", "efficientvit_l1"])
def test_every_lite_mla_of_a_model_is_replaced(name):
    model = timm.create_model(name, num_classes=3).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        names = cxv_kernels.accelerate(model)
        assert names == [n for n, m in model.named_modules() if isinstance(m, LiteMLA)]
        torch.testing.assert_close(model(x), expected)
        subclasses = timm.models.efficientvit_mit.LiteMLA.__subclasses__()
        assert sum(kind.__module__.startswith("cxv_kernels") for kind in subclasses) == 1


def test_lite_mla_compiles_and_exports():
    check_compiled_and_exported(nn.Sequential(lite_mla()), [image(2, 16, 6, 6)])


def test_lite_mla_with_another_feature_map_or_a_hook_on_it_is_left_alone():
    model = nn.ModuleDict({"gelu": lite_mla(kernel_func=nn.ReLU6), "hook": lite_mla(), "plain": lite_mla()})
    model["hook"].kernel_func.register_forward_hook(lambda *_: None)
    names, reasons = cxv_kernels.accelerate(model, return_reasons=True)
    assert names == ["plain"]
    assert reasons.keys() == {"gelu", "hook"}
    assert "ReLU6" in reasons["gelu"]
    assert "hook on it" in reasons["hook"]


def test_hooks_run_as_before():
    model = lite_mla().eval()
    calls = []
    model.register_forward_hook(lambda *_: calls.append("module"))
    model.qkv.register_forward_hook(lambda *_: calls.append("qkv"))
    cxv_kernels.accelerate(model)
    model(image(2, 16, 4, 4))
    assert calls == ["qkv", "module"]
