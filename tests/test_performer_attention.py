"""performer_attention and performer_features: the semantics of FAVOR+ and the paper's variants of it."""

import math

import pytest
import torch
from conftest import heads

import cxv_kernels
from cxv_kernels import orthogonal_projection, performer_attention, performer_features


def setup(queries=40, keys=60, dim=16, value_dim=16, batch=2, features=None):
    q, k, v = heads(batch, 3, queries, dim), heads(batch, 3, keys, dim), heads(batch, 3, keys, value_dim)
    return q, k, v, orthogonal_projection(features or cxv_kernels.num_random_features(dim), dim, dtype=q.dtype)


def test_number_of_features():
    assert [cxv_kernels.num_random_features(d) for d in (1, 2, 32, 64)] == [1, 1, 110, 266]


def test_projection_is_orthogonal_with_gaussian_norms_and_reproducible():
    draw = [orthogonal_projection(110, 32, generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*draw)
    directions = torch.nn.functional.normalize(draw[0].double(), dim=1)
    for start in range(0, 110, 32):
        block = directions[start : start + 32]
        torch.testing.assert_close(block @ block.T, torch.eye(len(block), dtype=torch.float64), atol=1e-6, rtol=0)
    norms = orthogonal_projection(20_000, 32).norm(dim=1)
    assert abs(norms.mean() - math.sqrt(31.5)) < 0.05  # of the chi distribution with 32 degrees of freedom
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        orthogonal_projection(4, 0)


def definition(q, k, v, w, kernel, eps, key_mask=None, batch_maximum=False):
    """Weights over N_q × N_k written out, with loops over batch and heads."""
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype)
    root = q.shape[-1] ** 0.25

    def exponent(x):
        return x @ w.T / root, x.square().sum(-1, keepdim=True) / (2 * root**2)

    everywhere = exponent(k)[0].max()
    for b in range(q.shape[0]):
        seen = torch.ones(k.shape[2], dtype=torch.bool) if key_mask is None else key_mask[b]
        for h in range(q.shape[1]):
            (zq, nq), (zk, nk) = exponent(q[b, h]), exponent(k[b, h, seen])
            if kernel == "relu":
                phi_q, phi_k = zq.clamp(min=0) + eps, zk.clamp(min=0) + eps
            else:
                phi_q = (zq - nq - zq.max(-1, keepdim=True).values).exp() + eps
                phi_k = (zk - nk - (everywhere if batch_maximum else zk.max())).exp() + eps
            weights = phi_q @ phi_k.T
            out[b, h] = weights @ v[b, h, seen] / weights.sum(-1, keepdim=True)
    return out


@pytest.mark.parametrize(("kernel", "eps"), [("softmax", 1e-4), ("softmax", 0.1), ("softmax", 0.0), ("relu", 1e-3)])
def test_is_the_definition(kernel, eps):
    q, k, v, w = setup(value_dim=5)
    torch.testing.assert_close(performer_attention(q, k, v, w, kernel, eps=eps), definition(q, k, v, w, kernel, eps))
    key_mask = torch.rand(2, 60) > 0.3
    got = performer_attention(q, k, v, w, kernel, eps=eps, key_mask=key_mask)
    torch.testing.assert_close(got, definition(q, k, v, w, kernel, eps, key_mask))


def test_default_eps_is_the_papers():
    q, k, v, w = setup()
    assert torch.equal(performer_attention(q, k, v, w), performer_attention(q, k, v, w, eps=1e-4))
    assert torch.equal(performer_attention(q, k, v, w, "relu"), performer_attention(q, k, v, w, "relu", eps=1e-3))


def test_features_make_attention():
    q, k, v, w = setup()
    phi_q, phi_k = performer_features(q, w, True), performer_features(k, w, False)
    assert phi_q.shape == (2, 3, 40, w.shape[0])
    weights = phi_q @ phi_k.mT
    torch.testing.assert_close(weights @ v / weights.sum(-1, keepdim=True), performer_attention(q, k, v, w))
    # the factor M^-½ of FAVOR+: a query's largest feature is that times exp(−‖x‖²/2√D) + eps
    largest = (-q.square().sum(-1) / (2 * math.sqrt(16))).exp() + 1e-4
    torch.testing.assert_close(phi_q.amax(-1), largest * w.shape[0] ** -0.5)


def test_approximates_softmax_attention():
    q, k, v, _ = setup(dim=8)
    q, k = q / 2, k / 2  # the estimator's variance grows like exp(‖q + k‖²)
    w = orthogonal_projection(20_000, 8, dtype=q.dtype)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    error = (performer_attention(q, k, v, w, eps=0) - exact).norm() / exact.norm()
    assert error < 0.05


def test_head_stabilizer_is_batch_invariant_and_batch_stabilizer_is_the_released_code():
    q, k, v, w = setup(batch=3)
    k[1] *= 3
    for alone in range(3):
        part = slice(alone, alone + 1)
        got = performer_attention(q[part], k[part], v[part], w)
        torch.testing.assert_close(got, performer_attention(q, k, v, w)[part], rtol=1e-12, atol=1e-13)
    released = performer_attention(q, k, v, w, stabilizer="batch")
    torch.testing.assert_close(released, definition(q, k, v, w, "softmax", 1e-4, batch_maximum=True))
    assert not torch.allclose(released[:1], performer_attention(q[:1], k[:1], v[:1], w, stabilizer="batch"), rtol=1e-3)


@pytest.mark.parametrize(
    ("kernel", "eps", "stabilizer"),
    [("softmax", 0.0, "head"), ("softmax", 0.0, "batch"), ("softmax", 0.1, "batch"), ("relu", 1e-3, "head")],
)
def test_gradcheck(kernel, eps, stabilizer):
    """Finite differences see the maxima: with eps > 0 only the batch stabilizer has its function's gradient."""
    q, k, v, w = setup(4, 5, 3, 2, features=6)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    options = {"eps": eps, "stabilizer": stabilizer, "backend": "reference"}
    assert torch.autograd.gradcheck(lambda *t: performer_attention(*t, w, kernel, **options), inputs)


@pytest.mark.parametrize("is_query", [True, False], ids=["queries", "keys"])
def test_gradcheck_of_features_with_the_batch_stabilizer(is_query):
    q, _, _, w = setup(4, 5, 3, 2, features=6)
    options = {"eps": 0.1, "stabilizer": "batch", "backend": "reference"}
    assert torch.autograd.gradcheck(lambda x: performer_features(x, w, is_query, **options), q.requires_grad_())


def test_head_stabilizers_carry_no_gradient():
    """With eps > 0 a shift does not cancel, so finite differences see it and the gradient must not: the gradient is
    that of the same formula with the shifts held fixed."""
    q, k, v, w = setup(4, 5, 3, 2, features=6)
    zq, zk = (x @ w.T / 3**0.25 for x in (q, k))
    sq, sk = zq.amax(-1, keepdim=True), zk.amax((-2, -1), keepdim=True)

    def fixed(q, k, v):
        phi = lambda x, s: (x @ w.T / 3**0.25 - x.square().sum(-1, keepdim=True) / 12**0.5 - s).exp() + 0.1  # noqa: E731
        weights = phi(q, sq) @ phi(k, sk).mT
        return weights @ v / weights.sum(-1, keepdim=True)

    inputs = [t.requires_grad_() for t in (q, k, v)]
    got = torch.autograd.grad(performer_attention(*inputs, w, eps=0.1).square().sum(), inputs)
    torch.testing.assert_close(got, torch.autograd.grad(fixed(*inputs).square().sum(), inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("eps", [0.0, 1e-4])
@pytest.mark.parametrize("norm", [1, 10, 30])
def test_finite_and_close_to_float64_for_large_inputs(dtype, eps, norm):
    q, k, v, w = setup(dim=32)
    q, k = (torch.nn.functional.normalize(x, dim=-1) * norm for x in (q, k))
    low = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double() for x in low]
    out = performer_attention(*low, w.float(), eps=eps)
    want = performer_attention(*exact, w, eps=eps)
    assert out.isfinite().all()
    # exponents reach norm² / √D = 160: their rounding is a relative error of the features
    bound = torch.finfo(dtype).eps + 160 * torch.finfo(torch.float32).eps
    assert (out.double() - want).abs().max() <= 4 * bound * v.abs().max()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.float().square().sum(), low))


def test_eps_zero_keeps_the_keys_that_the_papers_form_loses():
    """Long keys: with the paper's one maximum per head every feature is the eps, and the heads only average."""
    q, k, v, w = setup(dim=32, keys=200)
    k = torch.nn.functional.normalize(k, dim=-1) * 30
    average = v.mean(dim=-2, keepdim=True).expand(-1, -1, 40, -1)
    lost = (performer_attention(q, k, v, w) - average).norm() / average.norm()
    kept = (performer_attention(q, k, v, w, eps=0) - average).norm() / average.norm()
    assert kept > 10 * lost


def test_empty_and_hidden_keys():
    q, k, v, w = setup()
    for kernel in ("softmax", "relu"):
        for eps in (None, 0.0):
            assert performer_attention(q, k[:, :, :0], v[:, :, :0], w, kernel, eps=eps).eq(0).all()
            key_mask = torch.ones(2, 60, dtype=torch.bool)
            key_mask[1] = False
            out = performer_attention(q, k, v, w, kernel, eps=eps, key_mask=key_mask)
            assert out[1].eq(0).all()
            assert out.isfinite().all()
    assert performer_attention(q[:0], k[:0], v[:0], w).shape == (0, 3, 40, 16)


def test_autocast_leaves_the_projection_alone():
    q, k, v, w = (t.float() for t in setup())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = performer_attention(q, k, v, w)
        assert performer_features(q, w, True).dtype == torch.bfloat16
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, performer_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), w))


def test_bad_input():
    q, k, v, w = setup()
    for error, match, arguments, options in (
        (ValueError, "projection has D = 8, the heads have D = 16", (q, k, v, w[:, :8]), {}),
        (ValueError, r"projection must have 2 dimensions \(M, D\)", (q, k, v, w[0]), {}),
        (ValueError, "kernel must be one of 'softmax', 'relu', got 'gelu'", (q, k, v, w, "gelu"), {}),
        (ValueError, "eps must be a finite number of at least 0, got -1", (q, k, v, w), {"eps": -1}),
        (TypeError, "eps must be a number, got str", (q, k, v, w), {"eps": "a"}),
        (ValueError, "k must have at least one channel", (q[..., :0], k[..., :0], v, w[:, :0]), {}),
        (ValueError, "stabilizer must be one of 'head', 'batch'", (q, k, v, w), {"stabilizer": "token"}),
        (ValueError, "k has 2 heads, q 3", (q, k[:, :2], v[:, :2], w), {}),
    ):
        with pytest.raises(error, match=match):
            performer_attention(*arguments, **options)
    with pytest.raises(ValueError, match=r"x must have 4 dimensions \(B, H, N, D\)"):
        performer_features(q[0], w, True)
    with pytest.raises(ValueError, match="projection must have at least one column, got D = 0"):
        performer_features(q[..., :0], w[:, :0], True)
    with pytest.raises(TypeError, match="is_query must be a bool, got str"):
        performer_features(q, w, "relu")
