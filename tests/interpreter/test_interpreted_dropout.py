"""The dropout kernel in Triton's interpreter: the reference's mask, bit for bit."""

import pytest
import torch
from torch.library import opcheck

from cxv_kernels import dropout, dropout_mask, gelu_dropout

SEED = torch.tensor(0x0123456789ABCDEF)
DTYPES = (torch.float64, torch.float32, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("count", "offset", "p"),
    [(0, 5, 0.5), (1, 0, 0.1), (5, 126, 0.5), (1000, 77, 0.99), (128 * 40 + 3, 128 * 3, 0.1), (300, 2**36 - 100, 0.3)],
)
def test_is_the_reference(count, offset, p, dtype):
    x, residual = torch.randn(count).to(dtype), torch.randn(count).to(dtype)
    got, want = (dropout(x, p, SEED, residual=residual, offset=offset, backend=b) for b in ("triton", "reference"))
    assert torch.equal(got, want)
    kept = dropout(torch.ones_like(x), p, SEED, offset=offset, backend="triton")
    assert torch.equal(kept != 0, dropout_mask(SEED, count, p, offset))


def test_writes_its_elements_and_no_others(monkeypatch):
    memory = torch.full((3000,), torch.nan)
    monkeypatch.setattr(torch, "empty_like", lambda _: memory[1000:2000])
    dropout(torch.randn(1000), 0.5, SEED, offset=3, backend="triton")
    assert torch.equal(memory.isfinite().nonzero().flatten(), torch.arange(1000, 2000))


def test_gradients():
    x, residual = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def function(x, residual):
        return dropout(x, 0.3, SEED, residual=residual, offset=125, backend="triton")

    assert torch.autograd.gradcheck(function, (x, residual))
    assert torch.autograd.gradgradcheck(function, (x, residual))


def test_opcheck():
    x = torch.randn(2, 300)
    opcheck(torch.ops.cxv_kernels_triton.dropout, (x, x + 1, SEED, 0.3, 5))
    opcheck(torch.ops.cxv_kernels_triton.dropout, (x.half(), None, SEED, 0.3, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_dropout(dtype):
    x = torch.randn(3, 90).to(dtype).requires_grad_()
    got, want = (gelu_dropout(x, 0.3, SEED, offset=125, backend=b) for b in ("triton", "reference"))
    torch.testing.assert_close(got, want)
    grads = (torch.autograd.grad(y, x, torch.ones_like(y))[0] for y in (got, want))
    torch.testing.assert_close(*grads)


def test_gelu_dropout_gradients():
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gelu_dropout(x, 0.3, SEED, offset=125, backend="triton"), x)
    opcheck(torch.ops.cxv_kernels_triton.gelu_dropout_forward, (x.detach().float(), SEED, 0.3, 5))
    opcheck(torch.ops.cxv_kernels_triton.gelu_dropout_backward, (x.detach().float(),) * 2 + (SEED, 0.3, 5))
