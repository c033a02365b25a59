"""linear_attention and kv_state: the reference against their definition, the fused kernels against the reference."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import heads, layouts, needs_cpp
from torch.library import opcheck

import cxv_kernels
from cxv_kernels.checks import tolerance
from cxv_kernels.linear_attention.op import LinearAttention
from cxv_kernels.validation import FLOAT_DTYPES

MAPS = ("softmax", "elu", "relu")
attend = cxv_kernels.linear_attention


def qkv(batch=2, num_heads=3, queries=70, keys=150, dim=32, value_dim=32, dtype=torch.float64, grad=False):
    shapes = ((queries, dim), (keys, dim), (keys, value_dim))
    return [heads(batch, num_heads, n, d, dtype=dtype, grad=grad) for n, d in shapes]


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


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("feature_map", MAPS)
def test_reference_is_the_definition(feature_map, masked):
    q, k, v = qkv(value_dim=20)
    key_mask = torch.rand(2, 150) > 0.4 if masked else None
    out = attend(q, k, v, feature_map, eps=1e-3, key_mask=key_mask, backend="reference")
    torch.testing.assert_close(out, dense(q, k, v, feature_map, 1e-3, key_mask), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("feature_map", MAPS)
def test_kv_state_is_what_attention_reads(feature_map):
    q, k, v = qkv()
    state, z = cxv_kernels.kv_state(k, v, feature_map)
    assert state.shape == (2, 3, 32, 32)
    assert z.shape == (2, 3, 32)
    if feature_map == "softmax":
        torch.testing.assert_close(z, torch.ones_like(z))
        out = (q * 32**-0.25).softmax(-1) @ state
    else:
        phi = torch.nn.functional.elu(q) + 1 if feature_map == "elu" else q.relu()
        out = phi @ state / ((phi * z[:, :, None]).sum(-1, keepdim=True) + (1e-6 if feature_map == "relu" else 0))
    torch.testing.assert_close(out, attend(q, k, v, feature_map, backend="reference"))


def assert_fused_matches(inputs, feature_map, key_mask=None):
    dtype = inputs[0].dtype
    inputs = [t.detach().requires_grad_() for t in inputs]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    out = attend(*inputs, feature_map, key_mask=key_mask, backend="cpp")
    want = attend(*exact, feature_map, key_mask=key_mask, backend="reference")
    grad = torch.randn_like(want).to(dtype)
    got_all = (out, *torch.autograd.grad(out, inputs, grad))
    want_all = (want, *torch.autograd.grad(want, exact, grad.double()))
    depth = max(inputs[0].shape[2], inputs[1].shape[2], 1)
    for name, got, expected in zip(("out", "dq", "dk", "dv"), got_all, want_all, strict=True):
        assert got.shape == expected.shape
        assert got.dtype == dtype
        error = (got.detach().double() - expected.detach()).abs()
        # a query whose relu features nearly vanish divides by a small denominator
        bound = tolerance(expected.detach(), dtype, depth, 4 if feature_map == "relu" else 1)
        assert error.numel() == 0 or error.max() <= bound, f"{name}: {error.max():.2e} > {bound:.2e}"


@needs_cpp
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize(
    ("queries", "keys", "dim", "value_dim"),
    [(1, 1, 1, 1), (64, 64, 16, 16), (65, 63, 17, 5), (130, 70, 32, 48), (1030, 2200, 8, 33), (100, 100, 130, 129)],
)
def test_fused_matches_float64(feature_map, dtype, queries, keys, dim, value_dim):
    assert_fused_matches(qkv(2, 2, queries, keys, dim, value_dim, dtype), feature_map)


@needs_cpp
@pytest.mark.parametrize("feature_map", MAPS)
def test_fused_honours_key_mask(feature_map):
    key_mask = torch.rand(3, 150) > 0.5
    key_mask[1] = False  # sees nothing
    key_mask[2, :100] = False  # nothing in its first tiles
    inputs = qkv(3)
    inputs[1][:, :, ::2] *= ~key_mask[:, None, ::2, None] * 1e4 + 1  # what is hidden must not reach the maximum
    assert_fused_matches(inputs, feature_map, key_mask)
    assert attend(*inputs, feature_map, key_mask=key_mask)[1].eq(0).all()
    assert_fused_matches(inputs, feature_map, torch.stack([key_mask, key_mask], -1)[..., 0])  # a strided mask


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1, 1)))
def test_fused_reads_any_strides(layout, dtype):
    contiguous = qkv(dtype=dtype, keys=70)
    strided = [layouts(t)[layout] for t in contiguous]
    assert not any(t.is_contiguous() for t in strided)
    assert_fused_matches(strided, "softmax")
    assert_fused_matches([strided[0], contiguous[1], strided[2]], "elu")


@needs_cpp
def test_no_copy_of_strided_inputs():
    q, k, v = (layouts(t)["a chunk of qkv"].requires_grad_() for t in qkv(dtype=torch.float32, keys=70))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.untyped_storage().data_ptr()), lambda t: t):
        attend(q, k, v, backend="cpp")
    assert {t.untyped_storage().data_ptr() for t in (q, k, v)} <= set(saved)
    with torch.profiler.profile() as profile:
        attend(q, k, v, backend="cpp")
    assert not {"aten::copy_", "aten::clone", "aten::contiguous"} & {event.key for event in profile.key_averages()}


@needs_cpp
def test_output_is_laid_out_like_q():
    q, k, v = (layouts(t)["(B, N, H, D)"] for t in qkv(keys=70))
    out = attend(q, k, v, backend="cpp")
    assert out.transpose(1, 2).is_contiguous()


@needs_cpp
@pytest.mark.parametrize("shape", [{"batch": 0}, {"num_heads": 0}, {"queries": 0}, {"keys": 0}, {"value_dim": 0}])
@pytest.mark.parametrize("feature_map", MAPS)
def test_empty(feature_map, shape):
    inputs = qkv(**shape)
    assert_fused_matches(inputs, feature_map)
    if shape == {"keys": 0}:
        assert attend(*inputs, feature_map).eq(0).all()


@needs_cpp
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_finite_wherever_float64_is(dtype, scale):
    q, k, v = qkv(dtype=dtype)
    for feature_map in MAPS:
        out = attend(q * scale, k * scale, v, feature_map, backend="cpp")
        assert out.isfinite().all()


@needs_cpp
@pytest.mark.parametrize("feature_map", MAPS)
def test_nan_is_not_swallowed(feature_map):
    for position in range(3):
        inputs = qkv(1, 1, 70, 70, 8, 8)
        inputs[position][0, 0, 3, 2] = float("nan")
        got, want = (attend(*inputs, feature_map, backend=b) for b in ("cpp", "reference"))
        assert want.isnan().any()
        assert torch.equal(got.isnan(), want.isnan())


@needs_cpp
def test_keys_of_minus_infinity_have_no_weight():
    q, k, v = qkv(1, 1, 5, 200, 4, 4)
    k[:, :, :150, 1] = float("-inf")  # all of the first tiles, for one channel
    got, want = (attend(q, k, v, backend=b) for b in ("cpp", "reference"))
    torch.testing.assert_close(got, want)


@needs_cpp
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("feature_map", MAPS)
def test_gradcheck(feature_map, masked):
    inputs = qkv(1, 2, 5, 6, 3, 4, grad=True)
    key_mask = torch.tensor([[True, False, True, True, True, False]]) if masked else None

    def function(q, k, v):
        return attend(q, k, v, feature_map, key_mask=key_mask, backend="cpp")

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@needs_cpp
def test_forward_mode_says_no():
    q, k, v = qkv()
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: attend(x, k, v, backend="cpp"), (q,), (q,))
    _, tangent = torch.func.jvp(lambda x: attend(x, k, v, backend="reference"), (q,), (q,))
    assert tangent.isfinite().all()


@needs_cpp
@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("layout", ["(B, N, H, D)", "NCHW"])
def test_opcheck(feature_map, layout):
    inputs = [layouts(t)[layout] for t in qkv(1, 2, 20, 20, 4, 6)]
    key_mask = torch.rand(1, 20) > 0.5
    opcheck(torch.ops.cxv_kernels.linear_attention_forward, (*inputs, key_mask, feature_map, 1e-6))
    out, state, stat = torch.ops.cxv_kernels.linear_attention_forward(*inputs, key_mask, feature_map, 1e-6)
    opcheck(
        torch.ops.cxv_kernels.linear_attention_backward,
        (torch.randn_like(out), *inputs, key_mask, state, stat, feature_map, 1e-6),
    )


@needs_cpp
def test_raw_op_refuses_what_does_not_fit():
    q, k, v = qkv()
    op = torch.ops.cxv_kernels.linear_attention_forward
    with pytest.raises(RuntimeError, match="feature_map must be softmax, elu or relu, got cosine"):
        op(q, k, v, None, "cosine", 0.0)
    with pytest.raises(RuntimeError, match="v has size 5 in dimension 2, expected 150"):
        op(q, k, v[:, :, :5], None, "elu", 0.0)
    with pytest.raises(RuntimeError, match="k has a dtype that does not go with q's"):
        op(q, k.float(), v, None, "elu", 0.0)
    with pytest.raises(RuntimeError, match="key_mask must be bool"):
        op(q, k, v, torch.ones(2, 3, dtype=torch.bool), "elu", 0.0)


@needs_cpp
def test_compile_fullgraph_keeps_the_fused_ops():
    q, k, v = qkv(grad=True)
    targets = []

    def spy(graph, _):
        targets.extend(node.target for node in graph.graph.nodes)
        return make_boxed_func(graph)

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    @torch.compile(fullgraph=True, backend=aot_autograd(fw_compiler=spy, bw_compiler=spy))
    def loss(q, k, v):
        return attend(q * 2, k, v, "elu").square().sum()

    got = torch.autograd.grad(loss(q, k, v), (q, k, v))
    want = torch.autograd.grad(attend(q * 2, k, v, "elu").square().sum(), (q, k, v))
    torch.testing.assert_close(got, want)
    ops = torch.ops.cxv_kernels
    assert {ops.linear_attention_forward.default, ops.linear_attention_backward.default} <= set(targets)


@needs_cpp
@pytest.mark.slow
def test_compile_inductor():
    q, k, v = qkv(dtype=torch.float32, grad=True)
    loss = torch.compile(lambda *t: attend(*t).sin().sum(), fullgraph=True)
    got = torch.autograd.grad(loss(q, k, v), (q, k, v))
    torch.testing.assert_close(got, torch.autograd.grad(attend(q, k, v).sin().sum(), (q, k, v)))


@needs_cpp
def test_compile_dynamic_shapes():
    compiled = torch.compile(lambda *t: attend(*t, "elu"), fullgraph=True, dynamic=True, backend="aot_eager")
    for queries, keys in ((64, 64), (100, 33), (33, 100)):
        inputs = qkv(queries=queries, keys=keys)
        torch.testing.assert_close(compiled(*inputs), attend(*inputs, "elu"))


@needs_cpp
def test_export():
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return attend(q, k, v)

    inputs = tuple(qkv())
    program = torch.export.export(Module(), inputs)
    assert torch.ops.cxv_kernels.linear_attention_forward.default in {n.target for n in program.graph.nodes}
    torch.testing.assert_close(program.module()(*inputs), attend(*inputs))


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
def test_autocast(backend):
    q, k, v = qkv(dtype=torch.float32)
    k = k.bfloat16()  # mixed inputs are autocast's business
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(q, k, v, backend=backend)
    assert out.dtype == torch.bfloat16
    exact = attend(*(t.bfloat16().double() for t in (q, k, v)), backend="reference")
    assert (out.double() - exact).abs().max() <= tolerance(exact, torch.bfloat16, 150)
    q64 = [t.double() for t in (q, k, v)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attend(*q64, backend=backend).dtype == torch.float64


def run_on(threads, inputs, feature_map):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        inputs = [t.detach().requires_grad_() for t in inputs]
        out = attend(*inputs, feature_map, backend="cpp")
        return (out, *torch.autograd.grad(out.square().sum(), inputs))
    finally:
        torch.set_num_threads(before)


@needs_cpp
@pytest.mark.parametrize("feature_map", MAPS)
def test_same_bits_for_any_threads_and_any_batch(feature_map):
    inputs = qkv(3, 2, 2500, 3000, 32, 32, torch.float32)
    first = run_on(1, inputs, feature_map)
    for threads in (1, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(first, run_on(threads, inputs, feature_map), strict=True))
    alone = run_on(2, [t[1:2] for t in inputs], feature_map)
    assert all(torch.equal(a[1:2], b) for a, b in zip(first, alone, strict=True))


@needs_cpp
def test_every_output_element_is_written():
    """Memory from the allocator is poisoned with NaN; what the kernels leave unwritten would show."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(4).isnan().all()
        for feature_map in MAPS:
            inputs = [layouts(t)["NCHW"].requires_grad_() for t in qkv(keys=70)]
            out, state, stat = LinearAttention.apply(*inputs, None, feature_map, 1e-6)
            gradients = torch.autograd.grad(out.sum(), inputs)
            assert all(t.isfinite().all() for t in (out, state, stat, *gradients))
    finally:
        torch.use_deterministic_algorithms(False)


@needs_cpp
def test_saved_bytes():
    q, k, v = qkv(4, 4, 1024, 1024, dtype=torch.float32, grad=True)

    def saved(backend):
        storages = {}
        pack = lambda t: storages.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()})  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            attend(q, k, v, backend=backend)
        own = {t.untyped_storage().data_ptr() for t in (q, k, v)}
        return sum(size for pointer, size in storages.items() if pointer not in own)

    state = 4 * 4 * (32 * 32 + 32) * 4
    assert saved("cpp") == state
    assert saved("reference") >= 3 * state


@needs_cpp
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set(isa):
    """The narrower kernels, chosen by the environment, in a process of their own."""
    code = (
        "import torch, cxv_kernels._extension as e, cxv_kernels.checks as c\n"
        "print(e.build_info()['cpu_isa'])\n"
        "for case in c.cases(dim=19):\n"
        "    for dtype in c.FLOAT_DTYPES:\n"
        "        if case.op == 'linear_attention': assert c.run(case, 'cpp', 'cpu', dtype).passed, (case, dtype)\n"
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


@needs_cpp
def test_half_precision_conversions_are_exact():
    """Every finite float16 and bfloat16 value passes through the kernel and back: one key, so out = v."""
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
        v = every[every.isfinite()].reshape(1, 1, 1, -1)
        q = torch.zeros(1, 1, 1, 1, dtype=dtype)
        out = attend(q, q, v, "softmax", backend="cpp")
        assert torch.equal(out, v)


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
        (ValueError, "k is on meta, q on cpu", (q, k.to("meta"), v.to("meta"))),
    ):
        with pytest.raises(error, match=match):
            attend(*arguments)
    with pytest.raises(ValueError, match="feature_map must be one of 'softmax', 'elu', 'relu', got 'cosine'"):
        attend(q, k, v, "cosine")
    with pytest.raises(TypeError, match=r"key_mask must be a bool tensor \(B, N_k\), got torch.float32"):
        attend(q, k, v, key_mask=torch.ones(2, 150))
    with pytest.raises(ValueError, match=r"key_mask must have shape \(2, 150\)"):
        attend(q, k, v, key_mask=torch.ones(2, 70, dtype=torch.bool))
    with pytest.raises(ValueError, match="backend must be one of"):
        attend(q, k, v, backend="fast")
