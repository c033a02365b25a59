"""Weights given away and taken: safetensors, the Hub, and files that mean harm."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import cxv
from cxv.checkpoint import METADATA_KEY, read_checkpoint
from cxv.cli import main
from cxv.sharing import describe
from cxv.training import InputError, TrainConfig, load_model, train

TINY = {"embed_dim": 16, "num_classes": 3, "in_chans": 1, "img_size": 8}
CLASSES = ["ant", "bee", "cat"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of ``cxv train`` on some digits."""
    output = tmp_path_factory.mktemp("runs") / "digits"
    config = TrainConfig(model="cpv-1/2", embed_dim=16, limit_train=60, limit_test=40, epochs=2, sgd_epochs=0, seed=3)
    config.output, config.lr, config.threads = str(output), 0.01, 1
    train(config, log=lambda line: None)
    return output


@pytest.fixture
def saved(tmp_path):
    """A model and its file."""
    model = cxv.create_model("cpv-1/2", **TINY).eval()
    cxv.save_safetensors(model, tmp_path / "model.safetensors", classes=CLASSES, seed=7, metrics={"test_top1": 50.0})
    return model, tmp_path / "model.safetensors"


def rewritten(path: Path, weights=None, **metadata) -> Path:
    """The file with other weights or metadata; a metadata of None is left out."""
    checkpoint = read_checkpoint(path)
    found = {k: v for k, v in checkpoint.items() if k != "model"} | metadata
    header = {METADATA_KEY: json.dumps({k: v for k, v in found.items() if v is not None})}
    other = path.with_name("other.safetensors")
    save_file(checkpoint["model"] if weights is None else weights, other, header)
    return other


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("name", ["cpv-1/2", "cnv-1/2", "cltv-1/2", "hybrid-vip-1/2", "wavemix-1", "vit-1/2"])
def test_round_trip(tmp_path, name):
    """The same bits, arguments and outputs; the caller's random numbers are left alone."""
    options = {k: v for k, v in TINY.items() if k != "img_size"}
    model = cxv.create_model(name, img_size=16, **options).eval()
    state = torch.get_rng_state()
    cxv.save_safetensors(model, tmp_path / "a.safetensors", classes=CLASSES)
    assert torch.equal(torch.get_rng_state(), state)
    loaded = cxv.create_model(name.upper(), checkpoint=tmp_path / "a.safetensors").eval()
    assert same_weights(model, loaded)
    x = torch.randn(2, 1, 16, 16)
    assert torch.equal(model(x), loaded(x))
    assert load_file(tmp_path / "a.safetensors").keys() == model.state_dict().keys()  # any reader finds the names


def test_float16_file_loads_as_float32(saved):
    """The file is half as large, and a model that loads it has float32 parameters with the rounded values."""
    model, path = saved
    half = path.with_name("half.safetensors")
    cxv.save_safetensors(model, half, dtype=torch.float16)
    assert all(t.dtype == torch.float16 for t in load_file(half).values())
    loaded = cxv.create_model("cpv-1/2", checkpoint=half)
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.state_dict()[name].half().float())
    with pytest.raises(InputError, match=r"dtype: expected a floating-point dtype or None, got torch\.int8"):
        cxv.save_safetensors(model, half, dtype=torch.int8)


def test_what_the_file_says(saved):
    _, path = saved
    _, checkpoint = load_model(path.parent)  # a directory with a model.safetensors
    assert checkpoint["model_name"] == "cpv-1/2"
    assert checkpoint["model_kwargs"] == TINY
    assert checkpoint["classes"] == CLASSES
    assert checkpoint["normalization"] == {"mean": 0.5, "std": 0.5}
    assert (checkpoint["img_size"], checkpoint["in_chans"], checkpoint["seed"]) == (8, 1, 7)
    assert checkpoint["metrics"] == {"test_top1": 50.0}
    assert not load_model(path)[0].training


def test_a_run(run, tmp_path, capsys):
    """A run's metrics and arguments travel, its paths do not; the CLI evaluates the file as it does the run."""
    cxv.save_safetensors(run, tmp_path / "a.safetensors")
    best, shared = read_checkpoint(run / "best.pt"), read_checkpoint(tmp_path / "a.safetensors")
    row = best["history"][-1]
    assert shared["metrics"]["test_top1"] == row["test_top1"]
    assert (shared["epoch"], shared["seed"], shared["args"]["data"]) == (best["epoch"], 3, "digits")
    assert str(run) not in (tmp_path / "a.safetensors").read_bytes().decode("latin-1")
    for source in (run, run / "best.pt", tmp_path / "a.safetensors"):
        model = cxv.create_model("cpv-1/2", checkpoint=source, use_fused=False)
        assert all(torch.equal(v, best["model"][k]) for k, v in model.state_dict().items())
        assert model.layers[0].attn.use_fused is False
    capsys.readouterr()
    printed = []
    for source in (run, tmp_path / "a.safetensors"):
        assert main(["eval", "--checkpoint", str(source), "--threads", "1"]) == 0
        printed.append(capsys.readouterr().out)
    assert f"top-1 {row['test_top1']:.2f} %" in printed[0]
    assert printed[0] == printed[1]
    cxv.save_safetensors(tmp_path / "a.safetensors", tmp_path / "b.safetensors")  # and on
    again = read_checkpoint(tmp_path / "b.safetensors")
    assert again.pop("model").keys() == shared.pop("model").keys()
    assert again == shared


def test_predict_and_eval_of_a_model_of_unknown_making(saved, capsys, tmp_path):
    from PIL import Image

    model, path = saved
    Image.new("L", (8, 8), 255).save(tmp_path / "white.png")
    assert main(["predict", "--checkpoint", str(path), str(tmp_path / "white.png")]) == 0
    shares = model(torch.ones(1, 1, 8, 8))[0].softmax(0)
    assert f"{100 * shares.max():6.2f} %  {CLASSES[shares.argmax()]}" in capsys.readouterr().out
    assert main(["eval", "--checkpoint", str(path)]) == 2
    assert "--data: give it, as" in capsys.readouterr().err
    other = rewritten(path, normalization={"mean": [0.485], "std": [0.229]})
    assert main(["predict", "--checkpoint", str(other), str(tmp_path / "white.png")]) == 0
    shares = model(torch.full((1, 1, 8, 8), (1 - 0.485) / 0.229))[0].softmax(0)
    assert f"{100 * shares.max():6.2f} %  {CLASSES[shares.argmax()]}" in capsys.readouterr().out
    other = rewritten(path, normalization={"mean": [0.485, 0.456], "std": 0.229})
    assert main(["predict", "--checkpoint", str(other), str(tmp_path / "white.png")]) == 2
    assert "wants pixels normalized by" in capsys.readouterr().err


def test_the_older_spelling_of_a_key_is_read(saved):
    """Files from before version 0.1.0 was released have ``normalisation``."""
    pixels = {"mean": [0.485], "std": [0.229]}
    other = rewritten(saved[1], normalization=None, normalisation=pixels)
    assert load_model(other)[1]["normalization"] == pixels


def test_another_number_of_classes_is_a_fresh_classifier(saved):
    model, path = saved
    loaded = cxv.create_model("cpv-1/2", checkpoint=path, num_classes=5)
    assert loaded.head.weight.shape == (5, 16)
    assert same_weights(loaded.stem, model.stem)
    assert same_weights(loaded.layers, model.layers)
    model.reset_classifier(4)  # what is saved follows
    cxv.save_safetensors(model, path)
    assert read_checkpoint(path)["classes"] == ["0", "1", "2", "3"]
    cxv.save_safetensors(cxv.create_model("wavemix-1", **TINY), path)  # which has no reset_classifier
    with pytest.raises(ValueError, match="num_classes of wavemix-1 must be 3, as in"):
        cxv.create_model("wavemix-1", checkpoint=path, num_classes=5)


@pytest.mark.parametrize(("name", "pool"), [("cpv-1/2", "avg"), ("hybrid-vip-1/2", "token")])
def test_pooling_is_kept_as_reset_classifier_left_it(tmp_path, name, pool):
    model, path, x = cxv.create_model(name, **TINY).eval(), tmp_path / "a.safetensors", torch.randn(2, 1, 8, 8)
    for classes, kind in ((0, ""), (0, pool), (4, None)):
        model.reset_classifier(classes, kind)
        cxv.save_safetensors(model, path)
        loaded = cxv.create_model(name, checkpoint=path).eval()
        assert torch.equal(loaded(x), model(x))
        assert loaded.global_pool == model.global_pool == (pool if kind is None else kind)
        model = loaded


def test_images_that_are_no_squares(tmp_path, capsys):
    from PIL import Image

    model = cxv.create_model("hybrid-vip-1/2", **TINY | {"img_size": (8, 12)}).eval()
    path = tmp_path / "a.safetensors"
    cxv.save_safetensors(model, path)
    x = torch.ones(1, 1, 8, 12)
    assert torch.equal(model(x), cxv.create_model("hybrid-vip-1/2", checkpoint=path).eval()(x))
    Image.new("L", (40, 20), 255).save(tmp_path / "white.png")
    assert main(["predict", "--checkpoint", str(path), str(tmp_path / "white.png")]) == 0
    assert f"{100 * model(x).softmax(1).max():6.2f} %" in capsys.readouterr().out
    out = str(tmp_path / "a.pt2")
    assert main(["export", "--checkpoint", str(path), "--format", "torch", "--no-fused", out]) == 0
    assert "images of 8×12; logits within" in capsys.readouterr().out
    for name in "012":
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("L", (40, 20), 255).save(tmp_path / "images" / name / "white.png")
    assert main(["eval", "--checkpoint", str(path), "--data", str(tmp_path / "images")]) == 0
    assert "33.33 %" in capsys.readouterr().out


def test_wrapped_models_are_saved_as_what_they_wrap(saved):
    model, path = saved
    compiled = torch.compile(model, backend="eager")
    for wrapped in (compiled, nn.DataParallel(model), nn.DataParallel(compiled)):
        path.unlink()
        cxv.save_safetensors(wrapped, path)
        assert same_weights(model, cxv.create_model("cpv-1/2", checkpoint=path))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"classes": ["one"]}, "classes: expected 3 names"),
        ({"classes": "abc"}, "classes: expected a list of strings, got 'abc'"),
        ({"license": "mine"}, "license: no such metadata; allowed: model_name"),
        ({"classes": [1, 2, 3]}, "classes: expected a list of strings"),
        ({"normalization": {"mean": 0.5}}, "normalization: expected a dict of mean and std"),
        ({"seed": "7"}, "seed: expected an integer or None, got '7'"),
        ({"args": {"data": Path("data")}}, "metadata: expected numbers, strings"),
        ({"metrics": {"top1": torch.ones(1)}}, "metrics: expected a dict of numbers"),
        ({"model_name": "cnv-1/2"}, "do not fit CNV"),
        ({"model_kwargs": {"num_classes": 3, "embed_dim": 32}}, "do not fit CPV"),
        ({"model_kwargs": {"num_classes": 3, "color": 1}}, "cannot be built"),
    ],
)
def test_metadata_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, metadata, message):
    with pytest.raises(InputError, match=message):
        cxv.save_safetensors(cxv.create_model("cpv-1/2", **TINY), tmp_path / "a.safetensors", **metadata)
    assert not list(tmp_path.iterdir())


def test_a_model_built_by_hand_needs_its_name(tmp_path):
    model = cxv.CPV(depth=1, num_heads=2, **TINY)
    with pytest.raises(InputError, match="model_name and model_kwargs: give them"):
        cxv.save_safetensors(model, tmp_path / "a.safetensors")
    cxv.save_safetensors(model, tmp_path / "a.safetensors", model_name="cpv-1/2", model_kwargs=TINY)
    assert same_weights(model, cxv.create_model("cpv-1/2", checkpoint=tmp_path / "a.safetensors"))
    with pytest.raises(InputError, match=r"expected a name that ends in \.safetensors, got model\.pt"):
        cxv.save_safetensors(model, "model.pt")


DAMAGES = {  # of a file's content, whose header ends at byte h
    "empty": lambda c, h: b"",
    "a few bytes": lambda c, h: c[:5],
    "half a header": lambda c, h: c[: h // 2],
    "half the weights": lambda c, h: c[: (h + len(c)) // 2],
    "bytes too many": lambda c, h: c + b"more",
    "a huge header": lambda c, h: (2**62).to_bytes(8, "little") + c[8:],
    "no JSON": lambda c, h: c[:8] + b"[" + c[9:],
    "offsets out of range": lambda c, h: c.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1),
    "a pickle": lambda c, h: pickle.dumps({"model": 1}),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_malformed_safetensors(saved, how, capsys):
    _, path = saved
    content = path.read_bytes()
    path.write_bytes(DAMAGES[how](content, 8 + int.from_bytes(content[:8], "little")))
    with pytest.raises(InputError) as caught:
        cxv.create_model("cpv-1/2", checkpoint=path)
    assert str(caught.value).startswith(f"{path}: truncated or corrupt, not a safetensors file (")
    assert main(["predict", "--checkpoint", str(path), "x.png"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_name": None}, "model_name: expected a string, got None"),
        ({"model_name": 5}, "model_name: expected a string, got 5"),
        ({"model_name": "gpt-1/2"}, "the model it names cannot be built (`model` gpt-1/2"),
        ({"model_kwargs": {**TINY, "make_attention": 1}}, "the model it names cannot be built"),
        ({"model_kwargs": {**TINY, "embed_dim": "16"}}, "the model it names cannot be built"),
        ({"model_kwargs": {**TINY, "embed_dim": 32}}, "do not fit CPV"),
        ({"model_name": "cnv-1/2"}, "do not fit CNV: layers.0.attn"),
        ({"classes": ["ant"]}, "classes: expected 3 names, as many as num_classes, got ['ant']"),
    ],
)
def test_metadata_of_another_model(saved, change, message):
    path = rewritten(saved[1], **change)
    with pytest.raises(InputError) as caught:
        load_model(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_of_another_model(saved):
    model, path = saved
    weights = model.state_dict()
    for change, message in (
        ({"head.bias": torch.zeros(4)}, "head.bias is (4,) in the file and (3,) in the model"),
        ({"head.bias": None}, "head.bias is absent in the file and (3,) in the model"),
        ({"more": torch.zeros(2)}, "more is (2,) in the file and absent in the model"),
    ):
        other = rewritten(path, {k: v for k, v in (weights | change).items() if v is not None})
        with pytest.raises(InputError) as caught:
            load_model(other)
        assert str(caught.value).startswith(f"{other}: the weights of cpv-1/2 in it do not fit CPV: {message}")
    save_file(weights, path)
    with pytest.raises(InputError, match="does not say which model the weights are of"):
        load_model(path)
    with pytest.raises(InputError, match="no such file or directory"):
        load_model(path.with_name("none.safetensors"))


def test_create_model_names_the_checkpoints_model(saved):
    with pytest.raises(ValueError, match="a checkpoint of cpv-1/2, and not of cnv-1/2"):
        cxv.create_model("cnv-1/2", checkpoint=saved[1])
    with pytest.raises(ValueError, match="do not fit"):
        cxv.create_model("cpv-1/2", checkpoint=saved[1], embed_dim=32)


class Hostile:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("kind", ["torch", "legacy", "bare pickle", "named safetensors", "inside a checkpoint"])
def test_a_hostile_pickle_is_never_run(tmp_path, run, kind):
    trace = tmp_path / "owned"
    path = tmp_path / ("best.safetensors" if kind == "named safetensors" else "best.pt")
    if kind == "inside a checkpoint":
        torch.save(read_checkpoint(run / "best.pt") | {"args": Hostile(trace)}, path)
    elif kind in ("torch", "legacy"):
        torch.save({"model": Hostile(trace)}, path, _use_new_zipfile_serialization=kind == "torch")
    else:
        path.write_bytes(pickle.dumps(Hostile(trace)))
    for load in (load_model, lambda p: cxv.create_model("cpv-1/2", checkpoint=p), read_checkpoint):
        with pytest.raises(InputError, match="truncated or corrupt"):
            load(path)
    assert main(["eval", "--checkpoint", str(path)]) == 2
    assert not trace.exists()
    if zipfile.is_zipfile(path):  # the file does what it says where one unpickles
        torch.load(path, weights_only=False)
    elif kind == "bare pickle":
        pickle.loads(path.read_bytes())
    assert trace.exists() or kind in ("legacy", "named safetensors")


def test_import_is_light_and_needs_neither_the_hub_nor_timm():
    """FLOP counting would import Triton."""
    code = """
import sys
import cxv
assert not {"safetensors", "torch.utils.flop_counter"} & sys.modules.keys()
import cxv.cli
assert not {"torchvision", "matplotlib", "sklearn", "huggingface_hub", "timm"} & sys.modules.keys()
sys.modules["huggingface_hub"] = sys.modules["timm"] = None
for name in ("hub", "timm"):
    try:
        __import__(f"cxv.{name}")
    except ImportError as error:
        print(error)
"""
    env = {**os.environ, "PYTHONPATH": str(Path(cxv.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "cxv.hub needs huggingface_hub, which is not installed: pip install 'cxv[hub]'",
        "cxv.timm needs timm, which is not installed: pip install 'cxv[baselines]'",
    ]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A directory in place of the Hub, with uploads and downloads."""
    from huggingface_hub import hub_mixin

    import cxv.hub

    remote = tmp_path / "hub"

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **_):
            (remote / repo_id).mkdir(parents=True, exist_ok=True)
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id, folder_path, **_):
            shutil.copytree(folder_path, remote / repo_id, dirs_exist_ok=True)
            return f"hub/{repo_id}"

    def download(repo_id, filename, **_):
        return str(remote / repo_id / filename)

    monkeypatch.setattr(hub_mixin, "HfApi", Api)
    monkeypatch.setattr(hub_mixin, "hf_hub_download", download)
    monkeypatch.setattr(cxv.hub, "hf_hub_download", download)
    return remote


def test_push_and_from_pretrained(hub, run):
    from cxv.hub import HubModel

    model = HubModel.from_checkpoint(run)
    assert model.push_to_hub("me/digits") == "hub/me/digits"
    files = {path.name for path in (hub / "me/digits").iterdir()}
    assert files == {"model.safetensors", "config.json", "README.md"}
    loaded = HubModel.from_pretrained("me/digits", use_fused=False)
    assert same_weights(model, loaded)
    assert loaded.metadata == model.metadata
    assert loaded.model.layers[0].attn.use_fused is False
    x = torch.randn(2, 1, 8, 8)
    assert torch.allclose(loaded(x), model.eval()(x), atol=1e-5)
    assert json.loads((hub / "me/digits/config.json").read_text())["model_name"] == "cpv-1/2"
    assert same_weights(loaded.model, cxv.create_model("cpv-1/2", checkpoint=hub / "me/digits"))


def test_model_card(run, tmp_path):
    from huggingface_hub import ModelCard

    from cxv.hub import HubModel

    model = HubModel.from_checkpoint(run)
    model.save_pretrained(tmp_path / "a")
    card = ModelCard.load(tmp_path / "a" / "README.md")
    top1 = model.metadata["metrics"]["test_top1"]
    assert card.data.library_name == "cxv"
    assert card.data.eval_results[0].metric_value == pytest.approx(top1 / 100)
    assert f"| test top1 | {top1:.4g} |" in card.text
    assert "its top-1 is flattering" in card.text
    assert str(run) not in card.text
    untold = HubModel(cxv.create_model("cpv-1/2", **TINY), classes=CLASSES)
    untold.save_pretrained(tmp_path / "b")
    card = ModelCard.load(tmp_path / "b" / "README.md")
    assert card.data.eval_results is None
    assert "| trained on | not recorded |" in card.text


def test_from_pretrained_reads_the_file_alone(tmp_path):
    """An edited config.json changes nothing, and a keyword that would change the model is an error."""
    from cxv.hub import HubModel

    model = HubModel(cxv.create_model("cpv-1/2", **TINY | {"img_size": (8, 6)}), classes=CLASSES)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    edited = config | {"num_classes": 5, "use_fused": True, "map_location": "meta", "more": 1}
    (tmp_path / "config.json").write_text(json.dumps(edited))
    for keywords in ({}, {"local_files_only": True, "revision": None, "map_location": "cpu"}):
        loaded = HubModel.from_pretrained(tmp_path, **keywords)
        assert same_weights(model, loaded)
        assert not loaded.model.layers[0].attn.use_fused
        assert not loaded.training
    for name in ("typo", "num_classes", "model_name"):
        with pytest.raises(InputError, match=rf"{name}: .* no such keyword \(allowed: .*, use_fused\); .*create_model"):
            HubModel.from_pretrained(tmp_path, **{name: 3})


def test_model_card_kwargs(hub, saved, tmp_path):
    """Entries of the header, in place of ours, and the variables of a subclass's template."""
    from huggingface_hub import ModelCard

    from cxv.hub import HubModel

    class Licensed(
        HubModel, license="mit", tags=["ants"], model_card_template="---\n{{ card_data }}\n---\nBy {{ who }}"
    ):
        """A subclass with the mixin's own arguments."""

    model = HubModel.from_checkpoint(saved[1])
    model.save_pretrained(tmp_path / "a", model_card_kwargs={"license": "apache-2.0", "datasets": ["ants"]})
    model.push_to_hub("me/ants", model_card_kwargs={"license": "apache-2.0", "pipeline_tag": "other"})
    card = ModelCard.load(tmp_path / "a" / "README.md")
    assert (card.data.license, card.data.datasets, card.data.library_name) == ("apache-2.0", ["ants"], "cxv")
    assert "pytorch_model_hub_mixin" in card.data.tags
    pushed = ModelCard.load(hub / "me/ants/README.md")
    assert (pushed.data.license, pushed.data.pipeline_tag, pushed.text) == ("apache-2.0", "other", card.text)
    Licensed.from_checkpoint(saved[1]).save_pretrained(tmp_path / "b", model_card_kwargs={"who": "me"})
    card = ModelCard.load(tmp_path / "b" / "README.md")
    assert (card.data.license, card.text.strip()) == ("mit", "By me")
    assert {"ants", "cxv"} <= set(card.data.tags)


def test_device_and_dtype(saved):
    model, path = saved
    loaded = cxv.create_model("cpv-1/2", checkpoint=path, device="cpu", dtype=torch.float64)
    assert torch.equal(loaded.head.weight, model.head.weight.double())
    fresh = cxv.create_model("resnet-18", device="meta", num_classes=3)
    assert {p.device.type for p in fresh.parameters()} == {"meta"}
    assert fresh.model_kwargs == {"num_classes": 3}  # where a model is says nothing of its weights


def test_features_of_a_checkpoint(saved):
    model, path = saved
    features = cxv.create_model("cpv-1/2", checkpoint=path, num_classes=0, global_pool="").eval()
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(features(x), model.forward_features(x))


def test_which_weights(saved, run, tmp_path):
    for source, which, message in (
        (saved[0], "last", "which: chooses among the weights of a run"),
        (run, "x", "which: expected best or last, got 'x'"),
        (run / "best.pt", "last", "`which`: last is an epoch of a run"),
        ("cltv-5/4", "last", "`which`: last is an epoch of a run"),
    ):
        with pytest.raises(InputError, match=message):
            cxv.save_safetensors(source, tmp_path / "a.safetensors", which=which)


@pytest.mark.parametrize(
    ("phase_epoch", "resume_state", "top1"),
    [(2, None, 60.0), (0, None, 50.0), (2, {"step": 1}, None)],
    ids=["end of an epoch", "new phase with the best weights", "middle of an epoch"],
)
def test_metrics_are_those_of_the_weights(run, phase_epoch, resume_state, top1):
    checkpoint = read_checkpoint(run / "last.pt") | {"resume_state": resume_state}
    checkpoint["optimizer"] |= {"phase_epoch": phase_epoch, "best_epoch": 1}
    for row, value in zip(checkpoint["history"], (50.0, 60.0), strict=True):
        row["test_top1"] = value
    assert describe(checkpoint)["metrics"].get("test_top1") == top1
