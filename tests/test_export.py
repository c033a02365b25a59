"""torch.compile, torch.export, ONNX and AOTInductor of every model, and ``cxv export``."""

import csv
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cli_support import TINY, assert_error, call
from conftest import ROOT, needs_cpp
from PIL import Image
from torch.utils import cpp_extension

import cxv
from cxv import cli
from cxv.data import Preprocessing, normalize
from cxv.errors import InputError
from cxv.export import export_model
from cxv.training import load_model
from cxv_kernels import library

ANY_SIZE = ["cpv-1/2", "cnv-1/2", "cltv-1/2", "hybrid-vilt-1/2"]
FIXED_SIZE = "hybrid-vip-1/2"  # HybridViN has no layer that these do not have
slow = pytest.mark.slow


def tiny(name: str, use_fused: bool = False) -> torch.nn.Module:
    landmarks = {"num_landmarks": 16} if "vin" in name or "cnv" in name else {}
    return cxv.create_model(name, embed_dim=16, num_classes=4, img_size=10, use_fused=use_fused, **landmarks).eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "digits"
    assert (
        cli.main(["train", *TINY, "--epochs", "3", "--sgd-epochs", "0", "--lr", "0.005", "--output", str(output)]) == 0
    )
    return output


def test_a_failed_check_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "model.pt2"
    path.write_text("older")
    other = SimpleNamespace(module=lambda: tiny("cpv-1/2"))
    monkeypatch.setattr(torch.export, "load", lambda _: other)  # as if the file held other weights
    model = tiny("cltv-1/2").train()
    with pytest.raises(InputError, match=r"not written: its logits .* differ"):
        export_model(model, path, "torch", img_size=10)
    assert model.training
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


def test_a_model_of_another_dtype_is_written_in_float32(tmp_path):
    model = tiny("cltv-1/2").bfloat16().train()
    export_model(model, tmp_path / "a.pt2", "torch", img_size=10)
    x = torch.randn(2, 3, 10, 10)
    got = torch.export.load(tmp_path / "a.pt2").module()(x)
    assert model.training
    assert {t.dtype for t in model.parameters()} == {torch.bfloat16}
    assert torch.allclose(got, model.float().eval()(x), atol=1e-5)


def test_cli_writes_classes_into_the_file(capsys, run, tmp_path):
    path = tmp_path / "digits.pt2"
    code, out, _ = call(capsys, "export", "--checkpoint", run, "--format", "torch", "--data", "digits", path)
    assert code == 0
    assert f"{path}: " in out
    assert "any batch, images of any size; logits within" in out
    assert "100.0 % of 360 images have the same class" in out
    note = {"cxv": ""}
    torch.export.load(path, extra_files=note)
    assert json.loads(note["cxv"])["classes"] == [str(i) for i in range(10)]


@pytest.fixture(scope="module")
def int8(run, tmp_path_factory):
    """The run's model by ``cxv export --int8``, alone in its folder."""
    pytest.importorskip("onnx")
    path = tmp_path_factory.mktemp("int8") / "digits.onnx"
    assert cli.main(["export", "--checkpoint", str(run), "--format", "onnx", "--int8", str(path)]) == 0
    return path


def test_cli_int8(int8):
    """The scales are static, from the images of training: those are -1 to 1, in 255 steps."""
    import onnx

    written = onnx.load(int8)
    assert sum(n.op_type == "DequantizeLinear" for n in written.graph.node) > 5
    assert json.loads({p.key: p.value for p in written.metadata_props}["cxv"])["in_chans"] == 1
    assert list(int8.parent.iterdir()) == [int8]
    values = {value.name: onnx.numpy_helper.to_array(value) for value in written.graph.initializer}
    (quantize,) = [n for n in written.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "images"]
    assert float(values[quantize.input[1]]) == pytest.approx(2 / 255, rel=0.02)


@pytest.fixture
def deploy_page():
    """The names that the program of docs/deploy.md defines."""
    pytest.importorskip("onnxruntime")
    (block,) = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "docs" / "deploy.md").read_text(), re.DOTALL | re.MULTILINE
    )
    names = {}
    exec(block, names)
    return SimpleNamespace(**names)


def odd_images(folder):
    """Images of other sizes and modes, among them a transparent one and one that EXIF rotates."""
    mask = torch.arange(23 * 40).view(23, 40) % 256
    color = torch.stack([mask, mask.flip(0), torch.randint(0, 256, (23, 40))], 2).to(torch.uint8)
    photo = Image.fromarray(color.numpy())
    transparent = photo.copy()
    transparent.putalpha(Image.fromarray(mask.to(torch.uint8).numpy()))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation
    files = [(photo, "a.png", {}), (photo, "b.jpg", {"exif": exif}), (transparent, "c.png", {})]
    files += [(photo.convert("L"), "d.webp", {}), (transparent.convert("LA"), "e.png", {})]
    files += [(transparent.quantize(), "f.png", {}), (photo.resize((12, 10)), "g.png", {})]
    for image, name, options in files:
        image.save(folder / name, **options)
    return [str(folder / name) for _, name, _ in files]


def rules_of(resize, size, channels):
    return Preprocessing(size, channels, resize, "lanczos", "#ff8000", mean=[0.2] * channels, std=[0.3] * channels)


@pytest.mark.parametrize(("resize", "size", "channels"), [("pad", [10, 12], 3), ("crop", 10, 1), ("squash", 9, 3)])
def test_the_program_of_the_page_sees_the_pixels_of_training(deploy_page, tmp_path, resize, size, channels):
    rules = rules_of(resize, size, channels)
    for file in odd_images(tmp_path):
        seen = torch.from_numpy(deploy_page.preprocess(file, rules.to_dict()))
        torch.testing.assert_close(seen, normalize(rules.decode(file)[None], **rules.normalization))


def test_the_program_of_the_page_agrees_with_predict(capsys, deploy_page, tmp_path):
    """To 1e-4, from the image file to the probabilities."""
    torch.manual_seed(0)
    model = cxv.create_model("cltv-1/2", embed_dim=16, num_classes=4)
    torch.nn.init.normal_(model.head.weight)
    rules = rules_of("pad", [10, 12], 3)
    checkpoint, path = tmp_path / "model.safetensors", tmp_path / "model.onnx"
    cxv.save_safetensors(model, checkpoint, classes=["a", "b", "c", "d"], **rules.to_dict())
    code, _, err = call(capsys, "export", "--checkpoint", checkpoint, "--format", "onnx", path)
    assert code == 0, err
    files = odd_images(tmp_path)
    code, out, _ = call(capsys, "predict", "--checkpoint", checkpoint, "--format", "json", *files)
    assert code == 0
    seen = []
    for entry in json.loads(out):
        expected = {pair["class"]: pair["probability"] for pair in entry["predictions"]}
        assert dict(deploy_page.classify(str(path), entry["file"])) == pytest.approx(expected, abs=1e-4)
        seen.append(torch.tensor([expected[name] for name in "abcd"]))
    assert (torch.stack(seen).amax(0) - torch.stack(seen).amin(0)).max() > 5e-3  # the model sees the differences


def test_cli_safetensors(capsys, run, tmp_path):
    path = tmp_path / "digits.safetensors"
    code, out, _ = call(capsys, "export", "--checkpoint", run, "--format", "safetensors", path)
    assert code == 0
    assert f"checkpoint='{path}'" in out
    assert call(capsys, "eval", "--checkpoint", path, "--data", "digits")[0] == 0


def test_bad_arguments(capsys, run, tmp_path, monkeypatch):
    def export(*arguments):
        return call(capsys, "export", "--checkpoint", run, *arguments)

    assert_error(export("--format", "onnx", tmp_path / "a.pt2"), "a.pt2: a file of --format onnx must be named ….onnx")
    assert_error(export("--format", "torch", tmp_path / "no" / "a.pt2"), "no is not a directory")
    assert_error(export("--format", "torch", "--int8", tmp_path / "a.pt2"), "--int8: written with --format onnx alone")
    assert_error(export("--format", "onnx", "--fused", tmp_path / "a.onnx"), "--fused: an ONNX file holds")
    assert_error(export("--format", "tflite", tmp_path / "a"), "--format", "onnx", "tflite")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert_error(export("--format", "onnx", tmp_path / "a.onnx"), "onnxscript is needed", "pip install 'cxv[export]'")
    assert not list(tmp_path.iterdir())


def test_fewer_tokens_than_landmarks_fix_the_size(tmp_path):
    model = cxv.create_model("cnv-1/2", embed_dim=16, num_landmarks=64).eval()
    done = export_model(model, tmp_path / "a.pt2", "torch", img_size=6)
    assert not done.any_size


@pytest.mark.parametrize("name", ["cpv-1/2", "cnv-1/2"])
def test_onnx_on_a_hundred_images(name, tmp_path):
    """The program of the page, above, runs a file of CLTV. The hybrids have the layers of these."""
    onnx = pytest.importorskip("onnx")
    model = tiny(name, use_fused=True)
    done = export_model(model, tmp_path / "a.onnx", "onnx", img_size=10, images=torch.randn(100, 3, 10, 10))
    assert done.difference <= 1e-4
    assert done.agreement == 1
    written = onnx.load(done.path)
    assert {o.domain: o.version for o in written.opset_import}[""] == 20
    assert not any("cxv" in node.domain for node in written.graph.node)
    axes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*written.graph.input, *written.graph.output)
    }
    assert axes == {
        "images": ["batch", 3, "height", "width"],
        "logits": ["batch", 4],
    }


@needs_cpp
@pytest.mark.parametrize("name", [*ANY_SIZE, FIXED_SIZE])
def test_export_with_dynamic_batch_and_size(name, tmp_path):
    model = tiny(name, use_fused=True)
    done = export_model(model, tmp_path / "model.pt2", "torch", img_size=10)
    assert done.any_size == (name in ANY_SIZE)
    program = torch.export.load(done.path)
    assert any("cxv_kernels" in str(node.target) for node in program.graph.nodes)
    for batch, *size in [(1, 10, 10), (5, 10, 10), (2, 17, 24), (3, 31, 9)][: 4 if done.any_size else 2]:
        x = torch.randn(batch, 3, *size)
        torch.testing.assert_close(program.module()(x), model(x))


@needs_cpp
@pytest.mark.parametrize("name", ["cnv-1/2", "cltv-1/2"])
def test_compile_once_for_every_batch(name):
    """The package of AOTInductor, below, is of CPV and of any batch, too."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = tiny(name, use_fused=True)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        compiled(torch.randn(2, 3, 10, 10))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for batch in (3, 7, 2):
                x = torch.randn(batch, 3, 10, 10)
                torch.testing.assert_close(compiled(x), model(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.fixture(scope="module")
def package(run, tmp_path_factory):
    """AOTInductor's, of the fused model of the run: compiled once, which takes long."""
    model, _ = load_model(run, use_fused=True)
    return export_model(model, tmp_path_factory.mktemp("aoti") / "digits.pt2", "aoti", img_size=8, in_chans=1)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """examples/aoti's, compiled: it has libtorch, and no Python."""
    program = tmp_path_factory.mktemp("aoti") / "classify"
    source = ROOT / "examples" / "aoti" / "classify.cpp"
    where = [f"-I{p}" for p in cpp_extension.include_paths()]
    libraries = cpp_extension.library_paths()
    # a CUDA build's own symbols stay open; the package itself needs libtorch.so, which nothing here calls
    where += ["-Wl,--unresolved-symbols=ignore-in-shared-libs,--no-as-needed"]
    where += [flag for p in libraries for flag in (f"-L{p}", f"-Wl,-rpath,{p}")]
    linked = ["-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    subprocess.run(["g++", "-std=c++20", str(source), "-o", str(program), *where, *linked], check=True)
    needed = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True).stdout
    assert "libtorch_cpu" in needed
    assert "libpython" not in needed
    return program


@slow
@needs_cpp
def test_a_cpp_program_runs_the_aoti_package(program, package, run, tmp_path):
    """With our library for the fused ops."""
    model, _ = load_model(run, use_fused=True)
    x = torch.randn(3, 1, 10, 14)
    x.numpy().tofile(tmp_path / "images.f32")
    kernels = next(Path(library.__file__).parent.glob("_cpu.*so"))
    done = subprocess.run(
        [str(program), str(package.path), str(kernels), str(tmp_path / "images.f32"), *map(str, x.shape)],
        capture_output=True,
        text=True,
        check=True,
    )
    got = torch.tensor([[float(v) for v in line.split()] for line in done.stdout.splitlines()])
    torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-4)


@needs_cpp
@slow
def test_deploy_benchmark_compares_exports(run, package, int8, run_script, tmp_path, monkeypatch):
    """Of what other tests have exported already, copies."""

    def export(model, path, format, calibration=None, **options):
        if format == "onnx" and calibration is None:
            return export_model(model, path, format, **options)
        shutil.copy(package.path if format == "aoti" else int8, path)
        return replace(package, path=path, size=path.stat().st_size)

    monkeypatch.setattr("cxv.export.export_model", export)
    options = ["--checkpoint", run, "--limit-test", "20", "--output", tmp_path]
    printed = run_script("examples/deploy_benchmark.py", *options)
    with (tmp_path / "deploy-cpu.csv").open(newline="") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["eager, reference", "eager, fused", "ONNX, float32", "ONNX, int8", "AOTInductor, fused"]
    assert len({row["top1"] for name, row in rows.items() if "int8" not in name}) == 1
    assert int(rows["ONNX, int8"]["bytes"]) < int(rows["ONNX, float32"]["bytes"])
    assert all(float(row["batch_1_ms"]) > 0 and float(row["batch_32_ms"]) > 0 for row in rows.values())
    assert all(name in printed for name in rows)
