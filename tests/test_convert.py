"""Softmax attention in timm's models replaced by ours."""

import copy
import importlib.util
import warnings
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import Attention, AttentionRope
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import cxv_kernels

MECHANISMS = ["performer", "linear", "nystrom"]


def vit(**kwargs) -> VisionTransformer:
    """A class token and 16 patches, 2 layers."""
    options = {"img_size": 16, "patch_size": 4, "num_classes": 5, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return VisionTransformer(**options | kwargs).eval()


def variants() -> dict[str, Attention]:
    """timm's attention with all that it can have."""
    norms = {"qk_norm": True, "scale_norm": True, "norm_layer": nn.LayerNorm, "gated": True, "qkv_bias": True}
    return {
        "plain": Attention(32, 4),
        "all parts": Attention(32, 4, **norms, proj_drop=0.1),
        "other widths": Attention(32, 2, attn_head_dim=8, dim_out=24, qkv_bias=True),
    }


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_names_and_weights_are_kept(mechanism):
    model = vit(qk_norm=True, scale_attn_norm=True)
    before = dict(model.named_parameters())
    assert cxv_kernels.replace_attention(model, mechanism) == ["blocks.0.attn", "blocks.1.attn"]
    after = dict(model.named_parameters())
    assert list(before) == list(after)
    assert all(after[name] is p for name, p in before.items())  # an optimizer made before still fits
    added = [name for name, _ in model.named_buffers()]
    assert added == (["blocks.0.attn.projection", "blocks.1.attn.projection"] if mechanism == "performer" else [])
    assert not any(m.training for m in model.modules())
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 5)


@pytest.mark.parametrize("variant", ["plain", "all parts", "other widths"])
def test_an_approximation_of_the_same_function(variant):
    """Many features and a landmark for each token come close to the softmax attention that was there."""
    softmax = variants()[variant].double().eval()
    x = torch.randn(2, 17, 32, dtype=torch.float64)
    expected = softmax(x)

    def error(mechanism, **options):
        model = nn.Sequential(copy.deepcopy(softmax))
        assert cxv_kernels.replace_attention(model, mechanism, **options) == ["0"]
        return ((model(x) - expected).norm() / expected.norm()).item()

    few, many = (error("performer", num_features=m, eps=0.0) for m in (8, 8192))
    assert many < 0.25
    assert many < few / 3
    assert error("nystrom", num_landmarks=17) < 0.03
    assert error("linear") > 0.05  # another function


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_fine_tuning(mechanism):
    model = vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cxv_kernels.replace_attention(model, mechanism)
    x, y = torch.randn(8, 3, 16, 16), torch.arange(8) % 5
    qkv, losses = model.blocks[0].attn.qkv.weight.clone(), []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model.train()(x), y)
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not torch.equal(qkv, model.blocks[0].attn.qkv.weight)


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_any_number_of_tokens_and_the_fused_kernels(mechanism):
    attention = nn.Sequential(Attention(64, 2))
    cxv_kernels.replace_attention(attention, mechanism)
    reference = copy.deepcopy(attention)
    reference[0].backend = "reference"
    for tokens in (1, 2, 65, 197):
        x = torch.randn(2, tokens, 64)
        torch.testing.assert_close(attention(x), reference(x), rtol=1e-4, atol=1e-5)


def test_state_dict_reproduces_the_features():
    first, second = vit(), vit()
    for model in (first, second):
        cxv_kernels.replace_attention(model, "performer", num_features=20)
    assert first.blocks[0].attn.projection.shape == (20, 16)
    second.load_state_dict(first.state_dict())
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(first(x), second(x))


def test_masks_are_declined():
    model = vit()
    cxv_kernels.replace_attention(model, "linear")
    x = torch.randn(1, 3, 16, 16)
    with pytest.raises(ValueError, match="attn_mask: linear attention cannot mask pairs of tokens"):
        model(x, attn_mask=torch.ones(17, 17, dtype=torch.bool))
    with pytest.raises(ValueError, match="is_causal: linear attention"):
        model.blocks[0].attn(torch.randn(1, 5, 32), is_causal=True)
    with pytest.raises(ValueError, match=r"x must be \(B, N, C\), got shape \(1, 4, 4, 32\)"):
        model.blocks[0].attn(torch.randn(1, 4, 4, 32))


class FixedSize(Attention):
    """Attention that accepts one number of tokens only."""

    def forward(self, x):
        if x.shape[1] != 16:
            raise AssertionError
        return super().forward(x)


def lookalikes() -> dict[str, tuple[nn.Module, str]]:
    """What has qkv, num_heads and proj, and computes or does something else."""
    from timm.models.davit import ChannelAttention
    from timm.models.nest import Attention as NestAttention
    from timm.models.swin_transformer import WindowAttention
    from timm.models.twins import LocallyGroupedAttn
    from timm.models.xcit import XCA

    hooked = Attention(32, 4)
    hooked.register_forward_hook(lambda *_: None)
    return {
        "a hook": (hooked, "has hooks, which would be lost"),
        "channel attention": (ChannelAttention(32, 4), "is not softmax attention of its qkv"),
        "blocks of tokens": (NestAttention(32, 4), "does not take tokens (B, N, C)"),
        "relative positions": (WindowAttention(32, 4, window_size=4), "relative_position_bias_table"),
        "a size besides": (LocallyGroupedAttn(32, 4, ws=4), "takes other arguments than the tokens: size"),
        "cross-covariance": (XCA(32, 4), "has other parameters: temperature"),
        "one number of tokens": (FixedSize(32, 4), "(FixedSize) does not take tokens (B, N, C): AssertionError"),
        "rotary positions": (AttentionRope(32, 4), "takes other arguments than the tokens: rope"),
    }


@pytest.mark.parametrize("kind", list(lookalikes()))
def test_lookalikes_are_left_alone(kind):
    module, reason = lookalikes()[kind]
    model = nn.Sequential(module)
    with pytest.raises(ValueError, match="Sequential has no softmax attention that can be replaced: 0 ") as caught:
        cxv_kernels.replace_attention(model, "linear")
    assert reason in str(caught.value)
    model.append(Attention(32, 4))
    with pytest.warns(UserWarning, match="replace_attention skips these modules: 0 "):
        assert cxv_kernels.replace_attention(model, "linear") == ["1"]
    assert model[0] is module


def test_nothing_to_replace():
    with pytest.raises(ValueError, match=r"ResNet has no softmax attention .*: none of its modules has qkv"):
        cxv_kernels.replace_attention(timm.create_model("resnet10t"))
    model = vit()
    cxv_kernels.replace_attention(model)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn \(ReplacedAttention\) is not softmax attention"):
        cxv_kernels.replace_attention(model, "nystrom")


def test_what_is_wrong_with_the_arguments_changes_nothing():
    model = vit()
    for options, message in (
        ({"mechanism": "cosine"}, "mechanism must be one of 'performer', 'linear', 'nystrom', got 'cosine'"),
        ({"num_landmarks": 8}, "num_landmarks: not an option of 'performer'; allowed: num_features, kernel"),
        ({"num_features": 0}, "num_features must be at least 1, got 0"),
        ({"kernel": "cosine"}, "kernel must be one of"),
        ({"mechanism": "linear", "feature_map": "cosine"}, "feature_map must be one of"),
        ({"mechanism": "nystrom", "num_landmarks": 0}, "num_landmarks must be at least 1"),
        ({"mechanism": "nystrom", "pinv_init": "image"}, "pinv_init must be one of 'head', 'batch', got 'image'"),
    ):
        with pytest.raises(ValueError, match=message):
            cxv_kernels.replace_attention(model, **options)
    assert all(type(block.attn) is Attention for block in model.blocks)


def test_dropout_of_the_map_is_announced():
    model = vit(attn_drop_rate=0.1)
    with pytest.warns(UserWarning, match="attn_drop is removed"):
        cxv_kernels.replace_attention(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cxv_kernels.replace_attention(vit(proj_drop_rate=0.1))


def test_a_shared_module_and_another_scale():
    shared = Attention(32, 4)
    shared.scale, shared.fused_attn = 0.7, False
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    x = torch.randn(1, 9, 32)
    expected = shared(x)
    assert cxv_kernels.replace_attention(model, "nystrom", num_landmarks=9) == ["a", "b.0"]
    assert model["a"] is model["b"][0]
    assert (model["a"](x) - expected).norm() < 0.03 * expected.norm()
    model["a"].gain = None  # the usual scale
    assert (model["a"](x) - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_compiles_without_a_break(mechanism):
    model = vit()
    cxv_kernels.replace_attention(model, mechanism)
    x = torch.randn(2, 3, 16, 16)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_the_example_runs(capsys):
    pytest.importorskip("sklearn")
    path = Path(__file__).parent.parent / "examples" / "replace_attention.py"
    spec = importlib.util.spec_from_file_location("replace_attention", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    small = "--img-size 8 --patch-size 1 --embed-dim 16 --depth 1 --epochs 3 --finetune-epochs 1 --limit-train 200"
    results = example.main(small.split())
    assert results.keys() == example.SWAPS.keys()
    out = capsys.readouterr().out
    assert "digits: 200 training and 360 test images, 65 tokens" in out
    assert all(f"| {name} | {swapped:.2f} | {tuned:.2f} |" in out for name, (swapped, tuned) in results.items())
