"""Compare an accelerated model with the original: outputs, gradients, state, and what undo restores."""

import copy
from contextlib import contextmanager

import pytest
import torch

import cxv_kernels
from cxv_kernels.testing import tolerance


@contextmanager
def float64_kept():
    """The packages compute attention in float32 whatever the dtype of the model; here float64 stays float64."""
    to_float, to = torch.Tensor.float, torch.Tensor.to

    def keep(x, *args, **kwargs):
        return x if x.dtype == torch.float64 and kwargs == {"dtype": torch.float32} else to(x, *args, **kwargs)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else to_float(x))
        monkeypatch.setattr(torch.Tensor, "to", keep)
        yield


def image(*shape, channels_last=False):
    x = torch.randn(shape)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def output_of(result):
    return result[0] if isinstance(result, tuple) else result


def cast(inputs, dtype):
    return [x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs]


def results(model, inputs, dtype):
    """The output, the gradients of all parameters and of the first input, and the buffers after the call."""
    model = copy.deepcopy(model).to(dtype)
    first, *rest = cast(inputs, dtype)
    leaf = first.detach().clone().requires_grad_() if first.is_floating_point() else first
    torch.manual_seed(0)
    out = output_of(model(leaf, *rest))
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    leaves = {"input": leaf} | dict(model.named_parameters())
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(out, list(leaves.values()), cotangent, allow_unused=True)
    named = {"output": out} | {f"grad of {name}": g for name, g in zip(leaves, grads, strict=True) if g is not None}
    return {name: x.detach() for name, x in named.items()} | dict(model.named_buffers())


def check_equal(model, inputs, names, *, depth, amplification=10.0):
    """Assert everything that ``accelerate`` promises about ``model`` and the call ``model(*inputs)``.

    Args:
        names: the modules that it must change.
        depth, amplification: of the error model, which is about one op; here there are layers before and after it.
    """
    for training in (False, True):
        model.train(training)
        fused = copy.deepcopy(model)
        assert cxv_kernels.accelerate(fused) == names
        assert all(module.training == training for module in fused.modules())
        state = model.state_dict()
        assert fused.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in fused.state_dict().items())
        with float64_kept():
            exact = results(model, inputs, torch.float64)
        for name, result in results(fused, inputs, torch.float64).items():
            scale = exact[name].abs().max().clamp_min(1.0)
            assert (result - exact[name]).abs().max() <= 1e-10 * scale, (name, training)
        original = results(model, inputs, torch.float32)
        for name, result in results(fused, inputs, torch.float32).items():
            own_error = (original[name].double() - exact[name]).abs().max()
            error = (result.double() - exact[name]).abs().max()
            bound = tolerance(exact[name].double(), torch.float32, depth, amplification)
            assert error <= bound + 2 * own_error, (name, training, float(error), bound, float(own_error))
        assert cxv_kernels.accelerate(fused, undo=True) == names
        assert [type(m) for m in fused.modules()] == [type(m) for m in model.modules()]
        for name, result in results(fused, inputs, torch.float32).items():
            assert torch.equal(result, original[name]), name


def check_fused(model, inputs, op):
    """Assert that an accelerated model calls the fused op."""
    cxv_kernels.accelerate(model)
    with torch.profiler.profile() as recorded:
        model(*inputs)
    assert f"cxv_kernels::{op}" in {event.key for event in recorded.key_averages()}


def check_half(model, inputs):
    """Assert that a bfloat16 model stays one, and is as accurate as the original."""
    model.eval()
    fused = copy.deepcopy(model)
    cxv_kernels.accelerate(fused)
    exact = results(model, inputs, torch.float64)["output"]
    original = results(model, inputs, torch.bfloat16)["output"]
    result = results(fused, inputs, torch.bfloat16)["output"]
    assert result.dtype == torch.bfloat16
    error, own_error = ((x.double() - exact).norm() for x in (result, original))
    assert error <= 1.5 * own_error + 1e-2 * exact.norm()


def check_compiled_and_exported(model, inputs, *, export=True):
    """Assert that an accelerated model compiles without a graph break, differentiates, and exports."""
    model.eval()
    cxv_kernels.accelerate(model)
    with torch.no_grad():
        expected = output_of(model(*inputs))
    torch.compiler.reset()
    out = output_of(torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs))
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    assert any(p.grad is not None for p in model.parameters())
    if export:
        torch.testing.assert_close(output_of(torch.export.export(model, tuple(inputs)).module()(*inputs)), expected)
