"""Table 1's fifteen rows: paper.md's counts, the hybrids' fused ops, section 5's variants."""

import itertools
import sys

import pytest
import torch
from models_support import create_or_skip
from torch import nn

import cxv
from cxv.models.registry import TABLE_1, has_fused_ops
from cxv.models.variants import CPVVariant

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

HYBRIDS = ("hybrid-vilt-6/8", "hybrid-vin-6/8", "hybrid-vip-6/8")
OURS = ("cnv-5/4", "cltv-5/4", "cpv-5/4")


@pytest.mark.parametrize("name", TABLE_1)
def test_any_image_size_and_classes(name):
    small, shallow = {}, name
    if not name.startswith("resnet"):
        family, _, heads = name.partition("/")
        small, shallow = {"embed_dim": 16}, f"{family.rpartition('-')[0]}-3" + (f"/{heads}" if heads else "")
    model = create_or_skip(shallow, img_size=24, in_chans=1, num_classes=7, **small).train()
    logits = model(torch.randn(2, 1, 24, 24))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    twin = cxv.create_model(shallow, img_size=24, in_chans=1, num_classes=7, **small)
    twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 1, 24, 24)
    assert torch.equal(twin.eval()(x), model.eval()(x))


def test_names_that_are_not():
    with pytest.raises(ValueError, match="did you mean 'vit-10/4'"):
        cxv.create_model("vit-10")
    with pytest.raises(ValueError, match="depth of a resnet must be 18 or 34, got 50"):
        cxv.create_model("resnet-50")
    with pytest.raises(ValueError, match="did you mean 'resnet-18'"):
        cxv.create_model("resnet-18/2")
    assert {name for name in TABLE_1 if has_fused_ops(name)} == {*HYBRIDS, *OURS}


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.models.vision_transformer", None)
    with pytest.raises(ImportError, match=r"vit is built with timm.models.vision_transformer, .*cxv\[baselines\]"):
        cxv.create_model("vit-10/4")


def test_a_hybrid_refuses_another_image_size():
    model = cxv.create_model("hybrid-vip-1/2", embed_dim=8, head_dim=4, img_size=8)
    with pytest.raises(ValueError, match="made for images of 8×8"):
        model(torch.zeros(1, 3, 9, 9))


VARIANTS = {
    "one stem convolution": {"stem_convs": 1},
    "three": {"stem_convs": 3},
    "no padding": {"stem_padding": 0},
    "stem GELU": {"stem_act": True},
    "stem max-pool": {"stem_pool": True},
    "conv GELU": {"conv_act": True},
    "conv in every second layer": {"conv_every": 2},
    "residual around conv": {"conv_residual": "conv"},
    "residual around conv and norm": {"conv_residual": "conv_norm"},
    "learned positions": {"positions": "learned"},
    "rotary positions": {"positions": "rotary"},
    "batch norm": {"norm": "batch"},
    "eps on σ": {"norm": "layer_std"},
    "norm in every second layer": {"norm_every": 2},
    "pre-norm": {"pre_norm": True},
}
OWN = {
    "cpv": {
        "relu": {"attn_kernel": "relu"},
        "eps 0": {"attn_eps": 0.0},
        "local": {"local_heads": 1, "local_window": 7},
    },
    "cnv": {"front pad": {"front_pad": True, "num_landmarks": 7}},
    "cltv": {"3×3": {"attn_kernel_size": 3}},
}


@pytest.mark.parametrize(
    ("family", "variant"),
    [*zip(itertools.cycle(OWN), VARIANTS, strict=False), *((family, name) for family in OWN for name in OWN[family])],
)
def test_variants_train_and_round_trip(family, variant):
    """Each is another function, fused and not alike, and its weights load into its twin.

    test_fused_equals_plain.py has most of them for every family.
    """
    options = VARIANTS.get(variant) or OWN[family][variant]
    shape = {"embed_dim": 16, "img_size": 10, "num_classes": 4, "drop_rate": 0.0}
    torch.manual_seed(0)
    plain = cxv.create_model(f"{family}-3/2", **shape).double()
    reference, fused = (
        cxv.create_model(f"{family}-3/2", use_fused=u, **shape, **options).double().train() for u in (False, True)
    )
    fused.load_state_dict(reference.state_dict())
    shared = {k: v for k, v in reference.state_dict().items() if k in plain.state_dict()}
    if all(v.shape == plain.state_dict()[k].shape for k, v in shared.items()):
        plain.load_state_dict(shared, strict=False)
    x = torch.randn(3, 3, 10, 10, dtype=torch.float64)
    loss = reference(x).square().sum()
    torch.testing.assert_close(fused(x).square().sum(), loss, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(plain(x).square().sum(), loss)
    optimizer = torch.optim.SGD(reference.parameters(), lr=1e-3)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in reference.parameters())
    optimizer.step()
    twin = cxv.create_model(f"{family}-3/2", **shape, **options).double()
    twin.load_state_dict(reference.state_dict())
    assert torch.equal(twin.eval()(x), reference.eval()(x))


def test_variant_is_restored_from_a_file(tmp_path):
    """The file has the arguments by their own names, as files of earlier code do."""
    options = {"embed_dim": 16, "img_size": 8, "stem_convs": 3, "positions": "learned", "conv_residual": "conv"}
    model = cxv.create_model("cpv-2/2", **options).eval()
    cxv.save_safetensors(model, tmp_path / "a.safetensors")
    loaded = cxv.create_model("cpv-2/2", checkpoint=tmp_path / "a.safetensors").eval()
    assert type(loaded) is CPVVariant
    assert loaded.model_kwargs.items() >= options.items()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(loaded(x), model(x))


def test_arguments_of_variants_are_unknown_to_other_models():
    for build in (lambda: cxv.CPV(stem_convs=3), lambda: cxv.create_model("hybrid-vip-6/8", stem_convs=3)):
        with pytest.raises(TypeError, match="unexpected keyword argument 'stem_convs'"):
            build()


@pytest.mark.parametrize(("convs", "count"), [(1, 1.326), (2, 1.343), (3, 1.348)])
def test_stem_variants_have_the_parameters_of_table_2(convs, count):
    """Millions, without the channel norms, which the paper's counter does not see."""
    parameters = cxv.create_model("cnv-5/4", stem_convs=convs).named_parameters()
    assert round(sum(p.numel() for name, p in parameters if ".conv_norm.norm." not in name) / 1e6, 3) == count


def test_variants_refuse_what_is_not_allowed():
    for options, message in (
        ({"stem_convs": 4}, "stem_convs must be one of 1, 2, 3, got 4"),
        ({"norm": "group"}, "norm must be one of 'layer', 'layer_std', 'batch', got 'group'"),
        ({"conv_residual": "all"}, "conv_residual must be one of None, 'conv', 'conv_norm', got 'all'"),
        ({"positions": "sine"}, "positions must be one of None, 'learned', 'rotary', got 'sine'"),
        ({"local_heads": 5}, r"local_heads must be in \[0, 4\], got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            cxv.create_model("cpv-5/4", **options)
    with pytest.raises(ValueError, match="learned positions were made for 64 tokens"):
        cxv.create_model("cpv-1/4", embed_dim=16, img_size=8, positions="learned")(torch.zeros(1, 3, 9, 9))


def test_local_attention_is_softmax_over_the_neighborhood():
    from cxv.models.attention import local_attention

    q, k, v = (torch.randn(2, 2, 11, 4, dtype=torch.float64) for _ in range(3))
    for window in (3, 4, 11, 20):
        block = torch.arange(11) // window
        near = (block[:, None] - block).abs() <= 1
        expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=near)
        torch.testing.assert_close(local_attention(q, k, v, window), expected)


def test_rotary_positions_depend_on_the_distance_alone():
    from cxv.models.attention import rotate

    q, k = (torch.randn(6, dtype=torch.float64).expand(1, 1, 9, 6) for _ in range(2))
    scores = rotate(q) @ rotate(k).transpose(-2, -1)
    for offset in range(-8, 9):
        diagonal = scores[0, 0].diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(scores[0, 0, 0, 1], scores[0, 0, 0, 2])


def test_haar_is_orthonormal():
    from cxv.models.baselines.wavemix import haar

    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    low, details = haar(x)
    assert low.shape == (2, 3, 3, 4)
    assert details.shape == (2, 9, 3, 4)
    torch.testing.assert_close(low.square().sum() + details.square().sum(), x.square().sum())
    assert details.abs().max() > 0
    assert haar(torch.ones(1, 1, 4, 4))[1].abs().max() == 0
