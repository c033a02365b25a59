"""Linear attention on CUDA cores without a GPU: run on the host under an emulator (tests/simt)."""

import ctypes
import itertools

import pytest
import torch
from simt.host import NUMBERS, Arena, Arguments, View, build, call, make, needs_cxx
from test_extreme_values import NAMED_VALUES, check_with, draw

from cxv_kernels.ops.linear_attention.reference import FEATURE_MAPS, kv_state_reference, linear_attention_reference

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def simt(tmp_path_factory):
    return build("linear_attention.cpp", tmp_path_factory.mktemp("simt"))


def run(simt, q, k, v, grad_out, feature_map, eps=1e-6, key_mask=None, threads=64, seed=0, needed=(1, 1, 1)):
    """out, state, key_stat and the three gradients, as the kernels write them into NaNs. needed: the gradients that are
    written."""
    (batch, heads, queries, dim), keys, value_dim = q.shape, k.shape[2], v.shape[3]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    with Arena(simt) as arena:
        out, *grads = (arena.result(t.shape, t.dtype, t.stride()) for t in (grad_out, q, k, v))
        state, stat = (arena.result((batch, heads, *s), wide) for s in ((dim, value_dim), (dim,)))
        sizes = batch, heads, queries, keys, dim, value_dim
        a = Arguments(DTYPES.index(q.dtype), NUMBERS[feature_map], eps, *sizes)
        a.q, a.k, a.v, a.grad_out = (View(arena.put(t)) for t in (q, k, v, grad_out))
        a.out = View(out)
        a.grad_q, a.grad_k, a.grad_v = (View(t if need else None) for t, need in zip(grads, needed, strict=True))
        a.state, a.key_stat = state.data_ptr(), stat.data_ptr()
        if key_mask is not None:
            a.key_mask, a.mask_stride = arena.put(key_mask).data_ptr(), tuple(key_mask.stride())
        for forward in (True, False):
            call(simt.simt_linear_attention, ctypes.byref(a), ctypes.c_bool(forward), threads, seed)
    return out, state, stat, *grads


def check(simt, dtype, feature_map, queries, keys, dim, value_dim, *, batch=1, heads=2, layout="bhnd", mask=None, **kw):
    q = make((batch, heads, queries, dim), dtype, 0, layout)
    k = make((batch, heads, keys, dim), dtype, 1, layout)
    v = make((batch, heads, keys, value_dim), dtype, 2, layout)
    grad_out = make((batch, heads, queries, value_dim), dtype, 3, layout)
    out, state, _, *grads = run(simt, q, k, v, grad_out, feature_map, key_mask=mask, **kw)
    inputs = [t.double().requires_grad_() for t in (q, k, v)]
    expected_state, z = kv_state_reference(*inputs[1:], feature_map, mask)
    if feature_map == "elu":
        expected_state = (expected_state / z.unsqueeze(-1)).nan_to_num()
    expected = linear_attention_reference(*inputs, feature_map, 1e-6, mask)
    expected_grads = torch.autograd.grad(expected, inputs, grad_out.double())
    # One rounding to the storage type, and sums of N or D terms of size 1 in the accumulator, which grow as a random
    # walk and may cancel.
    rounding = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0
    sums = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps * max(keys, queries, 32) ** 0.5
    results = zip((out, state, *grads), (expected, expected_state, *expected_grads), strict=True)
    for name, (got, want) in zip(("out", "state", "dq", "dk", "dv"), results, strict=True):
        if want.numel() == 0:
            continue
        bound = rounding * want.abs() + 16 * sums * max(1, want.abs().max())
        error = (got.double() - want).abs()
        assert (error <= bound).all(), f"{name}: {error.max():.2e}, at most {(error / bound).max():.2f} of the bound"
        if dtype == torch.float64:
            assert error.max() <= 1e-12 * max(1, want.abs().max()), name


@needs_cxx
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
class TestAgainstFloat64:
    def test_one_token(self, simt, dtype, feature_map):
        check(simt, dtype, feature_map, 1, 1, 5, 17)

    def test_odd_sizes(self, simt, dtype, feature_map):
        check(simt, dtype, feature_map, 63, 130, 17, 5, layout="nchw")

    def test_strided_views(self, simt, dtype, feature_map):
        check(simt, dtype, feature_map, 130, 63, 32, 32, layout="gaps")

    def test_wide(self, simt, dtype, feature_map):
        check(simt, dtype, feature_map, 63, 130, 64, 17, heads=1)

    def test_key_mask(self, simt, dtype, feature_map):
        mask = torch.rand(2, 70, generator=torch.Generator().manual_seed(4)) > 0.4
        mask[1] = False  # no key is seen
        check(simt, dtype, feature_map, 33, 70, 12, 20, batch=2, heads=1, mask=mask)
        check(simt, dtype, feature_map, 3, 70, 12, 20, batch=2, heads=1, mask=mask[:, None].expand(2, 3, 70)[:, 1])


@needs_cxx
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
class TestShapes:
    def test_tiles_of_state_share_a_thread(self, simt, feature_map):
        check(simt, torch.float64, feature_map, 40, 40, 64, 64, heads=1)

    def test_largest_state_comes_in_chunks(self, simt, feature_map):
        check(simt, torch.float64, feature_map, 9, 17, 128, 128, heads=1, threads=0)
        check(simt, torch.float32, feature_map, 17, 9, 127, 125, heads=1, threads=256)

    def test_several_splits(self, simt, feature_map):
        check(simt, torch.float64, feature_map, 1100, 1100, 5, 6, heads=1)

    @pytest.mark.parametrize(("queries", "keys"), [(0, 3), (3, 0), (0, 0)])
    def test_no_tokens(self, simt, feature_map, queries, keys):
        check(simt, torch.float32, feature_map, queries, keys, 5, 6)

    def test_no_channels(self, simt, feature_map):
        check(simt, torch.float32, feature_map, 7, 6, 5, 0)
        q, v = make((1, 2, 7, 0), torch.float32, 0), make((1, 2, 7, 5), torch.float32, 1)
        out, *_, grad_v = run(simt, q, q, v, v, feature_map)
        assert not out.any()
        assert not grad_v.any()

    def test_odd_number_of_threads(self, simt, feature_map):
        check(simt, torch.float32, feature_map, 35, 37, 24, 20, threads=37)


@needs_cxx
class TestNumerics:
    @pytest.mark.parametrize("feature_map", FEATURE_MAPS)
    def test_same_bits_in_any_schedule(self, simt, feature_map):
        q, k, v, g = (make((2, 1, 70, c), torch.float32, i) for i, c in enumerate((20, 20, 12, 12)))
        mask = torch.rand(2, 70, generator=torch.Generator().manual_seed(4)) > 0.2
        first = run(simt, q, k, v, g, feature_map, key_mask=mask)
        for seed in (1, 2, 3):
            again = run(simt, q, k, v, g, feature_map, key_mask=mask, seed=seed)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    @pytest.mark.parametrize("feature_map", FEATURE_MAPS)
    def test_needed_gradients_alone_have_the_same_bits(self, simt, feature_map):
        """Every subset of the gradients of q, k and v; the others stay unwritten."""
        q, k, v, g = (make((1, 2, 40, c), torch.float32, i) for i, c in enumerate((8, 8, 12, 12)))
        every = run(simt, q, k, v, g, feature_map)[3:]
        for needed in itertools.product((False, True), repeat=3):
            grads = run(simt, q, k, v, g, feature_map, needed=needed)[3:]
            for got, want, need in zip(grads, every, needed, strict=True):
                assert torch.equal(got, want) if need else got.isnan().all()

    @pytest.mark.parametrize("feature_map", FEATURE_MAPS)
    def test_same_bits_alone_and_in_a_batch(self, simt, feature_map):
        q, k, v, g = (make((3, 2, 40, c), torch.float32, i) for i, c in enumerate((8, 8, 12, 12)))
        batch = run(simt, q, k, v, g, feature_map)
        alone = run(simt, *(t[1:2] for t in (q, k, v, g)), feature_map)
        assert all(torch.equal(a[1:2], b) for a, b in zip(batch, alone, strict=True))

    def test_large_exponents(self, simt):
        q, k, v, g = (make((1, 1, 50, 8), torch.float32, i) for i in range(4))
        results = run(simt, 300 * q, 300 * k, v, g, "softmax")
        assert all(t.isfinite().all() for t in results)
        expected = linear_attention_reference(300 * q.double(), 300 * k.double(), v.double())
        torch.testing.assert_close(results[0].double(), expected, rtol=1e-3, atol=1e-4)

    def test_a_hidden_key_may_be_anything(self, simt):
        q, k, v, g = (make((1, 1, 9, 8), torch.float32, i) for i in range(4))
        k[:, :, 4], v[:, :, 4] = torch.nan, torch.inf
        mask = torch.arange(9)[None] != 4
        for feature_map in FEATURE_MAPS:
            assert all(t.isfinite().all() for t in run(simt, q, k, v, g, feature_map, key_mask=mask))

    @pytest.mark.parametrize("feature_map", FEATURE_MAPS)
    def test_nan_is_not_hidden(self, simt, feature_map):
        for i in range(3):
            q, k, v, g = inputs = [make((1, 1, 9, 8), torch.float32, i) for i in range(4)]
            inputs[i][0, 0, 2, 3] = torch.nan
            assert torch.equal(
                run(simt, q, k, v, g, feature_map)[0].isnan(), linear_attention_reference(q, k, v, feature_map).isnan()
            )

    def test_plans_fit_every_shape(self, simt):
        fits, limit = ctypes.c_int(), simt.simt_linear_attention_max_dim()
        for dim in range(limit + 1):
            for value_dim in range(limit + 1):
                for size in (4, 8):
                    shared = simt.simt_linear_attention_plan(dim, value_dim, size, ctypes.byref(fits))
                    assert fits.value, (dim, value_dim, size)
                    assert shared <= 48 * 1024, (dim, value_dim, size)


@needs_cxx
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("name", "means", "scales"), [v for v in NAMED_VALUES if "favor" not in v[0]], ids=str)
def test_extreme_values(simt, name, means, scales, dtype):
    """Where float32 underflows and float64 does not; tests/test_extreme_values.py has the oracle."""
    feature_map, eps = name.split()[0], 0.0 if "eps=0" in name else 1e-6

    def with_gradients(q, k, v, grad):
        out, _, _, *grads = run(simt, q, k, v, grad, feature_map, eps)
        return [out, *grads]

    check_with(with_gradients, name, draw(0, dtype, means, scales))
