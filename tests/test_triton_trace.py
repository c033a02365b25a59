"""The Triton ops as PyTorch sees them, without a GPU: in one graph, never waiting for the device."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import cxv
import cxv_kernels
from cxv_kernels import _triton
from cxv_kernels._triton import TRITON_MISSING

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

from triton_compile import LAUNCHERS, MODELS, recording

ALL = [True] * 3  # the gradients that are needed

needs_triton = pytest.mark.skipif(TRITON_MISSING is not None, reason=f"Triton: {TRITON_MISSING}")


def served(op):
    with recording(lambda *_: None, 90):
        return cxv_kernels.explain_backend(op)["triton"] == "supported"


def compiled(function):
    """``function`` in one graph, forward and backward, and the names of the ops in it as it runs."""
    ops = set()

    def spy(module, _):
        ops.update(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return make_boxed_func(module)

    return torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=spy, bw_compiler=spy)), ops


@needs_triton
@pytest.mark.parametrize("model", MODELS)
def test_a_training_step_is_one_graph(model):
    """The graph launches the kernels, forward and backward. Their computation is skipped."""
    needed = (MODELS[model], "conv_norm", "dropout")
    if not all(map(served, needed)):
        pytest.skip(f"the Triton backend does not have all of {', '.join(needed)}")
    net = cxv.create_model(model, use_fused=True).train()
    images, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])

    def loss(images, labels):
        return nn.functional.cross_entropy(net(images), labels)

    launched = []
    step, ops = compiled(loss)
    with recording(lambda kernel, *_: launched.append(kernel.__name__), 90):
        step(images, labels).backward()
    mine = {op.partition(".")[2].partition(".")[0] for op in ops if op.startswith("cxv_kernels_triton.")}
    for name in (MODELS[model].replace("_attention", ""), "conv_norm"):
        assert {op for op in mine if op.startswith(name) and "backward" in op}, (name, mine)
        assert {op for op in mine if op.startswith(name) and "backward" not in op}, (name, mine)
    assert len(set(launched)) >= 6
    assert not [op for op in ops if op.startswith("cxv_kernels.")]  # the C++ library's
    assert all(parameter.grad is not None for parameter in net.parameters())


def arguments(op, like):
    """A call of the op's launchers on tensors that ``like(*shape)`` makes: [(name, arguments from earlier results)]."""
    q, k, v, grad = (like(2, 4, 300, 32) for _ in range(4))
    if op == "performer_attention":
        w = like(110, 32).float()
        yield "performer_attention_forward", lambda _: (q, k, v, w, None, "softmax", 1e-4)
        yield "performer_attention_backward", lambda r: (grad, q, k, v, w, None, *r[1:], "softmax", 1e-4, ALL)
        yield "performer_features_forward", lambda _: (q, w, False, "softmax", 1e-4)
        yield "performer_features_backward", lambda r: (r[0], q, w, r[1], False, "softmax", 1e-4)
    elif op == "linear_attention":
        yield "linear_attention_forward", lambda _: (q, k, v, None, "softmax", 1e-6)
        yield "linear_attention_backward", lambda r: (grad, q, k, v, None, *r[1:], "softmax", 1e-6, ALL)
        yield "kv_state_forward", lambda _: (k, v, None, "elu")
        yield "kv_state_backward", lambda r: (r[0], r[1], k, v, None, r[1], "elu", ALL[:2])
    elif op == "conv_norm":
        x, out, vector = like(2, 128, 16, 16), like(2, 128, 16, 16), like(128)
        weight = like(128, 128, 3, 3)
        yield "conv_norm_forward", lambda _: (x, weight, vector, vector, vector, 1e-5)
        yield (
            "conv_norm_backward",
            lambda r: (out, x, weight, vector, r[0], r[1], vector, vector, 1e-5, [True] * 5),
        )
    elif op == "nystrom_attention":
        means, mixed, filters = like(2, 4, 64, 32).float(), like(2, 4, 64, 32), like(4, 1, 33, 1)
        yield "nystrom_means", lambda _: (q, 64)
        yield "nystrom_means_backward", lambda _: (means, q)
        yield "nystrom_mix", lambda _: (means, means, mixed)
        yield "nystrom_mix_backward", lambda _: (mixed, means, means, mixed, ALL)
        yield "nystrom_residual", lambda _: (q, v, filters)
        yield "nystrom_residual_backward", lambda _: (grad, v, filters, ALL[:2])
    elif op == "dropout":
        seed = torch.empty((), device="cuda", dtype=torch.int64)
        yield "dropout", lambda _: (q, v, seed, 0.3, 0)
        yield "gelu_dropout_forward", lambda _: (q, seed, 0.3, 0)
        yield "gelu_dropout_backward", lambda _: (grad, q, seed, 0.3, 0)


@needs_triton
@pytest.mark.parametrize("op", ["performer_attention", "linear_attention", "conv_norm", "nystrom_attention", "dropout"])
def test_launchers_never_look_at_the_numbers(op):
    """On tensors of a GPU that have no numbers: a launcher that waits for one raises. So a CUDA graph can hold it."""
    if not served(op):
        pytest.skip(f"the Triton backend has no {op}")
    module = importlib.import_module(LAUNCHERS[op])
    launched = []
    with FakeTensorMode(allow_non_fake_inputs=True), recording(lambda k, g, a, _: launched.append((k, g, a)), 90):

        def like(*shape):
            return torch.empty(shape, device="cuda", dtype=torch.float16)

        with pytest.raises(DataDependentOutputException):
            like(1).item()
        results = ()
        for name, of in arguments(op, like):
            results = getattr(module, name)(*of(results))
            for tensor in results if isinstance(results, tuple) else (results,):
                assert tensor.device.type == "cuda"
    assert len(launched) >= 2
    for _, grid, given in launched:
        assert all(isinstance(n, int) for n in grid)
        assert {t.device.type for t in given if isinstance(t, torch.Tensor)} == {"cuda"}


@needs_triton
@pytest.mark.parametrize("op", ["performer_attention", "linear_attention"])
def test_no_copy_of_strided_inputs(op):
    """Forward and backward the kernels get the chunks of one q|k|v as they lie."""
    module = importlib.import_module(LAUNCHERS[op])
    q, k, v = torch.randn(2, 40, 3, 4, 16).permute(2, 0, 3, 1, 4)
    grad = torch.randn(2, 40, 4, 16).transpose(1, 2)
    w = (torch.randn(20, 16),) if op == "performer_attention" else ()
    launched = []
    with recording(lambda kernel, grid, given, _: launched.extend(given), 80):
        out = getattr(module, f"{op}_forward")(q, k, v, *w, None, "softmax", 1e-4)
        getattr(module, f"{op}_backward")(grad, q, k, v, *w, None, *out[1:], "softmax", 1e-4, ALL)
    pointers = {t.data_ptr() for t in launched if isinstance(t, torch.Tensor)}
    assert {t.data_ptr() for t in (q, k, v, grad)} <= pointers


@needs_triton
@pytest.mark.parametrize(("setting", "precision"), [("tf32", "tf32"), ("ieee", "tf32x3")])
def test_tf32_is_the_users_to_allow(setting, precision):
    x, launched, matmul = torch.randn(1, 1, 64, 32), [], torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, setting
    try:
        with recording(lambda kernel, grid, given, options: launched.append(options), 80):
            cxv_kernels.linear_attention(x, x, x)
    finally:
        matmul.fp32_precision = before
    params = [options["P"].values for options in launched]
    assert {values["PRECISION"] for values in params if "PRECISION" in values} == {precision}


@needs_triton
def test_cache_keys_name_all_that_kernels_read():
    """Triton's cache on disk outlives this version of the package."""
    params = importlib.import_module(LAUNCHERS["linear_attention"]).Params(MAP="exact", D=3)
    read = [name for name in vars(params) if name.isupper()]
    assert {"MAP", "D", "LOG_WEIGHTS"} <= set(read)
    assert [name for name in read if f"'{name}': " not in repr(params)] == []


@needs_triton
def test_a_t4_is_declined_what_needs_tensor_cores():
    with recording(lambda *_: None, 75):
        answers = {op: cxv_kernels.explain_backend(op)["triton"] for op in cxv_kernels.OPS}
        assert "bfloat16 from sm_80 on" in cxv_kernels.explain_backend("dropout", dtype=torch.bfloat16)["triton"]
    assert answers["linear_attention"] == "supports matrix products from sm_80 on, not sm_75"
    assert {op for op, answer in answers.items() if answer == "supported"} == {
        *("conv_norm", "nystrom_attention", "dropout", "gelu_dropout")
    }


def test_a_failed_launch_names_op_kernel_and_tensors():
    class Kernel:
        __name__ = "some_kernel"

        def __getitem__(self, grid):
            raise ValueError("out of resources")

    match = r"linear_attention: Triton could not run some_kernel on cpu \(\(2, 3\) torch.float16\): out of resources"
    with pytest.raises(RuntimeError, match=match):
        _triton.launch("linear_attention", Kernel(), (1,), torch.zeros(2, 3, dtype=torch.float16), 5)
