"""linear_attention and kv_state: their definition, their options, and the kernels that they share with the Performer.

test_values.py, test_gradients.py and test_pytorch.py have the properties of every op.
"""

import pytest
import torch
from cases import (
    LINEAR,
    LINEAR_FAMILY,
    MAPS,
    PERFORMER,
    Sizes,
    assert_close_to_float64,
    device_of,
    every,
    every_backend,
    in_float64,
    run,
    threads,
    with_dtypes,
)
from conftest import heads, layouts, needs_cpp, qkv
from hypothesis import given, settings
from hypothesis import strategies as st

from cxv.errors import out_of_memory
from cxv_kernels import kv_state, linear_attention
from cxv_kernels.validation import FLOAT_DTYPES


def dense(q, k, v, feature_map, eps, key_mask):
    """The N_q × N_k weights written out."""
    seen = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool) if key_mask is None else key_mask
    seen = seen[:, None, :, None].to(k.dtype)
    if feature_map == "softmax":
        phi_q = (q / q.shape[-1] ** 0.25).exp()
        phi_q = phi_q / phi_q.sum(-1, keepdim=True)
        phi_k = (k / k.shape[-1] ** 0.25).exp() * seen
        return phi_q @ (phi_k / phi_k.sum(-2, keepdim=True)).mT @ v
    phi = (lambda x: torch.where(x > 0, x + 1, x.exp())) if feature_map == "elu" else (lambda x: x.clamp(min=0))
    weights = phi(q) @ (phi(k) * seen).mT
    return weights @ v / (weights.sum(-1, keepdim=True) + (eps if feature_map == "relu" else 0))


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("feature_map", MAPS)
@in_float64
def test_linear_attention_is_its_definition(backend, feature_map, masked):
    q, k, v = qkv(value_dim=20)
    key_mask = torch.rand(2, 150) > 0.4 if masked else None
    out = linear_attention(q, k, v, feature_map, eps=1e-3, key_mask=key_mask, backend=backend)
    torch.testing.assert_close(out, dense(q, k, v, feature_map, 1e-3, key_mask), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("feature_map", MAPS)
@in_float64
def test_kv_state_is_what_attention_reads(backend, feature_map):
    q, k, v = qkv()
    state, z = kv_state(k, v, feature_map, backend=backend)
    assert state.shape == (2, 3, 32, 32)
    assert z.shape == (2, 3, 32)
    if feature_map == "softmax":
        torch.testing.assert_close(z, torch.ones_like(z))
        out = (q * 32**-0.25).softmax(-1) @ state
    else:
        phi = torch.nn.functional.elu(q) + 1 if feature_map == "elu" else q.relu()
        out = phi @ state / ((phi * z[:, :, None]).sum(-1, keepdim=True) + (1e-6 if feature_map == "relu" else 0))
    torch.testing.assert_close(out, linear_attention(q, k, v, feature_map, backend="reference"))


@in_float64
def test_keys_of_minus_infinity_have_no_weight(backend):
    q, k, v = qkv(1, 1, 5, 200, 4, 4)
    k[:, :, :150, 1] = float("-inf")  # all of the first tiles, for one channel
    torch.testing.assert_close(*(linear_attention(q, k, v, backend=b) for b in (backend, "reference")))


@with_dtypes
def test_one_key(backend, dtype):
    """What relu's features see of v differs by rounding alone. Every other query sees nothing, the rest all of it:
    between them dk is a small difference of large terms, of which the float64 reference, too, misses a tolerance.
    """
    q, k, v = qkv(1, 2, 50, 1, 16, 16, dtype)
    q, k = torch.where(torch.arange(50)[:, None] % 2 > 0, q.abs(), -q.abs()), k.abs() + 0.125
    assert_close_to_float64(LINEAR[2], backend, [q, k, v])


@needs_cpp
def test_exponential_is_within_two_ulp():
    """elu's φ of one negative key is the kernels' exponential itself."""
    x = torch.cat([-torch.logspace(-8, 1.94, 400_000), torch.linspace(-87.3, 0, 400_000)]).reshape(1, 800, 1, 1000)
    _, z = kv_state(x, torch.ones(1, 800, 1, 1), "elu", backend="cpu")
    exact = x[:, :, 0].double().exp()
    ulp = torch.nextafter(exact.float(), torch.tensor(torch.inf)).double() - exact.float().double()
    assert ((z.double() - exact).abs() / ulp).max() < 2
    below = torch.full((1, 1, 1, 5), -90.0)
    below[..., 1:] = torch.tensor([-1e4, -torch.inf, 0.0, torch.nan])
    _, z = kv_state(below, torch.ones(1, 1, 1, 1), "elu", backend="cpu")
    assert z[0, 0, :4].tolist() == [0, 0, 0, 1]
    assert z[0, 0, 4].isnan()


@needs_cpp
def test_half_precision_conversions_are_exact():
    """Every finite float16 and bfloat16 value passes through the kernel and back: one key, so out = v."""
    for dtype in (torch.float16, torch.bfloat16):
        every_value = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
        v = every_value[every_value.isfinite()].reshape(1, 1, 1, -1)
        q = torch.zeros(1, 1, 1, 1, dtype=dtype)
        assert torch.equal(linear_attention(q, q, v, "softmax", backend="cpu"), v)


# --- the kernels that linear_attention and performer_attention share ---


@needs_cpp
@every(LINEAR_FAMILY)
def test_key_mask_of_late_keys(case):
    """An image that sees nothing in its first tiles, and few keys elsewhere, whose values are large where hidden."""
    sizes = Sizes(3, 1, 20, 150, 16, 16)
    inputs, key_mask = case.inputs(sizes), torch.rand(3, 150) > 0.5
    key_mask[1], key_mask[2, :100] = torch.arange(150) < 3, False
    inputs[1] *= ~key_mask[:, None, :, None] * 1e4 + 1
    assert_close_to_float64(case, "cpu", inputs, sizes, 2, key_mask=key_mask)


@pytest.mark.parametrize("scale", [1e-3, 1e3], ids=["small-values", "large-values"])
@every_backend
@every(LINEAR_FAMILY)
def test_large_inputs_in_float16(case, backend, scale):
    """|q| = |k| = 30, values and gradients of 1e-3 and of 1e3."""
    sizes = Sizes(1, 2, 40, 150, 16, 16)
    q, k, v = case.inputs(sizes)
    q, k = (30 * torch.nn.functional.normalize(t, dim=-1) for t in (q, k))
    inputs = [t.half() for t in (q, k, v * scale)]
    gots = run(case.bind(backend, sizes), [t.to(device_of(backend)) for t in inputs])
    wants = run(case.bind("reference", sizes), [t.double() for t in inputs])
    for got, want in zip(gots, wants, strict=True):
        assert (got.cpu().double() - want).abs().max() <= 4e-3 * want.abs().max() + 6e-8


@needs_cpp
@every([LINEAR[0], PERFORMER[0]])
def test_more_splits_than_a_wave_holds(case):
    """70 splits of one head, reduced in waves: no bit depends on where a wave ends, which the threads decide."""
    sizes = Sizes(1, 1, 70_000, 71_000, 4, 3)
    inputs = case.inputs(sizes, torch.float32)
    first = assert_close_to_float64(case, "cpu", inputs, sizes)
    with threads(3):
        assert all(map(torch.equal, first, run(case.bind("cpu", sizes), inputs)))


@needs_cpp
@pytest.mark.slow
@every([LINEAR[0], LINEAR[1], PERFORMER[0]])
def test_a_million_large_keys_in_float16(case):
    """|q| and |k| up to 30: finite, and the float64 results for the same inputs."""
    sizes = Sizes(1, 1, 16, 1 << 20, 8, 8)
    q, k, v = case.inputs(sizes, torch.float16)
    inputs = [(30 * q).clamp(-30, 30), (30 * k).clamp(-30, 30), v]
    grad = 1024 * heads(1, 1, 16, 8, dtype=torch.float16)  # a loss scale: a millionth of it is still a normal float16
    gots = run(case.bind("cpu", sizes), inputs, [grad])
    wants = run(case.bind("reference", sizes), [t.double() for t in inputs], [grad])
    assert all(t.isfinite().all() for t in (*gots, *wants))
    for place in (0, 3):
        assert float((gots[place] - wants[place]).abs().max() / wants[place].abs().max()) < 2**-9


@needs_cpp
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    case=st.sampled_from(LINEAR_FAMILY),
    dtype=st.sampled_from(FLOAT_DTYPES),
    sizes=st.tuples(*(st.integers(1, n) for n in (3, 3, 150, 150, 40, 40))),
    layout=st.sampled_from(["contiguous", *layouts(torch.zeros(1, 1, 1, 1))]),
    scale=st.floats(0.1, 10),
    masked=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_sizes_layout_dtype_and_scale(case, dtype, sizes, layout, scale, masked, seed):
    torch.manual_seed(seed)
    sizes = Sizes(*sizes)
    q, k, v = (({"contiguous": t} | layouts(t))[layout] for t in case.inputs(sizes, dtype))
    if case.op == "linear_attention" and case.label == "relu":  # gradients grow with 1/φ: test_extreme_values.py
        q, k = (t + t.sign() for t in (q, k))
    key_mask = torch.rand(sizes.batch, sizes.keys) > 0.3 if masked else None
    # exponents of up to scale² · ‖x‖² have a rounding of that size
    inputs, amplification = (q * scale, k * scale, v), 4 * max(1.0, scale) ** 2
    assert_close_to_float64(case, "cpu", inputs, sizes, amplification, key_mask=key_mask)


@needs_cpp
def test_out_of_memory_keeps_pytorchs_words():
    """So cxv's training and the benchmarks recognize it."""
    few, many = torch.zeros(1, 1, 4, 32), torch.zeros(1, 1, 1, 1).expand(1, 1, 1 << 43, 32)
    with pytest.raises(RuntimeError, match="new_empty_strided has failed: ") as raised:
        linear_attention(many, few, few, backend="cpu")
    assert out_of_memory(raised.value)


@needs_cpp
def test_raw_ops_refuse_bad_arguments():
    q, k, v = qkv()
    op = torch.ops.cxv_kernels.linear_attention_forward
    mask = torch.ones(2, 3, dtype=torch.bool)
    for match, arguments in (
        ("feature_map must be softmax, elu or relu, got cosine", (q, k, v, None, "cosine")),
        ("v has size 5 in dimension 2, expected 150", (q, k, v[:, :, :5], None, "elu")),
        ("k has a dtype that does not go with q's", (q, k.float(), v, None, "elu")),
        ("key_mask has size 3 in dimension 1, expected 150", (q, k, v, mask, "elu")),
    ):
        with pytest.raises(RuntimeError, match=match):
            op(*arguments, 0.0)


def test_bad_input():
    q, k, v = qkv(dtype=torch.float32)
    for error, match, arguments in (
        (ValueError, r"q must have 4 dimensions \(B, H, N_q, D\), got shape \(3, 70, 32\)", (q[0], k, v)),
        (ValueError, "k has 2 heads, q 3", (q, k[:, :2], v[:, :2])),
        (ValueError, "k has batch size 1, q 2", (q, k[:1], v[:1])),
        (ValueError, "k has head dimension 16, q 32", (q, k[..., :16], v)),
        (ValueError, "v has 100 tokens, k 150", (q, k, v[:, :, :100])),
        (TypeError, "v is torch.float64, k torch.float32", (q, k, v.double())),
        (TypeError, "k must be float64, float32, float16 or bfloat16, got torch.int64", (q, k.long(), v)),
        (TypeError, "q must be a torch.Tensor, got list", ([1.0], k, v)),
        (ValueError, "k must have at least one channel", (q[..., :0], k[..., :0], v)),
        (ValueError, "k is on meta, q on cpu", (q, k.to("meta"), v.to("meta"))),
        (ValueError, "feature_map must be one of 'softmax', 'elu', 'relu', got 'cosine'", (q, k, v, "cosine")),
    ):
        with pytest.raises(error, match=match):
            linear_attention(*arguments)
    for error, match, options in (
        (ValueError, "eps must be a finite number of at least 0, got nan", {"eps": float("nan")}),
        (TypeError, r"key_mask must be a bool tensor \(B, N_k\), got torch.float32", {"key_mask": torch.ones(2, 150)}),
        (ValueError, r"key_mask must have shape \(2, 150\)", {"key_mask": torch.ones(2, 70, dtype=torch.bool)}),
        (ValueError, "backend must be one of", {"backend": "fast"}),
    ):
        with pytest.raises(error, match=match):
            linear_attention(q, k, v, **options)


@needs_cpp
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_adjacent_tokens_give_the_same_bits(dtype):
    """The kernels transpose them in registers: 37 tokens and 19 channels leave a rest in both directions."""
    rows = [torch.randn(2, 3, 37, 19, dtype=dtype) for _ in range(4)]
    columns = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in rows]

    def results(q, k, v, weight):
        inputs = [t.detach().requires_grad_() for t in (q, k, v)]
        out = linear_attention(*inputs, "relu", eps=1e-6, backend="cpu")
        return out, *torch.autograd.grad(out, inputs, weight)

    for one, other in zip(results(*rows), results(*columns), strict=True):
        assert torch.equal(one, other)
