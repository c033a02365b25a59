"""performer_attention and performer_features: the semantics of FAVOR+ and the paper's variants of it.

test_linear_attention.py has more of the kernels; test_values.py, test_gradients.py and test_pytorch.py have the
properties of every op.
"""

import math
from functools import partial

import pytest
import torch
from cases import (
    PERFORMER,
    Sizes,
    assert_close_to_float64,
    device_of,
    every,
    every_backend,
    in_float64,
    run,
    with_dtypes,
)
from cases import projection as projection_of
from conftest import heads, needs_cpp
from torch.nn.functional import normalize

import cxv_kernels
from cxv_kernels import orthogonal_projection, performer_attention, performer_features
from cxv_kernels._triton import interpreting


def setup(queries=40, keys=60, dim=16, value_dim=16, batch=2, features=None):
    q, k, v = heads(batch, 3, queries, dim), heads(batch, 3, keys, dim), heads(batch, 3, keys, value_dim)
    return q, k, v, orthogonal_projection(features or cxv_kernels.num_random_features(dim), dim, dtype=q.dtype)


def test_number_of_features():
    assert [cxv_kernels.num_random_features(d) for d in (1, 2, 32, 64)] == [1, 1, 110, 266]


def test_projection_is_orthogonal_with_gaussian_norms_and_reproducible():
    draw = [orthogonal_projection(110, 32, generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert torch.equal(*draw)
    directions = normalize(draw[0].double(), dim=1)
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
@in_float64
def test_performer_attention_is_its_definition(backend, kernel, eps):
    q, k, v, w = setup(value_dim=5)
    for key_mask in (None, torch.rand(2, 60) > 0.3):
        got = performer_attention(q, k, v, w, kernel, eps=eps, key_mask=key_mask, backend=backend)
        torch.testing.assert_close(got, definition(q, k, v, w, kernel, eps, key_mask))


def test_default_eps_is_the_papers():
    q, k, v, w = setup()
    assert torch.equal(performer_attention(q, k, v, w), performer_attention(q, k, v, w, eps=1e-4))
    assert torch.equal(performer_attention(q, k, v, w, "relu"), performer_attention(q, k, v, w, "relu", eps=1e-3))


@in_float64
def test_features_make_attention(backend):
    q, k, v, w = setup()
    phi_q, phi_k = (performer_features(x, w, x is q, backend=backend) for x in (q, k))
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


@pytest.mark.parametrize("features", [70] if interpreting() else [1, 15, 16, 17, 64, 300])
@with_dtypes
@every(PERFORMER)
def test_number_of_random_features(case, backend, dtype, features):
    """Also more than a block of the kernels holds."""
    sizes = Sizes(1, 1, 20, 37, 12, 9)
    w = projection_of(features, 12)
    assert_close_to_float64(case, backend, case.inputs(sizes, dtype), sizes, projection=w)


def test_head_stabilizer_in_any_batch():
    q, k, v, w = setup(batch=3)
    k[1] *= 3
    for alone in range(3):
        part = slice(alone, alone + 1)
        got = performer_attention(q[part], k[part], v[part], w)
        torch.testing.assert_close(got, performer_attention(q, k, v, w)[part], rtol=1e-12, atol=1e-13)


def test_batch_stabilizer_is_the_released_code():
    q, k, v, w = setup(batch=3)
    k[1] *= 3
    released = performer_attention(q, k, v, w, stabilizer="batch")
    torch.testing.assert_close(released, definition(q, k, v, w, "softmax", 1e-4, batch_maximum=True))
    assert not torch.allclose(released[:1], performer_attention(q[:1], k[:1], v[:1], w, stabilizer="batch"), rtol=1e-3)


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_batch_stabilizer_gradcheck(eps):
    """Finite differences see the maxima: with eps > 0 only the batch stabilizer has its function's gradient."""
    q, k, v, w = setup(4, 5, 3, 2, features=6)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    options = {"eps": eps, "stabilizer": "batch", "backend": "reference"}
    assert torch.autograd.gradcheck(lambda *t: performer_attention(*t, w, **options), inputs)
    for is_query in (True, False):
        assert torch.autograd.gradcheck(lambda x: performer_features(x, w, is_query, **options), inputs[0])  # noqa: B023


@in_float64
def test_head_stabilizers_carry_no_gradient(backend):
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
    got = torch.autograd.grad(performer_attention(*inputs, w, eps=0.1, backend=backend).square().sum(), inputs)
    torch.testing.assert_close(got, torch.autograd.grad(fixed(*inputs).square().sum(), inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("eps", [0.0, 1e-4])
@pytest.mark.parametrize("norm", [1, 10, 30])
def test_long_inputs_of_the_reference(dtype, eps, norm):
    q, k, v, w = setup(dim=32)
    q, k = (normalize(x, dim=-1) * norm for x in (q, k))
    low = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    out = performer_attention(*low, w.float(), eps=eps, backend="reference")
    want = performer_attention(*(x.detach().double() for x in low), w, eps=eps, backend="reference")
    assert out.isfinite().all()
    # exponents reach norm² / √D = 160: their rounding is a relative error of the features
    bound = torch.finfo(dtype).eps + 160 * torch.finfo(torch.float32).eps
    assert (out.double() - want).abs().max() <= 4 * bound * v.abs().max()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.float().square().sum(), low))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("norm", [10, 30])
@needs_cpp
@every(PERFORMER[:2])
def test_long_keys(case, norm, dtype):
    """Exponents reach norm²/√D = 160, whose rounding is a relative error of the features. The paper's form, with one
    maximum per head, loses its keys there: every feature is the eps, and the heads only average. eps = 0 does not."""
    sizes = Sizes(1, 2, 40, 200, 32, 32)
    q, k, v = case.inputs(sizes)
    low = [x.to(dtype) for x in (norm * normalize(q, dim=-1), norm * normalize(k, dim=-1), v)]
    out = assert_close_to_float64(case, "cpu", low, sizes, 20)[0].double()
    average = v.mean(dim=-2, keepdim=True).expand_as(out)
    if norm == 30:
        assert ((out - average).norm() / average.norm() > 0.5) == (case.label == "exact")


@every_backend
def test_gradients_where_eps_dominates(backend):
    """Long keys of unequal length: with one maximum for all, nearly all features are the eps alone."""
    sizes = Sizes(1, 2, 60, 200, 32, 32)
    q, k, v = PERFORMER[0].inputs(sizes)
    inputs = [t.half() for t in (q, 12 * normalize(k, dim=-1), v)]
    gots = run(PERFORMER[0].bind(backend, sizes), [t.to(device_of(backend)) for t in inputs])
    wants = run(PERFORMER[0].bind("reference", sizes), [t.double() for t in inputs])
    for got, want in zip(gots, wants, strict=True):
        assert (got.cpu().double() - want).abs().max() <= 1e-2 * want.abs().max() + 6e-8


def test_autocast_leaves_the_projection_alone():
    q, k, v, w = (t.float() for t in setup())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = performer_attention(q, k, v, w)
        assert performer_features(q, w, True).dtype == torch.bfloat16
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, performer_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), w))


@every_backend
def test_options_of_the_reference_alone(backend):
    q, k, v = (t.to(device_of(backend)) for t in setup()[:3])
    w = torch.randn(5, 16).to(q.device)
    attend = partial(performer_attention, q.float(), k.float(), v.float())
    with pytest.raises(RuntimeError, match=f"{backend} does not support stabilizer='batch'"):
        attend(w, stabilizer="batch", backend=backend)
    with pytest.raises(RuntimeError, match=f"{backend} does not support a projection that requires grad"):
        attend(w.requires_grad_(), backend=backend)
    assert attend(w, backend="reference").requires_grad


@needs_cpp
def test_raw_ops_refuse_bad_arguments():
    q, k, v, w = setup()
    op = torch.ops.cxv_kernels.performer_attention_forward
    for match, w, kernel in (  # noqa: B020
        ("kernel must be softmax or relu, got cosine", w, "cosine"),
        ("projection has size 15 in dimension 1, expected 16", w[:, :15], "softmax"),
        ("projection has a dtype that does not go with q's", w.float(), "softmax"),
    ):
        with pytest.raises(RuntimeError, match=match):
            op(q, k, v, w, None, kernel, 0.0)


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
    with pytest.raises(ValueError, match="projection is on meta, x on cpu"):
        performer_features(q, w.to("meta"), True)
    with pytest.raises(TypeError, match="is_query must be a bool, got str"):
        performer_features(q, w, "relu")
