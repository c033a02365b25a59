"""conv_norm's CUDA kernels (csrc/cuda/conv_norm.cuh) without a GPU: run on the host under the emulator."""

import ctypes

import pytest
import torch
import torch.nn.functional as F
from cuda_emulator import Arena, View, build, call, needs_cxx

pytestmark = needs_cxx
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SUPPORTED = pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=("NCHW", "NHWC"))


class Arguments(ctypes.Structure):
    """cxv::ConvNormParams, field by field."""

    _fields_ = [
        ("dtype", ctypes.c_int),
        ("channels_last", ctypes.c_bool),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("batch", "channels", "pixels")),
        *((name, ctypes.c_void_p) for name in ("bias", "gamma", "beta", "rstd", "y")),
        ("from_conv", ctypes.c_bool),
        *((name, ctypes.c_void_p) for name in ("grad_out", "grad_conv", "grad_gamma", "grad_beta", "grad_bias")),
        ("splits", ctypes.c_int64),
        ("partial", ctypes.c_void_p),
    ]


@pytest.fixture(scope="module")
def simt(tmp_path_factory, csrc):
    return build("conv_norm.cpp", csrc, tmp_path_factory.mktemp("conv_norm"))


def make(dtype, layout, batch=2, c_in=3, c_out=40, size=(7, 9), gamma=None, beta=None):
    """x, weight, bias, gamma, beta, grad_out, and the convolution without bias, in the layout."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, weight = draw(batch, c_in, *size).to(dtype), (draw(c_out, c_in, 3, 3) / 3).to(dtype)
    bias, grad_out = draw(c_out).to(dtype), draw(batch, c_out, *size).to(dtype).contiguous(memory_format=layout)
    gamma = (1 + 0.2 * draw(c_out) if gamma is None else gamma).float()
    beta = (draw(c_out) if beta is None else beta).float()
    u = F.conv2d(x.double(), weight.double(), padding=1).to(dtype).contiguous(memory_format=layout)
    return x, weight, bias, gamma, beta, grad_out, u


def run(simt, x, weight, bias, gamma, beta, grad_out, u, layout, seed=0, conv_needed=True):
    """out, rstd, du, dgamma, dbeta, dbias."""
    with Arena(simt) as arena:
        batch, channels, height, width = u.shape
        a = Arguments(DTYPES.index(u.dtype), layout == torch.channels_last, 1e-5, batch, channels, height * width)
        y, du = (arena.result(u.shape, u.dtype, u.stride()) for _ in range(2))
        y.copy_(u)
        rstd = arena.result((batch, height, width), torch.float32)
        dgamma, dbeta = (arena.result((channels,), torch.float32) for _ in range(2))
        dbias = arena.result((channels,), u.dtype)
        inputs = [None if t is None else arena.put(t) for t in (bias, gamma, beta, grad_out)]
        a.bias, a.gamma, a.beta, a.grad_out = (None if t is None else t.data_ptr() for t in inputs)
        a.y, a.rstd, a.grad_conv = (t.data_ptr() for t in (y, rstd, du))
        a.grad_gamma, a.grad_beta, a.grad_bias = (t.data_ptr() for t in (dgamma, dbeta, dbias))
        call(simt.simt_norm_forward, ctypes.byref(a), seed)
        views = (ctypes.byref(View(arena.put(t))) for t in (x, weight))
        sizes = (ctypes.c_int64(n) for n in (x.shape[1], height, width))
        call(simt.simt_norm_backward, ctypes.byref(a), *views, *sizes, ctypes.c_bool(conv_needed), seed)
    return y, rstd, du, dgamma, dbeta, dbias


def expected(x, weight, bias, gamma, beta, grad_out, u, layout):
    inputs = [t.double().requires_grad_() for t in (u, gamma, beta, torch.zeros_like(gamma) if bias is None else bias)]
    u, gamma, beta, bias = inputs
    v = u + bias[:, None, None]
    out = F.layer_norm(v.permute(0, 2, 3, 1), gamma.shape, gamma, beta).permute(0, 3, 1, 2)
    rstd = (v.var(1, correction=0) + 1e-5).rsqrt()
    return out.detach(), rstd.detach(), *torch.autograd.grad(out, inputs, grad_out.double())


def check(simt, *tensors, layout, **options):
    """x̂ is read off y, so has its rounding: unit (|x̂| + |β/γ|), at most 4 + √C units; sums are of at most that each."""
    u, gamma = tensors[-1], tensors[3]
    results, wants = run(simt, *tensors, layout, **options), expected(*tensors, layout)
    unit = torch.finfo(u.dtype).eps / 2
    for name, got, want in zip(("out", "rstd", "du", "dgamma", "dbeta", "dbias"), results, wants, strict=True):
        terms = u.numel() // len(gamma) if name in ("dgamma", "dbeta", "dbias") else 1
        bound = unit * want.abs() + 8 * unit * want.abs().max() + (8 * unit if name == "dgamma" else 0) * terms**0.5
        if name in ("dbeta", "dbias"):  # dbias cancels
            bound += 8 * unit * terms**0.5
        error = (got.double() - want).abs()
        assert (error <= bound).all(), f"{name}: {error.max():.2e}, {(error / bound).max():.2f} of the bound"
    return results


@SUPPORTED
@LAYOUTS
class TestAgainstFloat64:
    def test_odd_sizes(self, simt, dtype, layout):
        check(simt, *make(dtype, layout), layout=layout, seed=1)

    @pytest.mark.parametrize("channels", [3, 8, 128, 130, 200, 260])
    def test_channels(self, simt, dtype, layout, channels):
        check(simt, *make(dtype, layout, c_out=channels, size=(3, 11)), layout=layout, seed=2)

    def test_a_misaligned_gradient(self, simt, dtype, layout):
        *rest, grad_out, u = make(dtype, layout)
        shifted = torch.empty(grad_out.numel() + 1, dtype=dtype)[1:].as_strided(grad_out.shape, grad_out.stride())
        check(simt, *rest, shifted.copy_(grad_out), u, layout=layout)

    def test_no_bias(self, simt, dtype, layout):
        x, weight, _, *rest = make(dtype, layout)
        check(simt, x, weight, None, *rest, layout=layout)

    def test_several_splits(self, simt, dtype, layout):
        check(simt, *make(dtype, layout, batch=3, c_out=9, size=(17, 23)), layout=layout, seed=3)

    def test_channels_whose_y_does_not_tell(self, simt, dtype, layout):
        """γ of 0, tiny or small beside β: those are convolved again, from an x and a weight with any strides."""
        gamma, beta = torch.ones(40), torch.zeros(40)
        gamma[3], gamma[7], gamma[11], beta[11] = 0, 1e-30, 0.01, 5
        x, weight, *rest = make(dtype, layout, gamma=gamma, beta=beta)
        x = x.mT.contiguous().mT
        check(simt, x, weight.contiguous(memory_format=torch.channels_last), *rest, layout=layout, seed=4)
        x, weight, *rest = make(dtype, layout, gamma=torch.zeros(40))
        check(simt, x, weight, *rest, layout=layout)


@LAYOUTS
def test_no_gradient_of_the_convolution(simt, layout):
    tensors = make(torch.float32, layout)
    whole, part = run(simt, *tensors, layout), run(simt, *tensors, layout, conv_needed=False)
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], part[3:], strict=True))


@LAYOUTS
def test_same_bits_in_any_schedule(simt, layout):
    tensors = make(torch.float16, layout, c_out=20)
    first = run(simt, *tensors, layout)
    for seed in (1, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(simt, *tensors, layout, seed=seed), strict=True))


@LAYOUTS
def test_a_large_mean_costs_no_digits(simt, layout):
    x, weight, _, *rest, u = make(torch.float32, layout)
    check(simt, x, weight, None, *rest, u + 1000, layout=layout)
