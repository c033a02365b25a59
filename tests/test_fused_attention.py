"""What every fused op of the linear-attention family promises, its kernels against the reference in float64."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from conftest import heads, layouts, needs_cpp, qkv
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch.library import opcheck

import cxv_kernels
from cxv.errors import out_of_memory
from cxv_kernels import kv_state, linear_attention, orthogonal_projection, performer_features
from cxv_kernels.testing import tolerance
from cxv_kernels.validation import FLOAT_DTYPES

pytestmark = needs_cpp
ops = torch.ops.cxv_kernels


def performer(q, k, v, features=None, **options):
    """performer_attention with one projection per head dimension."""
    features = features or cxv_kernels.num_random_features(q.shape[-1])
    generator = torch.Generator().manual_seed(3)
    projection = orthogonal_projection(features, q.shape[-1], generator=generator, dtype=torch.float64)
    return cxv_kernels.performer_attention(q, k, v, projection, **options)


ATTENTION: dict[str, Callable] = {
    "softmax": linear_attention,
    "elu": partial(linear_attention, feature_map="elu"),
    "relu": partial(linear_attention, feature_map="relu"),
    "favor": performer,
    "favor exact": partial(performer, eps=0.0),
    "favor relu": partial(performer, kernel="relu"),
}
# How much a variant enlarges roundings: small denominators, exponents of several units.
AMPLIFICATION = {"relu": 4, "favor": 8, "favor exact": 8, "favor relu": 2}
every_variant = pytest.mark.parametrize("variant", ATTENTION)


def assert_fused_matches(inputs, variant, key_mask=None, amplification=1, backend="cpu"):
    """Output and gradients, within the error model."""
    attend, dtype = partial(ATTENTION[variant], key_mask=key_mask), inputs[0].dtype
    inputs = [t.detach().requires_grad_() for t in inputs]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    out, want = attend(*inputs, backend=backend), attend(*exact, backend="reference")
    grad = torch.randn_like(want).to(dtype)
    got_all = (out, *torch.autograd.grad(out, inputs, grad))
    want_all = (want, *torch.autograd.grad(want, exact, grad.double()))
    depth = max(inputs[0].shape[2], inputs[1].shape[2], 1)
    for name, got, expected in zip(("out", "dq", "dk", "dv"), got_all, want_all, strict=True):
        assert got.shape == expected.shape
        assert got.dtype == dtype
        error = (got.detach().double() - expected.detach()).abs()
        bound = tolerance(expected.detach(), dtype, depth, amplification * AMPLIFICATION.get(variant, 1))
        assert error.numel() == 0 or error.max() <= bound, f"{name}: {error.max():.2e} > {bound:.2e}"


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("queries", "keys", "dim", "value_dim"),
    [(1, 1, 1, 1), (64, 64, 16, 16), (65, 63, 17, 5), (130, 70, 32, 48), (1030, 2200, 8, 33), (50, 50, 70, 129)],
)
@every_variant
def test_matches_float64(variant, dtype, queries, keys, dim, value_dim):
    assert_fused_matches(qkv(2, 2, queries, keys, dim, value_dim, dtype), variant)


@pytest.mark.parametrize("features", [1, 15, 16, 17, 64, 300])
def test_any_number_of_random_features(features):
    q, k, v = qkv(1, 2, 70, 80, 12, 9)
    for options in ({}, {"eps": 0.0}, {"kernel": "relu"}):
        got, want = (performer(q, k, v, features, backend=b, **options) for b in ("cpu", "reference"))
        torch.testing.assert_close(got, want)


@every_variant
def test_honors_key_mask(variant):
    key_mask = torch.rand(3, 150) > 0.5
    key_mask[1] = False  # sees nothing
    key_mask[2, :100] = False  # nothing in its first tiles
    inputs = qkv(3)
    inputs[1][:, :, ::2] *= ~key_mask[:, None, ::2, None] * 1e4 + 1  # what is hidden must not reach the maximum
    assert_fused_matches(inputs, variant, key_mask)
    assert ATTENTION[variant](*inputs, key_mask=key_mask)[1].eq(0).all()
    assert_fused_matches(inputs, variant, torch.stack([key_mask, key_mask], -1)[..., 0])  # a strided mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1, 1)))
def test_reads_any_strides(layout, dtype):
    contiguous = qkv(dtype=dtype, keys=70)
    strided = [layouts(t)[layout] for t in contiguous]
    assert not any(t.is_contiguous() for t in strided)
    assert_fused_matches(strided, "softmax")
    assert_fused_matches(strided, "favor")
    assert_fused_matches([strided[0], contiguous[1], strided[2]], "elu")


@pytest.mark.parametrize("variant", ["softmax", "favor"])
def test_no_copy_of_strided_inputs(variant):
    attend = ATTENTION[variant]
    q, k, v = (layouts(t)["a chunk of qkv"].requires_grad_() for t in qkv(dtype=torch.float32, keys=70))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.untyped_storage().data_ptr()), lambda t: t):
        attend(q, k, v, backend="cpu")
    assert {t.untyped_storage().data_ptr() for t in (q, k, v)} <= set(saved)
    op = ops.linear_attention_forward if variant == "softmax" else ops.performer_attention_forward
    arguments = (None, "softmax", 1e-4) if variant == "softmax" else (torch.randn(9, 32), None, "softmax", 1e-4)
    with torch.profiler.profile() as profile:
        op(q, k, v, *arguments)
    assert not {"aten::copy_", "aten::clone"} & {event.key for event in profile.key_averages()}


@every_variant
def test_output_is_laid_out_like_q(variant):
    q, k, v = (layouts(t)["(B, N, H, D)"] for t in qkv(keys=70))
    assert ATTENTION[variant](q, k, v, backend="cpu").transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("shape", [{"batch": 0}, {"num_heads": 0}, {"queries": 0}, {"keys": 0}, {"value_dim": 0}])
@every_variant
def test_empty(variant, shape):
    inputs = qkv(**shape)
    assert_fused_matches(inputs, variant)
    if shape == {"keys": 0}:
        assert ATTENTION[variant](*inputs, backend="cpu").eq(0).all()


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@every_variant
def test_finite_wherever_float64_is(variant, dtype, scale):
    q, k, v = qkv(dtype=dtype)
    q, k = (q * scale).requires_grad_(), (k * scale).requires_grad_()
    out = ATTENTION[variant](q, k, v, backend="cpu")
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.float().square().sum(), (q, k)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("norm", [10, 30])
@pytest.mark.parametrize("variant", ["favor", "favor exact"])
def test_long_keys(variant, norm, dtype):
    """Exponents reach norm²/√D = 160, whose rounding is a relative error of the features; the paper's form has lost
    its keys there, and eps = 0 has not."""
    q, k, v = qkv(queries=40, keys=200)
    q, k = (torch.nn.functional.normalize(x, dim=-1) * norm for x in (q, k))
    low = [x.to(dtype) for x in (q, k, v)]
    assert_fused_matches(low, variant, amplification=20)
    average = v.mean(dim=-2, keepdim=True)
    distance = (ATTENTION[variant](*low, backend="cpu").double() - average).norm() / average.expand(
        -1, -1, 40, -1
    ).norm()
    if norm == 30:
        assert (distance > 0.5) == (variant == "favor exact")


def test_out_of_memory_is_said():
    """In PyTorch's words, where it keeps them; so cxv's training and the benchmarks know it."""
    few, many = torch.zeros(1, 1, 4, 32), torch.zeros(1, 1, 1, 1).expand(1, 1, 1 << 43, 32)
    with pytest.raises(RuntimeError, match="new_empty_strided has failed: ") as raised:
        cxv_kernels.linear_attention(many, few, few, backend="cpu")
    assert out_of_memory(raised.value)
    image, weight, one = torch.zeros(1, 1, 1, 1).expand(1 << 43, 3, 4, 4), torch.zeros(4, 3, 3, 3), torch.ones(4)
    with pytest.raises(RuntimeError, match="aten::convolution has failed: ") as raised:
        cxv_kernels.conv_norm(image, weight, None, one, one, backend="cpu")
    assert out_of_memory(raised.value)


@every_variant
def test_nan_is_not_swallowed(variant):
    for position in range(3):
        inputs = qkv(1, 1, 70, 70, 8, 8)
        inputs[position][0, 0, 3, 2] = float("nan")
        got, want = (ATTENTION[variant](*inputs, backend=b) for b in ("cpu", "reference"))
        assert want.isnan().any()
        assert torch.equal(got.isnan(), want.isnan())


def test_keys_of_minus_infinity_have_no_weight():
    q, k, v = qkv(1, 1, 5, 200, 4, 4)
    k[:, :, :150, 1] = float("-inf")  # all of the first tiles, for one channel
    torch.testing.assert_close(*(linear_attention(q, k, v, backend=b) for b in ("cpu", "reference")))


@pytest.mark.parametrize("masked", [False, True])
@every_variant
def test_gradients(variant, masked):
    """gradcheck and gradgradcheck; FAVOR+ with eps has detached maxima, which finite differences see, so there the
    second derivatives are compared with the reference's (test_matches_float64 has the first)."""
    inputs = qkv(1, 2, 5, 6, 3, 4, grad=True)
    key_mask = torch.tensor([[True, False, True, True, True, False]]) if masked else None
    attend = partial(ATTENTION[variant], key_mask=key_mask)
    if variant != "favor":
        assert torch.autograd.gradcheck(partial(attend, backend="cpu"), inputs)
        assert torch.autograd.gradgradcheck(partial(attend, backend="cpu"), inputs)

    def second(backend):
        first = torch.autograd.grad(attend(*inputs, backend=backend).sin().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    torch.testing.assert_close(second("cpu"), second("reference"))


@pytest.mark.parametrize("variant", ["softmax", "favor"])
def test_forward_mode_says_no(variant):
    attend = ATTENTION[variant]
    q, k, v = qkv()
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: attend(x, k, v, backend="cpu"), (q,), (q,))
    _, tangent = torch.func.jvp(lambda x: attend(x, k, v, backend="reference"), (q,), (q,))
    assert tangent.isfinite().all()


@pytest.mark.parametrize("layout", ["(B, N, H, D)", "NCHW"])
@pytest.mark.parametrize("option", ["softmax", "elu", "relu"])
def test_opcheck_linear_attention(option, layout):
    inputs = [layouts(t)[layout] for t in qkv(1, 2, 20, 20, 4, 6)]
    tail = (torch.rand(1, 20) > 0.5,)
    opcheck(ops.linear_attention_forward, (*inputs, *tail, option, 1e-6))
    out, state, stat = ops.linear_attention_forward(*inputs, *tail, option, 1e-6)
    for needed in ([True] * 3, [True, False, False], [False, True, False], [False, False, True]):
        arguments = (torch.randn_like(out), *inputs, *tail, state, stat, option, 1e-6, needed)
        opcheck(ops.linear_attention_backward, arguments)
    opcheck(ops.kv_state_forward, (*inputs[1:], *tail, option))
    for needed in ([True, True], [True, False], [False, True]):
        opcheck(ops.kv_state_backward, (state, stat, *inputs[1:], *tail, stat, option, needed))


@pytest.mark.parametrize("layout", ["(B, N, H, D)", "NCHW"])
@pytest.mark.parametrize(("kernel", "eps"), [("softmax", 1e-4), ("softmax", 0.0), ("relu", 1e-3)])
def test_opcheck_performer(kernel, eps, layout):
    q, k, v = (layouts(t)[layout] for t in qkv(1, 2, 20, 20, 4, 6))
    projection = torch.randn(7, 4, dtype=q.dtype)
    tail = (projection, torch.rand(1, 20) > 0.5)
    opcheck(ops.performer_attention_forward, (q, k, v, *tail, kernel, eps))
    out, *saved = ops.performer_attention_forward(q, k, v, *tail, kernel, eps)
    for needed in ([True] * 3, [True, False, False], [False, True, False], [False, False, True]):
        arguments = (torch.randn_like(out), q, k, v, *tail, *saved, kernel, eps, needed)
        opcheck(ops.performer_attention_backward, arguments)
    for is_query in (True, False):
        opcheck(ops.performer_features_forward, (k, projection, is_query, kernel, eps))
        phi, key_max = ops.performer_features_forward(k, projection, is_query, kernel, eps)
        opcheck(ops.performer_features_backward, (phi, k, projection, key_max, is_query, kernel, eps))


def test_raw_ops_refuse_what_does_not_fit():
    q, k, v = qkv()
    op = ops.linear_attention_forward
    with pytest.raises(RuntimeError, match="feature_map must be softmax, elu or relu, got cosine"):
        op(q, k, v, None, "cosine", 0.0)
    with pytest.raises(RuntimeError, match="v has size 5 in dimension 2, expected 150"):
        op(q, k, v[:, :, :5], None, "elu", 0.0)
    with pytest.raises(RuntimeError, match="k has a dtype that does not go with q's"):
        op(q, k.float(), v, None, "elu", 0.0)
    with pytest.raises(RuntimeError, match="key_mask must be bool"):
        op(q, k, v, torch.ones(2, 3, dtype=torch.bool), "elu", 0.0)
    op = ops.performer_attention_forward
    with pytest.raises(RuntimeError, match="kernel must be softmax or relu, got cosine"):
        op(q, k, v, torch.randn(5, 32).double(), None, "cosine", 0.0)
    with pytest.raises(RuntimeError, match=r"projection must be \(M, D\) with M > 0 and D = 32"):
        op(q, k, v, torch.randn(5, 31).double(), None, "softmax", 0.0)
    with pytest.raises(RuntimeError, match="projection has a shape or dtype that does not go with q's"):
        op(q, k, v, torch.randn(5, 32), None, "softmax", 0.0)


def test_performer_options_without_a_kernel():
    q, k, v = qkv()
    projection = torch.randn(5, 32, dtype=q.dtype)
    attend = partial(cxv_kernels.performer_attention, q, k, v)
    with pytest.raises(RuntimeError, match="cpu does not support stabilizer='batch'"):
        attend(projection, stabilizer="batch", backend="cpu")
    with pytest.raises(RuntimeError, match="cpu does not support a projection that requires grad"):
        attend(projection.requires_grad_(), backend="cpu")
    assert attend(projection, backend="reference").requires_grad


@pytest.mark.parametrize(("variant", "op"), [("elu", "linear_attention"), ("favor", "performer_attention")])
def test_compile_fullgraph_keeps_the_fused_ops(variant, op):
    attend = ATTENTION[variant]
    q, k, v = qkv(grad=True)
    projection = (torch.randn(20, 32, dtype=q.dtype),) if variant == "favor" else ()
    if projection:
        attend = cxv_kernels.performer_attention
    targets = []

    def spy(graph, _):
        targets.extend(node.target for node in graph.graph.nodes)
        return make_boxed_func(graph)

    def loss(q, k, v):
        return attend(q * 2, k, v, *projection).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend=aot_autograd(fw_compiler=spy, bw_compiler=spy))
    got = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    torch.testing.assert_close(got, torch.autograd.grad(loss(q, k, v), (q, k, v)))
    assert {getattr(ops, f"{op}_{way}").default for way in ("forward", "backward")} <= set(targets)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["softmax", "favor"])
def test_compile_inductor(variant):
    q, k, v = qkv(dtype=torch.float32, grad=True)
    projection = (torch.randn(20, 32),) if variant == "favor" else ()
    attend = cxv_kernels.performer_attention if projection else linear_attention
    loss = torch.compile(lambda *t: attend(*t, *projection).sin().sum(), fullgraph=True)
    got = torch.autograd.grad(loss(q, k, v), (q, k, v))
    torch.testing.assert_close(got, torch.autograd.grad(attend(q, k, v, *projection).sin().sum(), (q, k, v)))


@pytest.mark.parametrize("variant", ["elu", "favor"])
def test_compile_dynamic_shapes(variant):
    projection = (torch.randn(20, 32, dtype=torch.float64),) if variant == "favor" else ("elu",)
    attend = cxv_kernels.performer_attention if variant == "favor" else linear_attention
    compiled = torch.compile(lambda *t: attend(*t, *projection), fullgraph=True, dynamic=True, backend="aot_eager")
    for queries, keys in ((64, 64), (100, 33), (33, 100)):
        inputs = qkv(queries=queries, keys=keys)
        torch.testing.assert_close(compiled(*inputs), attend(*inputs, *projection))


@pytest.mark.parametrize("variant", ["softmax", "favor"])
def test_export(variant):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("projection", torch.randn(20, 32, dtype=torch.float64))

        def forward(self, q, k, v):
            if variant == "softmax":
                return linear_attention(q, k, v)
            return cxv_kernels.performer_attention(q, k, v, self.projection)

    module, inputs = Module(), tuple(qkv())
    program = torch.export.export(module, inputs)
    op = ops.linear_attention_forward if variant == "softmax" else ops.performer_attention_forward
    assert op.default in {n.target for n in program.graph.nodes}
    torch.testing.assert_close(program.module()(*inputs), module(*inputs))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@every_variant
def test_autocast(variant, backend):
    attend = ATTENTION[variant]
    q, k, v = qkv(dtype=torch.float32)
    k = k.bfloat16()  # mixed inputs are autocast's business
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(q, k, v, backend=backend)
    assert out.dtype == torch.bfloat16
    exact = attend(*(t.bfloat16().double() for t in (q, k, v)), backend="reference")
    bound = tolerance(exact, torch.bfloat16, 150, AMPLIFICATION.get(variant, 1))
    assert (out.double() - exact).abs().max() <= bound
    q64 = [t.double() for t in (q, k, v)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attend(*q64, backend=backend).dtype == torch.float64


def run_on(threads, inputs, call):
    """Outputs and gradients of call(*inputs) with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        inputs = [t.detach().requires_grad_() for t in inputs]
        out = call(*inputs)
        outs = out if isinstance(out, tuple) else (out,)
        return (*outs, *torch.autograd.grad(sum(o.square().sum() for o in outs), inputs))
    finally:
        torch.set_num_threads(before)


def assert_bits_are_the_inputs_alone(call, inputs):
    first = run_on(1, inputs, call)
    for threads in (1, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(first, run_on(threads, inputs, call), strict=True))
    alone = run_on(2, [t[1:2] for t in inputs], call)
    assert all(torch.equal(a[1:2], b) for a, b in zip(first, alone, strict=True))


@every_variant
def test_same_bits_for_any_threads_and_any_batch(variant):
    inputs = qkv(3, 2, 2500, 3000, 32, 32, torch.float32)
    assert_bits_are_the_inputs_alone(partial(ATTENTION[variant], backend="cpu"), inputs)


def test_more_splits_than_a_wave_holds():
    """70 splits of one head, folded in waves: no bit depends on where a wave ends, which the threads decide."""
    q, k, v = qkv(1, 1, 70_000, 71_000, 4, 3, torch.float32)
    for variant in ("softmax", "favor"):
        call = partial(ATTENTION[variant], backend="cpu")
        first, others = run_on(1, (q, k, v), call), run_on(3, (q, k, v), call)
        assert all(torch.equal(a, b) for a, b in zip(first, others, strict=True))
        assert_fused_matches((q, k, v), variant)


@every_variant
def test_every_output_element_is_written(variant):
    """Memory from the allocator is poisoned with NaN; what the kernels leave unwritten would show."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(4).isnan().all()
        inputs = [layouts(t)["NCHW"].requires_grad_() for t in qkv(keys=70)]
        out = ATTENTION[variant](*inputs, backend="cpu")
        state = out.grad_fn.saved_tensors[-3:]
        gradients = torch.autograd.grad(out.sum(), inputs)
        assert all(t.isfinite().all() for t in (out, *state, *gradients) if t is not None)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("variant", "features"), [("softmax", 32), ("elu", 32), ("favor", 110), ("favor exact", 110)])
def test_saved_bytes(variant, features):
    """The inputs and O(M·E) state, no more."""
    attend = ATTENTION[variant]
    q, k, v = qkv(4, 4, 1024, 1024, dtype=torch.float32, grad=True)

    def saved(backend):
        storages = {}
        pack = lambda t: storages.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()})  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            attend(q, k, v, backend=backend)
        own = {t.untyped_storage().data_ptr() for t in (q, k, v)}
        return sum(size for pointer, size in storages.items() if pointer not in own)

    state = 4 * 4 * (features * 32 + features) * 4
    if variant.startswith("favor"):
        state += 4 * 4 * 4 + features * 32 * 4  # the maxima, the projection
        assert 3 * q.nbytes + saved("cpu") <= 3.5 * q.nbytes
    assert saved("cpu") == state
    assert saved("reference") >= 3 * state


SMALL_OPS = {
    **{f"kv_state {m}": (partial(kv_state, feature_map=m), 2) for m in ("softmax", "elu", "relu")},
    **{
        f"performer_features {kernel} {eps} {is_query}": (
            lambda x, kernel=kernel, eps=eps, is_query=is_query, **options: performer_features(
                x,
                orthogonal_projection(37, x.shape[-1], generator=torch.Generator().manual_seed(1), dtype=torch.float64),
                is_query,
                kernel,
                eps=eps,
                **options,
            ),
            1,
        )
        for kernel, eps in (("softmax", 1e-4), ("softmax", 0.0), ("relu", 1e-3))
        for is_query in (True, False)
    },
}


@pytest.mark.parametrize("op", SMALL_OPS)
class TestSmallOps:
    """kv_state and performer_features."""

    def inputs(self, count, **options):
        return qkv(keys=1100, **options)[-count:]

    @pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
    def test_matches_float64_in_any_layout(self, op, dtype):
        function, count = SMALL_OPS[op]
        for layout in ("(B, N, H, D)", "NCHW", "every other token"):
            low = [layouts(t.detach())[layout].requires_grad_() for t in self.inputs(count, dtype=dtype)]
            exact = [t.detach().double().requires_grad_() for t in low]
            got, want = (
                f if isinstance(f, tuple) else (f,)
                for f in (function(*low, backend="cpu"), function(*exact, backend="reference"))
            )
            seeds = [torch.randn_like(w) for w in want]
            got += torch.autograd.grad(got, low, [s.to(g) for s, g in zip(seeds, got, strict=True)])
            want += torch.autograd.grad(want, exact, [s.to(g).double() for s, g in zip(seeds, got, strict=False)])
            for g, w in zip(got, want, strict=True):
                assert (g.double() - w).abs().max() <= tolerance(w.detach(), dtype, 1100, 4)

    def test_double_backward(self, op):
        function, count = SMALL_OPS[op]
        inputs = [heads(1, 2, 6, 3, grad=True) for _ in range(count)]

        def second(backend):
            out = function(*inputs, backend=backend)
            loss = sum(o.sin().sum() for o in (out if isinstance(out, tuple) else (out,)))
            first = torch.autograd.grad(loss, inputs, create_graph=True)
            return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

        torch.testing.assert_close(second("cpu"), second("reference"))

    def test_same_bits_for_any_threads_and_any_batch(self, op):
        function, count = SMALL_OPS[op]
        inputs = self.inputs(count, batch=3, dtype=torch.float32)
        assert_bits_are_the_inputs_alone(partial(function, backend="cpu"), inputs)

    def test_empty(self, op):
        function, count = SMALL_OPS[op]
        for shape in ({"batch": 0}, {"num_heads": 0}, {"queries": 0}):
            inputs = [heads(*({"batch": 2, "num_heads": 3, "queries": 5, "dim": 4} | shape).values())] * count
            torch.testing.assert_close(function(*inputs, backend="cpu"), function(*inputs, backend="reference"))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    variant=st.sampled_from(sorted(ATTENTION)),
    dtype=st.sampled_from(FLOAT_DTYPES),
    sizes=st.tuples(*(st.integers(1, n) for n in (3, 3, 150, 150, 40, 40))),
    layout=st.sampled_from(["contiguous", *layouts(torch.zeros(1, 1, 1, 1))]),
    scale=st.floats(0.1, 10),
    masked=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_property(variant, dtype, sizes, layout, scale, masked, seed):
    """Any shape, layout, dtype and scale: finite wherever float64 is, and close to it."""
    torch.manual_seed(seed)
    q, k, v = ({"contiguous": t} | layouts(t) for t in qkv(*sizes, dtype=dtype))
    q, k, v = q[layout] * scale, k[layout] * scale, v[layout]
    key_mask = torch.rand(k.shape[0], k.shape[2]) > 0.3 if masked else None
    # exponents of up to scale² · ‖x‖² have a rounding of that size
    assert_fused_matches((q, k, v), variant, key_mask, amplification=4 * max(1.0, scale) ** 2)


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set(isa):
    """The narrower kernels, chosen by the environment, in a process of their own."""
    code = (
        "import torch, cxv_kernels.library as e, cxv_kernels.testing as c\n"
        "print(e.build_info()['cpu_isa'])\n"
        "from cxv_kernels.dispatch import explain_backend\n"
        "for case in c.cases(dim=19):\n"
        "    for dtype in c.FLOAT_DTYPES:\n"
        "        if explain_backend(case.op)['cpu'] == 'supported':\n"
        "            assert c.run(case, 'cpu', 'cpu', dtype).passed, (case, dtype)\n"
        "x = torch.linspace(-87.3, 0, 100_000).reshape(1, 100, 1, 1000)\n"
        "_, z = c.kv_state(x, torch.ones(1, 100, 1, 1), 'elu', backend='cpu')\n"
        "assert (z.double() / x[:, :, 0].double().exp() - 1).abs().max() < 2 * 2**-23\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"CXV_CPU_ISA": isa, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] in (isa, "baseline")


# --- float16 ---


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["softmax", "elu", "favor"])
def test_a_million_large_keys_in_float16(variant):
    """|q| and |k| up to 30: finite, and what float64 says of the same inputs."""
    q, k, v, grad = (heads(1, 1, n, 8, dtype=torch.float16) for n in (16, 1 << 20, 1 << 20, 16))
    grad *= 1024  # a loss scale: a millionth of it is still a normal float16
    q, k = ((30 * t).clamp(-30, 30).requires_grad_() for t in (q, k))
    attend = partial(ATTENTION[variant], **({"features": 8} if "favor" in variant else {}))
    out = attend(q, k, v.requires_grad_(), backend="cpu")
    results = out, *torch.autograd.grad(out, (q, k, v), grad)
    assert all(t.isfinite().all() for t in results)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    want = attend(*exact, backend="reference")
    wants = want, *torch.autograd.grad(want, exact, grad.double())
    assert all(t.isfinite().all() for t in wants)
    for got, expected in ((out.detach(), want.detach()), (results[3], wants[3])):
        assert float((got - expected).abs().max() / expected.abs().max()) < 2**-9
