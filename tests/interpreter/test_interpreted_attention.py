"""The attention kernels in Triton's interpreter, against the reference in float64; test_triton.py runs this file."""

from functools import partial

import pytest
import torch
from conftest import heads, layouts, qkv
from test_fused_attention import ATTENTION, assert_fused_matches, performer
from torch.library import opcheck

import cxv_kernels
from cxv_kernels import orthogonal_projection, performer_features, testing
from cxv_kernels.ops.linear_attention.triton import configs

every_variant = pytest.mark.parametrize("variant", ATTENTION)
DTYPES = (torch.float64, torch.float32, torch.float16)
OURS = ("linear_attention", "kv_state", "performer_attention", "performer_features")
matches = partial(assert_fused_matches, backend="triton")


def short_splits(**options):
    """A table that cuts few tokens into several splits; with other options, too."""
    names = ("key_pass", "query_pass", "query_backward", "key_backward")
    table = {}
    for name in names:
        entry = configs.lookup(name, 0, 32, None, torch.float32) | {"TOKENS": 64, "BLOCK_N": 32} | options
        table[name] = {"default": entry}
    return configs.override(table)


def out_and_gradients(attend, inputs, backend="triton", **options):
    inputs = [t.detach().requires_grad_() for t in inputs]
    out = attend(*inputs, backend=backend, **options)
    grad = torch.linspace(-1, 1, out.shape[-1]).to(out.dtype).expand_as(out)
    return [t.detach() for t in (out, *torch.autograd.grad(out, inputs, grad))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [c for c in testing.cases(1, 2, 70) if c.op in OURS], ids=lambda c: f"{c.op} {c.label}"
)
def test_checks(case, dtype):
    result = testing.run(case, "triton", "cpu", dtype)
    assert result.passed, f"error {result.error:.1e}, {result.ratio:.2f} of the tolerance"


@pytest.mark.parametrize(
    ("queries", "keys", "dim", "value_dim"), [(1, 1, 1, 1), (65, 63, 17, 40), (5, 70, 20, 3)], ids=str
)
@every_variant
def test_odd_shapes(variant, queries, keys, dim, value_dim):
    matches(qkv(1, 2, queries, keys, dim, value_dim), variant)


@every_variant
def test_nan_is_not_swallowed(variant):
    for position in range(3):
        inputs = qkv(1, 1, 9, 9, 8, 8, torch.float32)
        inputs[position][0, 0, 3, 2] = torch.nan
        want = out_and_gradients(ATTENTION[variant], [t.double() for t in inputs], backend="reference")
        got = out_and_gradients(ATTENTION[variant], inputs)
        assert want[0].isnan().any()
        assert torch.equal(got[0].isnan(), want[0].isnan())
        assert [g.isnan().any() for g in got[1:]] == [g.isnan().any() for g in want[1:]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"eps": 0.0}, {"kernel": "relu"}], ids=str)
def test_more_features_than_a_block(options, dtype, monkeypatch):
    monkeypatch.setitem(ATTENTION, "wide", partial(performer, features=70, **options))
    matches(qkv(1, 2, 40, 70, 12, 9, dtype), "wide", amplification=8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["softmax", "elu", "relu"])
def test_more_channels_than_a_block(variant, dtype):
    with short_splits(BLOCK_F=16):
        matches(qkv(1, 2, 20, 70, 40, 9, dtype), variant)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@every_variant
def test_splits_are_added(variant, dtype):
    """Several splits, and a batch in which one image sees few keys, one none, whatever the hidden ones hold."""
    q, k, v = qkv(3, 1, 50, 140, 16, 16, dtype)
    key_mask = torch.rand(3, 140) > 0.5
    key_mask[1], key_mask[2] = torch.arange(140) < 3, False
    with short_splits():
        matches((q, k, v), variant, key_mask, 2)  # with three keys nothing averages the operands' roundings
        out, _, dk, dv = out_and_gradients(partial(ATTENTION[variant], key_mask=key_mask), (q, k, v))
        hidden = ~key_mask[:, None, :, None]
        spoilt = (q, k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.inf))
        again = out_and_gradients(partial(ATTENTION[variant], key_mask=key_mask), spoilt)
    assert torch.equal(again[0], out)
    assert not out[2].any()
    assert not dk.masked_select(hidden).any()
    assert torch.equal(again[3], dv)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_key(dtype):
    """What relu's features see of v differs by rounding alone. Every other query sees nothing, the rest all of it:
    between them dk is a small difference of large terms, of which the float64 reference, too, misses a tolerance.
    """
    q, k, v = qkv(1, 2, 50, 1, 16, 16, dtype)
    q, k = torch.where(torch.arange(50)[:, None] % 2 > 0, q.abs(), -q.abs()), k.abs() + 0.125
    matches((q, k, v), "relu")


@pytest.mark.parametrize("separate", [True, False])
@every_variant
def test_needed_gradients_alone_have_the_same_bits(variant, separate):
    """Of some inputs alone, where query_backward_sums does a part of the work and where it does not."""
    entry = configs.lookup("query_backward", 0, 32, None, torch.float32) | {"SEPARATE": separate}
    inputs = qkv(1, 1, 20, 18, 12, 9)
    with configs.override({"query_backward": {"default": entry}}):
        _, *every = out_and_gradients(ATTENTION[variant], inputs)
        for needed in ((0,), (1,), (2,), (0, 2)):
            leaves = [t.detach().requires_grad_(i in needed) for i, t in enumerate(inputs)]
            out = ATTENTION[variant](*leaves, backend="triton")
            out.backward(torch.linspace(-1, 1, out.shape[-1]).to(out.dtype).expand_as(out))
            for i, (leaf, want) in enumerate(zip(leaves, every, strict=True)):
                assert torch.equal(leaf.grad, want) if i in needed else leaf.grad is None


@pytest.mark.parametrize("feature_map", ["softmax", "elu"])
def test_needed_gradients_of_the_state_alone_have_the_same_bits(feature_map):
    inputs = [t.requires_grad_() for t in qkv(1, 1, 1, 20, 12, 9)[1:]]
    outs = cxv_kernels.kv_state(*inputs, feature_map=feature_map, backend="triton")
    every = torch.autograd.grad(outs, inputs, [o.detach().cos() for o in outs])
    for i in range(2):
        some = [t.detach().requires_grad_(i == j) for j, t in enumerate(inputs)]
        outs = cxv_kernels.kv_state(*some, feature_map=feature_map, backend="triton")
        assert torch.equal(torch.autograd.grad(outs, some[i], [o.detach().cos() for o in outs])[0], every[i])


@every_variant
def test_bits_depend_on_the_head_alone(variant):
    """Alone or in a batch, in whatever layout, again and again."""
    q, k, v = qkv(2, 2, 20, 140, 16, 16, torch.float16)
    with short_splits():
        got = out_and_gradients(ATTENTION[variant], (q, k, v))
        alone = out_and_gradients(ATTENTION[variant], [t[1:, 1:] for t in (q, k, v)])
        assert all(torch.equal(a[1:, 1:], b) for a, b in zip(got, alone, strict=True))
        for name in ("NCHW", "a chunk of qkv"):
            strided = out_and_gradients(ATTENTION[variant], [layouts(t)[name] for t in (q, k, v)])
            assert all(torch.equal(a, b) for a, b in zip(got, strided, strict=True)), name


@every_variant
def test_nothing_uninitialized_is_read_or_left(variant, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    inputs = qkv(1, 2, 40, 70, 12, 9)
    torch.use_deterministic_algorithms(True)  # empty tensors are filled with NaN
    try:
        assert torch.empty(3).isnan().all()
        with short_splits():
            matches(inputs, variant)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("variant", ["softmax", "favor"])
def test_offsets_beyond_32_bits(variant):
    """Tokens 2²⁶ elements apart, the last beyond 2³¹; of that memory only what holds a token is ever touched."""
    contiguous = qkv(1, 2, 40, 40, 16, 16, torch.float16)
    space = torch.empty(40 << 26, dtype=torch.float16)
    strided = [space.as_strided(t.shape, (0, 16, 1 << 26, 1), 32 * i) for i, t in enumerate(contiguous)]
    for far, near in zip(strided, contiguous, strict=True):
        far.copy_(near)
    got, want = (out_and_gradients(ATTENTION[variant], inputs) for inputs in (strided, contiguous))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("variant", ["softmax", "favor"])
def test_many_tokens_in_half_precision(variant):
    """Neither what is summed nor a key's share, 1e-5 of it, leaves float16."""
    inputs = [t.half() for t in qkv(1, 1, 1, 100_003, 8, 4)]
    with short_splits(BLOCK_N=1 << 14, TOKENS=1 << 14):
        got = out_and_gradients(ATTENTION[variant], inputs)
    exact = [t.double().requires_grad_() for t in inputs]
    want = ATTENTION[variant](*exact, backend="reference")
    grad = torch.linspace(-1, 1, 4).half().double().expand_as(want)
    for name, a, b in zip("oqkv", got, (want, *torch.autograd.grad(want, exact, grad)), strict=True):
        assert (a.double() - b).abs().max() <= 1e-2 * b.abs().max() + 6e-8, name


@every_variant
def test_no_tokens_no_heads(variant):
    for batch, queries, keys in ((2, 0, 5), (2, 5, 0), (0, 5, 5)):
        inputs = [heads(batch, 2, n, 8, dtype=torch.float32) for n in (queries, keys, keys)]
        out, *grads = out_and_gradients(ATTENTION[variant], inputs)
        assert not out.any() or keys
        assert all(g.shape == t.shape and g.isfinite().all() for g, t in zip(grads, inputs, strict=True))


@every_variant
def test_gradcheck(variant):
    inputs = [t.requires_grad_() for t in qkv(1, 2, 5, 6, 4, 3)]
    attend = partial(ATTENTION[variant], backend="triton")
    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)


@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
def test_gradcheck_of_the_state(feature_map):
    state = partial(cxv_kernels.kv_state, feature_map=feature_map, backend="triton")
    assert torch.autograd.gradcheck(state, qkv(1, 2, 5, 6, 4, 3, grad=True)[1:], fast_mode=True)


@pytest.mark.parametrize("is_query", [False, True])
@pytest.mark.parametrize("options", [{}, {"eps": 0.0}, {"kernel": "relu"}], ids=str)
def test_features_and_their_gradient(options, is_query):
    """gradcheck cannot: the maximum is detached."""
    x, projection = heads(2, 2, 70, 12, grad=True), orthogonal_projection(70, 12, dtype=torch.float64)
    phi, want = (performer_features(x, projection, is_query, backend=b, **options) for b in ("triton", "reference"))
    torch.testing.assert_close(phi, want, rtol=1e-12, atol=1e-14)
    grad = torch.randn_like(want)
    grads = (torch.autograd.grad(o, x, grad)[0] for o in (phi, want))
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-13)


@every_variant
def test_large_inputs_in_half_precision(variant):
    """|q| = |k| = 30, values and gradients of 1e-3 and of 1e3."""
    q, k, v = qkv(1, 2, 40, 150, 16, 16)
    q, k = (30 * torch.nn.functional.normalize(t, dim=-1) for t in (q, k))
    for scale in (1e-3, 1e3):
        inputs = [t.half() for t in (q, k, v * scale)]
        got = out_and_gradients(ATTENTION[variant], inputs)
        exact = [t.double().requires_grad_() for t in inputs]
        want = ATTENTION[variant](*exact, backend="reference")
        grad = torch.linspace(-1, 1, 16).half().double().expand_as(want)
        for name, a, b in zip("oqkv", got, (want, *torch.autograd.grad(want, exact, grad)), strict=True):
            assert (a.double() - b).abs().max() <= 4e-3 * b.abs().max() + 6e-8, name


def test_gradients_where_eps_dominates():
    """Long keys of unequal length: one maximum serves all, so nearly all features are the eps alone."""
    q, k, v = qkv(1, 2, 60, 200, 32, 32)
    inputs = [t.half() for t in (q, 12 * torch.nn.functional.normalize(k, dim=-1), v)]
    got = out_and_gradients(performer, inputs)
    exact = [t.double().requires_grad_() for t in inputs]
    want = performer(*exact, backend="reference")
    grad = torch.linspace(-1, 1, 32).half().double().expand_as(want)
    for name, a, b in zip("oqkv", got, (want, *torch.autograd.grad(want, exact, grad)), strict=True):
        assert (a.double() - b).abs().max() <= 1e-2 * b.abs().max() + 6e-8, name


def test_what_is_declined():
    q = heads(1, 1, 4, 129, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="supports 1 to 128 channels, not 129"):
        cxv_kernels.linear_attention(q, q, q, backend="triton")
    x, projection = heads(1, 1, 4, 8, dtype=torch.float32), torch.randn(513, 8)
    with pytest.raises(RuntimeError, match="supports at most 512 features, not 513"):
        cxv_kernels.performer_attention(x, x, x, projection, backend="triton")
    with pytest.raises(RuntimeError, match="does not support bfloat16 in its interpreter"):
        cxv_kernels.linear_attention(*[x.bfloat16()] * 3, backend="triton")


def test_opcheck():
    ops = torch.ops.cxv_kernels_triton
    q, k, v = qkv(1, 2, 5, 6, 4, 3, torch.float32)
    w, mask = torch.randn(9, 4), torch.rand(1, 6) > 0.3
    out, *kept = ops.linear_attention_forward(q, k, v, mask, "elu", 0.0)
    opcheck(ops.linear_attention_forward, (q, k, v, mask, "elu", 0.0))
    some = ([True] * 3, [True, False, False], [False, True, False], [False, False, True])
    for needed in some:
        opcheck(ops.linear_attention_backward, (out, q, k, v, mask, *kept, "elu", 0.0, needed))
    state, stat = ops.kv_state_forward(k, v, None, "softmax")
    opcheck(ops.kv_state_forward, (k, v, None, "softmax"))
    for _, *needed in some:
        opcheck(ops.kv_state_backward, (state, stat, k, v, None, stat, "softmax", needed))
    out, *kept = ops.performer_attention_forward(q, k, v, w, None, "softmax", 1e-4)
    opcheck(ops.performer_attention_forward, (q, k, v, w, None, "softmax", 1e-4))
    for needed in some:
        opcheck(ops.performer_attention_backward, (out, q, k, v, w, None, *kept, "softmax", 1e-4, needed))
    phi, top = ops.performer_features_forward(k, w, False, "softmax", 1e-4)
    opcheck(ops.performer_features_forward, (k, w, False, "softmax", 1e-4))
    opcheck(ops.performer_features_backward, (phi, k, w, top, False, "softmax", 1e-4))


@pytest.mark.parametrize("op", ["linear_attention", "performer_attention"])
def test_compiles_without_graph_breaks(op):
    inputs = qkv(1, 2, 5, 6, 4, 3, torch.float32, grad=True)
    more = [torch.randn(9, 4)] if op == "performer_attention" else []

    def attend(*tensors):
        return getattr(cxv_kernels, op)(*tensors, backend="triton")

    got, want = torch.compile(attend, fullgraph=True, backend="aot_eager")(*inputs, *more), attend(*inputs, *more)
    assert torch.equal(got, want)
    for a, b in zip(*(torch.autograd.grad(o.sum(), inputs) for o in (got, want)), strict=True):
        assert torch.equal(a, b)
