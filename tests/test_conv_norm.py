"""conv_norm: 3×3 convolution, then LayerNorm over channels. The reference against its definition, the fused kernels
against the reference."""

import contextlib
import importlib
from types import SimpleNamespace

import pytest
import torch
from conftest import needs_cpp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from cxv_kernels import conv_norm
from cxv_kernels._triton import TRITON_MISSING
from cxv_kernels.ops.conv_norm.op import conv_norm_op
from cxv_kernels.testing import tolerance
from cxv_kernels.validation import FLOAT_DTYPES, accumulate_dtype

FORMATS = (torch.contiguous_format, torch.channels_last)
NAMES = ("out", "dx", "dweight", "dbias", "dgamma", "dbeta")
OPS = torch.ops.cxv_kernels
in_every_format = pytest.mark.parametrize("layout", FORMATS, ids=("NCHW", "channels_last"))


def setup(c_in=5, c_out=7, dtype=torch.float64, batch=2, size=(6, 9), layout=torch.contiguous_format, grad=False):
    """x, weight, bias, gamma, beta; gamma about 1, as LayerNorm's is."""
    draw = lambda *shape: torch.randn(shape, dtype=torch.float64)  # noqa: E731
    x = draw(batch, c_in, *size).to(dtype).contiguous(memory_format=layout)
    weight, gamma = draw(c_out, c_in, 3, 3) / (9 * c_in) ** 0.5, 1 + 0.2 * draw(c_out)
    rest = (t.to(dtype) for t in (weight, draw(c_out), gamma, draw(c_out)))
    return [t.requires_grad_(grad) for t in (x, *rest)]


def image_layouts(x):
    """The same (B, C, H, W) values in the ways that they may lie in memory."""
    return {
        "NCHW": x.contiguous(),
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "H and W swapped": x.mT.contiguous().mT,
        "every other column": torch.stack([x, x], dim=4).flatten(3)[..., ::2],
        "every other channel": torch.stack([x, x], dim=2).flatten(1, 2)[:, ::2],
        "expanded batch": x[:1].expand_as(x),
    }


@in_every_format
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpp)])
def test_is_the_definition(backend, layout, with_bias):
    x, weight, bias, gamma, beta = setup(layout=layout)
    bias = bias if with_bias else None
    got = conv_norm(x, weight, bias, gamma, beta, 1e-3, backend=backend)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    y = torch.einsum("bchwij,ocij->bohw", padded.unfold(2, 3, 1).unfold(3, 3, 1), weight)
    y = y if bias is None else y + bias[:, None, None]
    y = (y - y.mean(1, keepdim=True)) / (y.var(1, correction=0, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(got, y * gamma[:, None, None] + beta[:, None, None])
    assert got.is_contiguous(memory_format=torch.channels_last if backend == "reference" else layout)


def fused_and_exact(inputs, grad_out=None, eps=1e-5):
    """Output and gradients of the fused op, and of the reference in float64."""
    dtype = inputs[0].dtype
    mine = [None if t is None else t.detach().requires_grad_() for t in inputs]
    exact = [None if t is None else t.detach().double().requires_grad_() for t in inputs]
    out, want = conv_norm(*mine, eps, backend="cpu"), conv_norm(*exact, eps, backend="reference")
    grad_out = torch.randn_like(want).to(dtype) if grad_out is None else grad_out
    leaves = [[t for t in group if t is not None] for group in (mine, exact)]
    got = (out, *torch.autograd.grad(out, leaves[0], grad_out))
    return got, (want, *torch.autograd.grad(want, leaves[1], grad_out.double())), leaves[0]


def assert_fused_matches(inputs, amplification=4.0, grad_out=None):
    dtype = inputs[0].dtype
    got_all, want_all, leaves = fused_and_exact(inputs, grad_out)
    names = [name for name, t in zip(NAMES[1:], inputs, strict=True) if t is not None]
    assert got_all[0].dtype == dtype
    assert [g.dtype for g in got_all[1:]] == [t.dtype for t in leaves]
    (batch, c_in, height, width), c_out = inputs[0].shape, len(inputs[1])
    depth = max(9 * c_in, 9 * c_out, batch * height * width)
    for name, got, expected in zip(("out", *names), got_all, want_all, strict=True):
        assert got.shape == expected.shape
        error = (got.detach().double() - expected.detach()).abs()
        bound = tolerance(expected.detach(), dtype, depth, amplification)
        assert error.numel() == 0 or error.max() <= bound, f"{name}: {error.max():.2e} > {bound:.2e}"


@needs_cpp
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@in_every_format
@pytest.mark.parametrize(
    ("c_in", "c_out", "size", "batch"),
    [
        (3, 1, (5, 5), 2),
        (1, 3, (1, 1), 5),
        (2, 7, (7, 9), 2),
        (3, 16, (8, 8), 1),
        (4, 64, (1, 1), 3),
        (4, 64, (5, 13), 2),
        (8, 128, (9, 15), 2),
        (3, 130, (11, 7), 2),
        (2, 5, (40, 41), 2),
        (3, 8, (4, 4), 0),
    ],
)
def test_fused_matches_float64(layout, dtype, c_in, c_out, size, batch):
    # of one channel only the rounding of the deviation is left, over √eps
    assert_fused_matches(setup(c_in, c_out, dtype, batch, size, layout), 4 if c_out > 1 else 4 * 1e5**0.5)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@in_every_format
def test_without_bias(layout, dtype):
    x, weight, _, gamma, beta = setup(3, 20, dtype, layout=layout)
    assert_fused_matches([x, weight, None, gamma, beta])


@needs_cpp
@pytest.mark.parametrize("layout", image_layouts(torch.zeros(1, 1, 1, 1)))
def test_any_strides(layout):
    x, *rest = setup(4, 18, torch.float32)
    grad_out = image_layouts(torch.randn(2, 18, 6, 9))
    for other in FORMATS:
        inputs = [image_layouts(x)[layout], *rest]
        assert_fused_matches(inputs, grad_out=grad_out["NCHW"].contiguous(memory_format=other))
        assert_fused_matches([x.contiguous(memory_format=other), *rest], grad_out=grad_out[layout])
    strided = [torch.stack([t, t], -1)[..., 0] for t in rest]
    assert not any(t.is_contiguous() for t in strided)
    assert_fused_matches([x, *strided])


@needs_cpp
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@in_every_format
@pytest.mark.parametrize("case", ["zero", "tiny", "mixed", "large beta", "just inside", "all zero"])
def test_gradients_where_the_output_does_not_tell_xhat(case, layout, dtype):
    x, weight, bias, gamma, beta = setup(3, 24, torch.float64, layout=layout)
    low = torch.finfo(dtype).bits == 16
    sign = 1 - 2 * (torch.arange(24) % 2)
    if case == "zero":
        gamma[::3] = 0
    elif case == "tiny":
        gamma = 1e-8 * gamma
    elif case == "mixed":
        gamma = sign * gamma * 10.0 ** (-8.0 * torch.arange(24) / 23)
    elif case == "large beta":
        beta = 300 * sign * beta.abs()
    elif case == "just inside":
        beta = sign * gamma * (3.98 if low else 15.9)
    else:
        gamma, beta = gamma * 0, beta * 0
    # γ and β in float32, as under autocast: float16 has no 1e-8
    params = [t.to(accumulate_dtype(dtype)) for t in (gamma, beta)]
    assert_fused_matches([*(t.to(dtype) for t in (x, weight, bias)), *params])


@needs_cpp
@pytest.mark.parametrize("source", ["bias", "convolution"])
@in_every_format
def test_a_large_mean_keeps_the_variance(layout, source):
    x, weight, bias, gamma, beta = setup(3, 40, torch.float32, layout=layout)
    if source == "bias":
        bias = bias + 1e3
    else:
        x[:, 0] = 1e3
        weight[:, 0] = 0
        weight[:, 0, 1, 1] = 1
    # a rounding of 1,000 is that many roundings of 1; the square of the mean would cost a thousand times more
    assert_fused_matches([x, weight, bias, gamma, beta], 1e3)


@needs_cpp
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from(FLOAT_DTYPES),
    layout=st.sampled_from(list(image_layouts(torch.zeros(1, 1, 1, 1)))),
    grad_layout=st.sampled_from(list(image_layouts(torch.zeros(1, 1, 1, 1)))),
    weight_layout=st.sampled_from(FORMATS),
    batch=st.integers(0, 3),
    c_in=st.integers(1, 5),
    c_out=st.integers(1, 40),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    scales=st.lists(st.floats(0.1, 10), min_size=5, max_size=5),
    with_bias=st.booleans(),
)
def test_any_shape_strides_and_scale(
    dtype, layout, grad_layout, weight_layout, batch, c_in, c_out, size, scales, with_bias
):
    x, *rest = (t * s for t, s in zip(setup(c_in, c_out, dtype, batch, size), scales, strict=True))
    x, rest[0] = image_layouts(x)[layout], rest[0].contiguous(memory_format=weight_layout)
    rest[1] = rest[1] if with_bias else None
    grad_out = image_layouts(torch.randn(batch, c_out, *size).to(dtype))[grad_layout]
    got, want, _ = fused_and_exact([x, *rest], grad_out)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert a.isfinite().all() or not b.to(dtype).isfinite().all()
    if batch:
        u = torch.nn.functional.conv2d(*(t if t is None else t.double() for t in (x, *rest[:2])), padding=1)
        enlarged = u.abs().amax(1) / (u.var(1, correction=0) + 1e-5).sqrt()  # by what a rounding of u grows
        bound = tolerance(want[0].detach(), dtype, 9 * c_in, 4 + 4 * float(enlarged.max()))
        assert (got[0].double() - want[0]).abs().max() <= bound
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        arguments = [None if t is None else mode.from_tensor(t.detach()) for t in (x, *rest)]
        arguments[3:] = (t.to(accumulate_dtype(dtype)) for t in arguments[3:])
        fake, rstd = OPS.conv_norm_forward(*arguments, 1e-5)
    assert fake.stride() == got[0].stride()
    assert rstd.shape == (batch, *size)


@needs_cpp
@in_every_format
def test_nan_is_not_swallowed(layout):
    x, *rest = setup(layout=layout)
    x[1, 2, 3, 4] = float("nan")
    got, want = (conv_norm(x, *rest, backend=b) for b in ("cpu", "reference"))
    assert want.isnan().any()
    assert torch.equal(got.isnan(), want.isnan())


@in_every_format
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpp)])
@pytest.mark.parametrize("gain", [1.0, 0.0])  # 0: the convolution is run again in backward
def test_gradcheck(backend, layout, gain):
    x, weight, bias, gamma, beta = (
        t.detach().requires_grad_() for t in setup(2, 3, batch=1, size=(3, 3), layout=layout)
    )
    gamma.data[1] *= gain

    def function(*t):
        return conv_norm(*t, 1e-2, backend=backend)

    assert torch.autograd.gradcheck(function, (x, weight, bias, gamma, beta))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias, gamma, beta))
    assert torch.autograd.gradgradcheck(lambda x, w, g: function(x, w, None, g, beta.detach()), (x, weight, gamma))


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpp)])
def test_a_constant_pixel_has_finite_gradients(backend):
    x, weight, bias, gamma, beta = setup()
    x = torch.zeros_like(x, requires_grad=True)
    out = conv_norm(x, weight, torch.ones_like(bias), gamma, beta, backend=backend)
    assert torch.autograd.grad(out.square().sum(), x)[0].isfinite().all()


@needs_cpp
def test_only_the_wanted_gradients_are_computed():
    inputs = setup(3, 10, grad=True)
    every = torch.autograd.grad(conv_norm(*inputs, backend="cpu").square().sum(), inputs)
    for wanted in ((1, 2, 3, 4), (0,), (1,), (2,), (3,), (4,), (3, 4), (0, 2)):
        some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
        with torch.profiler.profile() as profile:
            conv_norm(*some, backend="cpu").square().sum().backward()
        for i, t in enumerate(some):
            assert (t.grad is not None) == (i in wanted)
            if i in wanted:
                torch.testing.assert_close(t.grad, every[i], rtol=1e-12, atol=1e-12)
        ran = {event.key for event in profile.key_averages()}
        assert ("aten::convolution_backward" in ran) == (not {0, 1}.isdisjoint(wanted))
    assert not conv_norm(*(t.detach() for t in inputs), backend="cpu").requires_grad


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@in_every_format
def test_no_copy_of_an_image(layout, dtype):
    inputs = setup(16, 24, dtype, size=(12, 12), layout=layout, grad=True)
    grad_out = torch.randn(2, 24, 12, 12).to(dtype).contiguous(memory_format=layout)

    def copies_of_images(function, *inputs):
        torch.autograd.grad(function(*inputs), inputs, grad_out)
        with torch.profiler.profile(record_shapes=True) as profile:
            torch.autograd.grad(function(*inputs), inputs, grad_out)
        copied = [e.input_shapes for e in profile.events() if e.name in ("aten::copy_", "aten::clone")]
        return [shapes for shapes in copied if shapes[0] and shapes[0][0] == 2]

    # None, but where oneDNN lays out its results otherwise than x, as on some CPUs, and PyTorch brings them back.
    of_convolution = copies_of_images(lambda x, weight: torch.nn.functional.conv2d(x, weight, padding=1), *inputs[:2])
    assert copies_of_images(lambda *t: conv_norm(*t, backend="cpu"), *inputs) == of_convolution


@needs_cpp
def test_forward_mode_says_no():
    x, *rest = setup()
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: conv_norm(x, *rest, backend="cpu"), (x,), (x,))
    _, tangent = torch.func.jvp(lambda x: conv_norm(x, *rest, backend="reference"), (x,), (x,))
    assert tangent.isfinite().all()


@needs_cpp
@in_every_format
@pytest.mark.parametrize("with_bias", [True, False])
def test_opcheck(layout, with_bias):
    x, weight, bias, gamma, beta = setup(layout=layout)
    bias = bias if with_bias else None
    for inputs in (
        (x, weight, bias, gamma, beta),
        (x.bfloat16(), weight.bfloat16(), bias.bfloat16() if with_bias else None, gamma.float(), beta.float()),
    ):
        opcheck(OPS.conv_norm_forward, (*inputs, 1e-5))
        out, rstd = OPS.conv_norm_forward(*inputs, 1e-5)
        for needed in ([True, True, with_bias, True, True], [False, True, False, False, True]):
            arguments = (*inputs[:3], out, rstd, *inputs[3:], 1e-5, needed)
            opcheck(OPS.conv_norm_backward, (torch.randn_like(out), *arguments))


@needs_cpp
def test_the_raw_op_builds_no_graph_of_its_own():
    inputs = setup(grad=True)
    out, _ = OPS.conv_norm_forward(*inputs, 1e-5)
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        out.sum().backward()
    assert all(t.grad is None for t in inputs)


@needs_cpp
def test_raw_op_refuses_what_does_not_fit():
    x, weight, bias, gamma, beta = setup()
    op = OPS.conv_norm_forward
    for match, arguments in (
        (r"x must have 4 dimensions \(B, C_in, H, W\), got 3", (x[0], weight, bias, gamma, beta)),
        ("x must have at least one channel", (x[:, :0], weight[:, :0], bias, gamma, beta)),
        ("weight must have at least one output channel", (x, weight[:0], bias, gamma, beta)),
        ("x must be float64, float32", (x.int(), weight, bias, gamma, beta)),
        ("weight has size 4 in dimension 1, expected 5", (x, weight[:, :4], bias, gamma, beta)),
        ("weight has a dtype that does not go with x's", (x, weight.float(), bias, gamma, beta)),
        ("bias has size 6 in dimension 0, expected 7", (x, weight, bias[:6], gamma, beta)),
        ("gamma has a dtype that does not go with x's", (x, weight, bias, gamma.float(), beta)),
        ("beta must have 1 dimensions, got 2", (x, weight, bias, gamma, beta[None])),
    ):
        with pytest.raises(RuntimeError, match=match):
            op(*arguments, 1e-5)
    out, rstd = op(x, weight, bias, gamma, beta, 1e-5)
    op = OPS.conv_norm_backward
    for match, grad_out, b, y, r, needed in (
        ("grad_out has size 1 in dimension 0, expected 2", out[:1], bias, out, rstd, [True] * 5),
        ("out has a dtype that does not go with x's", out, bias, out.float(), rstd, [True] * 5),
        ("rstd has size 5 in dimension 1, expected 6", out, bias, out, rstd[:, :5], [True] * 5),
        ("a gradient of bias is needed, but bias is None", out, None, out, rstd, [True] * 5),
    ):
        with pytest.raises(RuntimeError, match=match):
            op(grad_out, x, weight, b, y, r, gamma, beta, 1e-5, needed)


@needs_cpp
@in_every_format
def test_compile_fullgraph_keeps_the_fused_ops(layout):
    inputs = setup(layout=layout, grad=True)
    targets = []

    def spy(graph, _):
        targets.extend(node.target for node in graph.graph.nodes)
        return make_boxed_func(graph)

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    @torch.compile(fullgraph=True, backend=aot_autograd(fw_compiler=spy, bw_compiler=spy))
    def loss(x, *rest):
        return conv_norm(x * 2, *rest).square().sum()

    got = torch.autograd.grad(loss(*inputs), inputs)
    want = torch.autograd.grad(conv_norm(inputs[0] * 2, *inputs[1:]).square().sum(), inputs)
    torch.testing.assert_close(got, want)
    assert {OPS.conv_norm_forward.default, OPS.conv_norm_backward.default} <= set(targets)


@needs_cpp
@pytest.mark.slow
def test_compile_inductor():
    inputs = setup(dtype=torch.float32, grad=True)
    loss = torch.compile(lambda *t: conv_norm(*t).sin().sum(), fullgraph=True)
    got = torch.autograd.grad(loss(*inputs), inputs)
    torch.testing.assert_close(got, torch.autograd.grad(conv_norm(*inputs).sin().sum(), inputs))


@needs_cpp
def test_compile_dynamic_shapes_and_frozen_inputs():
    def loss(*inputs):
        return conv_norm(*inputs).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch, size in ((2, (6, 9)), (3, (8, 5)), (4, (5, 5))):
        x, weight, bias, gamma, beta = setup(batch=batch, size=size)
        inputs = (x, weight.requires_grad_(), bias, gamma.requires_grad_(), beta)
        got, want = (torch.autograd.grad(f(*inputs), (weight, gamma)) for f in (compiled, loss))
        torch.testing.assert_close(got, want)


@needs_cpp
@in_every_format
def test_export(layout):
    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return conv_norm(*inputs)

    inputs = tuple(setup(layout=layout))
    program = torch.export.export(Module(), inputs)
    assert OPS.conv_norm_forward.default in {n.target for n in program.graph.nodes}
    torch.testing.assert_close(program.module()(*inputs), conv_norm(*inputs))


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_cpp)])
@pytest.mark.parametrize("gain", [1.0, 0.0])  # 0: backward convolves again, which autocast must not touch
def test_autocast(backend, gain):
    """x, weight and bias are cast, γ and β are not; statistics are float32."""
    inputs = [t.requires_grad_() for t in setup(dtype=torch.float32)]
    inputs[3].data[0] *= gain
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = conv_norm(*inputs, backend=backend)
        grads = torch.autograd.grad(out.float().square().sum(), inputs)
    assert out.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in grads)
    low = [*(t.detach().bfloat16() for t in inputs[:3]), *(t.detach() for t in inputs[3:])]
    assert torch.equal(out, conv_norm(*low, backend=backend))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exact = [t.detach().double().requires_grad_() for t in inputs]
        out = conv_norm(*exact, backend=backend)
        torch.autograd.grad(out.sum(), exact)
    assert out.dtype == torch.float64


def run_on(threads, inputs):
    """Output, 1/σ and the gradients of bias, γ and β: all that owes nothing to PyTorch's convolution backward."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, weight, bias, gamma, beta = inputs
        out, rstd = OPS.conv_norm_forward(x, weight, bias, gamma, beta, 1e-5)
        saved = (x, weight, bias, out, rstd, gamma, beta, 1e-5, [False, False, True, True, True])
        return (out, rstd, *OPS.conv_norm_backward(out.cos(), *saved)[2:])
    finally:
        torch.set_num_threads(before)


@needs_cpp
@in_every_format
@pytest.mark.parametrize("gain", [1.0, 0.0])
def test_same_bits_for_any_threads_and_any_batch(layout, gain):
    x, weight, bias, gamma, beta = setup(3, 40, torch.float32, 5, (33, 37), layout)
    x, weight = (2 * x).round(), (4 * weight).round()  # whose convolution is exact in any order
    gamma[3] *= gain
    inputs = (x, weight, bias, gamma, beta)
    first = run_on(1, inputs)
    for threads in (1, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(first, run_on(threads, inputs), strict=True))
    alone = run_on(2, (x[1:2], *inputs[1:]))
    assert all(torch.equal(a[1:2], b) for a, b in zip(first[:2], alone[:2], strict=True))


@needs_cpp
@in_every_format
@pytest.mark.parametrize("gain", [1.0, 0.0])
def test_every_output_element_is_written(layout, gain):
    """Memory from the allocator is poisoned with NaN; what the kernels leave unwritten would show."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(4).isnan().all()
        for size in ((9, 11), (1, 1), (16, 16)):
            inputs = setup(3, 21, size=size, layout=layout)
            inputs[3][2] *= gain
            inputs = [t.requires_grad_() for t in inputs]
            out, rstd = conv_norm_op(*inputs, 1e-5, "cpu")
            gradients = torch.autograd.grad(out.sum(), inputs)
            assert all(t.isfinite().all() for t in (out, rstd, *gradients))
    finally:
        torch.use_deterministic_algorithms(False)


@needs_cpp
def test_saved_bytes():
    inputs = setup(16, 32, torch.float32, 4, (16, 16), grad=True)

    def saved(backend):
        storages = {}
        pack = lambda t: storages.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()})  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = conv_norm(*inputs, backend=backend)
        own = {t.untyped_storage().data_ptr() for t in (*inputs, out)}
        return sum(size for pointer, size in storages.items() if pointer not in own)

    rstd = 4 * 16 * 16 * 4
    assert saved("cpu") == rstd
    assert saved("reference") >= 32 * rstd


def test_bad_input():
    x, weight, bias, gamma, beta = setup()
    for error, match, arguments in (
        (ValueError, r"x must have 4 dimensions \(B, C_in, H, W\), got shape", (x[0], weight, bias, gamma, beta)),
        (ValueError, r"weight must be \(C_out, 5, 3, 3\) for x of 5 channels", (x, weight[:, :4], bias, gamma, beta)),
        (ValueError, "at least one channel, row and column", (x[:, :0], weight[:, :0], bias, gamma, beta)),
        (ValueError, "at least one channel, row and column", (x[:, :, :0], weight, bias, gamma, beta)),
        (ValueError, "at least one channel", (x, weight[:0], bias[:0], gamma[:0], beta[:0])),
        (ValueError, "gamma has 6 channels, weight 7", (x, weight, bias, gamma[:6], beta)),
        (TypeError, "weight is torch.float32, x torch.float64", (x, weight.float(), bias, gamma, beta)),
        (TypeError, "bias is torch.float32, x torch.float64", (x, weight, bias.float(), gamma, beta)),
        (TypeError, "beta must be a torch.Tensor, got float", (x, weight, bias, gamma, 1.0)),
        (TypeError, "gamma must be a torch.Tensor, got NoneType", (x, weight, bias, None, beta)),
        (ValueError, "eps must be a finite number of at least 0, got -10", (x, weight, bias, gamma, beta, -10)),
    ):
        with pytest.raises(error, match=match):
            conv_norm(*arguments)


# --- the two forward passes of Triton, of which cudnn.benchmark selects one ---


@pytest.fixture
def candidates(monkeypatch):
    """The Triton module with fake kernels and a fake timer.

    ``time``: each candidate's milliseconds; ``error``: what is added to the implicit GEMM's result, or an exception;
    ``calls``: what ran; ``timed``: what was timed; ``capturing``: the state of the fake GPU.
    """
    if TRITON_MISSING:
        pytest.skip(TRITON_MISSING)
    module = importlib.import_module("cxv_kernels.ops.conv_norm.triton")
    state = SimpleNamespace(time={"default": 2.0, "gemm": 1.0}, error=0.0, calls=[], timed=[], capturing=False)

    def candidate(name):
        def run(x, weight, *rest):
            state.calls.append(name)
            error = state.error if name == "gemm" else 0.0
            if isinstance(error, Exception):
                raise error
            out = torch.ones(len(x), len(weight), *x.shape[2:]).to(x) + error
            return out, out[:, 0].float()

        return run

    def milliseconds(run, device):
        run()
        state.timed.append(state.calls[-1])
        return state.time[state.calls[-1]]

    can_time = lambda device: not state.capturing and not torch.compiler.is_compiling()  # noqa: E731
    monkeypatch.setattr(module, "_norm_after_cudnn", candidate("default"))
    monkeypatch.setattr(module, "_implicit_gemm", candidate("gemm"))
    monkeypatch.setattr(module, "_milliseconds", milliseconds)
    monkeypatch.setattr(module, "_can_time", can_time)
    monkeypatch.setattr(module, "_gemm_is_faster", {})
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)

    def selected(size=(4, 6), dtype=torch.float32, layout=torch.channels_last, c_out=7):
        module.conv_norm_forward(*setup(5, c_out, dtype, size=size, layout=layout), 1e-5)
        return state.calls[-1]

    state.selected = selected
    return state


@pytest.mark.parametrize(("time", "expected"), [(1.0, "gemm"), (3.0, "default")], ids=["faster", "slower"])
def test_cudnn_benchmark_selects_the_faster_forward_pass(candidates, time, expected):
    candidates.time["gemm"] = time
    assert [candidates.selected() for _ in range(3)] == [expected] * 3
    assert candidates.timed == ["gemm", "default"]


def test_cudnn_benchmark_times_each_shape_and_dtype_once(candidates):
    cases = [{}, {"size": (5, 6)}, {"dtype": torch.float16}, {"c_out": 8}]
    for case in [*cases, *cases]:
        assert candidates.selected(**case) == "gemm"
    assert len(candidates.timed) == 2 * len(cases)


def test_cudnn_benchmark_off_or_unsupported_shapes_use_the_default(candidates, monkeypatch):
    assert candidates.selected(layout=torch.contiguous_format) == candidates.selected(c_out=257) == "default"
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    assert candidates.selected() == "default"
    assert candidates.timed == []


def test_cudnn_benchmark_times_nothing_during_a_graph_capture(candidates):
    candidates.capturing = True
    assert candidates.selected() == "default"
    assert candidates.timed == []
    candidates.capturing = False
    assert candidates.selected() == "gemm"  # nothing was remembered


@pytest.mark.parametrize("error", [0.1, torch.nan, RuntimeError("out of resources")], ids=["wrong", "nan", "raises"])
def test_cudnn_benchmark_rejects_a_result_that_differs(candidates, error):
    candidates.error = error
    assert candidates.selected() == candidates.selected() == "default"
    assert candidates.timed == []


def test_timing_needs_a_gpu_with_tensor_cores_and_no_capture(monkeypatch):
    if TRITON_MISSING:
        pytest.skip(TRITON_MISSING)
    can_time = importlib.import_module("cxv_kernels.ops.conv_norm.triton")._can_time
    capability, capturing = (8, 0), False
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    gpu = torch.device("cuda", 0)
    assert can_time(gpu)
    assert not can_time(torch.device("cpu"))
    with monkeypatch.context() as tracing:
        tracing.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not can_time(gpu)
    capturing = True
    assert not can_time(gpu)
    capability, capturing = (7, 5), False
    assert not can_time(gpu)
