"""nystrom_attention: its definition with every map written out, its landmarks and inverse, and the ops of its parts.

test_values.py, test_gradients.py and test_pytorch.py have the properties of every op.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import (
    NYSTROM,
    OpCalls,
    Sizes,
    assert_close_to_float64,
    device_of,
    every_backend,
    in_float64,
    needed_gradients,
    run,
    threads,
    with_dtypes,
)
from conftest import heads, layouts, needs_cpp
from hypothesis import given, settings
from hypothesis import strategies as st

from cxv_kernels import nystrom_attention
from cxv_kernels._triton import interpreting
from cxv_kernels.ops.nystrom_attention.op import means_op, mix_op, readout_op, residual_op, summary_op
from cxv_kernels.ops.nystrom_attention.reference import (
    iterative_pinv,
    mix_reference,
    residual_reference,
    segment_means,
)
from cxv_kernels.testing import tolerance
from cxv_kernels.validation import accumulate_dtype

OPS = torch.ops.cxv_kernels
ALL = [True] * 3  # the gradients that are needed
PLAIN, RESIDUAL = NYSTROM


def qkv(batch=2, num_heads=3, queries=70, keys=70, dim=16, value_dim=16, dtype=torch.float64):
    shapes = ((queries, dim), (keys, dim), (keys, value_dim))
    return [heads(batch, num_heads, n, d, dtype=dtype) for n, d in shapes]


def residual_weight(num_heads=3, kernel=33, dtype=torch.float64):
    return (heads(num_heads, 1, kernel, 1) / kernel**0.5).to(dtype)


def landmark_inputs(batch=1, num_heads=2, landmarks=5, dim=3, value_dim=4, dtype=torch.float64):
    """(q_means, k_means, summary); the means in the accumulation dtype."""
    means = [heads(batch, num_heads, landmarks, dim, dtype=accumulate_dtype(dtype)) for _ in range(2)]
    return [*means, heads(batch, num_heads, landmarks, value_dim, dtype=dtype)]


def definition(q, k, v, landmarks, weight=None, one_scale=False):
    scale = q.shape[-1] ** -0.5
    q_means, k_means = (
        torch.stack([part.mean(dim=-2) for part in x.tensor_split(landmarks, dim=-2)], dim=-2) for x in (q, k)
    )
    inner = (q_means @ k_means.mT * scale).softmax(-1)
    left, right = (q @ k_means.mT * scale).softmax(-1), (q_means @ k.mT * scale).softmax(-1)
    scales = (inner.sum(-1).amax(-1) * inner.sum(-2).amax(-1))[..., None, None]
    z = inner.mT / (scales.amax() if one_scale else scales)
    eye = torch.eye(landmarks, dtype=q.dtype)
    for _ in range(6):
        az = inner @ z
        z = 0.25 * z @ (13 * eye - az @ (15 * eye - az @ (7 * eye - az)))
    out = left @ z @ right @ v
    if weight is not None:
        reach = weight.shape[2] // 2
        windows = F.pad(v, (0, 0, reach, reach)).unfold(2, weight.shape[2], 1)  # (B, H, N, E, K)
        out = out + (windows * weight[:, 0, None, None, :, 0]).sum(-1)
    return out


@in_float64
@pytest.mark.parametrize(
    ("queries", "keys", "landmarks"),
    [(64, 64, 16), (70, 101, 16), (130, 64, 64), *([] if interpreting() else [(1024, 1024, 64)])],
)
def test_nystrom_attention_is_its_definition(queries, keys, landmarks, backend):
    q, k, v = qkv(queries=queries, keys=keys, dim=8, value_dim=5)
    weight = residual_weight() if queries == keys else None
    got = nystrom_attention(q, k, v, landmarks, residual_weight=weight, backend=backend)
    torch.testing.assert_close(got, definition(q, k, v, landmarks, weight))


@in_float64
def test_segments_are_the_papers_where_they_divide(backend):
    x = heads(1, 1, 1024, 4)
    means = segment_means(x, 64) if backend == "reference" else means_op(x, 64, backend)
    torch.testing.assert_close(means, x.reshape(1, 1, 64, 16, 4).mean(dim=3))


def test_landmarks_for_every_token_give_softmax_attention():
    q, k, v = (heads(1, 2, 8, 4) * 3 for _ in range(3))
    exact = F.scaled_dot_product_attention(q, k, v)
    inner = (q @ k.mT / 2).softmax(-1)
    torch.testing.assert_close(inner @ iterative_pinv(inner, 40) @ inner @ v, exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(nystrom_attention(q, k, v, 64), nystrom_attention(q, k, v, 8))


@in_float64
def test_pinv_scale_is_per_head(backend):
    q, k, v = (heads(3, 2, 64, 8) for _ in range(3))
    q[1] *= 5
    whole = nystrom_attention(q, k, v, 16, backend=backend)
    for part in (slice(0, 1), slice(1, 2)):
        alone = nystrom_attention(q[part], k[part], v[part], 16, backend=backend)
        torch.testing.assert_close(alone, whole[part], rtol=1e-12, atol=1e-12)


@in_float64
def test_pinv_init_of_the_batch(backend):
    """Its output is the definition's and its gradient that of finite differences; the default's output is another."""
    q, k, v = (heads(2, 2, 12, 4) for _ in range(3))
    q[1] *= 5
    options = {"pinv_init": "batch", "backend": backend}
    got = nystrom_attention(q, k, v, 4, **options)
    torch.testing.assert_close(got, definition(q, k, v, 4, one_scale=True))
    assert (got - nystrom_attention(q, k, v, 4)).abs().max() > 1e-3
    inputs = [x.requires_grad_() for x in (q, k, v)]
    call = lambda *x: nystrom_attention(*x, 4, **options)  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs, fast_mode=interpreting())


@with_dtypes
def test_error_of_pinv_init_of_the_batch(backend, dtype):
    case = replace(PLAIN, function=partial(PLAIN.function, pinv_init="batch"))
    assert_close_to_float64(case, backend, case.inputs(dtype=dtype), num_landmarks=12)


@with_dtypes
@pytest.mark.parametrize(
    ("queries", "keys", "dim", "value_dim", "landmarks", "kernel"),
    [
        (1, 1, 1, 1, 64, 33),
        (2, 3, 4, 4, 64, 0),
        (64, 64, 16, 16, 16, 1),
        (65, 63, 17, 5, 12, 0),
        (90, 90, 16, 20, 25, 33),
        (130, 70, 32, 48, 64, 0),
        (129, 129, 8, 21, 16, 33),
        (140, 140, 8, 21, 16, 301),
        (300, 300, 130, 129, 100, 5),
        (1030, 2200, 8, 33, 40, 0),
    ],
)
def test_sizes_and_landmarks(backend, dtype, queries, keys, dim, value_dim, landmarks, kernel):
    """``kernel``: the length of the residual's filters, 0 for no residual."""
    if backend != "cpu" and queries > 100:
        pytest.skip("long in Triton's interpreter, and wider heads are the reference's")
    sizes = Sizes(2, 2, queries, keys, dim, value_dim)
    inputs, case = PLAIN.inputs(sizes, dtype), PLAIN
    if kernel:
        inputs, case = [*inputs, residual_weight(2, kernel, dtype)], RESIDUAL
    assert_close_to_float64(case, backend, inputs, sizes, num_landmarks=landmarks)


@needs_cpp
def test_many_tokens():
    sizes = Sizes(1, 1, 100_003, 100_003, 4, 4)
    inputs = [*PLAIN.inputs(sizes, torch.float32), residual_weight(1, dtype=torch.float32)]
    assert_close_to_float64(RESIDUAL, "cpu", inputs, sizes, num_landmarks=64)


@needs_cpp
def test_same_bits_with_many_landmarks():
    sizes = Sizes(3, 2, 2500, 2500, 32, 32)
    inputs = RESIDUAL.inputs(sizes, torch.float32)
    call = RESIDUAL.bind("cpu", sizes, num_landmarks=40)
    first = run(call, inputs)
    for count in (1, 2, 3):
        with threads(count):
            assert all(map(torch.equal, first, run(call, inputs)))
    alone = run(call, [*(t[1:2] for t in inputs[:3]), inputs[3]])
    assert all(torch.equal(a[1:2], b) for a, b in zip(first[:-1], alone[:-1], strict=True))  # a sum over the batch


@pytest.mark.parametrize("tokens", [128, 196, 256, 1024])
def test_reference_residual_gradients_in_float32(tokens):
    """oneDNN's own, with the tokens along the height, were 5 to 9 % off for 196 and 256 tokens."""
    v, weight, grad = heads(4, 4, tokens, 32), residual_weight(4), heads(4, 4, tokens, 32)
    exact, single = (
        torch.autograd.grad(residual_reference(*inputs), inputs, grad.to(inputs[0].dtype))
        for inputs in ([x.to(dtype).requires_grad_() for x in (v, weight)] for dtype in (torch.float64, torch.float32))
    )
    for a, b in zip(single, exact, strict=True):
        assert (a.double() - b).abs().max() < 3e-6 * b.abs().max()


@needs_cpp
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    scale=st.floats(0.1, 10),
    tokens=st.integers(1, 200),
    landmarks=st.integers(1, 80),
    dim=st.integers(1, 40),
    similar=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_finite_wherever_float64_is(dtype, scale, tokens, landmarks, dim, similar, seed):
    """Like images, ``similar`` tokens differ little from their neighbors, and so then do the landmarks."""
    torch.manual_seed(seed)
    q, k, v = (heads(1, 2, tokens, dim) for _ in range(3))
    if similar:
        q, k = (x[:, :, :1] + 0.01 * x for x in (q, k))
    inputs = [(q * scale).to(dtype), (k * scale).to(dtype), v.to(dtype)]
    weight, grad = residual_weight(2, dtype=dtype), heads(1, 2, tokens, dim, dtype=dtype)

    def run(backend, kind):
        tensors = [t.to(kind).requires_grad_() for t in (*inputs, weight)]
        out = nystrom_attention(*tensors[:3], landmarks, residual_weight=tensors[3], backend=backend)
        return [t.detach() for t in (out, *torch.autograd.grad(out, tensors, grad.to(kind)))]

    assert all(t.isfinite().all() for t in run("reference", torch.float64))
    assert all(t.isfinite().all() for t in run("cpu", dtype))


@needs_cpp
@pytest.mark.parametrize("scale", [0.1, 1, 3, 10, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_no_worse_than_the_reference_where_the_inverse_is_large(dtype, scale):
    inputs = [(x * s).to(dtype) for x, s in zip(qkv(2, 2, 256, 256), (scale, scale, 1), strict=True)]
    grad = heads(2, 2, 256, 16, dtype=dtype)

    def run(backend, kind=dtype):
        tensors = [t.to(kind).requires_grad_() for t in inputs]
        out = nystrom_attention(*tensors, backend=backend)
        return [t.detach().double() for t in (out, *torch.autograd.grad(out, tensors, grad.to(kind)))]

    for want, reference, fused in zip(run("reference", torch.float64), run("reference"), run("cpu"), strict=True):
        floor = tolerance(want, dtype, 256)
        assert (fused - want).norm() <= 1.5 * (reference - want).norm() + floor


# --- the ops that it is made of; Triton's two others are PyTorch's attention ---

PIECES = ("means", "mix", "residual", *(() if interpreting() else ("summary", "readout")))
every_piece = pytest.mark.parametrize("piece", PIECES)


def piece_of(name, backend):
    """(function, inputs) of an op."""
    q, k, v = qkv(1, 2, 7, 7, 3, 4, torch.float32)
    q_means, k_means, summary = landmark_inputs(dtype=torch.float32)
    return {
        "means": (lambda x: means_op(x, 3, backend), [q]),
        "mix": (lambda *t: mix_op(*t, backend), [q_means, k_means, summary]),
        "residual": (lambda *t: residual_op(*t, backend), [v + 1, v, residual_weight(2, 5, torch.float32)]),
        "summary": (lambda *t: summary_op(*t, backend)[0], [q_means, k, v]),
        "readout": (lambda *t: readout_op(*t, backend), [q, k_means, summary]),
    }[name]


@every_piece
@every_backend
def test_needed_gradients_of_each_op(backend, piece):
    function, inputs = piece_of(piece, backend)
    inputs = [t.to(device_of(backend)) for t in inputs]
    call = lambda *inputs: (function(*inputs),)  # noqa: E731
    every = needed_gradients(call, inputs, range(len(inputs)))
    for needed in [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)] if len(inputs) == 3 else [(0,)]:
        with OpCalls() as calls:
            found = needed_gradients(call, inputs, needed)
        for i, (got, want) in enumerate(zip(found, every, strict=True)):
            assert torch.equal(got, want) if i in needed else got is None
        asked = [args[-1] for op, args in calls.made if op._schema.arguments[-1].name == "needed"]
        # the gradient of the residual's attention is that of the result
        expected = [i in needed for i in range(piece == "residual", len(inputs))]
        assert asked == ([expected] if any(expected) and piece != "means" else [])


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1, 1)))
def test_strides_of_each_op(layout, dtype):
    """The same bits as for contiguous tensors, forward and backward."""
    sizes = Sizes(2, 3, 70, 70, 16, 16)
    with OpCalls() as calls:
        run(RESIDUAL.bind("cpu", sizes, num_landmarks=9), RESIDUAL.inputs(sizes, dtype))
    assert len({op for op, _ in calls.made}) == 10
    for op, args in calls.made:
        args = [t.detach() if isinstance(t, torch.Tensor) else t for t in args]
        is_image = [isinstance(t, torch.Tensor) and t.dim() == 4 and t.shape[3] == 16 for t in args]
        strided = [layouts(t)[layout] if mine else t for t, mine in zip(args, is_image, strict=True)]
        plain = [t.contiguous() if mine else t for t, mine in zip(strided, is_image, strict=True)]
        got, want = (r if isinstance(r, tuple | list) else (r,) for r in (op(*strided), op(*plain)))
        assert all(map(torch.equal, got, want)), op


@every_backend
def test_gradient_of_the_inverse_with_tied_columns(backend):
    """Columns that tie share the gradient of their sum."""
    if device_of(backend) == "cuda":
        pytest.skip("the GPU kernels take no float64")
    for landmarks in (5,) if interpreting() else (1, 5, 8, 17, 64):
        for zeroed in (False, True):  # q = 0 makes A constant: every column sum is the largest
            inputs = landmark_inputs(2, 2, landmarks, 8)
            inputs[0] *= not zeroed
            inputs = [t.requires_grad_() for t in inputs]
            grad = torch.randn_like(inputs[2])
            mixed = (mix_op(*inputs, backend), mix_reference(*inputs))
            got, want = (torch.autograd.grad(out, inputs, grad) for out in mixed)
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@needs_cpp
def test_raw_ops_refuse_bad_arguments():
    q, _, v = qkv()
    weight = residual_weight()
    with pytest.raises(RuntimeError, match="landmarks must be from 1 to the number of tokens 70, got 71"):
        OPS.nystrom_means(q, 71)
    with pytest.raises(RuntimeError, match="x must have 4 dimensions, got 3"):
        OPS.nystrom_means(q[0], 7)
    with pytest.raises(RuntimeError, match="grad_means has a dtype that does not go with q's"):
        OPS.nystrom_means_backward(q[:, :, :7].float(), q)
    with pytest.raises(RuntimeError, match="means has size 15 in dimension 3, expected 16"):
        OPS.nystrom_readout(q, q[:, :, :5, :15], v[:, :, :5])
    with pytest.raises(RuntimeError, match="mixed has size 6 in dimension 2, expected 5"):
        OPS.nystrom_readout(q, q[:, :, :5], v[:, :, :6])
    with pytest.raises(RuntimeError, match="v has size 60 in dimension 2, expected 70"):
        OPS.nystrom_summary(q[:, :, :5], q, v[:, :, :60])
    with pytest.raises(RuntimeError, match="log_sums has size 4 in dimension 2, expected 5"):
        OPS.nystrom_summary_backward(v[:, :, :5], q[:, :, :5], q, v, v[:, :, :5], q[:, :, :4, 0], ALL)
    with pytest.raises(RuntimeError, match="k_means has size 4 in dimension 2, expected 5"):
        OPS.nystrom_mix(q[:, :, :5], q[:, :, :4], v[:, :, :5])
    with pytest.raises(RuntimeError, match="weight must have an odd size in dimension 2, got 4"):
        OPS.nystrom_residual(v, v, weight[:, :, :4])
    with pytest.raises(RuntimeError, match="attention has size 60 in dimension 2, expected 70"):
        OPS.nystrom_residual(v[:, :, :60], v, weight)


@in_float64
def test_bad_input(backend):
    q, k, v = (heads(2, 3, 10, 8) for _ in range(3))
    weight = residual_weight()
    for error, match, arguments, bad in (
        (ValueError, "num_landmarks must be at least 1, got 0", (q, k, v, 0), None),
        (TypeError, "num_landmarks must be an int, got float", (q, k, v, 4.0), None),
        (ValueError, "k has 2 heads, q 3", (q, k[:, :2], v[:, :2]), None),
        (ValueError, r"residual_weight must have 4 dimensions \(H, 1, K, 1\)", (q, k, v), weight[0]),
        (ValueError, r"must have shape \(3, 1, K, 1\) with K odd, got \(3, 1, 32, 1\)", (q, k, v), weight[:, :, 1:]),
        (ValueError, r"residual_weight must have shape .* got \(2, 1,", (q, k, v), weight[:2]),
        (TypeError, "residual_weight is torch.float32, q torch.float64", (q, k, v), weight.float()),
        (TypeError, "residual_weight must be a torch.Tensor, got int", (q, k, v), 3),
        (ValueError, "residual_weight needs as many queries as keys, got 9 and 10", (q[:, :, :9], k, v), weight),
    ):
        with pytest.raises(error, match=match):
            nystrom_attention(*arguments, residual_weight=bad, backend=backend)
    with pytest.raises(ValueError, match="pinv_init must be one of 'head', 'batch', got 'image'"):
        nystrom_attention(q, k, v, pinv_init="image", backend=backend)
