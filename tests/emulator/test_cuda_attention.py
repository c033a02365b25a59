"""The tensor-core kernels (csrc/cuda/linear_attention) without a GPU: run on the host under the emulator."""

import ctypes
import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from cuda_emulator import NUMBERS, Arena, Arguments, View, build, call, make, needs_cxx
from test_extreme_values import ATTENTION, NAMED_VALUES, PROJECTION, check_with, draw

from cxv_kernels.ops.linear_attention.reference import kv_state_reference, linear_attention_reference
from cxv_kernels.ops.performer_attention.reference import (
    orthogonal_projection,
    performer_attention_reference,
    performer_features_reference,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import cuda_report

pytestmark = needs_cxx
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LINEAR, FAVOR = ("softmax", "elu", "relu"), ("favor", "favor_exact", "favor_relu")
MAPS = (*LINEAR, *FAVOR)
EPS = {"relu": 1e-6, "favor": 1e-4, "favor_relu": 1e-3}
# cxv::cuda::Call
FORWARD, BACKWARD, STATE, STATE_BACKWARD, FEATURES_MAX, FEATURES_FORWARD, FEATURES_BACKWARD = range(7)


@pytest.fixture(scope="module")
def sm75(tmp_path_factory, csrc, attention):
    return build("linear_attention.cpp", csrc, tmp_path_factory.mktemp("sm75"), attention)


def projection_for(feature_map, dim, features=None):
    if feature_map not in FAVOR:
        return None
    return orthogonal_projection(features or 2 * dim + 3, dim, generator=torch.Generator().manual_seed(5))


def describe(arena, feature_map, q, k, v, projection=None, key_mask=None, eps=None):
    """cxv::LinearAttentionParams with its inputs, state and statistics, and the last two as tensors."""
    batch, heads, queries, dim = q.shape
    features = dim if projection is None else projection.shape[0]
    a = Arguments(DTYPES.index(q.dtype), NUMBERS[feature_map], EPS.get(feature_map, 0) if eps is None else eps)
    a.batch, a.heads, a.queries, a.keys, a.dim, a.value_dim = batch, heads, queries, k.shape[2], dim, v.shape[3]
    a.features = features
    a.q, a.k, a.v = (View(arena.put(t)) for t in (q, k, v))
    shapes = (features, v.shape[3]), (features,), ()
    results = [arena.result((batch, heads, *shape), torch.float32) for shape in shapes]
    a.state, a.key_stat, a.key_max = (t.data_ptr() for t in results)
    if projection is not None:
        a.projection = arena.put(projection).data_ptr()
    if key_mask is not None:
        a.key_mask, a.mask_stride = arena.put(key_mask).data_ptr(), tuple(key_mask.stride())
    return a, results


def run(
    simt,
    feature_map,
    q,
    k,
    v,
    grad_out,
    projection=None,
    key_mask=None,
    seed=0,
    between=lambda *_: None,
    needed=(1, 1, 1),
    eps=None,
):
    """out, grad_q, grad_k, grad_v, state, key_stat, key_max, as the kernels write them into NaNs.

    between: is given state and key_stat, before the backward pass reads them. needed: the gradients that are written.
    """
    with Arena(simt) as arena:
        a, results = describe(arena, feature_map, q, k, v, projection, key_mask, eps)
        out, *grads = (arena.result(t.shape, t.dtype, t.stride()) for t in (grad_out, q, k, v))
        a.grad_out, a.out = View(arena.put(grad_out)), View(out)
        a.grad_q, a.grad_k, a.grad_v = (View(t if need else None) for t, need in zip(grads, needed, strict=True))
        call(simt.simt_attention, ctypes.byref(a), FORWARD, seed)
        between(*results[:2])
        call(simt.simt_attention, ctypes.byref(a), BACKWARD, seed)
    return out, *grads, *results


def reference(feature_map, q, k, v, projection=None, key_mask=None, eps=None):
    eps = EPS.get(feature_map, 0) if eps is None else eps
    if projection is None:
        return linear_attention_reference(q, k, v, feature_map, eps, key_mask)
    kernel = "relu" if feature_map == "favor_relu" else "softmax"
    return performer_attention_reference(q, k, v, projection.to(q.dtype), kernel, eps, key_mask=key_mask)


def exact(feature_map, q, k, v, grad_out, projection=None, key_mask=None, eps=None):
    """The reference's out, grad_q, grad_k and grad_v in float64."""
    inputs = [t.double().requires_grad_() for t in (q, k, v)]
    out = reference(feature_map, *inputs, projection, key_mask, eps)
    return out, *torch.autograd.grad(out, inputs, grad_out.double())


def assert_close(name, got, want, dtype, terms=0):
    """Every operand of a product is rounded once to dtype, and so is the result; the terms of a sum are of the size of
    the largest result, and their roundings partly cancel. A gradient that is 0 because products of size ``terms``
    cancel is 0 up to their rounding to float32."""
    if want.numel() == 0:
        return
    unit = torch.finfo(dtype).eps / 2
    bound = unit * want.abs() + (4 if dtype.itemsize == 2 else 16) * unit * want.abs().max() + 2.0**-23 * terms
    if dtype == torch.float16:
        bound += 2.0**-25  # half the smallest number
    error = (got.double() - want).abs()
    assert (error <= bound).all(), f"{name}: {error.max():.2e}, {(error / bound).max():.2f} of the bound"


def assert_all_close(results, wants, dtype, terms=0):
    for name, got, want in zip(("out", "dq", "dk", "dv"), results, wants, strict=False):
        assert_close(name, got, want, dtype, terms)


def check(simt, feature_map, queries, keys, dim, value_dim, dtype=torch.float16, *, batch=1, heads=2, layout="bhnd",
          mask=None, features=None, seed=0):  # fmt: skip
    q, k, v, grad_out = (
        make((batch, heads, *shape), dtype, i, layout)
        for i, shape in enumerate(((queries, dim), (keys, dim), (keys, value_dim), (queries, value_dim)))
    )
    projection = projection_for(feature_map, dim, features)
    results = run(simt, feature_map, q, k, v, grad_out, projection, mask, seed)
    terms = grad_out.abs().max() * v.abs().max() * value_dim if grad_out.numel() * v.numel() else 0
    assert_all_close(results, exact(feature_map, q, k, v, grad_out, projection, mask), dtype, float(terms))


EVERY_SIZE = [*((m, torch.float16) for m in MAPS), *((m, torch.float32) for m in LINEAR)]
every_size = pytest.mark.parametrize(("feature_map", "dtype"), EVERY_SIZE, ids=lambda x: str(x).removeprefix("torch."))


SIZES = {  # tokens of queries and keys, channels of keys and values
    "one-token": ((1, 1, 5, 17), {}),
    "channels-before-tokens": ((130, 63, 32, 32), {"layout": "nchw", "seed": 1}),
    "strided-views": ((63, 130, 17, 5), {"layout": "gaps", "seed": 2}),
    "widest": ((33, 40, 64, 50), {"features": 75, "heads": 1, "seed": 3}),
    "narrowest-in-several-splits": ((1100, 1100, 13, 16), {"heads": 1, "seed": 4}),
    "features-of-several-blocks": ((20, 20, 32, 32), {"heads": 1, "features": 150}),
    "odd": ((67, 130, 30, 32), {"layout": "nchw", "seed": 6}),
    "odd-contiguous": ((130, 33, 17, 20), {}),
    "no-queries": ((0, 3, 5, 6), {}),
    "no-keys": ((3, 0, 5, 6), {}),
    "no-tokens": ((0, 0, 5, 6), {}),
    "no-channels": ((7, 6, 5, 0), {}),
}


@every_size
class TestAgainstFloat64:
    """Heads of every size, except projected ones in float32, which take the emulator too long."""

    @pytest.mark.parametrize(("sizes", "options"), SIZES.values(), ids=SIZES)
    def test_sizes(self, sm75, feature_map, dtype, sizes, options):
        check(sm75, feature_map, *sizes, dtype, **options)

    def test_key_mask(self, sm75, feature_map, dtype):
        mask = torch.rand(2, 70, generator=torch.Generator().manual_seed(4)) > 0.4
        mask[1] = False  # no key is seen
        check(sm75, feature_map, 33, 70, 12, 20, dtype, batch=2, heads=1, mask=mask, seed=5)
        expanded = mask[:, None].expand(2, 3, 70)[:, 1]
        check(sm75, feature_map, 3, 70, 12, 20, dtype, batch=2, heads=1, mask=expanded, layout="nchw")

    def test_a_hidden_key_may_be_anything(self, sm75, feature_map, dtype):
        q, k, v, g = (make((1, 1, 9, 8), dtype, i) for i in range(4))
        k[:, :, 4], v[:, :, 4] = torch.nan, torch.inf
        mask = torch.arange(9)[None] != 4
        results = run(sm75, feature_map, q, k, v, g, projection_for(feature_map, 8), mask)
        assert all(t.isfinite().all() for t in results)

    def test_nan_is_not_hidden(self, sm75, feature_map, dtype):
        projection = projection_for(feature_map, 8)
        for i in range(3):
            q, k, v, g = inputs = [make((1, 1, 9, 8), dtype, i) for i in range(4)]
            inputs[i][0, 0, 2, 3] = torch.nan
            got = run(sm75, feature_map, q, k, v, g, projection)[0].isnan()
            assert torch.equal(got, reference(feature_map, q, k, v, projection).isnan())


@pytest.mark.parametrize("feature_map", FAVOR)
@pytest.mark.parametrize("layout", ["bhnd", "nchw"])
def test_projected_float32(sm75, feature_map, layout):
    check(sm75, feature_map, 33, 40, 13, 16, torch.float32, layout=layout, seed=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("feature_map", ["favor", "favor_exact", "favor_relu"])
@pytest.mark.parametrize("is_query", [True, False])
def test_features(sm75, feature_map, is_query, dtype):
    x, projection = make((2, 2, 150, 13), dtype, 0, "nchw"), projection_for(feature_map, 13)
    kernel, eps = "relu" if feature_map == "favor_relu" else "softmax", EPS.get(feature_map, 0)
    grad_phi = make((2, 2, 150, projection.shape[0]), dtype, 1)
    feature_map = feature_map.replace("_exact", "")  # eps says it
    with Arena(sm75) as arena:
        a, (_, _, key_max) = describe(arena, feature_map, x, x, x, projection)
        a.eps = eps
        phi, grad = arena.result(grad_phi.shape, dtype), arena.result(x.shape, dtype, x.stride())
        key_max.zero_()
        a.out = View(phi)
        if not is_query and kernel == "softmax":
            call(sm75.simt_attention, ctypes.byref(a), FEATURES_MAX, 2)
        a.key_max = None if is_query else key_max.data_ptr()
        call(sm75.simt_attention, ctypes.byref(a), FEATURES_FORWARD, 3)
        a.grad_out, a.grad_q = View(arena.put(grad_phi)), View(grad)
        call(sm75.simt_attention, ctypes.byref(a), FEATURES_BACKWARD, 4)
    wide = x.double().requires_grad_()
    want = performer_features_reference(wide, projection.double(), is_query, kernel, eps)
    assert_close("phi", phi, want, dtype)
    assert_close("dx", grad, torch.autograd.grad(want, wide, grad_phi.double())[0], dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("feature_map", LINEAR)
def test_kv_state(sm75, feature_map, dtype):
    k, v = make((2, 2, 150, 20), dtype, 0, "nchw"), make((2, 2, 150, 12), dtype, 1)
    mask = torch.rand(2, 150, generator=torch.Generator().manual_seed(4)) > 0.4
    grad_state, grad_z = (make((2, 2, 20, *s), torch.float32, 2) for s in ((12,), ()))
    inputs = [t.double().requires_grad_() for t in (k, v)]
    state_, z_ = kv_state_reference(*inputs, feature_map, mask)
    wants = torch.autograd.grad((state_, z_), inputs, (grad_state.double(), grad_z.double()))
    with Arena(sm75) as arena:
        a, (state, stat, _) = describe(arena, feature_map, k, k, v, key_mask=mask)
        grads = [arena.result(t.shape, t.dtype, t.stride()) for t in (k, v)]
        if feature_map == "softmax":  # as op.py does: the gradient of the normalization
            grad_z = -(grad_state * state_.detach()).sum(-1).float()
        a.grad_state, a.grad_z = (arena.put(t).data_ptr() for t in (grad_state, grad_z))
        a.grad_k, a.grad_v = map(View, grads)
        if feature_map == "elu":
            a.feature_map = NUMBERS["kv_state elu"]
        call(sm75.simt_attention, ctypes.byref(a), STATE, 1)
        call(sm75.simt_attention, ctypes.byref(a), STATE_BACKWARD, 2)
    assert_close("state", state, state_, dtype)
    if feature_map != "softmax":
        assert_close("z", stat, z_, dtype)
    for name, got, want in zip(("dk", "dv"), grads, wants, strict=True):
        assert_close(name, got, want, dtype)


@pytest.mark.parametrize("feature_map", MAPS)
class TestNumerics:
    def test_same_bits_in_any_schedule(self, sm75, feature_map):
        q, k, v, g = (make((1, 1, 70, c), torch.float16, i) for i, c in enumerate((20, 20, 12, 12)))
        first, *others = (
            run(sm75, feature_map, q, k, v, g, projection_for(feature_map, 20), seed=seed) for seed in (0, 1, 2)
        )
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))

    def test_needed_gradients_alone_have_the_same_bits(self, sm75, feature_map):
        """Every subset of the gradients of q, k and v; the others stay unwritten. Projected float32 takes long here."""
        for dtype in (torch.float16, torch.float32)[: 1 + (feature_map in LINEAR)]:
            q, k, v, g = (make((1, 2, 70, c), dtype, i) for i, c in enumerate((12, 12, 9, 9)))
            projection = projection_for(feature_map, 12)
            every = run(sm75, feature_map, q, k, v, g, projection)[1:4]
            for needed in itertools.product((False, True), repeat=3):
                grads = run(sm75, feature_map, q, k, v, g, projection, needed=needed)[1:4]
                for got, want, need in zip(grads, every, needed, strict=True):
                    assert torch.equal(got, want) if need else got.isnan().all()

    def test_same_bits_alone_and_in_a_batch(self, sm75, feature_map):
        """The three tiles of tokens are one block's of three heads, and two blocks' of one."""
        q, k, v, g = (make((3, 1, 270, c), torch.float16, i) for i, c in enumerate((8, 8, 12, 12)))
        projection = projection_for(feature_map, 8)
        batch = run(sm75, feature_map, q, k, v, g, projection)
        alone = run(sm75, feature_map, *(t[1:2] for t in (q, k, v, g)), projection)
        assert all(torch.equal(a[1:2], b) for a, b in zip(batch, alone, strict=True))

    @pytest.mark.parametrize("size", [8, 30])
    def test_large_queries_and_keys(self, sm75, feature_map, size):
        """|q|, |k| up to 30: out is right; gradients are finite, and those of v right."""
        q, k, v, g = (make((1, 2, 70, c), torch.float16, i) for i, c in enumerate((16, 16, 12, 12)))
        q, k, projection = (q * size).clamp(-30, 30), (k * size).clamp(-30, 30), projection_for(feature_map, 16)
        results = run(sm75, feature_map, q, k, v, g, projection)
        assert all(t.isfinite().all() for t in results)
        out, _, _, grad_v = exact(feature_map, q, k, v, g, projection)
        assert_close("out", results[0], out, torch.float16)
        assert_close("dv", results[3], grad_v, torch.float16)

    @pytest.mark.parametrize("scale", [1e-4, 1e3])
    def test_gradients_of_any_size(self, sm75, feature_map, scale):
        """A loss scale neither overflows inside nor vanishes."""
        q, k, v, g = (make((1, 1, 40, c), torch.float16, i) for i, c in enumerate((16, 16, 12, 12)))
        projection = projection_for(feature_map, 16)
        g = g * scale
        results = run(sm75, feature_map, q, k, v, g, projection)
        assert_all_close(results, exact(feature_map, q, k, v, g, projection), torch.float16)

    @pytest.mark.parametrize("scales", [(1, 1e-40), (1e-40, 1)], ids=["gradients", "values"])
    def test_subnormal_numbers(self, sm75, feature_map, scales):
        """The reciprocal of less than 2⁻¹²⁸ is no float32. A saturated loss has such gradients."""
        q, k, v, g = (make((1, 1, 20, c), torch.float32, i) for i, c in enumerate((12, 12, 5, 5)))
        v, g, projection = v * scales[0], g * scales[1], projection_for(feature_map, 12)
        results = run(sm75, feature_map, q, k, v, g, projection)
        for got, expected in zip(results, exact(feature_map, q, k, v, g, projection), strict=False):
            assert ((got - expected).abs() <= 1e-37 + 1e-5 * expected.abs().max()).all()

    @pytest.mark.parametrize("size", [1, 30])
    def test_the_state_of_a_million_keys(self, sm75, feature_map, size):
        """64 keys as if each came 16,384 times, |q| and |k| up to 30: the state is so many times theirs (its logarithm
        so much more), and the gradients of a key so many times less."""
        times, scale = 1 << 14, 1024
        q, k, v, g = (make((1, 1, 64, c), torch.float16, i) for i, c in enumerate((16, 16, 12, 12)))
        q, k = (q * size).clamp(-30, 30), (k * size).clamp(-30, 30)
        projection = projection_for(feature_map, 16)

        def repeated(state, key_stat):
            if feature_map in ("softmax", "elu", "favor_exact"):
                key_stat += math.log(times)
            else:
                state *= times
                key_stat *= times

        results = run(sm75, feature_map, q, k, v, g * scale, projection, between=repeated)
        assert all(t.isfinite().all() for t in results)
        eps = EPS.get(feature_map, 0) / (times if feature_map == "relu" else 1)  # of the denominator, or of each key
        _, *grads = exact(feature_map, q, k, v, g * scale, projection, eps=eps)
        wants = [grads[0], grads[1] / times, grads[2] / times]
        for name, got, want in list(zip(("dq", "dk", "dv"), results[1:4], wants, strict=True))[size == 30 and 2 :]:
            assert_close(name, got, want, torch.float16)

    def test_many_keys(self, sm75, feature_map):
        """Sums of 40,000 keys and gradients of 1/40,000 of theirs (of the slower maps 5,000): 16 bits hold both."""
        keys = 40_000 if feature_map in ("softmax", "relu") else 5_000
        q, k, v, g = (make((1, 1, n, 16), torch.float16, i) for i, n in enumerate((64, keys, keys, 64)))
        projection = projection_for(feature_map, 16, 16)
        results = run(sm75, feature_map, q, k, v, g * 100, projection)
        assert_all_close(results, exact(feature_map, q, k, v, g * 100, projection), torch.float16)


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("case", ["one_visible_key", "equal_keys", "constant_v"])
def test_features_that_see_the_same_of_v(sm75, case, feature_map):
    """U is float32's rounding alone, so that in units of U what relu's eps does to δ, (Σp − 1) dO·c̄, is huge. Of relu
    every other query sees nothing, and of the rest Σp is far from 1."""
    q, k, v, g = (make((1, 2, n, 16), torch.float16, i) for i, n in enumerate((40, 20, 20, 40)))
    size = 2**-10 if feature_map == "relu" else 1
    q, k = torch.where(torch.arange(40)[:, None] % 2 > 0, q.abs(), -q.abs()) * size, k.abs() * size
    mask = torch.arange(20)[None] == 3 if case == "one_visible_key" else None
    if case == "equal_keys":
        k = k[:, :, :1].repeat(1, 1, 20, 1)
    if case == "constant_v":
        v = v[:, :, :1].repeat(1, 1, 20, 1)
    projection = projection_for(feature_map, 16)
    results = run(sm75, feature_map, q, k, v, g, projection, mask)
    terms = float(g.abs().max() * v.abs().max()) * 16
    assert_all_close(results, exact(feature_map, q, k, v, g, projection, mask), torch.float16, terms)


def test_the_report_knows_the_launches(sm75):
    """cuda_report.launch repeats what SumsShape and TokensShape say in C++."""
    threads, shared = (ctypes.c_int * 16)(), (ctypes.c_int * 16)()
    maps = ("favor", "favor_relu", "softmax", "relu", "elu")
    for dtype, number, size in (("__half", 2, 16), ("__half", 2, 32), ("__half", 2, 64), ("float", 1, 16)):
        for name in maps:
            projected = name in cuda_report.PROJECTED
            for features in (110, 266) if projected else (size,):
                a = Arguments(number, NUMBERS[name], 1e-4, 1, 1, 100, 100, size, size)
                a.features = features
                assert sm75.simt_launches(ctypes.byref(a), threads, shared) == 10
                passes = {
                    0: "key_pass",
                    3: "query_pass",
                    5: "query_backward",
                    6: "query_backward_sums",
                    9: "key_backward",
                }
                for i, kernel in passes.items():
                    assert (threads[i], shared[i]) == cuda_report.launch(kernel, dtype, size, name, features)


@pytest.mark.parametrize(("name", "means", "scales"), [v for v in NAMED_VALUES if "1e-40" not in v[0]], ids=str)
def test_extreme_values(sm75, name, means, scales):
    """Where float32 underflows and float64 does not; tests/test_extreme_values.py has the oracle."""
    keywords = ATTENTION[name][0].keywords
    kernel, eps = keywords.get("kernel", "softmax"), keywords.get("eps", 1e-6)
    if name.startswith("favor"):
        feature_map = "favor_relu" if kernel == "relu" else "favor" if eps else "favor_exact"
    else:
        feature_map = keywords["feature_map"]
    projection = PROJECTION.float() if name.startswith("favor") else None

    def with_gradients(q, k, v, grad):
        return run(sm75, feature_map, q, k, v, grad, projection, eps=eps)[:4]

    for dtype in (torch.float16, torch.float32):
        check_with(with_gradients, name, draw(0, dtype, means, scales))
