"""conv_norm: 3×3 convolution, then LayerNorm over channels."""

import pytest
import torch

from cxv_kernels import conv_norm


def setup(c_in=5, c_out=7, dtype=torch.float64):
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64).to(dtype)  # noqa: E731
    return draw(2, c_in, 6, 9), draw(c_out, c_in, 3, 3), draw(c_out), draw(c_out), draw(c_out)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_is_the_definition(layout, with_bias):
    x, weight, bias, gamma, beta = setup()
    bias = bias if with_bias else None
    got = conv_norm(x.contiguous(memory_format=layout), weight, bias, gamma, beta, 1e-3)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    y = torch.einsum("bchwij,ocij->bohw", padded.unfold(2, 3, 1).unfold(3, 3, 1), weight)
    y = y if bias is None else y + bias[:, None, None]
    y = (y - y.mean(1, keepdim=True)) / (y.var(1, correction=0, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(got, y * gamma[:, None, None] + beta[:, None, None])
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_gradcheck():
    inputs = [t.requires_grad_() for t in setup(2, 3)]
    inputs[0] = inputs[0][:1, :, :3, :3].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: conv_norm(*t, 1e-2), inputs)


def test_a_constant_pixel_has_finite_gradients():
    x, weight, bias, gamma, beta = setup()
    x = torch.zeros_like(x, requires_grad=True)
    out = conv_norm(x, weight, torch.ones_like(bias), gamma, beta)
    assert torch.autograd.grad(out.square().sum(), x)[0].isfinite().all()


def test_statistics_are_float32_under_autocast():
    x, weight, bias, gamma, beta = setup(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = conv_norm(x, weight, bias, gamma, beta)
    assert out.dtype == torch.bfloat16
    low = conv_norm(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), gamma, beta)
    assert torch.equal(out, low)


def test_empty_batch():
    x, *rest = setup()
    assert conv_norm(x[:0], *rest).shape == (0, 7, 6, 9)


def test_bad_input():
    x, weight, bias, gamma, beta = setup()
    for error, match, arguments in (
        (ValueError, r"x must have 4 dimensions \(B, C_in, H, W\), got shape", (x[0], weight, bias, gamma, beta)),
        (ValueError, r"weight must be \(C_out, 5, 3, 3\) for x of 5 channels", (x, weight[:, :4], bias, gamma, beta)),
        (ValueError, "gamma has 6 channels, weight 7", (x, weight, bias, gamma[:6], beta)),
        (TypeError, "weight is torch.float32, x torch.float64", (x, weight.float(), bias, gamma, beta)),
        (TypeError, "bias is torch.float32, x torch.float64", (x, weight, bias.float(), gamma, beta)),
        (TypeError, "beta must be a torch.Tensor, got float", (x, weight, bias, gamma, 1.0)),
    ):
        with pytest.raises(error, match=match):
            conv_norm(*arguments)
