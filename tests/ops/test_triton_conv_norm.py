"""Triton's kernels of conv_norm and dropout in its interpreter: tiles, implicit GEMM, 32-bit offsets and limits.

The other files of this folder have the properties of every backend; tests/test_triton.py runs both.
"""

import importlib

import pytest
import torch
from cases import CONV_NORM, assert_close_to_float64, every, image, name_of

from cxv_kernels import conv_norm, dropout

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero")  # 1/γ of an unused channel
OPS = torch.ops.cxv_kernels_triton
NCHW, CHANNELS_LAST, _ = CONV_NORM
in_both_formats = every([NCHW, CHANNELS_LAST])


@pytest.fixture
def kernels():
    return importlib.import_module("cxv_kernels.ops.conv_norm.triton")


@in_both_formats
def test_many_tiles_per_program(case, kernels, monkeypatch):
    """The sums and the convolution of programs that have several tiles."""
    monkeypatch.setattr(kernels, "_MAX_SPLITS", 3)
    sizes = image(3, 160, (12, 12))
    inputs = case.inputs(sizes, torch.float32)
    assert_close_to_float64(case, "triton", inputs, sizes)
    inputs[3][0] = 0
    assert_close_to_float64(case, "triton", inputs, sizes)


@in_both_formats
def test_convolution_runs_again_only_where_it_must(case):
    """Where the output tells x̂, backward reads it and not x and weight; where γ = 0 the reverse."""
    inputs = case.inputs(image(3, 8, (6, 9)), torch.float32)
    out, rstd = OPS.conv_norm_forward(*inputs, 1e-5)
    grad, poison = torch.randn_like(out), torch.full_like(inputs[1], torch.nan)
    needed = [False, False, True, True, True]

    def gradients(weight, out, gamma):
        x, _, bias, _, beta = inputs
        return OPS.conv_norm_backward(grad, x, weight, bias, out, rstd, gamma, beta, 1e-5, needed)[2:]

    gamma = inputs[3].clone()
    assert all(g.isfinite().all() for g in gradients(poison, out, gamma))
    gamma[2] = 0
    assert all(g.isfinite().all() for g in gradients(inputs[1], torch.full_like(out, torch.nan), gamma))
    assert gradients(poison, out, gamma)[1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=name_of)
@pytest.mark.parametrize("c_out", [1, 24, 100])
def test_convolution_that_normalizes(c_out, dtype, kernels, monkeypatch):
    monkeypatch.setattr(kernels, "prefers_implicit_gemm", lambda *_: True)
    sizes = image(5, c_out, (9, 11))
    inputs = CHANNELS_LAST.inputs(sizes, dtype)
    with torch.profiler.profile() as profile:
        out = assert_close_to_float64(CHANNELS_LAST, "triton", inputs, sizes, 1 if c_out > 1 else 1e5**0.5)[0]
    ran = [event.key for event in profile.key_averages()]
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert "aten::convolution_backward" in ran
    assert len([key for key in ran if key == "aten::conv2d"]) == 1  # the reference's


def test_offsets_beyond_32_bits():
    """Channels 2²⁶ elements apart, the last beyond 2³¹, read by the convolution of a channel that y does not tell."""
    sizes = image(40, 3, (4, 5), 1)
    inputs = NCHW.inputs(sizes, torch.float16)
    inputs[3][0] = 0
    space = torch.empty(40 << 26, dtype=torch.float16)
    far = space.as_strided(inputs[0].shape, (0, 1 << 26, 5, 1))
    far.copy_(inputs[0])
    grads = [torch.randn(1, 3, 4, 5).half()]
    near = assert_close_to_float64(NCHW, "triton", inputs, sizes, grads=grads)
    assert all(map(torch.equal, assert_close_to_float64(NCHW, "triton", [far, *inputs[1:]], sizes, grads=grads), near))


def test_limits():
    x = torch.zeros(1, 1, 1, 1)
    params = torch.zeros(4097, 1, 3, 3), None, torch.zeros(4097), torch.zeros(4097)
    with pytest.raises(RuntimeError, match="supports 1 to 4096 channels, not 4097"):
        conv_norm(x, *params, backend="triton")


def test_dropout_writes_its_elements_and_no_others(monkeypatch):
    memory = torch.full((3000,), torch.nan)
    monkeypatch.setattr(torch, "empty_like", lambda _: memory[1000:2000])
    dropout(torch.randn(1000), 0.5, torch.tensor(5), offset=3, backend="triton")
    assert torch.equal(memory.isfinite().nonzero().flatten(), torch.arange(1000, 2000))
