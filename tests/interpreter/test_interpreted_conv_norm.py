"""The conv_norm kernels in Triton's interpreter, against the reference in float64."""

import importlib

import pytest
import torch
from torch.library import opcheck

from cxv_kernels import conv_norm
from cxv_kernels.testing import tolerance
from cxv_kernels.validation import accumulate_dtype

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero")  # 1/γ where it is not used
FORMATS = (torch.contiguous_format, torch.channels_last)
DTYPES = (torch.float64, torch.float32, torch.float16)
NAMES = ("out", "dx", "dweight", "dbias", "dgamma", "dbeta")
OPS = torch.ops.cxv_kernels_triton
in_every_format = pytest.mark.parametrize("layout", FORMATS, ids=("NCHW", "channels_last"))


def setup(c_in=5, c_out=7, dtype=torch.float64, batch=2, size=(6, 9), layout=torch.contiguous_format):
    """x, weight, bias, gamma, beta; gamma about 1, as LayerNorm's is."""
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64)  # noqa: E731
    x = draw(batch, c_in, *size).to(dtype).contiguous(memory_format=layout)
    weight, gamma = draw(c_out, c_in, 3, 3) / (9 * c_in) ** 0.5, 1 + 0.2 * draw(c_out)
    return [x, *(t.to(dtype) for t in (weight, draw(c_out), gamma, draw(c_out)))]


def assert_matches(inputs, amplification=4.0, grad_out=None):
    """Output and gradients against the reference's in float64; returns them."""
    dtype = inputs[0].dtype
    mine = [None if t is None else t.detach().requires_grad_() for t in inputs]
    exact = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    out, want = conv_norm(*mine, backend="triton"), conv_norm(*exact, backend="reference")
    grad_out = torch.randn_like(want).to(dtype) if grad_out is None else grad_out
    leaves = [[t for t in group if t is not None] for group in (mine, exact)]
    got_all = (out, *torch.autograd.grad(out, leaves[0], grad_out))
    want_all = (want, *torch.autograd.grad(want, leaves[1], grad_out.double()))
    (batch, c_in, height, width), c_out = inputs[0].shape, len(inputs[1])
    depth = max(9 * c_in, 9 * c_out, batch * height * width)
    names = ["out", *(name for name, t in zip(NAMES[1:], inputs, strict=True) if t is not None)]
    for name, got, expected in zip(names, got_all, want_all, strict=True):
        assert got.shape == expected.shape
        error = (got.detach().double() - expected.detach()).abs()
        bound = tolerance(expected.detach(), dtype, depth, amplification)
        assert error.numel() == 0 or error.max() <= bound, f"{name}: {error.max():.2e} > {bound:.2e}"
    return got_all


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@in_every_format
@pytest.mark.parametrize(
    ("c_in", "c_out", "size", "batch"),
    [
        (3, 1, (5, 5), 2),
        (1, 3, (1, 1), 5),
        (2, 2, (3, 3), 1),
        (4, 64, (5, 13), 2),
        (3, 130, (11, 7), 1),
        (33, 20, (17, 5), 2),
        (3, 8, (4, 4), 0),
    ],
)
def test_matches_float64(layout, dtype, c_in, c_out, size, batch):
    # of one channel only the rounding of the deviation is left, over √eps; of two, du is little more than what cancels
    assert_matches(setup(c_in, c_out, dtype, batch, size, layout), 4 if c_out > 2 else 4 * 1e5**0.5)


@in_every_format
def test_many_tiles_a_program(layout, monkeypatch):
    """The sums and the convolution of programs that have several tiles."""
    monkeypatch.setattr(importlib.import_module("cxv_kernels.ops.conv_norm.triton"), "_MAX_SPLITS", 3)
    inputs = setup(3, 160, torch.float32, size=(12, 12), layout=layout)
    assert_matches(inputs)
    inputs[3][0] = 0
    assert_matches(inputs)


@in_every_format
def test_without_bias(layout):
    x, weight, _, gamma, beta = setup(3, 20, torch.float32, layout=layout)
    assert_matches([x, weight, None, gamma, beta])
    gamma[1] = 0
    exact = [t.detach().requires_grad_() for t in (x, weight, gamma, beta)]
    out = conv_norm(*exact[:2], None, *exact[2:], 0.0, backend="triton")  # eps = 0, and tiles that are not full
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.square().sum(), exact))


def test_any_strides():
    x, *rest = setup(4, 18, torch.float32)
    grad_out = torch.randn(2, 18, 6, 9)
    views = {
        "every other column": lambda t: torch.stack([t, t], dim=4).flatten(3)[..., ::2],
        "every other channel": lambda t: torch.stack([t, t], dim=2).flatten(1, 2)[:, ::2],
        "H and W swapped": lambda t: t.mT.contiguous().mT,
        "expanded batch": lambda t: t[:1].expand_as(t),
    }
    strided = [torch.stack([t, t], -1)[..., 0] for t in rest]
    strided[2][0] = 0  # so that the kernels' own convolution reads x and weight as they lie
    assert not any(t.is_contiguous() for t in strided)
    for view in views.values():
        assert_matches([view(x), *strided], grad_out=grad_out)
        assert_matches([x, *rest], grad_out=view(grad_out))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@in_every_format
@pytest.mark.parametrize("case", ["zero", "tiny", "mixed", "large beta", "just inside", "all zero"])
def test_gradients_where_the_output_does_not_tell_xhat(case, layout, dtype):
    x, weight, bias, gamma, beta = setup(3, 24, torch.float64, layout=layout)
    low = torch.finfo(dtype).bits == 16
    sign = 1 - 2 * (torch.arange(24) % 2)
    if case == "zero":
        gamma[::3] = 0
    elif case == "tiny":
        gamma = 1e-8 * gamma
    elif case == "mixed":
        gamma = sign * gamma * 10.0 ** (-8.0 * torch.arange(24) / 23)
    elif case == "large beta":
        beta = 300 * sign * beta.abs()
    elif case == "just inside":
        beta = sign * gamma * (3.98 if low else 15.9)
    else:
        gamma, beta = gamma * 0, beta * 0
    # γ and β in float32, as under autocast: float16 has no 1e-8
    params = [t.to(accumulate_dtype(dtype)) for t in (gamma, beta)]
    assert_matches([*(t.to(dtype) for t in (x, weight, bias)), *params])


@in_every_format
def test_the_convolution_runs_again_only_where_it_must(layout):
    """Where the output tells x̂, backward reads it and not x and weight; where γ = 0 the reverse."""
    inputs = setup(3, 8, torch.float32, layout=layout)
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


@pytest.mark.parametrize("source", ["bias", "convolution"])
@in_every_format
def test_a_large_mean_keeps_the_variance(layout, source):
    x, weight, bias, gamma, beta = setup(3, 40, torch.float32, layout=layout)
    if source == "bias":
        bias = bias + 1e3
    else:
        x[:, 0] = 1e3
        weight[:, 0] = 0
        weight[:, 0, 1, 1] = 1
    # a rounding of 1,000 is that many roundings of 1; the square of the mean would cost a thousand times more
    assert_matches([x, weight, bias, gamma, beta], 1e3)


@in_every_format
@pytest.mark.parametrize("gain", [1.0, 0.0])
def test_gradcheck(layout, gain):
    inputs = [t.detach().requires_grad_() for t in setup(2, 3, batch=1, size=(2, 2), layout=layout)]
    inputs[3].data[1] *= gain

    def function(*t):
        return conv_norm(*t, 1e-2, backend="triton")

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@in_every_format
def test_repeats_its_bits_in_any_batch_and_leaves_nothing_unwritten(layout, monkeypatch):
    inputs = setup(3, 20, torch.float16, batch=3, size=(7, 5), layout=layout)
    grad = torch.randn(3, 20, 7, 5).half()

    def run(x, grad):
        x = x.detach().requires_grad_()
        out = conv_norm(x, *inputs[1:], backend="triton")
        return out, torch.autograd.grad(out, x, grad)[0]

    first = run(inputs[0], grad)
    with monkeypatch.context() as poisoned:
        empty_like = torch.empty_like
        poisoned.setattr(torch, "empty_like", lambda t: empty_like(t).fill_(torch.nan))
        assert all(map(torch.equal, first, run(inputs[0], grad)))
    alone = run(inputs[0][1:2], grad[1:2])
    assert torch.equal(alone[0], first[0][1:2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c_out", [1, 24, 100])
def test_the_convolution_that_normalizes(c_out, dtype, monkeypatch):
    monkeypatch.setattr(
        importlib.import_module("cxv_kernels.ops.conv_norm.triton"), "prefers_implicit_gemm", lambda *_: True
    )
    inputs = setup(5, c_out, dtype, size=(9, 11), layout=torch.channels_last)
    with torch.profiler.profile() as profile:
        out = assert_matches(inputs, 4 if c_out > 1 else 4 * 1e5**0.5)[0]
    ran = [event.key for event in profile.key_averages()]
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert "aten::convolution_backward" in ran
    assert len([key for key in ran if key == "aten::conv2d"]) == 1  # the reference's


def test_offsets_beyond_32_bits():
    """Channels 2²⁶ elements apart, the last beyond 2³¹, read by the convolution of a channel that y does not tell."""
    inputs = setup(40, 3, torch.float16, 1, (4, 5))
    inputs[3][0] = 0
    space = torch.empty(40 << 26, dtype=torch.float16)
    far = space.as_strided(inputs[0].shape, (0, 1 << 26, 5, 1))
    far.copy_(inputs[0])
    grad = torch.randn(1, 3, 4, 5).half()
    near = assert_matches(inputs, grad_out=grad)
    assert all(map(torch.equal, assert_matches([far, *inputs[1:]], grad_out=grad), near))


@in_every_format
@pytest.mark.parametrize("with_bias", [True, False])
def test_opcheck(layout, with_bias):
    x, weight, bias, gamma, beta = setup(dtype=torch.float16, layout=layout)
    inputs = (x, weight, bias if with_bias else None, gamma.float(), beta.float())
    opcheck(OPS.conv_norm_forward, (*inputs, 1e-5))
    out, rstd = OPS.conv_norm_forward(*inputs, 1e-5)
    for needed in ([True, True, with_bias, True, True], [False, True, False, False, True]):
        arguments = (*inputs[:3], out, rstd, *inputs[3:], 1e-5, needed)
        opcheck(OPS.conv_norm_backward, (torch.randn_like(out), *arguments))


def test_declines_what_does_not_fit():
    x = torch.zeros(1, 1, 1, 1)
    params = torch.zeros(4097, 1, 3, 3), None, torch.zeros(4097), torch.zeros(4097)
    with pytest.raises(RuntimeError, match="supports 1 to 4096 channels, not 4097"):
        conv_norm(x, *params, backend="triton")
