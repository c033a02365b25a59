"""Models and ops under torch.fx, torchvision's feature extraction, TorchScript and ONNX by tracing."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import cxv
import cxv_kernels
from cxv.models.attention import PerformerAttention

OURS = ["cpv-2/2", "cnv-2/2", "cltv-2/2", "hybrid-vip-2/2", "hybrid-vin-2/2", "hybrid-vilt-2/2", "wavemix-2"]
VARIANTS = [(name, fused) for name in OURS for fused in (False, True) if not fused or "/" in name]
IDS = [f"{name.split('-2')[0]}-{'fused' if fused else 'reference'}" for name, fused in VARIANTS]


def build(name: str, **kwargs) -> nn.Module:
    return cxv.create_model(name, img_size=16, embed_dim=16, **kwargs)


@pytest.mark.parametrize(("name", "fused"), VARIANTS, ids=IDS)
def test_symbolic_trace_of_a_model(name, fused):
    """One graph for any batch size and mode: it takes each branch when it runs, as the model does."""
    model = build(name, use_fused=fused).eval()
    with torch.no_grad():  # where layers may write in place
        graph = fx.symbolic_trace(model)
    graph.graph.lint()
    for mode in (True, False):
        for module in (model, graph):
            module.train(mode)
        for batch in (3, 1):
            x = torch.randn(batch, 3, 16, 16)
            with torch.random.fork_rng():
                expected = model(x)
            assert torch.equal(graph(x), expected)
    graph(torch.randn(2, 3, 16, 16)).sum().backward()
    assert all(p.grad is not None for p in graph.parameters())
    copied = pickle.loads(pickle.dumps(copy.deepcopy(graph)))
    assert torch.equal(copied(x), expected)


def test_symbolic_trace_keeps_the_check_of_the_input():
    graph = fx.symbolic_trace(build("cpv-1/2"))
    with pytest.raises(ValueError, match=r"input must be \(B, 3, H, W\), got shape \(2, 1, 8, 8\)"):
        graph(torch.randn(2, 1, 8, 8))


def test_symbolic_trace_with_checkpointing():
    model = build("cpv-1/2", drop_rate=0.0)
    model.set_grad_checkpointing()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(fx.symbolic_trace(model)(x), model(x))


def test_symbolic_trace_of_a_branch_alone():
    attention = PerformerAttention(16, num_heads=2)
    with pytest.raises(TypeError, match="records PerformerAttention as one node: trace a model that contains it"):
        fx.symbolic_trace(attention)


def attend(q: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    """Every kind of op, called as ``cxv_kernels.<op>``."""
    y = cxv_kernels.linear_attention(q, q, v=q, key_mask=mask)
    y = y + cxv_kernels.performer_attention(q, q, q, torch.eye(4)) + cxv_kernels.nystrom_attention(q, q, q, 2)
    s, z = cxv_kernels.kv_state(q, q)
    y = y + s.mean() + z.mean() + cxv_kernels.performer_features(q, torch.eye(4), True)
    y = cxv_kernels.gelu_dropout(cxv_kernels.dropout(y, 0.5, torch.tensor(3)), 0.5, torch.tensor(4))
    ones = torch.ones(2)
    return cxv_kernels.conv_norm(y, weight, None, ones, ones)


def test_symbolic_trace_records_the_ops():
    arguments = (torch.randn(2, 2, 5, 4), torch.rand(2, 5) < 0.5, torch.randn(2, 2, 3, 3))
    graph = fx.symbolic_trace(attend)
    targets = {node.target.__name__ for node in graph.graph.nodes if node.op == "call_function"}
    assert set(cxv_kernels.OPS) <= targets
    assert torch.equal(graph(*arguments), attend(*arguments))


@pytest.mark.parametrize("mechanism", ["performer", "linear", "nystrom"])
def test_feature_extraction_after_replace_attention(mechanism):
    """By torchvision alone, without timm's lists of modules and functions to leave alone."""
    vit = pytest.importorskip("timm.models.vision_transformer")
    model = vit.VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5).eval()
    cxv_kernels.replace_attention(model, mechanism)
    assert "blocks.0.attn" in get_graph_node_names(model)[1]
    extractor = create_feature_extractor(model, ["blocks.0.attn", "blocks.1", "head"])
    x, seen = torch.randn(3, 3, 16, 16), []
    model.blocks[0].attn.register_forward_hook(lambda module, inputs, y: seen.append(y))
    found = extractor(x)
    assert torch.equal(found["head"], model(x))
    assert torch.equal(found["blocks.0.attn"], seen[0])
    with pytest.raises(ValueError, match="attn_mask: "):
        fx.symbolic_trace(model)(x, torch.ones(17, 17))


@pytest.mark.parametrize("name", OURS)
def test_torchscript_is_refused(name):
    """The model, a model that contains it, and the graph of it."""
    model = build(name)
    message = f"torch.jit.script does not support {type(model).__name__}: use torch.compile"
    for module in (model, nn.Sequential(nn.ReLU(), model)):
        with pytest.raises(RuntimeError, match=message):
            torch.jit.script(module)
    if not name.startswith("wavemix"):
        with pytest.raises(RuntimeError, match="does not support"):
            torch.jit.script(fx.symbolic_trace(model))


def test_torchscript_is_refused_after_replace_attention():
    attention = pytest.importorskip("timm.layers").Attention
    model = nn.Sequential(attention(32, 4))
    cxv_kernels.replace_attention(model, "linear")
    with pytest.raises(RuntimeError, match="does not support ReplacedAttention"):
        torch.jit.script(model)


@pytest.mark.filterwarnings("ignore")  # the exporter is deprecated, and the checks of shapes are not in its file
@pytest.mark.parametrize("name", ["cpv-1/2", "cnv-1/2", "cltv-1/2", "hybrid-vip-1/2"])
def test_onnx_by_tracing(tmp_path, name):
    """A valid file for any batch size, and where the model takes any size of image, for that too."""
    onnxruntime = pytest.importorskip("onnxruntime")
    any_size = not name.startswith(("hybrid-vip", "hybrid-vin"))
    model, path = build(name).eval(), str(tmp_path / "model.onnx")
    axes = {"x": {0: "batch"} | ({2: "height", 3: "width"} if any_size else {})}
    x = torch.randn(2, 3, 16, 16)
    torch.onnx.export(model, (x,), path, dynamo=False, input_names=["x"], dynamic_axes=axes, opset_version=18)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    sizes = [(2, 16, 16), (5, 16, 16), *([(3, 24, 20)] if any_size else [])]
    for batch, height, width in sizes:
        x = torch.randn(batch, 3, height, width)
        with torch.no_grad():
            torch.testing.assert_close(torch.tensor(session.run(None, {"x": x.numpy()})[0]), model(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mechanism", ["performer", "linear", "nystrom"])
def test_onnx_by_tracing_after_replace_attention(tmp_path, mechanism):
    onnxruntime = pytest.importorskip("onnxruntime")
    attention = pytest.importorskip("timm.layers").Attention
    model, path = nn.Sequential(attention(32, 4)).eval(), str(tmp_path / "model.onnx")
    cxv_kernels.replace_attention(model, mechanism, backend="reference")
    axes = {"x": {0: "batch"}}
    with torch.no_grad():
        x = torch.randn(2, 9, 32)
        torch.onnx.export(model, (x,), path, dynamo=False, input_names=["x"], dynamic_axes=axes, opset_version=18)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        x = torch.randn(5, 9, 32)
        torch.testing.assert_close(torch.tensor(session.run(None, {"x": x.numpy()})[0]), model(x))


def test_vmap_through_a_layer():
    """The batch of vmap may be any dimension of the images."""
    layer = cxv.CPV(embed_dim=16, num_heads=2, depth=1, drop_rate=0.0).eval().double().layers[0]
    x = torch.randn(2, 8, 4, 4, 3, dtype=torch.float64)
    found = torch.func.vmap(layer, in_dims=4)(x)
    torch.testing.assert_close(found, torch.stack([layer(x[..., i]) for i in range(3)]))
