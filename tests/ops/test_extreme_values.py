"""Results are finite and right wherever float64 is: tiny and large inputs, and NaN that stays visible.

The oracle computes attention's weights by their logarithms in float64, where nothing underflows or overflows.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from cases import dtypes_of, in_float64, name_of
from conftest import needs_cpp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cxv_kernels
from cxv_kernels import conv_norm, kv_state, linear_attention, nystrom_attention, performer_attention
from cxv_kernels._triton import interpreting
from cxv_kernels.testing import tolerance
from cxv_kernels.validation import FLOAT_DTYPES, accumulate_dtype

DIM, FEATURES = 4, 6
PROJECTION = cxv_kernels.orthogonal_projection(
    FEATURES, DIM, generator=torch.Generator().manual_seed(3), dtype=torch.float64
)
every_dtype = pytest.mark.parametrize("dtype", dtypes_of("triton" if interpreting() else "cpu"), ids=name_of)


# -- The oracle: log weights (B, H, N_q, N_k) and the size of the exponents that a float32 computation rounds ----------


def log_elu(x: Tensor) -> Tensor:
    return x.relu().log1p() + (x - x.relu())


def log_product(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a e^bᵀ)."""
    return (a.unsqueeze(-2) + b.unsqueeze(-3)).logsumexp(-1)


def attend_by_logarithms(logits: Tensor, v: Tensor) -> Tensor:
    return logits.softmax(-1) @ v


def elu_oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend_by_logarithms(log_product(log_elu(q), log_elu(k)), v)


def relu_oracle(q: Tensor, k: Tensor, v: Tensor, eps: float, constant: float = 0.0) -> Tensor:
    weights = (q.relu() + constant) @ (k.relu() + constant).mT
    total = weights.sum(-1, keepdim=True) + eps
    return weights @ v / total.masked_fill(total == 0, 1)


def softmax_oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q * DIM**-0.25).softmax(-1) @ (k * DIM**-0.25).softmax(-2).mT @ v


def project(x: Tensor) -> Tensor:
    return x * DIM**-0.25 @ PROJECTION.T


def half_norm(x: Tensor) -> Tensor:
    return x.square().sum(-1, keepdim=True) / (2 * DIM**0.5)


def favor_oracle(q: Tensor, k: Tensor, v: Tensor, eps: float) -> Tensor:
    a_q, a_k = project(q) - half_norm(q), project(k) - half_norm(k)
    if eps == 0:
        return attend_by_logarithms(log_product(a_q, a_k), v)
    log_eps = torch.tensor(eps, dtype=torch.float64).log()
    a_q = torch.logaddexp(a_q - project(q).detach().amax(-1, keepdim=True), log_eps)
    a_k = torch.logaddexp(a_k - project(k).detach().amax((-2, -1), keepdim=True), log_eps)
    return attend_by_logarithms(log_product(a_q, a_k), v)


performer = partial(performer_attention, projection=PROJECTION)
# name: (the op, the oracle, an input's exponents, of relu φ itself)
ATTENTION: dict[str, tuple[Callable, Callable, Callable[[Tensor], Tensor]]] = {
    "softmax": (linear_attention, softmax_oracle, lambda x: x * DIM**-0.25),
    "elu": (partial(linear_attention, feature_map="elu"), elu_oracle, log_elu),
    "relu": (partial(linear_attention, feature_map="relu"), partial(relu_oracle, eps=1e-6), torch.relu),
    "relu eps=0": (
        partial(linear_attention, feature_map="relu", eps=0.0),
        partial(relu_oracle, eps=0.0),
        torch.relu,
    ),
}
for _eps in (1e-4, 1e-12, 1e-25, 1e-40, 0.0):
    ATTENTION[f"favor eps={_eps:g}"] = (
        partial(performer, eps=_eps),
        partial(favor_oracle, eps=_eps),
        lambda x: project(x).abs() + half_norm(x),
    )
for _eps in (1e-3, 1e-40, 0.0):
    ATTENTION[f"favor relu eps={_eps:g}"] = (
        partial(performer, kernel="relu", eps=_eps),
        lambda q, k, v, eps=_eps: relu_oracle(project(q), project(k), v, 0.0, eps),
        lambda x, eps=_eps: project(x).relu() + eps,
    )
every_map = pytest.mark.parametrize("name", ATTENTION)


def assert_right(
    got: Tensor, want: Tensor, dtype: torch.dtype, depth: int, exponent: float = 1.0, unit: float = 1.0
) -> None:
    """One rounding to ``dtype``, and sums and exponentials in the accumulation dtype: the error model.

    Args:
        exponent: the size of the exponents, by which an exponential enlarges their roundings. unit: that the sums'
            terms, times it, are of order 1.
    """
    most = torch.finfo(dtype).max
    got, want = (t.double().clamp(-most, most) * unit for t in (got, want))
    bound = tolerance(want, dtype, depth) + tolerance(want, accumulate_dtype(dtype), depth, exponent)
    error = (got - want).abs()
    assert (error <= bound).all(), f"{error.max():.2e} > {bound:.2e}"


def with_gradients(attend: Callable, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = attend(*inputs)
    return [t.detach() for t in (out, *torch.autograd.grad(out, inputs, grad.to(out.dtype)))]


def check_with(compute: Callable, name: str, inputs: list[Tensor]) -> None:
    """Compare ``compute(q, k, v, grad_out)``, the output and three gradients, with the oracle."""
    _, oracle, exponents = ATTENTION[name]
    dtype = inputs[0].dtype
    exact = [t.double() for t in inputs]
    grad = torch.linspace(-1, 1, inputs[2].shape[-1]).to(dtype).repeat(*inputs[0].shape[:3], 1)
    wants = with_gradients(oracle, exact, grad)
    sizes = [float(exponents(x).abs().max()) for x in exact[:2]]
    units, exponent = [1.0] * 4, 4.0  # relu's projection is a sum
    if "relu" in name:  # of degree 0 in φ: the terms of its gradients are of the size of 1/φ, a query's of its own
        of_queries = exponents(exact[0]).abs().amax(-1)
        sizes[0] = float(of_queries[of_queries > 0].min()) if of_queries.any() else 0.0
        units[1:3] = [min(1.0, size) or 1.0 for size in sizes]
    else:
        exponent = max(1.0, sum(sizes)) * (2 if dtype == torch.float64 else 1)  # there the oracle rounds as much
    for got, want, unit in zip(compute(*inputs, grad), wants, units, strict=True):
        assert got.dtype == dtype
        assert_right(got, want, dtype, inputs[1].shape[2], exponent, unit)


def check_attention(name: str, backend: str, inputs: list[Tensor]) -> None:
    attend = partial(ATTENTION[name][0], backend=backend)
    check_with(lambda q, k, v, grad: with_gradients(attend, [q, k, v], grad), name, inputs)


def draw(seed: int, dtype: torch.dtype, means: tuple[float, float], scales: tuple[float, float]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, 2, n, c, generator=generator, dtype=torch.float64) for n, c in ((5, 4), (9, 4), (9, 3)))
    most = torch.finfo(torch.float16).max
    q, k = (t * scale + mean for t, mean, scale in zip((q, k), means, scales, strict=True))
    return [t.clamp(-most, most).to(dtype) for t in (q, k, v)]


# The map, the means of queries and keys, and their standard deviations.
NAMED_VALUES = [
    ("elu", (-18.0, 0.0), (1.0, 1.0)),
    ("elu", (-60.0, -60.0), (1.0, 1.0)),
    ("elu", (-85.0, -12.0), (1.0, 1.0)),
    ("elu", (0.0, -100.0), (100.0, 100.0)),
    ("elu", (-1000.0, -1000.0), (1.0, 1.0)),
    ("relu eps=0", (0.0, 0.0), (1e-22, 1e-22)),
    ("relu", (0.0, 0.0), (1e-22, 1e-22)),
    ("favor relu eps=0", (0.0, 0.0), (1e-22, 1e-22)),
    ("favor relu eps=1e-40", (0.0, 0.0), (1e-22, 1e-22)),
    ("favor eps=1e-25", (0.0, 0.0), (10.0, 10.0)),
    ("favor eps=1e-40", (0.0, 0.0), (10.0, 10.0)),
]
MEANS = st.one_of(st.sampled_from([-100.0, -85.0, -18.0, -12.0, 0.0, 1.0, 100.0]), st.floats(-100, 100))
SCALES = st.sampled_from([0.0, 1e-22, 1e-20, 1e-8, 1e-3, 1.0, 3.0, 10.0, 100.0, 1e4])


@every_map
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpp)])
@settings(max_examples=24, derandomize=True, deadline=None, database=None)
@given(
    dtype=st.sampled_from(FLOAT_DTYPES),
    means=st.tuples(MEANS, MEANS),
    scales=st.tuples(SCALES, SCALES),
    seed=st.integers(0, 99),
)
def test_attention_at_any_mean_and_scale(backend, name, dtype, means, scales, seed):
    check_attention(name, backend, draw(seed, dtype, means, scales))


@every_dtype
@in_float64
@pytest.mark.parametrize(("name", "means", "scales"), NAMED_VALUES, ids=str)
def test_attention_at_named_values(backend, dtype, name, means, scales):
    if backend == "triton" and ("1e-40" in name or (name == "favor eps=1e-25" and dtype == torch.float16)):
        pytest.skip("test_triton_attention.py has the values of eps that Triton does not support")
    check_attention(name, backend, draw(0, dtype, means, scales))


@in_float64
@pytest.mark.parametrize("name", ["softmax", "elu", "favor eps=0"])
def test_channels_of_far_means(backend, name):
    """Relative to the largest, the other features' Σ exp underflows."""
    q, k, v = draw(0, torch.float32, (0.0, 0.0), (1.0, 1.0))
    apart = torch.tensor([-200.0, 0.0, -100.0, -300.0])
    check_attention(name, backend, [q - apart if name == "favor eps=0" else q, k + apart, v])


@in_float64
def test_features_of_opposite_size(backend):
    """A query weighs the feature that its keys hardly have: no one scale for a head would do."""
    q = torch.tensor([[0.0, -300.0], [-300.0, 0.0]]).view(1, 1, 2, 2).repeat(1, 1, 1, 2)
    k = torch.tensor([[-200.0, 0.0], [-201.0, -400.0], [-199.0, -90.0]]).view(1, 1, 3, 2).repeat(1, 1, 1, 2)
    check_attention("elu", backend, [q, k, torch.randn(1, 1, 3, 3)])


def test_elu_reference_has_exact_derivatives():
    """The first three at 0, far below, where elu(x) + 1 is 0, and far above, where exp(x) overflows."""
    x = torch.tensor([-1e4, -700.0, -40.0, -1.0, 0.0, 1.0, 1e3, 1e4], dtype=torch.float64, requires_grad=True)
    ones = torch.ones(1, 1, x.numel(), 1, dtype=torch.float64)

    def phi(x: Tensor) -> Tensor:
        return kv_state(x.view(1, 1, 1, -1), ones[:, :, :1], "elu", backend="reference")[1].view(-1)

    wants = [torch.where(x > 0, x + 1, x.clamp(max=0).exp())] + 3 * [torch.where(x > 0, 0, x.clamp(max=0).exp())]
    wants[1] = torch.where(x > 0, 1, wants[2])
    y = phi(x)
    for order, want in enumerate(wants):
        torch.testing.assert_close(y, want, rtol=1e-15, atol=0)
        if order < 3:
            (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)


def test_elu_is_exported_to_onnx(tmp_path):
    """Queries and keys whose φ(q)·φ(k) float32 does not hold."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")

    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return linear_attention(q, k, v, "elu", backend="reference")

    inputs = draw(0, torch.float32, (-85.0, -12.0), (1.0, 1.0))
    torch.onnx.export(Attention().eval(), tuple(inputs), tmp_path / "elu.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "elu.onnx", providers=["CPUExecutionProvider"])
    names = [t.name for t in session.get_inputs()]
    (out,) = session.run(None, dict(zip(names, (t.numpy() for t in inputs), strict=True)))
    assert_right(torch.from_numpy(out), elu_oracle(*(t.double() for t in inputs)), torch.float32, 9, 97)


@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
@every_dtype
@in_float64
def test_kv_state_at_any_mean(backend, dtype, feature_map):
    """S and z, which are public, are accurate in float32 for normal numbers, and 0 below them."""
    for mean, scale in ((-18.0, 1.0), (-80.0, 1.0), (-100.0, 1.0), (100.0, 1.0), (0.0, 1e-22), (0.0, 1e3)):
        _, k, v = draw(1, dtype, (0.0, mean), (1.0, scale))
        exact_k, exact_v = k.double(), v.double()
        phi = {"elu": log_elu(exact_k).exp(), "relu": exact_k.relu()}.get(feature_map)
        phi = (exact_k * DIM**-0.25).softmax(-2) if phi is None else phi
        state, z = kv_state(k, v, feature_map, backend=backend)
        exponent = max(1.0, float(exact_k.abs().max())) if feature_map != "relu" else 1.0
        for got, want in ((state, phi.mT @ exact_v), (z, phi.sum(-2))):
            error, size = (got.double() - want).abs(), (phi.mT @ exact_v.abs() if got is state else want)
            assert (
                error <= exponent * 1e-6 * size + 9 * torch.finfo(torch.float32).tiny * (1 + exact_v.abs().max())
            ).all()


# -- NaN and infinity -------------------------------------------------------------------------------------------------

SPOILT: dict[str, Callable] = {name: attend for name, (attend, *_) in ATTENTION.items()}
SPOILT |= {f"kv_state {name}": partial(kv_state, feature_map=name) for name in ("softmax", "elu", "relu")}


def results(op: Callable, *inputs: Tensor, **options) -> list[Tensor]:
    out = op(*inputs, **options)
    return list(out) if isinstance(out, tuple) else [out]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("name", SPOILT)
@needs_cpp
def test_attention_of_values_that_are_not_finite(name, value):
    """Outputs of the C++ kernels have the float64 reference's pattern of finite elements."""
    op, attention = SPOILT[name], not name.startswith("kv_state")
    for position in range(3 if attention else 2):
        inputs = draw(2, torch.float32, (0.0, 0.0), (1.0, 1.0))[0 if attention else 1 :]
        inputs[position][0, 1, 2, 1] = value
        wants = results(op, *(t.double() for t in inputs), backend="reference")
        for got, want in zip(results(op, *inputs, backend="cpu"), wants, strict=True):
            assert torch.equal(got.isfinite(), want.isfinite())
            assert torch.equal(got[:, 0].isfinite(), torch.ones_like(got[:, 0], dtype=torch.bool))
        if value != value or position == 2 - (not attention):
            assert any(not want.isfinite().all() for want in wants)


@pytest.mark.parametrize("is_query", [True, False], ids=["query", "key"])
@pytest.mark.parametrize(("kernel", "eps"), [("softmax", 1e-4), ("softmax", 0.0), ("softmax", 1e-40), ("relu", 1e-3)])
@in_float64
def test_features_in_float16(backend, kernel, eps, is_query):
    """Where float16 can hold them: it is float32 inside, and rounds once."""
    if backend == "triton" and eps == 1e-40:
        pytest.skip("test_triton_attention.py has the values of eps that Triton does not support")
    op = partial(cxv_kernels.performer_features, projection=PROJECTION, kernel=kernel, eps=eps)
    for mean, scale in ((0.0, 1.0), (100.0, 1.0), (-100.0, 30.0), (0.0, 1e3), (0.0, 1e-8), (0.0, 4e3)):
        x = draw(4, torch.float16, (mean, 0.0), (scale, 1.0))[0]
        want = op(x.double(), is_query=is_query, backend="reference")
        got = op(x, is_query=is_query, backend=backend)
        exponent = float((project(x.double()).abs() + half_norm(x.double())).max()) if kernel == "softmax" else 4.0
        assert_right(got, want, torch.float16, DIM, max(1.0, exponent))
        assert torch.equal(got.isfinite(), op(x.float(), is_query=is_query, backend=backend).half().isfinite())
        x[0, 0, 1, 2] = torch.nan
        assert op(x, is_query=is_query, backend=backend)[0, 0, 1].isnan().all()


# -- nystrom_attention and conv_norm ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@needs_cpp
def test_nystrom_of_values_that_are_not_finite(value):
    for position in range(3):
        inputs = draw(5, torch.float32, (0.0, 0.0), (1.0, 1.0))
        inputs[position][0, 1, 2, 1] = value
        want = nystrom_attention(*(t.double() for t in inputs), 3, backend="reference")
        got = nystrom_attention(*inputs, 3, backend="cpu")
        assert torch.equal(got.isfinite(), want.isfinite())
        assert value == value or not got.isfinite().all()  # a key of −∞ may have no weight


@pytest.mark.parametrize(("mean", "scale"), [(0.0, 0.0), (0.0, 1e-22), (0.0, 1e4), (100.0, 1.0), (-100.0, 1e-3)])
@every_dtype
@needs_cpp
def test_nystrom_at_any_mean_and_scale(dtype, mean, scale):
    """Large logits, and landmarks that are all the same, whose matrix is singular."""
    inputs = draw(6, dtype, (mean, mean), (scale, scale))
    attend = partial(nystrom_attention, num_landmarks=3)
    grad = torch.linspace(-1, 1, 3).to(dtype).repeat(1, 2, 5, 1)
    gots = with_gradients(partial(attend, backend="cpu"), inputs, grad)
    wants = with_gradients(partial(attend, backend="reference"), [t.double() for t in inputs], grad)
    largest = max(float(t.double().abs().max()) for t in inputs[:2])
    logit = max(1.0, 4 * largest**2 / DIM**0.5)
    for got, want, unit in zip(gots, wants, (1.0, 1 / max(1.0, largest), 1 / max(1.0, largest), 1.0), strict=True):
        assert_right(got, want, dtype, 9, 8 * logit, unit)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
@every_dtype
@in_float64
def test_conv_norm_of_constant_pixels(backend, dtype, layout):
    """The variance is 0: the output is beta, and every gradient is finite."""
    x = torch.full((2, 3, 5, 5), 3.0).to(dtype).to(memory_format=layout)
    weight = torch.randn(1, 3, 3, 3).expand(8, -1, -1, -1).to(dtype)
    gamma, beta = torch.randn(8), torch.randn(8)
    inputs = [t.clone().requires_grad_() for t in (x, weight, torch.zeros(8, dtype=dtype), gamma, beta)]
    out = conv_norm(*inputs, backend=backend)
    assert_right(out.detach(), beta.double().view(1, 8, 1, 1).expand(out.shape), dtype, 27, 4)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out, inputs, torch.randn_like(out)))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@needs_cpp
def test_conv_norm_of_values_that_are_not_finite(value, layout):
    x = torch.randn(2, 3, 7, 7).to(memory_format=layout)
    parameters = torch.randn(8, 3, 3, 3), torch.randn(8), torch.randn(8), torch.randn(8)
    x[1, 2, 3, 3] = value
    out = conv_norm(x, *parameters, backend="cpu")
    seen = torch.zeros(2, 7, 7, dtype=torch.bool)
    seen[1, 2:5, 2:5] = True
    assert torch.equal(out.isfinite(), ~seen[:, None].expand(out.shape))
