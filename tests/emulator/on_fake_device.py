"""The CUDA backend whole, from Python to its kernels' source, on the fake CUDA device (test_fake_device.py)."""

import ctypes
import os
import warnings
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import cxv
import cxv_kernels
from cxv.training import TrainConfig, train
from cxv_kernels import dispatch, self_check, testing
from cxv_kernels._triton import TRITON_MISSING
from cxv_kernels.testing import peak_memory

ARCH = int(os.environ["FAKE_DEVICE_ARCH"])
OPS = [op for op in cxv_kernels.OPS if dispatch.explain_backend(op, "cuda")["cuda"] == "supported"]
CASES = [
    case for size in ((1, 2, 70, 32, True), (1, 1, 36, 64, False)) for case in testing.cases(*size) if case.op in OPS
]

SMALL = testing.cases(1, 1, 40, 16)
WAYS = ("forward", "backward")


def named(case):
    return f"{case.op}, {case.label}, {case.dim}"


def test_ops():
    assert len(OPS) == 5
    assert Path(cxv_kernels.__file__).parent.parent != Path(__file__).resolve().parents[2]
    assert torch.cuda.get_device_capability() == (ARCH // 10, ARCH % 10)


@pytest.mark.parametrize("op", ["linear_attention", "performer_attention"])
def test_any_strides_and_masks(op):
    """q in the layout of a convolution's output, v a slice with gaps, a third of the keys masked."""
    q, k, v = torch.randn(3, 2, 3, 40, 32, device="cuda").half()
    q = q.transpose(-2, -1).contiguous().transpose(-2, -1)
    v = torch.cat((v, v), -1)[..., ::2]
    mask = torch.rand(2, 40, device="cuda") < 0.7
    w = (cxv_kernels.orthogonal_projection(40, 32, device="cuda"),) * (op == "performer_attention")
    grad = torch.randn(2, 3, 40, 32, device="cuda").half()

    def results(backend, dtype):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        out = getattr(cxv_kernels, op)(*inputs, *w, key_mask=mask, backend=backend)
        return [out, *torch.autograd.grad(out, inputs, grad.to(dtype))]

    found = results("cuda", torch.float16)
    for got, want in zip(found, results("reference", torch.float64), strict=True):
        assert (got.double() - want).norm() <= 2e-3 * want.norm()
    assert found[1].stride() == q.stride()


class AsFake(TorchDispatchMode):
    """Every fused op gives tensors as its fake implementation says: shapes, strides, dtypes, device."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        found = op(*args, **(kwargs or {}))
        if op.namespace == "cxv_kernels":
            self.seen.add(op.__name__)
            with FakeTensorMode() as mode:
                said = op(*tree_map_only(torch.Tensor, mode.from_tensor, args))
            for got, want in zip(tree_leaves(found), tree_leaves(said), strict=True):
                assert (got.shape, got.dtype, got.device) == (want.shape, want.dtype, want.device)
                assert got.stride() == want.stride() or got.numel() == 0
        return found


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{named(case)}, {dtype}")
        for case in CASES
        for dtype in (torch.float32, torch.float16)
        # the Performer in float32, exact, takes the emulator a second: one size of it
        if not (dtype == torch.float32 and case.op.startswith("performer") and case.dim != 35)
    ],
)
def test_matches_float64(case, dtype):
    """The results also have the shapes, strides and dtypes of which the fakes tell the compiler."""
    with AsFake() as mode:
        result = testing.run(case, "cuda", "cuda", dtype)
    assert {name.rpartition("_")[2].partition(".")[0] for name in mode.seen} == {"forward", "backward"}
    assert result.ratio <= 1, f"{result.error} is {result.ratio} of what is allowed"


def launched_on():
    host = ctypes.CDLL(None)
    host.fake_device_last_stream.restype = ctypes.c_void_p
    return host.fake_device_last_stream() or 0


def check_streams(case, backend):
    """Forward on the current stream; backward, as PyTorch has it, on that of the forward pass."""
    inputs = [torch.randn(shape, device="cuda").half().requires_grad_() for shape in case.shapes]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        out = case.function(*inputs, backend=backend)
    assert launched_on() == stream.cuda_stream
    case.function(*inputs, backend=backend)
    assert launched_on() == torch.cuda.current_stream().cuda_stream
    outs = out if isinstance(out, tuple) else (out,)
    torch.autograd.grad(outs, inputs, [torch.ones_like(o) for o in outs])
    assert launched_on() == stream.cuda_stream


@pytest.mark.parametrize("op", OPS)
def test_launches_on_the_callers_stream(op):
    check_streams(next(case for case in SMALL if case.op == op), "cuda")


@pytest.mark.skipif(ARCH < 80, reason="Triton is the default on sm_80 and up")
@pytest.mark.parametrize("op", ["kv_state", "conv_norm", "gelu_dropout"])
def test_triton_launches_on_the_callers_stream(op):
    """Compiled and launched as on a GPU, by Triton's own launcher; here they compute nothing."""
    check_streams(next(case for case in testing.cases(1, 2, 64, 32, ragged=False) if case.op == op), "triton")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("cpv-1/4", torch.float16), ("cnv-1/4", torch.float16), ("cltv-1/4", torch.float16), ("cltv-1/4", None)],
)
def test_a_training_step_is_the_references(name, dtype):
    def gradients(serving):
        torch.manual_seed(0)
        model = cxv.create_model(name, use_fused=True).cuda().train()
        images, labels = torch.randn(2, 3, 8, 8).cuda(), torch.tensor([1, 2]).cuda()
        torch.manual_seed(1)
        with cxv_kernels.use_backend(serving):
            with torch.autocast("cuda", dtype or torch.float16, enabled=dtype is not None):
                loss = nn.functional.cross_entropy(model(images), labels)
            (64 * loss).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    found, expected = gradients("cuda,reference"), gradients("reference")
    tolerance = {torch.float16: 2e-3, None: 1e-5}[dtype]
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.fixture
def first_use(monkeypatch):
    """As in a new process, with small cases, and without Triton on cards for which it takes long to compile."""
    monkeypatch.setattr(self_check, "_verdicts", {})
    monkeypatch.setattr(self_check, "_shown", set())
    monkeypatch.setattr(dispatch, "_announced", set())
    monkeypatch.setattr(self_check, "_cases", lambda op: [case for case in SMALL if case.op == op])
    if ARCH >= 80:
        monkeypatch.setattr(dispatch, "dispatch_order", lambda device: ("cuda",))


def test_kernels_are_validated_on_their_first_use(first_use, capsys):
    """Triton's kernels compute nothing here, so they fail."""
    model = cxv.create_model("cpv-1/2", embed_dim=32, use_fused=True).cuda().eval()
    image, rng = torch.randn(1, 3, 8, 8).cuda(), (torch.get_rng_state(), torch.cuda.get_rng_state())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.inference_mode(), torch.autocast("cuda", torch.float16), AsFake() as mode:
            model(image)
            model(image)
        cxv_kernels.gelu_dropout(image, 0.5, torch.tensor(5, device="cuda"))
    assert torch.equal(rng[0], torch.get_rng_state())
    assert torch.equal(rng[1], torch.cuda.get_rng_state())
    assert {"performer_attention_forward.default", "conv_norm_forward.default"} <= mode.seen
    assert {key[1:3] for key, reason in self_check._verdicts.items() if reason is None} == {
        ("performer_attention", "cuda"),
        ("conv_norm", "cuda"),
    }
    output = capsys.readouterr().err
    assert output.count("validating performer_attention, float16, on ") == 1
    failed = {str(w.message).partition(" is not used on")[0] for w in caught if "not used on" in str(w.message)}
    assert failed == ({"gelu_dropout: triton"} if ARCH < 80 and TRITON_MISSING is None else set())


@pytest.mark.parametrize("known", [False, True], ids=["no-verdict", "verdict"])
def test_validated_kernels_are_used_in_compiled_code(known, first_use, monkeypatch):
    monkeypatch.setattr(dispatch, "dispatch_order", lambda device: ("cuda",))
    torch._dynamo.reset()
    for op in ("performer_attention", "conv_norm") if known else ():
        monkeypatch.setitem(self_check._verdicts, (0, op, "cuda", torch.float16), None)
    found = set()

    def record(graph, _):
        found.update(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    def layer(x, weight, gamma):
        x = cxv_kernels.conv_norm(x, weight, None, gamma, 2 * gamma).view(1, 2, 16, 9).mT
        return cxv_kernels.performer_attention(x, x + 1, 2 * x, gamma.detach().view(2, 16)).sum()

    inputs = [torch.randn(*shape, device="cuda", requires_grad=True) for shape in ((1, 3, 3, 3), (32, 3, 3, 3), (32,))]
    compiled = torch.compile(layer, backend=aot_autograd(fw_compiler=record, bw_compiler=record), fullgraph=True)
    with torch.autocast("cuda", torch.float16):
        compiled(*inputs).backward()
    ops = [f"cxv_kernels.{op}_{way}.default" for op in ("performer_attention", "conv_norm") for way in WAYS]
    assert set(ops) <= found


@pytest.mark.parametrize("known", [False, True], ids=["no-verdict", "verdict"])
def test_graph_capture_runs_no_check(known, first_use, monkeypatch, capsys):
    """Without a verdict the reference is captured, and the next call outside of the graph runs the check."""
    monkeypatch.setattr(dispatch, "dispatch_order", lambda device: ("cuda",))
    if known:
        monkeypatch.setitem(self_check._verdicts, (0, "kv_state", "cuda", torch.float16), None)
    k, v = torch.randn(2, 1, 1, 40, 16, device="cuda").half()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), AsFake() as mode:
        state, z = cxv_kernels.kv_state(k, v)
    assert mode.seen == ({"kv_state_forward.default"} if known else set())
    assert "validating" not in capsys.readouterr().err
    k.copy_(torch.randn_like(k))
    graph.replay()
    for found, expected in zip(
        (state, z), cxv_kernels.kv_state(k.double(), v.double(), backend="reference"), strict=True
    ):
        assert (found.double() - expected).norm() <= 2e-3 * expected.norm()
    cxv_kernels.kv_state(k, v)
    assert ("validating kv_state, float16, on " in capsys.readouterr().err) == (not known)


def test_training_in_float16(tmp_path, first_use, monkeypatch):
    """The loop's CUDA side: images on the device, the scaler, the checkpoints, the best of which SGD goes on from."""
    monkeypatch.setattr(dispatch, "dispatch_order", lambda device: ("cuda",))
    config = TrainConfig(
        model="cpv-1/2",
        embed_dim=32,
        data="digits",
        limit_train=8,
        limit_test=4,
        batch_size=8,
        epochs=1,
        sgd_epochs=1,
        precision="fp16",
        device="cuda",
        output=str(tmp_path),
    )
    lines = []
    assert train(config, log=lines.append).epochs == 2
    assert "on cuda" in "\n".join(lines)
    assert self_check._verdicts == {(0, op, "cuda", torch.float16): None for op in ("performer_attention", "conv_norm")}


def test_peak_of_the_allocator():
    def run():
        first = torch.empty(8 << 20, dtype=torch.uint8, device="cuda")
        del first
        return torch.empty(4 << 20, dtype=torch.uint8, device="cuda")

    older = torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
    assert peak_memory(run, "cuda") == (8 << 20, 4 << 20)
    del older
