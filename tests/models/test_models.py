"""CPV, CNV and CLTV against paper.md's counts and structure, and timm's conventions."""

import copy

import pytest
import torch
from models_support import create_or_skip
from torch import nn
from torch.nn.utils import parametrize, prune

import cxv

NAMES = ["cltv-5/4", "cnv-5/4", "cpv-5/4"]
SMALL = {"embed_dim": 16, "num_classes": 4}


def small(name: str, **kwargs) -> cxv.CXV:
    return cxv.create_model(name.replace("5/4", "2/2"), **SMALL | kwargs)


def test_list_models():
    assert len(cxv.list_models()) == 15
    assert cxv.list_models("c?v-*") == ["cnv-5/4", "cpv-5/4"]
    assert cxv.list_models("hybrid-*") == ["hybrid-vilt-6/8", "hybrid-vin-6/8", "hybrid-vip-6/8"]


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [
        ("cpv-5/4", 10, 1_345_994),
        ("cnv-5/4", 10, 1_344_734),
        ("cltv-5/4", 10, 1_345_994),
        ("cpv-5/4", 100, 1_357_604),
        ("cnv-5/4", 100, 1_356_344),
        ("cltv-5/4", 200, 1_370_504),
    ],
)
def test_parameter_counts_of_table_1(name, classes, count):
    model = cxv.create_model(name, num_classes=classes)
    assert sum(p.numel() for p in model.parameters()) == count
    assert sum(b.numel() for b in model.buffers()) == (5 * 110 * 32 if name.startswith("cpv") else 0)


def test_the_defaults_are_the_papers():
    for model, name in ((cxv.CPV(), "cpv-5/4"), (cxv.CNV(), "cnv-5/4"), (cxv.CLTV(), "cltv-5/4")):
        named = cxv.create_model(name).state_dict()
        assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in named.items()}
        assert [m.drop_rate for m in model.modules() if hasattr(m, "num_dropouts") and m.drop_rate] == [0.5] * (
            5 if name == "cltv-5/4" else 10
        )
        assert len(model.layers) == 5


def test_structure_of_section_3_5():
    """stem without activation → (conv, LN) → x + attention(x) → x + MLP(x) → average → linear."""
    model = cxv.CPV(embed_dim=16, num_heads=2, depth=2).double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    y = model.stem[1](model.stem[0](x))
    for layer in model.layers:
        y = layer.conv_norm.conv(y)
        y = nn.functional.layer_norm(
            y.movedim(1, -1), (16,), layer.conv_norm.norm.weight, layer.conv_norm.norm.bias, 1e-5
        ).movedim(-1, 1)
        y = layer.attn(y)
        y = y + layer.mlp.fc2(nn.functional.gelu(layer.mlp.fc1(y)))
    torch.testing.assert_close(model(x), model.head(y.mean((2, 3))))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("in_chans", "size"), [(3, (8, 8)), (3, (1, 1)), (1, (17, 23))])
def test_any_image_size_and_channels(name, size, in_chans):
    model = small(name, in_chans=in_chans, use_fused=True)
    logits = model(torch.randn(2, in_chans, *size))
    assert logits.shape == (2, 4)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("use_fused", [False, True], ids=["reference", "fused"])
def test_dropout_draws_another_mask_at_each_call(use_fused):
    model, x = small("cltv-5/4", use_fused=use_fused).train(), torch.randn(2, 3, 8, 8)
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", [*NAMES, "hybrid-vip-2/2", "hybrid-vin-2/2", "hybrid-vilt-2/2"])
def test_recompute_changes_memory_alone(name, monkeypatch):
    """With ``recompute=False`` outputs and gradients are the same, with dropout too, and autograd keeps more bytes."""
    monkeypatch.setattr("cxv.models.blocks.CHUNK_TOKENS", 2 * 9 * 9)  # chunks of two images, the last of one
    lean, fast = (small(name, img_size=9, use_fused=True, recompute=r).double().train() for r in (True, False))
    fast.load_state_dict(lean.state_dict())
    x = torch.randn(5, 3, 9, 9, dtype=torch.float64)
    results, saved_bytes = [], []
    for model in (lean, fast):
        storages = {}

        def pack(t, storages=storages):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        torch.manual_seed(7)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = model(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), model.parameters())))
        saved_bytes.append(sum(storages.values()))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert saved_bytes[1] > 1.5 * saved_bytes[0]


def test_recompute_is_accepted_by_models_without_fused_ops():
    assert not hasattr(cxv.create_model("wavemix-2", embed_dim=16, recompute=False), "recompute")


@pytest.mark.parametrize("use_fused", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_no_image_at_all(name, use_fused):
    model = small(name, use_fused=use_fused)
    model(torch.randn(0, 3, 8, 8)).sum().backward()
    assert all(not p.grad.any() for p in model.parameters())
    with torch.no_grad():
        assert model.eval()(torch.randn(0, 3, 8, 8)).shape == (0, 4)


@pytest.mark.parametrize("name", [*NAMES, "hybrid-vip-6/8"])
def test_on_the_meta_device(name):
    with torch.device("meta"):
        model = cxv.create_model(name, img_size=8)
    assert all(t.is_meta for t in model.state_dict().values())
    assert model.eval()(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 10)
    there = cxv.create_model(name, img_size=8).eval()
    model.load_state_dict(there.state_dict(), assign=True)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(x), there(x))


@pytest.mark.filterwarnings("ignore:.*performance drop.*")
@pytest.mark.parametrize("name", [*NAMES, "hybrid-vip-1/2"])
def test_gradients_by_image(name):
    """Of the references, by vmap, with a mask of dropout for each."""
    model = small(name, img_size=6)
    weights = {k: p.detach() for k, p in model.named_parameters()}
    x, labels = torch.randn(3, 3, 6, 6), torch.arange(3)

    def loss(weights: dict[str, torch.Tensor], x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(model, weights, (x[None],)), label[None])

    gradient = torch.func.grad(loss)
    by_image = lambda: torch.func.vmap(gradient, (None, 0, 0), randomness="different")(weights, x, labels)  # noqa: E731
    assert all(found.shape == (3, *weights[k].shape) for k, found in by_image().items())
    model.eval()
    for k, found in by_image().items():
        torch.testing.assert_close(found[1], gradient(weights, x[1], labels[1])[k])


def test_projection_follows_the_seed_and_can_be_redrawn():
    torch.manual_seed(3)
    first = small("cpv-5/4")
    torch.manual_seed(3)
    second = small("cpv-5/4")
    attn = first.layers[0].attn
    assert torch.equal(attn.projection, second.layers[0].attn.projection)
    assert not torch.equal(attn.projection, first.layers[1].attn.projection)
    before = attn.projection.clone()
    attn.redraw_projection_(torch.Generator().manual_seed(1))
    redrawn = attn.projection.clone()
    attn.redraw_projection_()
    assert not torch.equal(before, redrawn)
    attn.redraw_projection_(torch.Generator().manual_seed(1))
    assert torch.equal(attn.projection, redrawn)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_autocast_and_channels_last(name, layout):
    model = small(name, use_fused=True)
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x)
        features = model.forward_features(x)
    assert logits.dtype == torch.bfloat16
    assert features.is_contiguous(memory_format=torch.channels_last)
    logits.float().sum().backward()


def leaves(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if not list(module.children())}


@pytest.mark.parametrize("use_fused", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_hooks_see_every_layer(name, use_fused, monkeypatch):
    """Once, with the whole batch, wherever else the branches go through in chunks; and they change nothing."""
    monkeypatch.setattr("cxv.models.blocks.CHUNK_TOKENS", 2 * 6 * 6)
    model, x = small(name, use_fused=use_fused, pre_norm=True).double(), torch.randn(5, 3, 6, 6, dtype=torch.float64)
    x.requires_grad_()
    seen: list[tuple[str, object]] = []

    def step(grad: bool) -> list[torch.Tensor]:
        torch.manual_seed(3)
        with torch.set_grad_enabled(grad):
            y = model(x)
        return [y, *(torch.autograd.grad(y.square().sum(), (x, *model.parameters())) if grad else ())]

    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        for grad in (True, False)[: 1 if "backward" in register else 2]:
            expected = step(grad)
            seen.clear()
            hooks = [
                getattr(module, register)(lambda m, *args, leaf=leaf: seen.append((leaf, args[-1])))
                for leaf, module in leaves(model).items()
            ]
            found = step(grad)
            for hook in hooks:
                hook.remove()
            assert sorted(leaf for leaf, _ in seen) == sorted(leaves(model))
            assert all(len(t[0] if isinstance(t, tuple) else t) == 5 for _, t in seen)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("hooked", ["leaves", "conv_norm"])
def test_what_a_hook_holds_is_not_written_over(hooked, monkeypatch):
    monkeypatch.setattr("cxv.models.blocks.CHUNK_TOKENS", 8 * 8)  # an image a chunk
    model, x, seen = small("cpv-5/4", use_fused=True).eval(), torch.randn(2, 3, 8, 8), []
    for module in leaves(model).values() if hooked == "leaves" else [model.layers[0].conv_norm]:
        module.register_forward_hook(lambda m, inputs, y: seen.extend((t, t.clone()) for t in (*inputs, y)))
    with torch.no_grad():
        model(x)
    assert seen
    assert all(torch.equal(held, copy) for held, copy in seen)


class Adapted(nn.Module):
    """LoRA as libraries have it: the layer's weights as attributes, and more than those in forward."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.delta = layer, copy.deepcopy(layer)
        nn.init.normal_(self.delta.weight)
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.delta(x)


@pytest.mark.parametrize("use_fused", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_replaced_layers_are_called(name, use_fused):
    model, x = small(name, use_fused=use_fused).eval(), torch.randn(2, 3, 6, 6)
    last = model(x)
    for path, layer in leaves(model.layers[0]).items():
        if isinstance(layer, nn.LayerNorm):
            continue
        parent, _, child = path.rpartition(".")
        setattr(model.layers[0].get_submodule(parent), child, Adapted(layer))
        assert not torch.allclose(model(x), last), path
        last = model(x)
    last.square().sum().backward()
    assert all(m.delta.weight.grad.abs().sum() > 0 for m in model.modules() if isinstance(m, Adapted))


@pytest.mark.parametrize("use_fused", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_pruned_and_parametrized_layers_train(name, use_fused):
    model, x = small(name, use_fused=use_fused), torch.randn(2, 3, 6, 6)
    pruned, scaled = model.layers
    for layer in leaves(pruned).values():
        prune.l1_unstructured(layer, "weight", amount=0.5)
    for layer in leaves(scaled).values():
        parametrize.register_parametrization(layer, "weight", nn.Softplus())
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert all(p.grad is not None for p in model.parameters())


def test_a_convolution_of_another_shape_takes_the_place_of_ours():
    layer = small("cltv-5/4", use_fused=True).layers[1]
    layer.conv_norm.conv = nn.Conv2d(16, 16, 3, padding=2, dilation=2, padding_mode="circular")
    layer.mlp.fc2 = nn.Conv2d(32, 16, 1, groups=4)
    layer.double().eval()
    x = torch.randn(2, 16, 6, 6, dtype=torch.float64)
    y = layer.attn(layer.conv_norm.norm(layer.conv_norm.conv(x).movedim(1, -1)).movedim(-1, 1))
    torch.testing.assert_close(layer(x), y + layer.mlp.fc2(nn.functional.gelu(layer.mlp.fc1(y))))


def test_attention_can_be_taken_out():
    model, x = small("cpv-5/4", use_fused=True).eval(), torch.randn(2, 3, 6, 6)
    model.layers[0].attn = nn.Identity()
    with torch.no_grad():
        assert model(x).shape == (2, 4)


@pytest.mark.parametrize("name", ["cltv-1/2", "cnv-1/2"])  # a layer has every op
def test_compile_fullgraph(name):
    """With gradients; CPV's are in test_drop_path.py."""
    model = small(name, use_fused=True).eval()
    x = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_learns(name):
    """A few steps are enough to learn two classes that are bright in different places."""
    model = small(name, use_fused=True, num_classes=2, drop_rate=0.1)
    target = torch.arange(16) % 2
    x = torch.randn(16, 3, 8, 8) * 0.3
    x[target == 1, :, :4] += 1
    x[target == 0, :, 4:] += 1
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
    assert (model.eval()(x).argmax(1) == target).float().mean() > 0.95


@pytest.mark.parametrize("name", [*NAMES, "hybrid-vip-6/8", "hybrid-vilt-6/8", "fnet-10", "mlp-mixer-5", "cct-6/4"])
def test_height_and_width(name):
    options = {"positions": "learned"} if name in NAMES else {}
    model = create_or_skip(name, img_size=(8, 6), **options).eval()
    assert model(torch.randn(2, 3, 8, 6)).shape == (2, 10)


@pytest.mark.parametrize("name", cxv.list_models())
def test_no_classes_are_features(name):
    model = create_or_skip(name, num_classes=0, img_size=16).eval()
    channels = {"resnet": 512, "convmixer": 256, "wavemix": 64}.get(name.rpartition("-")[0].partition("-")[0], 128)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, channels)


def test_bad_input():
    for match, call in (
        (
            "model must be one of 'cct-6/4', 'cltv-5/4', .* got 'cpv5/4'; did you mean 'cpv-5/4'",
            lambda: cxv.create_model("cpv5/4"),
        ),
        ("got 'densenet-121'", lambda: cxv.create_model("densenet-121")),
        ("depth come from the name 'cpv-5/4'", lambda: cxv.create_model("cpv-5/4", depth=3)),
        ("multiple of 4 and of num_heads = 3, got 128", lambda: cxv.CPV(num_heads=3)),
        ("drop_rate must be in", lambda: cxv.CNV(drop_rate=1.5)),
        ("depth must be an integer of at least 1, got 0", lambda: cxv.create_model("cpv-0/4")),
        ("attn_kernel_size must be odd, got 2", lambda: cxv.CLTV(attn_kernel_size=2)),
        ("attn_kernel must be one of 'softmax', 'relu', got 'nope'", lambda: cxv.CPV(attn_kernel="nope")),
        ("stabilizer must be one of 'head', 'batch', got 'nope'", lambda: cxv.CPV(stabilizer="nope")),
        ("pinv_init must be one of 'head', 'batch', got 'nope'", lambda: cxv.CNV(pinv_init="nope")),
        ("eps must be a finite number of at least 0, got -1", lambda: cxv.CPV(attn_eps=-1)),
        ("feature_map must be one of .* got 'nope'", lambda: cxv.CLTV(feature_map="nope")),
        ("num_landmarks must be an integer of at least 1, got 0", lambda: cxv.CNV(num_landmarks=0)),
        ("global_pool must be 'avg', .* got 'max'", lambda: cxv.CLTV(global_pool="max")),
        ("residual_conv_kernel must be an integer of at least 1, got -1", lambda: cxv.CNV(residual_conv_kernel=-1)),
        ("mlp_ratio must be a number, at least 1/128 for 128 channels, got 0", lambda: cxv.CNV(mlp_ratio=0)),
        ("mlp_ratio .* got 'abc'", lambda: cxv.create_model("hybrid-vilt-6/8", mlp_ratio="abc")),
        (r"img_size .* integer of at least 1, or two \(H, W\), got \(32,\)", lambda: cxv.CPV(img_size=(32,))),
        ("img_size .* got 0", lambda: cxv.CPV(img_size=0)),
        ("depth must be an integer of at least 1, got 0", lambda: cxv.create_model("hybrid-vip-0/8")),
        ("num_heads must be an integer of at least 1, got 0", lambda: cxv.create_model("hybrid-vin-6/0")),
        ("in_chans must be an integer of at least 1, got 0", lambda: cxv.create_model("hybrid-vilt-6/8", in_chans=0)),
        ("embed_dim must be an integer of at least 4, got '16'", lambda: cxv.CPV(embed_dim="16")),
        (r"input must be \(B, 3, H, W\), got shape \(2, 1, 8, 8\)", lambda: cxv.CLTV()(torch.zeros(2, 1, 8, 8))),
        (r"input must be \(B, 3, H, W\), got shape \(3, 8, 8\)", lambda: cxv.HybridViLT()(torch.zeros(3, 8, 8))),
        ("num_classes must be an integer of at least 0, got -1", lambda: cxv.CLTV().reset_classifier(-1)),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    with pytest.raises(TypeError, match="use_fuse"):
        cxv.CPV(use_fuse=True)
