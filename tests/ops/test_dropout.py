"""dropout and gelu_dropout: Philox by its published answers, one mask everywhere, and GELU in its tail.

test_values.py, test_gradients.py and test_pytorch.py have the properties of every op.
"""

import pytest
import torch
from cases import and_reference, device_of, in_float64, with_dtypes
from conftest import layouts, needs_cpp

from cxv_kernels import dropout, dropout_mask, dropout_seed, gelu_dropout
from cxv_kernels.ops.dropout.reference import philox
from cxv_kernels.validation import FLOAT_DTYPES

SEED = torch.tensor(0x0123456789ABCDEF)


def test_philox_gives_the_published_answers():
    """Random123's known answers, for the counters and keys that 64 bits of each can hold."""
    found = [hex(int(w)) for w in philox(torch.tensor([0]), torch.tensor(0))]
    assert found == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]


def test_philox_is_its_definition():
    """Against the rounds in Python's own integers, counters beyond 32 bits included."""

    def rounds(counter, key):
        c, k = [counter & 0xFFFFFFFF, counter >> 32, 0, 0], [key & 0xFFFFFFFF, key >> 32]
        for _ in range(10):
            a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        return c

    for counter in (0, 1, 2**32 - 1, 2**32, 2**40 + 12345):
        for key in (0, 5, 2**62 - 1):
            found = [int(w) for w in philox(torch.tensor([counter]), torch.tensor(key))]
            assert found == rounds(counter, key)


@with_dtypes
@pytest.mark.parametrize(
    ("p", "count", "offset"),
    [
        (0.5, 0, 5),
        (0.1, 1, 0),
        (0.99, 5, 126),
        (0.0, 1000, 77),
        (0.5, 1000, 77),
        (0.1, 128 * 40 + 3, 128 * 3),
        (0.99, 128 * 40 + 3, 128 * 3),
        (0.5, 300, 2**36 - 100),
    ],
)
def test_every_backend_keeps_the_same_elements(p, count, offset, backend, dtype):
    x, residual = (torch.randn(count).to(device_of(backend), dtype) for _ in range(2))
    seed = SEED.to(x.device)
    got, want = (dropout(x, p, seed, residual=residual, offset=offset, backend=b) for b in (backend, "reference"))
    # the C++ kernel fuses the product with the sum
    torch.testing.assert_close(got, want, **({} if backend == "cpu" else {"rtol": 0, "atol": 0}))
    kept = dropout(torch.ones_like(x), p, seed, offset=offset, backend=backend)
    assert torch.equal(kept.cpu() != 0, dropout_mask(SEED, count, p, offset))
    got, want = (gelu_dropout(x, p, seed, offset=offset, backend=b) for b in (backend, "reference"))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("op", [dropout, gelu_dropout])
@and_reference
def test_part_gets_its_part_of_the_mask(backend, op):
    x, seed = torch.randn(7, 100, device=device_of(backend)), SEED.to(device_of(backend))
    whole = op(x, 0.4, seed, backend=backend)
    parts = [op(x[i : i + 3], 0.4, seed, offset=100 * i, backend=backend) for i in range(0, 7, 3)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpp)])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_expectation_and_independence(p, backend):
    n = 400_000  # so that 16 bits have every value
    y = dropout(torch.ones(n), p, SEED, backend=backend)
    assert torch.equal(y != 0, dropout_mask(SEED, n, p))
    assert abs(y.mean() - 1) < 5 * (p / (1 - p) / n) ** 0.5 + 1e-6
    assert y.unique().numel() == (1 if p == 0 else 2)
    other = dropout(torch.ones(n), p, SEED + 1, backend=backend)
    kept = (y != 0).double(), (other != 0).double()
    for a, b in ((kept[0][:-1], kept[0][1:]), (kept[0][:-64], kept[0][64:]), kept):
        assert abs(((a - a.mean()) * (b - b.mean())).mean()) < 5 * p * (1 - p) / n**0.5 + 1e-12


@and_reference
def test_layout_does_not_matter(backend):
    x, seed = torch.randn(2, 3, 20, 8, device=device_of(backend)), SEED.to(device_of(backend))
    for strided in layouts(x).values():
        if torch.equal(strided, x):
            assert torch.equal(dropout(strided, 0.5, seed, backend=backend), dropout(x, 0.5, seed, backend=backend))


@in_float64
def test_gradient_has_the_mask(backend):
    x = torch.randn(3, 50, dtype=torch.float64, requires_grad=True)
    for op in (dropout, gelu_dropout):
        (grad,) = torch.autograd.grad(op(x, 0.3, SEED, offset=7, backend=backend).sum(), x)
        assert torch.equal(grad != 0, dropout_mask(SEED, 150, 0.3, 7).view(3, 50))


@needs_cpp
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_gelu_is_exact_in_its_tail(dtype):
    """Without a mask, output and gradient against float64, over every order of magnitude that GELU has."""
    x = torch.linspace(-14, 14, 40_003, dtype=torch.float64).to(dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    got, want = gelu_dropout(x, 0.0, SEED, backend="cpu"), exact * torch.erfc(-exact / 2**0.5) / 2
    (got_grad,), (want_grad,) = torch.autograd.grad(got.sum(), x), torch.autograd.grad(want.sum(), exact)
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    # e^(-x²/2) turns the rounding of x²/2, which is up to 98, into a relative error
    relative = 1e-12 if dtype == torch.float64 else eps + 1.2e-5
    torch.testing.assert_close(got.double(), want, rtol=relative, atol=16 * tiny)
    torch.testing.assert_close(got_grad.double(), want_grad, rtol=relative, atol=4 * torch.finfo(got.dtype).eps)


@in_float64
def test_gelu_dropout_is_the_dropout_of_gelu(backend):
    x = torch.randn(7, 101, dtype=torch.float64, requires_grad=True)
    got = gelu_dropout(x, 0.4, SEED, offset=5, backend=backend)
    torch.testing.assert_close(got, dropout(torch.nn.functional.gelu(x), 0.4, SEED, offset=5, backend=backend))
    assert torch.equal(got != 0, dropout_mask(SEED, 707, 0.4, 5).view(7, 101))


def test_seeds_follow_the_generator():
    torch.manual_seed(3)
    first, second = dropout_seed(), dropout_seed()
    torch.manual_seed(3)
    assert torch.equal(first, dropout_seed())
    assert not torch.equal(first, second)
    assert torch.equal(*(dropout_seed(generator=torch.Generator().manual_seed(1)) for _ in range(2)))


@and_reference
def test_autocast_rounds_once(backend):
    low = torch.float16 if backend == "triton" else torch.bfloat16
    x, seed = torch.randn(100, device=device_of(backend)), SEED.to(device_of(backend))
    with torch.autocast(x.device.type, dtype=low):
        y = dropout(x.to(low), 0.5, seed, residual=x, backend=backend)
        assert dropout(x, 0.5, seed, backend=backend).dtype == torch.float32  # what comes alone stays as it is
    assert y.dtype == low


@needs_cpp
def test_raw_op_refuses_strides():
    with pytest.raises(RuntimeError, match="x must be contiguous"):
        torch.ops.cxv_kernels.dropout(torch.randn(2, 30).T, None, SEED, 0.5, 0)


def test_bad_input():
    x = torch.randn(4)
    for error, match, arguments, options in (
        (ValueError, "p must be in", (x, 1.0, SEED), {}),
        (ValueError, "p must be in", (x, -0.1, SEED), {}),
        (ValueError, "offset must be at least 0, got -1", (x, 0.5, SEED), {"offset": -1}),
        (ValueError, "seed must be one int64, got torch.float32", (x, 0.5, torch.tensor(1.0)), {}),
        (TypeError, "seed must be a torch.Tensor, see dropout_seed, got int", (x, 0.5, 5), {}),
        (TypeError, "residual must be a torch.Tensor, got list", (x, 0.5, SEED), {"residual": [1]}),
        (ValueError, "residual has shape", (x, 0.5, SEED), {"residual": x[:2]}),
        (TypeError, "residual is torch.float64, x torch.float32", (x, 0.5, SEED), {"residual": x.double()}),
        (TypeError, "x must be float64", (x.long(), 0.5, SEED), {}),
    ):
        with pytest.raises(error, match=match):
            dropout(*arguments, **options)
        if "residual" not in options:
            with pytest.raises(error, match=match):
                gelu_dropout(*arguments, **options)
