"""The models in timm's registry, as backbones, and by timm's method names."""

from collections import OrderedDict

import pytest
import timm
import torch
from torch import Tensor, nn

import cxv
import cxv.timm

CXV = ["cpv_5_4", "cnv_5_4", "cltv_5_4"]
NAMES = [*CXV, "hybrid_vip_6_8", "hybrid_vin_6_8", "hybrid_vilt_6_8"]
SMALL = {"embed_dim": 16, "num_heads": 2, "depth": 3}


def ours(name: str) -> str:
    """The name of timm's ``name`` in cxv."""
    family, depth, heads = name.rsplit("_", 2)
    return f"{family.replace('_', '-')}-{depth}/{heads}"


def create(name: str, **kwargs) -> nn.Module:
    """A small model; the hybrids with a class token take images of 8×8 only."""
    return timm.create_model(name, img_size=8, **SMALL | kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_create_model(name):
    """The models themselves: Table 1's parameters, the same weights from the same seed."""
    assert timm.is_model(name)
    torch.manual_seed(0)
    model = timm.create_model(name)
    torch.manual_seed(0)
    expected = cxv.create_model(ours(name))
    assert type(model) is type(expected)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
    assert model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    assert model.default_cfg["classifier"] == "head"
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (3, 32, 32)


def test_arguments_reach_the_model():
    model = timm.create_model("cpv_5_4", num_classes=7, in_chans=1, drop_rate=0.1, use_fused=True, **SMALL)
    assert model.head.weight.shape == (7, 16)
    assert model.layers[0].mlp.drop_rate == 0.1
    assert model.layers[0].attn.use_fused
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 7)
    untrained = sorted({*timm.list_models(module="cxv")} - {*timm.list_models(module="cxv", pretrained=True)})[0]
    with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {untrained}"):
        timm.create_model(untrained, pretrained=True)


@pytest.mark.parametrize("name", CXV)
@pytest.mark.parametrize("grad", [True, False])
def test_forward_intermediates(name, grad):
    """Every layer's output, unchanged by the layers after it, that in eval mode write in place."""
    model = timm.create_model(name, use_fused=True, **SMALL).eval()
    x, seen = torch.randn(2, 3, 8, 8), []
    hooks = [layer.register_forward_hook(lambda m, i, y: seen.append(y.clone())) for layer in model.layers]
    with torch.set_grad_enabled(grad):
        logits = model(x)
        for hook in hooks:
            hook.remove()
        final, features = model.forward_intermediates(x)
        assert torch.equal(model.forward_head(final), logits)
        assert all(torch.equal(a, b) for a, b in zip(features, seen, strict=True))
        for indices, layers in ((2, [1, 2]), ([0, -1], [0, 2]), ((1,), [1])):
            found = model.forward_intermediates(x, indices, stop_early=True, intermediates_only=True)
            assert all(torch.equal(a, seen[i]) for a, i in zip(found, layers, strict=True))
    assert torch.equal(model.forward_intermediates(x, [0], stop_early=True)[0], seen[0])
    assert torch.equal(model.forward_intermediates(x, [0])[0], seen[2])


def test_intermediates_that_are_not_there():
    model = timm.create_model("cpv_5_4", **SMALL)
    x = torch.randn(1, 3, 8, 8)
    for indices in ([3], [-4], [], 4):
        with pytest.raises(ValueError, match="indices must be layers from -3 to 2, got"):
            model.forward_intermediates(x, indices)
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NLC'"):
        model.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize("name", CXV)
def test_features_only(name):
    whole = timm.create_model(name, stem_stride=2, **SMALL)
    backbone = timm.create_model(name, stem_stride=2, features_only=True, out_indices=(0, -2), **SMALL)
    assert backbone.feature_info.channels() == [16, 16]
    assert backbone.feature_info.reduction() == [2, 2]
    assert backbone.feature_info.module_name() == ["layers.0", "layers.1"]
    assert len(backbone.model.layers) == 2  # what nobody asked for is gone
    weights = {k: v for k, v in whole.state_dict().items() if not k.startswith(("head", "layers.2"))}
    backbone.model.load_state_dict(weights)
    x = torch.randn(2, 3, 16, 12)
    expected = whole.eval().forward_intermediates(x, [0, 1], intermediates_only=True)
    found = backbone.eval()(x)
    assert [f.shape for f in found] == [(2, 16, 8, 6)] * 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    found[-1].sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())
    levels = timm.create_model(name, features_only=True, **SMALL | {"depth": 4})
    assert levels.feature_info.out_indices == (1, 2, 3)  # the last three without out_indices
    assert [f.shape for f in levels(x)] == [(2, 16, 16, 12)] * 3
    assert len(timm.create_model(name, features_only=True, **SMALL | {"depth": 2})(x)) == 2


def test_weights_of_cxv_load(tmp_path):
    """A shared file by timm's own loader, classifier and channels adapted by it."""
    model = cxv.create_model("cpv-3/2", embed_dim=16, num_classes=10).eval()
    cxv.save_safetensors(model, tmp_path / "a.safetensors")
    options = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "a.safetensors")}}
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(timm.create_model("cpv_5_4", **options, **SMALL).eval()(x), model(x))
    other = timm.create_model("cpv_5_4", num_classes=3, in_chans=1, **options, **SMALL)
    assert other.head.weight.shape == (3, 16)
    assert torch.equal(other.stem[0].weight, model.stem[0].weight.sum(1, keepdim=True))
    last = timm.create_model("cpv_5_4", features_only=True, **options, **SMALL).eval()(x)[-1]
    assert torch.equal(last, model.forward_features(x))


def test_a_file_says_what_its_weights_are_of(tmp_path):
    """Classes, images and normalization, unless the call says otherwise."""
    path = tmp_path / "a.safetensors"
    model = cxv.create_model("cpv-3/2", embed_dim=16, num_classes=3, in_chans=1, img_size=(8, 6)).eval()
    pixels = {"mean": 0.25, "std": [0.125]}
    cxv.save_safetensors(model, path, normalization=pixels)
    x, overlay = torch.randn(2, 1, 8, 6), {"file": str(path)}
    for given in ({}, {"num_classes": 3, "in_chans": 1}):
        found = timm.create_model("cpv_5_4", pretrained=True, pretrained_cfg_overlay=overlay, **given, **SMALL).eval()
        assert torch.equal(found(x), model(x))
    data = timm.data.resolve_model_data_config(found)
    assert (data["input_size"], data["mean"], data["std"]) == ((1, 8, 6), (0.25,), (0.125,))
    other = timm.create_model(
        "cpv_5_4", pretrained=True, pretrained_cfg_overlay=overlay | {"std": (1.0,)}, num_classes=5, **SMALL
    )
    assert other.head.weight.shape == (5, 16)
    assert other.pretrained_cfg["std"] == (1.0,)
    assert torch.equal(other.stem[0].weight, model.stem[0].weight)


def test_a_file_of_weights_alone_loads(tmp_path):
    model = timm.create_model("cltv_5_4", **SMALL)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    overlay = {"file": str(tmp_path / "a.pt")}
    again = timm.create_model("cltv_5_4", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL)
    assert torch.equal(again.head.weight, model.head.weight)


@pytest.mark.parametrize("name", ["cpv_5_4", "hybrid_vip_6_8"])
def test_learning_rates_by_layer(name):
    from timm.optim import param_groups_layer_decay

    model = create(name)
    groups = param_groups_layer_decay(model, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert len(scale) == len(list(model.parameters()))
    parts = (model.stem, *model.layers, model.head)
    if name == "cpv_5_4":
        assert [{scale[id(p)] for p in part.parameters()} for part in parts] == [{0.5 ** (4 - i)} for i in range(5)]
    else:
        assert scale[id(model.cls_token)] == scale[id(model.stem[0].weight)] == 0.5**4
        assert scale[id(model.norm.weight)] == scale[id(model.layers[2][1].fc1.weight)] == 0.5
        assert scale[id(model.head.weight)] == 1.0


def test_the_registry():
    """timm lists the models under the module name cxv, and finds them by it."""
    assert timm.list_models(module="cxv") == sorted(NAMES)
    assert "timm" not in timm.list_modules()
    assert timm.models.is_model_in_modules("cpv_5_4", "cxv")
    assert timm.models.model_entrypoint("cpv_5_4", module_filter="cxv") is cxv.timm.cpv_5_4


@pytest.mark.parametrize("name", NAMES)
def test_device_and_dtype(name):
    model = create(name, device="cpu", dtype=torch.float64)
    assert {t.dtype for t in (*model.parameters(), *model.buffers())} == {torch.float64}
    assert model(torch.randn(1, 3, 8, 8, dtype=torch.float64)).dtype == torch.float64
    backbone = create(name, device="meta", features_only=True)
    assert {p.device.type for p in backbone.parameters()} == {"meta"}


@pytest.mark.parametrize("name", NAMES)
def test_configuration(name):
    """As timm's own tests ask: the sizes of maps and features, and the names of the first and the last layer."""
    model = timm.create_model(name, **SMALL).eval()
    cfg, x = model.default_cfg, torch.randn(1, 3, 32, 32)
    features = model.forward_features(x)
    assert features.shape == (1, model.num_features, *cfg["pool_size"])
    assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
    assert {f"{cfg['classifier']}.weight", f"{cfg['first_conv']}.weight"} <= model.state_dict().keys()
    model.reset_classifier(0)
    assert (model.num_classes, model(x).shape) == (0, (1, model.num_features))
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    unpooled = create(name, num_classes=0, global_pool="").eval()
    assert unpooled(x[..., :8, :8]).dim() == 4
    pool = "token" if cfg["fixed_input_size"] else "avg"
    for classes, kind, given in ((0, "max", "max"), (4, None, "")):
        with pytest.raises(ValueError, match=f"global_pool must be '{pool}', or without classes '', got '{given}'"):
            unpooled.reset_classifier(classes, kind)
    unpooled.reset_classifier(42, pool)
    assert unpooled.get_classifier().weight.shape == (42, 16)


@pytest.mark.parametrize("name", NAMES)
def test_levels_of_features(name):
    """Each layer is a level, of the stem's resolution, without the class token; checkpointing changes nothing."""
    model, x = create(name, stem_stride=2).eval(), torch.randn(2, 3, 8, 8)
    info = timm.models.FeatureInfo(model.feature_info, len(model.feature_info))
    last, levels = model.forward_intermediates(x)
    assert info.channels() == [f.shape[1] for f in levels] == [16] * 3
    assert info.reduction() == [8 // f.shape[2] for f in levels] == [2] * 3
    assert torch.equal(last, model.forward_features(x))
    tokens = last.flatten(2).transpose(1, 2)[:, -16:]  # without the class token
    normed = getattr(model, "norm", nn.Identity())(tokens)
    for norm, expected in ((False, tokens), (True, normed)):
        (level,) = model.forward_intermediates(x, 1, norm=norm, intermediates_only=True)
        torch.testing.assert_close(level, expected.transpose(1, 2).unflatten(2, (4, 4)))
    model.set_grad_checkpointing()
    again = model.forward_intermediates(x, output_fmt=timm.layers.Format.NCHW)
    assert torch.equal(again[0], last)
    assert all(map(torch.equal, again[1], levels))


@pytest.mark.parametrize("kind", ["getter", "hook", "fx"])
@pytest.mark.parametrize("name", ["cpv_5_4", "hybrid_vilt_6_8"])
def test_features_only_by_every_extractor(name, kind):
    x = torch.randn(2, 3, 8, 8)
    model = create(name).eval()
    expected = model.forward_intermediates(x, intermediates_only=True)
    backbone = create(name, features_only=True, feature_cls=kind).eval()
    state = model.state_dict()
    backbone.load_state_dict({key: state[key.split(".", 1)[1]] for key in backbone.state_dict()})
    assert all(torch.equal(a, b) for a, b in zip(backbone(x), expected, strict=True))


@pytest.mark.parametrize("fused", [False, True], ids=["reference", "fused"])
@pytest.mark.parametrize("name", NAMES)
def test_fx(name, fused):
    """timm's feature extractor, whose graph runs forward and backward for any batch size."""
    model = create(name, use_fused=fused, drop_rate=0.0)
    extractor = timm.models.create_feature_extractor(model, ["layers.1", "head"])
    for batch in (1, 3):
        x = torch.randn(batch, 3, 8, 8)
        found = extractor(x)
        assert torch.equal(found["head"], model(x))
    assert torch.equal(found["layers.1"], model.eval()._run_layers(x, 2, ())[0])
    found["head"].mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_weight_decay_leaves_out_positions_and_class_tokens():
    from timm.optim import param_groups_weight_decay

    for model in (create("cpv_5_4", positions="learned"), create("hybrid_vip_6_8")):
        plain, decayed = param_groups_weight_decay(model, 0.1, no_weight_decay_list=model.no_weight_decay())
        names = {id(p): name for name, p in model.named_parameters()}
        kept = {names[id(p)].split(".")[-1] for p in decayed["params"]}
        assert kept == {"weight"}
        assert {"pos_embed", "bias"} <= {names[id(p)].split(".")[-1] for p in plain["params"]}


def test_moving_average_of_the_weights():
    model = create("cpv_5_4")
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    before = model.head.weight.detach().clone()
    with torch.no_grad():
        model.head.weight += 1
    average.update(model)
    torch.testing.assert_close(average.module.head.weight, before + 0.5)
    assert torch.equal(average.module.layers[0].attn.projection, model.layers[0].attn.projection)


@pytest.mark.parametrize("kind", ["checkpoint_path", "pretrained_cfg", "local-dir"])
def test_every_way_to_load_a_file(tmp_path, kind):
    """timm's ``checkpoint_path``, a file in its configuration, and a directory that timm wrote for the Hub."""
    model = create("cpv_5_4", num_classes=7, in_chans=1).eval()
    path, x = tmp_path / "model.safetensors", torch.randn(2, 1, 8, 8)
    metadata = {"model_name": "cpv-3/2", "model_kwargs": {"embed_dim": 16, "num_classes": 7, "in_chans": 1}}
    cxv.save_safetensors(model, path, **metadata)
    if kind == "checkpoint_path":
        again = create("cpv_5_4", num_classes=7, in_chans=1, checkpoint_path=path)
    elif kind == "pretrained_cfg":
        again = create("cpv_5_4", pretrained=True, pretrained_cfg={"file": str(path)})
        assert again.pretrained_cfg["classifier"] == "head"
    else:
        timm.models.save_for_hf(model, tmp_path / "hub", model_config={"num_classes": 7})
        again = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True)
    assert torch.equal(again.eval()(x), model(x))


class Backbone(nn.Module):
    """A timm backbone as torchvision's detectors want one."""

    def __init__(self, **kwargs):
        super().__init__()
        self.body = timm.create_model("cpv_5_4", features_only=True, out_indices=(-1,), **kwargs)
        self.out_channels = self.body.feature_info.channels()[-1]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return OrderedDict((str(i), feature) for i, feature in enumerate(self.body(x)))


def test_a_detector_trains():
    """torchvision's RetinaNet on 224×224 images, 784 tokens to each attention, all of it fused."""
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    backbone = Backbone(embed_dim=32, num_heads=2, depth=2, stem_stride=8, drop_rate=0.1, use_fused=True)
    assert all(layer.attn.use_fused for layer in backbone.body.model.layers)
    anchors = AnchorGenerator(sizes=((32, 64),), aspect_ratios=((0.5, 1.0, 2.0),))
    model = RetinaNet(backbone, num_classes=3, anchor_generator=anchors, min_size=224, max_size=224)
    images = list(torch.rand(2, 3, 224, 224))
    targets = [
        {"boxes": torch.tensor([[20.0, 30.0, 90.0, 100.0]]), "labels": torch.tensor([1])},
        {"boxes": torch.tensor([[50.0, 60.0, 200.0, 180.0], [5.0, 5.0, 60.0, 70.0]]), "labels": torch.tensor([2, 1])},
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = sum(model(images, targets).values())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    gradients = [p.grad for p in backbone.parameters()]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)
    assert sum(g.abs().sum() for g in gradients) > 0
    assert losses[1] < losses[0]
    detected = model.eval()(images)
    assert detected[0]["boxes"].shape[1] == 4
