"""``accelerate`` on performer-pytorch, nystrom-attention and linear-attention-transformer."""

import copy

import pytest
import torch
from conftest import needs_cpp
from torch import nn

import cxv_kernels

from .comparing import check_compiled_and_exported, check_equal, check_fused, check_half, image

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def seeded(cls, *args, **kwargs):
    torch.manual_seed(0)
    return cls(*args, **kwargs)


# --- performer-pytorch -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def performer():
    return pytest.importorskip("performer_pytorch")


@pytest.mark.parametrize(
    ("options", "tokens"), [({}, 1), ({}, 37), ({"generalized_attention": True}, 37), ({"no_projection": True}, 37)]
)
def test_performer_self_attention_is_equal(performer, options, tokens):
    model = seeded(performer.SelfAttention, 16, heads=2, dim_head=8, **options)
    check_equal(model, [torch.randn(2, tokens, 16)], ["fast_attention"], depth=tokens)


def test_performer_with_local_heads_a_mask_and_cross_attention_is_equal(performer):
    model = seeded(performer.SelfAttention, 16, heads=4, dim_head=4, local_heads=2, local_window_size=8)
    fused = copy.deepcopy(model)
    assert cxv_kernels.accelerate(fused) == ["fast_attention"]
    x, mask = torch.randn(2, 24, 16), torch.arange(24).expand(2, 24) < torch.tensor([[13], [24]])
    torch.testing.assert_close(fused(x, mask=mask), model(x, mask=mask))
    model = seeded(performer.CrossAttention, 16, heads=4, dim_head=4)
    fused = copy.deepcopy(model)
    cxv_kernels.accelerate(fused)
    torch.testing.assert_close(fused(x, context=x[:, :7]), model(x, context=x[:, :7]))


def test_performer_redraws_its_features(performer):
    model = seeded(performer.Performer, dim=16, depth=1, heads=2, dim_head=8, feature_redraw_interval=1)
    cxv_kernels.accelerate(model)
    attention = next(m for m in model.modules() if isinstance(m, performer.FastAttention))
    before = attention.projection_matrix.clone()
    for _ in range(3):
        model(torch.randn(1, 5, 16))
    assert not torch.equal(attention.projection_matrix, before)
    cxv_kernels.accelerate(model, undo=True)
    assert type(attention) is performer.FastAttention


def test_performer_in_bfloat16(performer):
    check_half(seeded(performer.SelfAttention, 16, heads=2, dim_head=8), [torch.randn(2, 30, 16)])


def test_performer_compiles_and_exports(performer):
    model = nn.Sequential(seeded(performer.SelfAttention, 16, heads=2, dim_head=8))
    check_compiled_and_exported(model, [torch.randn(2, 12, 16)])


def test_other_kernels_of_performer_are_left_alone(performer):
    options = {"gelu": {"generalized_attention": True, "kernel_fn": nn.GELU()}, "causal": {"causal": True}, "plain": {}}
    model = nn.ModuleDict({name: performer.FastAttention(8, **o) for name, o in options.items()})
    names, reasons = cxv_kernels.accelerate(model, return_reasons=True)
    assert names == ["plain"]
    assert "feature map GELU" in reasons["gelu"]
    assert reasons["causal"] == "is causal"


# --- nystrom-attention -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nystrom():
    return pytest.importorskip("nystrom_attention")


@pytest.mark.parametrize(("tokens", "options"), [(1, {}), (12, {}), (29, {}), (29, {"residual": False})])
def test_nystrom_attention_is_equal(nystrom, tokens, options):
    model = seeded(nystrom.NystromAttention, 16, dim_head=8, heads=2, num_landmarks=6, **options)
    check_equal(model, [torch.randn(2, tokens, 16)], [""], depth=tokens, amplification=80)


@needs_cpp
def test_nystrom_attention_is_fused(nystrom):
    model = seeded(nystrom.NystromAttention, 16, dim_head=8, heads=2, num_landmarks=6)
    check_fused(model, [torch.randn(2, 24, 16)], "nystrom_readout")


def test_nystrom_attention_with_a_mask_or_maps_runs_the_original(nystrom):
    model = seeded(nystrom.NystromAttention, 16, dim_head=8, heads=2, num_landmarks=6)
    fused = copy.deepcopy(model)
    cxv_kernels.accelerate(fused)
    x, mask = torch.randn(2, 20, 16), torch.arange(20).expand(2, 20) < 13
    assert torch.equal(fused(x, mask=mask), model(x, mask=mask))
    assert torch.equal(fused(x, return_attn=True)[1], model(x, return_attn=True)[1])


def test_nystrom_attention_compiles_and_exports(nystrom):
    model = nn.Sequential(seeded(nystrom.NystromAttention, 16, dim_head=8, heads=2, num_landmarks=6))
    check_compiled_and_exported(model, [torch.randn(2, 20, 16)])


def test_other_options_of_nystrom_attention_are_left_alone(nystrom):
    options = {"pinv_iterations": 4, "residual_conv_kernel": 4, "dropout": 0.1}
    model = nn.ModuleDict({name: nystrom.NystromAttention(8, **{name: o}) for name, o in options.items()})
    names, reasons = cxv_kernels.accelerate(model, return_reasons=True)
    assert names == ["dropout"]
    assert "runs 4 iterations" in reasons["pinv_iterations"]
    assert "residual convolution" in reasons["residual_conv_kernel"]


# --- linear-attention-transformer --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def linear():
    return pytest.importorskip("linear_attention_transformer")


@pytest.fixture(scope="module")
def linear_self_attention(linear):
    return linear.linear_attention_transformer.SelfAttention


@pytest.mark.parametrize("options", [{}, {"n_local_attn_heads": 1, "local_attn_window_size": 6}], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_linear_self_attention_is_equal(linear_self_attention, options, masked):
    model = seeded(linear_self_attention, 16, 2, **options)
    mask = [torch.arange(24).expand(2, 24) < torch.tensor([[13], [24]])] if masked else []
    check_equal(model, [torch.randn(2, 24, 16), *mask], [""], depth=24)


@pytest.mark.parametrize(("size", "channels_last"), [((1, 1), False), ((6, 5), False), ((6, 5), True)], ids=str)
def test_image_linear_attention_is_equal(linear, size, channels_last):
    model = seeded(linear.ImageLinearAttention, 8, key_dim=6, value_dim=6, heads=2)
    x = image(2, 8, *size, channels_last=channels_last)
    check_equal(model, [x], [""], depth=30)
    check_equal(model, [x, torch.randn(2, 8, 7)], [""], depth=37)


def test_linear_attention_in_bfloat16(linear, linear_self_attention):
    check_half(seeded(linear_self_attention, 16, 2), [torch.randn(2, 30, 16)])
    check_half(seeded(linear.ImageLinearAttention, 8, key_dim=16, heads=2), [torch.randn(2, 8, 5, 6)])


def test_linear_attention_compiles_and_exports(linear, linear_self_attention):
    check_compiled_and_exported(nn.Sequential(seeded(linear_self_attention, 16, 2)), [torch.randn(2, 24, 16)])
    model = nn.Sequential(seeded(linear.ImageLinearAttention, 8, key_dim=8, heads=2))
    check_compiled_and_exported(model, [torch.randn(2, 8, 5, 6)])


def test_other_options_of_linear_attention_are_left_alone(linear, linear_self_attention):
    model = nn.ModuleDict({"causal": linear_self_attention(16, 2, causal=True), "plain": linear_self_attention(16, 2)})
    model["image"] = linear.ImageLinearAttention(8, norm_queries=False)
    names, reasons = cxv_kernels.accelerate(model, return_reasons=True)
    assert names == ["plain"]
    assert reasons["causal"] == "is causal"
    assert "norm_queries=False" in reasons["image"]
    original = linear.linear_attention_transformer.linear_attn
    assert model["plain"].global_attn_fn is not original
    cxv_kernels.accelerate(model, undo=True)
    assert model["plain"].global_attn_fn is original
