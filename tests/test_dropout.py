"""dropout: Philox by its published answers, one mask everywhere, and what the fused kernel promises."""

import pytest
import torch
from conftest import layouts, needs_cpp
from torch.library import opcheck

from cxv_kernels import dropout, dropout_mask, dropout_seed, gelu_dropout
from cxv_kernels.ops.dropout.reference import philox
from cxv_kernels.validation import FLOAT_DTYPES

both = pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpp)])
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


@needs_cpp
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(("count", "offset"), [(0, 5), (1, 0), (5, 126), (1000, 77), (128 * 300 + 3, 128 * 3)])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.99])
def test_every_backend_keeps_the_same_elements(p, count, offset, dtype):
    x, residual = torch.randn(count).to(dtype), torch.randn(count).to(dtype)
    got, want = (dropout(x, p, SEED, residual=residual, offset=offset, backend=b) for b in ("cpu", "reference"))
    torch.testing.assert_close(got, want)
    keep = dropout_mask(SEED, count, p, offset)
    assert torch.equal(dropout(torch.ones(count), p, SEED, offset=offset, backend="cpu") != 0, keep)


@both
def test_a_part_gets_its_part_of_the_mask(backend):
    x = torch.randn(7, 100)
    whole = dropout(x, 0.4, SEED, backend=backend)
    parts = [dropout(x[i : i + 3], 0.4, SEED, offset=100 * i, backend=backend) for i in range(0, 7, 3)]
    assert torch.equal(torch.cat(parts), whole)


@both
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_expectation_and_independence(p, backend):
    n = 400_000
    y = dropout(torch.ones(n), p, SEED, backend=backend)
    assert abs(y.mean() - 1) < 5 * (p / (1 - p) / n) ** 0.5 + 1e-6
    assert y.unique().numel() == (1 if p == 0 else 2)
    other = dropout(torch.ones(n), p, SEED + 1, backend=backend)
    kept = (y != 0).double(), (other != 0).double()
    for a, b in ((kept[0][:-1], kept[0][1:]), (kept[0][:-64], kept[0][64:]), kept):
        assert abs(((a - a.mean()) * (b - b.mean())).mean()) < 5 * p * (1 - p) / n**0.5 + 1e-12


@both
def test_layout_does_not_matter(backend):
    x = torch.randn(2, 3, 20, 8)
    for strided in layouts(x).values():
        if torch.equal(strided, x):
            assert torch.equal(dropout(strided, 0.5, SEED, backend=backend), dropout(x, 0.5, SEED, backend=backend))


@both
def test_gradients(backend):
    x, residual = (torch.randn(3, 50, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def function(x, residual):
        return dropout(x, 0.3, SEED, residual=residual, offset=7, backend=backend)

    assert torch.autograd.gradcheck(function, (x, residual))
    assert torch.autograd.gradgradcheck(function, (x, residual))
    alone = torch.autograd.grad(dropout(x, 0.3, SEED, offset=7, backend=backend).sum(), x)[0]
    assert torch.equal(alone != 0, dropout_mask(SEED, 150, 0.3, 7).view(3, 50))


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


@both
def test_gelu_dropout_is_the_dropout_of_gelu(backend):
    x = torch.randn(7, 101, dtype=torch.float64, requires_grad=True)
    got = gelu_dropout(x, 0.4, SEED, offset=5, backend=backend)
    torch.testing.assert_close(got, dropout(torch.nn.functional.gelu(x), 0.4, SEED, offset=5, backend=backend))
    assert torch.equal(got != 0, dropout_mask(SEED, 707, 0.4, 5).view(7, 101))

    def function(x):
        return gelu_dropout(x, 0.4, SEED, offset=5, backend=backend)

    small = x[:2, :60].detach().requires_grad_()
    assert torch.autograd.gradcheck(function, small)
    assert torch.autograd.gradgradcheck(function, small)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gelu_dropout_keeps_its_input_alone(dtype):
    x = torch.randn(3, 1000).to(dtype).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        gelu_dropout(x, 0.5, SEED, backend="cpu")
    assert saved == [x.data_ptr()]
    opcheck(torch.ops.cxv_kernels.gelu_dropout_forward, (x.detach(), SEED, 0.3, 5))
    opcheck(torch.ops.cxv_kernels.gelu_dropout_backward, (x.detach(), x.detach(), SEED, 0.3, 5))
    parts = [gelu_dropout(x[i : i + 1], 0.5, SEED, offset=1000 * i, backend="cpu") for i in range(3)]
    assert torch.equal(torch.cat(parts), gelu_dropout(x, 0.5, SEED, backend="cpu"))


@needs_cpp
def test_nothing_is_saved():
    x = torch.randn(1000, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes), lambda t: t):
        dropout(x, 0.5, SEED, residual=x, backend="cpu")
    assert saved == []


def test_seeds_follow_the_generator():
    torch.manual_seed(3)
    first, second = dropout_seed(), dropout_seed()
    torch.manual_seed(3)
    assert torch.equal(first, dropout_seed())
    assert not torch.equal(first, second)
    assert torch.equal(*(dropout_seed(generator=torch.Generator().manual_seed(1)) for _ in range(2)))


@needs_cpp
def test_opcheck_and_threads():
    x, residual = torch.randn(2, 3000, requires_grad=True), torch.randn(2, 3000)
    opcheck(torch.ops.cxv_kernels.dropout, (x.detach(), residual, SEED, 0.3, 5))
    opcheck(torch.ops.cxv_kernels.dropout, (x.detach().bfloat16(), None, SEED, 0.3, 0))
    big = torch.randn(200_000)
    one = dropout(big, 0.5, SEED, backend="cpu")
    torch.set_num_threads(3)
    assert torch.equal(dropout(big, 0.5, SEED, backend="cpu"), one)
    with pytest.raises(RuntimeError, match="x must be contiguous"):
        torch.ops.cxv_kernels.dropout(x.detach().T, None, SEED, 0.5, 0)


@both
def test_compile_fullgraph(backend):
    x = torch.randn(300, requires_grad=True)
    compiled = torch.compile(
        lambda x, seed: dropout(x * 2, 0.5, seed, residual=x, backend=backend).sin(),
        fullgraph=True,
        backend="aot_eager",
    )
    want = dropout(x * 2, 0.5, SEED, residual=x, backend=backend).sin()
    torch.testing.assert_close(compiled(x, SEED), want)
    got, want = (torch.autograd.grad(y.sum(), x) for y in (compiled(x, SEED), want))
    torch.testing.assert_close(got, want)


@both
def test_autocast_rounds_once(backend):
    x = torch.randn(100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = dropout(x.bfloat16(), 0.5, SEED, residual=x, backend=backend)
        assert dropout(x, 0.5, SEED, backend=backend).dtype == torch.float32  # what comes alone stays as it is
    assert y.dtype == torch.bfloat16


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
