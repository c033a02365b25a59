"""conv_norm: 3×3 convolution, then LayerNorm over channels: its definition, and what is hard for its kernels.

test_values.py, test_gradients.py and test_pytorch.py have the properties of every op.
"""

import contextlib
import importlib
from types import SimpleNamespace

import pytest
import torch
from cases import (
    CONV_NORM,
    and_reference,
    assert_close_to_float64,
    device_of,
    every,
    every_backend,
    image,
    in_float64,
    poisoned_memory,
    run,
    threads,
    with_dtypes,
)
from conftest import needs_cpp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from cxv.errors import out_of_memory
from cxv_kernels import conv_norm
from cxv_kernels._triton import TRITON_MISSING, interpreting
from cxv_kernels.testing import tolerance
from cxv_kernels.validation import FLOAT_DTYPES, accumulate_dtype

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero")  # 1/γ of an unused channel, in the interpreter
FORMATS = (torch.contiguous_format, torch.channels_last)
OPS = torch.ops.cxv_kernels
NCHW, CHANNELS_LAST, NO_BIAS = CONV_NORM
in_both_formats = every([NCHW, CHANNELS_LAST])


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


LAYOUTS = list(image_layouts(torch.zeros(1, 1, 1, 1)))


@in_float64
@every(CONV_NORM)
def test_conv_norm_is_its_definition(case, backend):
    x, weight, *bias, gamma, beta = case.inputs(image(5, 7))
    (got,) = case.bind(backend, eps=1e-3)(x, weight, *bias, gamma, beta)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    y = torch.einsum("bchwij,ocij->bohw", padded.unfold(2, 3, 1).unfold(3, 3, 1), weight)
    y = y + bias[0][:, None, None] if bias else y
    y = (y - y.mean(1, keepdim=True)) / (y.var(1, correction=0, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(got, y * gamma[:, None, None] + beta[:, None, None])
    last = backend == "reference" or case is CHANNELS_LAST
    assert got.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@with_dtypes
@in_both_formats
@pytest.mark.parametrize(
    ("c_in", "c_out", "size", "batch"),
    [
        (3, 1, (5, 5), 2),
        (1, 3, (1, 1), 5),
        (2, 2, (3, 3), 1),
        (4, 64, (5, 13), 2),
        (8, 128, (3, 5), 1),
        (3, 130, (11, 7), 1),
        (33, 20, (17, 5), 2),
    ],
)
def test_sizes(case, backend, dtype, c_in, c_out, size, batch):
    """Of one channel only the rounding of the deviation is left, over √eps; of two, du is little more than what
    cancels."""
    sizes = image(c_in, c_out, size, batch)
    assert_close_to_float64(case, backend, case.inputs(sizes, dtype), sizes, 1e5**0.5 if c_out <= 2 else 1)


@every_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, backend):
    sizes = image(4, 18)
    x, *rest = NCHW.inputs(sizes, torch.float32)
    grads = image_layouts(torch.randn(2, 18, 6, 9))
    strided = [torch.stack([t, t], -1)[..., 0] for t in rest]
    assert not any(t.is_contiguous() for t in strided)
    strided[2][0] = 0  # where Triton's own convolution reads x and weight as they lie
    assert_close_to_float64(NCHW, backend, [image_layouts(x)[layout], *strided], sizes, grads=[grads["NCHW"]])
    for other in FORMATS[:1] if interpreting() else FORMATS:
        grad = grads["NCHW"].contiguous(memory_format=other)
        assert_close_to_float64(NCHW, backend, [image_layouts(x)[layout], *rest], sizes, grads=[grad])
        x = x.contiguous(memory_format=other)
        assert_close_to_float64(NCHW, backend, [x, *rest], sizes, grads=[grads[layout]])


@with_dtypes
@in_both_formats
@pytest.mark.parametrize("gain", ["zero", "tiny", "mixed", "large-beta", "just-inside", "all-zero"])
def test_gradients_where_the_output_does_not_tell_xhat(gain, case, backend, dtype):
    x, weight, bias, gamma, beta = case.inputs(image(3, 24))
    low = torch.finfo(dtype).bits == 16
    sign = 1 - 2 * (torch.arange(24) % 2)
    if gain == "zero":
        gamma[::3] = 0
    elif gain == "tiny":
        gamma = 1e-8 * gamma
    elif gain == "mixed":
        gamma = sign * gamma * 10.0 ** (-8.0 * torch.arange(24) / 23)
    elif gain == "large-beta":
        beta = 300 * sign * beta.abs()
    elif gain == "just-inside":
        beta = sign * gamma * (3.98 if low else 15.9)
    else:
        gamma, beta = gamma * 0, beta * 0
    # γ and β in float32, as under autocast: float16 has no 1e-8
    params = [t.to(accumulate_dtype(dtype)) for t in (gamma, beta)]
    grads = [torch.randn(2, 24, 6, 9).to(dtype)]
    assert_close_to_float64(
        case, backend, [*(t.to(dtype) for t in (x, weight, bias)), *params], image(3, 24), grads=grads
    )


@every_backend
@pytest.mark.parametrize("gain", [1.0, 0.0], ids=["", "zero"])
@pytest.mark.parametrize("source", ["bias", "convolution"])
@in_both_formats
def test_large_mean_costs_no_digits(case, source, gain, backend):
    """The convolution is exact in float32; the mean is not, nor is the sum of which it is the quotient."""
    x, weight, bias, gamma, beta = case.inputs(image(3, 40), torch.float32)
    x, weight, bias = ((8 * t).round() / 8 for t in (x, weight, bias))
    gamma[1] *= gain  # of 0, backward convolves again
    # the GPU's kernels have the rounding of the mean, which is a thousand roundings of 1
    mean, amplification = (1e5, 1) if backend == "cpu" else (1e3, 250)
    if source == "bias":
        bias = bias + mean
    else:
        x[:, 0] = mean
        weight[:, 0] = 0
        weight[:, 0, 1, 1] = 1
    assert_close_to_float64(case, backend, [x, weight, bias, gamma, beta], image(3, 40), amplification)


@needs_cpp
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from(FLOAT_DTYPES),
    layout=st.sampled_from(LAYOUTS),
    grad_layout=st.sampled_from(LAYOUTS),
    weight_layout=st.sampled_from(FORMATS),
    sizes=st.tuples(*(st.integers(least, most) for least, most in ((0, 3), (1, 5), (1, 40), (1, 12), (1, 12)))),
    scales=st.lists(st.floats(0.1, 10), min_size=5, max_size=5),
    with_bias=st.booleans(),
)
def test_any_shape_strides_and_scale(dtype, layout, grad_layout, weight_layout, sizes, scales, with_bias):
    batch, c_in, c_out, *size = sizes
    inputs = NCHW.inputs(image(c_in, c_out, size, batch), dtype)
    x, weight, bias, gamma, beta = (t * scale for t, scale in zip(inputs, scales, strict=True))
    x, weight = image_layouts(x)[layout], weight.contiguous(memory_format=weight_layout)
    given_inputs = [x, weight, *([bias] if with_bias else []), gamma, beta]
    grad = image_layouts(torch.randn(batch, c_out, *size).to(dtype))[grad_layout]
    case = NCHW if with_bias else NO_BIAS
    gots = run(case.bind("cpu"), given_inputs, [grad])
    wants = run(case.bind("reference"), [t.double() for t in given_inputs], [grad])
    for got, want in zip(gots, wants, strict=True):
        assert got.shape == want.shape
        assert got.isfinite().all() or not want.to(dtype).isfinite().all()
    bias = bias if with_bias else None
    if batch:
        u = torch.nn.functional.conv2d(*(t if t is None else t.double() for t in (x, weight, bias)), padding=1)
        enlarged = u.abs().amax(1) / (u.var(1, correction=0) + 1e-5).sqrt()  # by what a rounding of u grows
        bound = tolerance(wants[0], dtype, 9 * c_in, 4 + 4 * float(enlarged.max()))
        assert (gots[0].double() - wants[0]).abs().max() <= bound
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        arguments = [None if t is None else mode.from_tensor(t) for t in (x, weight, bias, gamma, beta)]
        arguments[3:] = (t.to(accumulate_dtype(dtype)) for t in arguments[3:])
        fake, rstd = OPS.conv_norm_forward(*arguments, 1e-5)
    assert fake.stride() == gots[0].stride() or not batch
    assert rstd.shape == (batch, *size)


@in_float64
@in_both_formats
def test_gradcheck_where_backward_convolves_again(case, backend):
    """γ = 0, whose channel the output does not tell."""
    inputs = case.inputs(image(2, 3, (2, 2), 1))
    inputs[3][1] = 0
    inputs = [t.requires_grad_() for t in inputs]
    call = case.bind(backend, eps=1e-2)
    assert torch.autograd.gradcheck(call, inputs, fast_mode=interpreting())
    assert interpreting() or torch.autograd.gradgradcheck(call, inputs)


@every_backend
def test_eps_of_zero(backend):
    """Also where tiles are not full."""
    inputs = [t.to(device_of(backend)) for t in NO_BIAS.inputs(image(3, 20), torch.float32)]
    inputs[2][1] = 0
    assert all(t.isfinite().all() for t in run(NO_BIAS.bind(backend, eps=0.0), inputs))


@needs_cpp
def test_convolution_backward_runs_where_it_is_needed():
    inputs = NCHW.inputs(image(3, 10))
    for wanted in ((1, 2, 3, 4), (0,), (1,), (2,), (3,), (4,), (3, 4), (0, 2)):
        some = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
        with torch.profiler.profile() as profile:
            conv_norm(*some, backend="cpu").square().sum().backward()
        ran = {event.key for event in profile.key_averages()}
        assert ("aten::convolution_backward" in ran) == (not {0, 1}.isdisjoint(wanted))
    assert not conv_norm(*inputs, backend="cpu").requires_grad


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@in_both_formats
def test_no_copy_of_an_image(case, dtype):
    inputs = case.inputs(image(16, 24, (12, 12)), dtype, grad=True)
    grad_out = torch.randn(2, 24, 12, 12).to(dtype)
    grad_out = grad_out.contiguous(memory_format=FORMATS[case is CHANNELS_LAST])

    def copies_of_images(function, *inputs):
        torch.autograd.grad(function(*inputs), inputs, grad_out)
        with torch.profiler.profile(record_shapes=True) as profile:
            torch.autograd.grad(function(*inputs), inputs, grad_out)
        copied = [e.input_shapes for e in profile.events() if e.name in ("aten::copy_", "aten::clone")]
        return [shapes for shapes in copied if shapes[0] and shapes[0][0] == 2]

    # None, but where oneDNN lays out its results otherwise than x, as on some CPUs, and PyTorch brings them back.
    of_convolution = copies_of_images(lambda x, weight: torch.nn.functional.conv2d(x, weight, padding=1), *inputs[:2])
    assert copies_of_images(lambda *t: conv_norm(*t, backend="cpu"), *inputs) == of_convolution


@and_reference
def test_autocast_where_backward_convolves_again(backend):
    """x, weight and bias are cast, γ and β are not; backward's convolution is not autocast's."""
    low, device = torch.float16 if interpreting() else torch.bfloat16, device_of(backend)
    inputs = [t.to(device).requires_grad_() for t in NCHW.inputs(image(5, 7), torch.float32)]
    inputs[3].data[0] = 0
    with torch.autocast(device, dtype=low):
        out = conv_norm(*inputs, backend=backend)
        grads = torch.autograd.grad(out.float().square().sum(), inputs)
    assert out.dtype == low
    assert all(g.dtype == torch.float32 for g in grads)
    rounded = [*(t.detach().to(low) for t in inputs[:3]), *(t.detach() for t in inputs[3:])]
    assert torch.equal(out, conv_norm(*rounded, backend=backend))


@needs_cpp
@pytest.mark.parametrize("gain", [1.0, 0.0])
@in_both_formats
def test_same_bits_for_any_threads_and_any_batch(case, gain):
    """Also of the gradients that owe nothing to PyTorch's convolution backward: those of bias, γ and β."""
    x, weight, bias, gamma, beta = case.inputs(image(3, 40, (33, 37), 5), torch.float32)
    x, weight = (2 * x).round(), (4 * weight).round()  # whose convolution is exact in any order
    gamma[3] *= gain

    def results(count, x):
        with threads(count):
            out, rstd = OPS.conv_norm_forward(x, weight, bias, gamma, beta, 1e-5)
            saved = (x, weight, bias, out, rstd, gamma, beta, 1e-5, [False, False, True, True, True])
            return (out, rstd, *OPS.conv_norm_backward(out.cos(), *saved)[2:])

    first = results(1, x)
    assert all(torch.equal(a, b) for n in (1, 2, 3) for a, b in zip(first, results(n, x), strict=True))
    assert all(torch.equal(a[1:2], b) for a, b in zip(first[:2], results(2, x[1:2])[:2], strict=True))


@every_backend
@in_both_formats
def test_every_element_is_written_where_backward_convolves_again(case, backend):
    for size in ((1, 1), (4, 5)) if interpreting() else ((9, 11), (1, 1), (16, 16)):
        inputs = [t.to(device_of(backend)) for t in case.inputs(image(3, 21, size), torch.float32)]
        inputs[3][2] = 0
        with poisoned_memory():
            assert all(t.isfinite().all() for t in run(case.bind(backend), inputs))


@needs_cpp
def test_raw_op_has_the_gradients():
    inputs = NCHW.inputs(image(5, 7), grad=True)
    raw, _ = OPS.conv_norm_forward(*inputs, 1e-5)
    public = conv_norm(*inputs, 1e-5, backend="cpu")
    for got, want in zip(*(torch.autograd.grad(out.cos().sum(), inputs) for out in (raw, public)), strict=True):
        assert torch.equal(got, want)


@needs_cpp
def test_out_of_memory_keeps_pytorchs_words():
    x, weight, one = torch.zeros(1, 1, 1, 1).expand(1 << 43, 3, 4, 4), torch.zeros(4, 3, 3, 3), torch.ones(4)
    with pytest.raises(RuntimeError, match="aten::convolution has failed: ") as raised:
        conv_norm(x, weight, None, one, one, backend="cpu")
    assert out_of_memory(raised.value)


@needs_cpp
def test_raw_ops_refuse_bad_arguments():
    x, weight, bias, gamma, beta = NCHW.inputs(image(5, 7))
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


def test_bad_input():
    x, weight, bias, gamma, beta = NCHW.inputs(image(5, 7))
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
        x, *rest = NCHW.inputs(image(5, c_out, size), dtype)
        module.conv_norm_forward(x.contiguous(memory_format=layout), *rest, 1e-5)
        return state.calls[-1]

    state.selected = selected
    return state


@pytest.mark.parametrize(("time", "expected"), [(1.0, "gemm"), (3.0, "default")], ids=["faster", "slower"])
def test_cudnn_benchmark_selects_the_faster_forward_pass(candidates, time, expected):
    candidates.time["gemm"] = time
    assert [candidates.selected() for _ in range(3)] == [expected] * 3
    assert candidates.timed == ["gemm", "default"]


def test_cudnn_benchmark_times_each_shape_and_dtype_once(candidates):
    calls = [{}, {"size": (5, 6)}, {"dtype": torch.float16}, {"c_out": 8}]
    for call in [*calls, *calls]:
        assert candidates.selected(**call) == "gemm"
    assert len(candidates.timed) == 2 * len(calls)


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
