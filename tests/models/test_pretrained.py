"""The weights in the package: every way to load them, and what their files say."""

import importlib.util
from pathlib import Path

import pytest
import torch
from cli_support import assert_error, call
from PIL import Image
from safetensors.torch import load_file

import cxv
from cxv import checkpoint
from cxv.checkpoint import find_checkpoint, find_pretrained, pretrained_models, read_checkpoint

NAME = "cltv-5/4"
ROOT = Path(__file__).parents[2]


def logits(model, seed=0):
    with torch.no_grad():
        return model.eval()(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two random images of each class of CIFAR-10, as folders."""
    folder = tmp_path_factory.mktemp("images")
    for label in read_checkpoint(find_pretrained(NAME))["classes"]:
        (folder / "test" / label).mkdir(parents=True)
        for i in range(2):
            pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / "test" / label / f"{i}.png")
    return folder


@pytest.mark.parametrize("name", pretrained_models())
def test_file_describes_its_weights(name):
    path = find_pretrained(name)
    found = read_checkpoint(path)
    assert found["model_name"] == name
    assert found["img_size"] == 32
    assert found["classes"][:2] == ["airplane", "automobile"]
    assert found["args"]["recipe"]
    assert found["epoch"] > 0
    assert found["seed"] is not None
    ((metric, top1),) = found["metrics"].items()
    assert metric in ("validation_top1", "test_top1")
    assert 50 < top1 < 100
    assert found["notes"].keys() == {"training", "evaluation", "data", "terms of the data", "license", "versions"}
    assert {t.dtype for t in load_file(path).values()} == {torch.float16}
    assert not {"use_fused", "recompute"} & found["model_kwargs"].keys()


@pytest.mark.parametrize("name", pretrained_models())
def test_fused_model_has_the_same_logits(name):
    plain, fused = (cxv.create_model(name, pretrained=True, use_fused=fused) for fused in (False, True))
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    torch.testing.assert_close(logits(fused), logits(plain), rtol=1e-4, atol=1e-4)


def test_pretrained_equals_checkpoint_by_name():
    model = cxv.create_model(NAME.upper(), pretrained=True)
    assert torch.equal(logits(model), logits(cxv.create_model(NAME, checkpoint=NAME)))
    assert not torch.equal(logits(model), logits(cxv.create_model(NAME)))
    assert find_checkpoint(NAME) == find_pretrained(NAME)
    assert cxv.list_models(pretrained=True) == pretrained_models()
    assert cxv.list_models("resnet*", pretrained=True) == []


def test_other_number_of_classes_gets_a_new_classifier():
    model, other = cxv.create_model(NAME, pretrained=True), cxv.create_model(NAME, pretrained=True, num_classes=7)
    x = torch.randn(1, 3, 16, 24)
    assert other(x).shape == (1, 7)
    assert torch.equal(other.eval().forward_features(x), model.eval().forward_features(x))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (NAME, {"in_chans": 1}, r"stem.0.weight is \(32, 3, 3, 3\) in the file and \(32, 1, 3, 3\) in the model"),
        (NAME, {"embed_dim": 64}, "do not fit CLTV"),
        (NAME, {"checkpoint": "runs/a"}, "pretrained and checkpoint: give one of them, got checkpoint='runs/a' too"),
        ("cltv-6/4", {}, f"cltv-6/4 has no pretrained weights; these models do: .*{NAME}"),
        ("resnet-18", {}, f"resnet-18 has no pretrained weights; these models do: .*{NAME}"),
        ("no-model", {}, "model must be one of"),
    ],
)
def test_weights_that_do_not_exist_or_fit(name, options, message):
    with pytest.raises(ValueError, match=message):
        cxv.create_model(name, pretrained=True, **options)


def test_own_file_comes_before_the_name(tmp_path, monkeypatch):
    """A file or folder that is called like a model is the user's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cltv-5").mkdir()
    (tmp_path / NAME).write_text("mine")
    assert find_checkpoint(NAME) == Path(NAME)


def test_command_line_takes_the_name(images, capsys):
    picture = images / "test" / "cat" / "0.png"
    code, out, _ = call(capsys, "predict", "--checkpoint", NAME, picture)
    assert (code, out.count("%")) == (0, 5)
    folder = ("--data", "folder", "--data-dir", images, "--precision", "fp32")
    lines = [call(capsys, "eval", "--checkpoint", NAME, *folder, fused)[1] for fused in ("--fused", "--no-fused")]
    assert "top-1" in lines[0]
    assert lines[0] == lines[1]
    result = call(capsys, "predict", "--checkpoint", "resnet-18", picture)
    assert_error(result, "resnet-18: no such file or directory; pretrained models:", NAME)


def test_timm_loads_the_weights():
    timm = pytest.importorskip("timm")
    import cxv.timm

    model = timm.create_model("cltv_5_4", pretrained=True, use_fused=True)
    torch.testing.assert_close(logits(model), logits(cxv.create_model(NAME, pretrained=True, use_fused=True)))
    assert timm.data.resolve_model_data_config(model)["mean"] == (0.5, 0.5, 0.5)
    other = timm.create_model("cltv_5_4", pretrained=True, num_classes=3, in_chans=1)
    summed = model.stem[0].weight.sum(1, keepdim=True)
    torch.testing.assert_close(other.stem[0].weight, summed, rtol=1e-3, atol=1e-3)  # timm sums in float16
    assert set(timm.list_models(module="cxv", pretrained=True)) == {
        name.replace("-", "_").replace("/", "_") for name in pretrained_models()
    }


def test_timm_prefers_another_source(tmp_path):
    """A URL replaces the weights of the package."""
    timm = pytest.importorskip("timm")
    import cxv.timm

    small = cxv.create_model("cltv-1/4", embed_dim=16)
    torch.save(small.state_dict(), tmp_path / "a.pth")
    overlay = {"url": (tmp_path / "a.pth").as_uri()}
    options = {"depth": 1, "embed_dim": 16, "pretrained_cfg_overlay": overlay, "cache_dir": tmp_path / "cache"}
    assert torch.equal(timm.create_model("cltv_5_4", pretrained=True, **options).head.weight, small.head.weight)


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


@pytest.mark.parametrize(("name", "missing"), [("cpv-1/2", "projection"), ("cnv-1/2", "res_conv.weight")])
def test_warm_start(name, missing, tmp_path, monkeypatch, capsys):
    """The first weights of another attention are CLTV's as far as both have them."""
    cxv.save_safetensors(source := cxv.create_model("cltv-1/2", embed_dim=16), tmp_path / "a.safetensors")
    output = str(tmp_path / "b.safetensors")
    monkeypatch.setattr("sys.argv", ["warm_start.py", name, str(tmp_path / "a.safetensors"), output])
    load_tool("warm_start").main()
    assert capsys.readouterr().out == f"{output}: random are layers.0.attn.{missing}\n"
    old, new = source.state_dict(), cxv.create_model(name, checkpoint=output).state_dict()
    same = new.keys() & old.keys()
    assert len(same) > 15
    assert all(torch.equal(new[key].flatten(), old[key].flatten()) for key in same)
    if "layers.0.attn.qkv.weight" in new:
        parts = new["layers.0.attn.qkv.weight"].chunk(3)
        for letter, part in zip("qkv", parts, strict=True):
            assert torch.equal(part, old[f"layers.0.attn.{letter}.weight"].flatten(1))


def test_pack_weights(tmp_path, monkeypatch, capsys):
    """The tool writes a file that ``pretrained=True`` loads."""
    tool = load_tool("pack_weights")
    model = cxv.create_model("cnv-1/2", embed_dim=16, use_fused=True)
    cxv.save_safetensors(model, tmp_path / "a.safetensors", seed=3)
    for module in (tool, checkpoint):
        monkeypatch.setattr(module, "WEIGHTS", tmp_path / "weights")
    (tmp_path / "weights").mkdir()
    with pytest.raises(ValueError, match="cnv-1/2 has no pretrained weights; these models do: none"):
        find_pretrained("cnv-1/2")
    texts = ["--metric", "test_top1=91.5", "--evaluation", "somehow", "--training", "not at all"]
    monkeypatch.setattr("sys.argv", ["pack_weights.py", str(tmp_path / "a.safetensors"), *texts])
    tool.main()
    assert "cnv-1-2.safetensors" in capsys.readouterr().out
    assert pretrained_models() == ["cnv-1/2"]
    loaded = cxv.create_model("cnv-1/2", pretrained=True)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-2, atol=1e-2)
    found = read_checkpoint(find_pretrained("cnv-1/2"))
    assert (found["seed"], found["metrics"]) == (3, {"test_top1": 91.5})
    assert found["notes"].items() >= {"evaluation": "somehow", "training": "not at all"}.items()
    assert found["model_kwargs"] == {"embed_dim": 16, "num_classes": 10}
