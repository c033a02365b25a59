"""Nyström attention's kernels in Triton's interpreter, against the reference in float64."""

import pytest
import torch
from torch.library import opcheck

from cxv_kernels import nystrom_attention
from cxv_kernels.ops.nystrom_attention.op import means_op, mix_op, residual_op
from cxv_kernels.ops.nystrom_attention.reference import mix_reference, residual_reference, segment_means
from cxv_kernels.testing import tolerance

DTYPES = (torch.float64, torch.float32, torch.float16)
OPS = torch.ops.cxv_kernels_triton


def heads(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def assert_matches(inputs, landmarks, weight=None):
    dtype = inputs[0].dtype
    inputs = [*inputs, *([] if weight is None else [weight])]
    mine = [t.detach().requires_grad_() for t in inputs]
    exact = [t.detach().double().requires_grad_() for t in inputs]

    def call(q, k, v, weight=None, *, backend):
        return nystrom_attention(q, k, v, landmarks, residual_weight=weight, backend=backend)

    out, want = call(*mine, backend="triton"), call(*exact, backend="reference")
    grad = torch.randn_like(want).to(dtype)
    got_all = (out, *torch.autograd.grad(out, mine, grad))
    want_all = (want, *torch.autograd.grad(want, exact, grad.double()))
    depth = max(inputs[0].shape[2], inputs[1].shape[2])
    for name, got, expected in zip(("out", "dq", "dk", "dv", "dw"), got_all, want_all, strict=False):
        assert got.shape == expected.shape
        assert got.dtype == dtype
        error = float((got.detach().double() - expected.detach()).abs().max())
        bound = tolerance(expected.detach(), dtype, depth, 8)
        assert error <= bound, f"{name}: {error:.2e} > {bound:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("queries", "keys", "dim", "value_dim", "landmarks"),
    [(1, 1, 1, 1, 64), (65, 63, 17, 5, 12), (90, 90, 16, 20, 25)],
)
def test_matches_float64(queries, keys, dim, value_dim, landmarks, dtype):
    shapes = ((queries, dim), (keys, dim), (keys, value_dim))
    weight = heads(2, 1, 33, 1, dtype=dtype) / 33**0.5 if queries == keys else None
    assert_matches([heads(2, 2, *shape, dtype=dtype) for shape in shapes], landmarks, weight)


def test_any_strides():
    qkv = torch.randn(2, 50, 3, 2, 12)  # (B, N, 3, H, D), as one projection gives them
    assert_matches([qkv[:, :, i].transpose(1, 2) for i in range(3)], 7, torch.randn(2, 1, 6, 1)[:, :, ::2])


def pieces(dtype=torch.float64):
    """(function, reference, inputs)"""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    q, v = heads(1, 2, 7, 3, dtype=dtype), heads(1, 2, 7, 4, dtype=dtype)
    mix = [heads(1, 2, 5, 3, dtype=acc), heads(1, 2, 5, 3, dtype=acc), heads(1, 2, 5, 4, dtype=dtype)]
    weight = heads(2, 1, 5, 1, dtype=dtype)
    return {
        "means": (lambda x: means_op(x, 3, "triton"), lambda x: segment_means(x.to(acc), 3), [q]),
        "mix": (lambda *t: mix_op(*t, "triton"), mix_reference, mix),
        "residual": (
            lambda *t: residual_op(*t, "triton"),
            lambda a, v, w: a + residual_reference(v, w),
            [v + 1, v, weight],
        ),
    }


@pytest.mark.parametrize("piece", ["mix", "residual"])
def test_needed_gradients_alone_have_the_same_bits(piece):
    function, _, inputs = pieces()[piece]

    def gradients(needed):
        leaves = [t.detach().clone().requires_grad_(i in needed) for i, t in enumerate(inputs)]
        out = function(*leaves)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape))
        return [t.grad for t in leaves]

    every = gradients((0, 1, 2))
    for needed in ((0,), (1,), (2,), (0, 2), (1, 2)):
        for i, (got, want) in enumerate(zip(gradients(needed), every, strict=True)):
            assert torch.equal(got, want) if i in needed else got is None


@pytest.mark.parametrize("piece", ["means", "mix", "residual"])
def test_gradcheck_of_the_pieces(piece):
    function, reference, inputs = pieces()[piece]
    inputs = [t.requires_grad_() for t in inputs]
    torch.testing.assert_close(function(*inputs), reference(*inputs))
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_columns_that_tie_share_the_gradient_of_their_sum():
    inputs = [torch.zeros(1, 1, 4, 3, dtype=torch.float64), heads(1, 1, 4, 3), heads(1, 1, 4, 2)]
    inputs[1][:] = inputs[1][:, :, :1]  # all keys the same: A is constant
    inputs = [t.requires_grad_() for t in inputs]
    grad = heads(1, 1, 4, 2)
    got, want = (
        torch.autograd.grad(f(*inputs), inputs, grad) for f in (lambda *t: mix_op(*t, "triton"), mix_reference)
    )
    torch.testing.assert_close(got, want)


def test_a_head_depends_on_no_other_and_repeats_its_bits():
    q, k, v = (heads(3, 2, 40, 8, dtype=torch.float32) for _ in range(3))

    def run(part):
        inputs = [t[part].detach().requires_grad_() for t in (q, k, v)]
        weight = torch.linspace(-1, 1, 2 * 9).view(2, 1, 9, 1)
        out = nystrom_attention(*inputs, 6, residual_weight=weight, backend="triton")
        return [out, *torch.autograd.grad(out.sin().sum(), inputs)]

    whole = run(slice(None))
    assert all(map(torch.equal, whole, run(slice(None))))
    for alone, all_heads in zip(run(slice(1, 2)), whole, strict=True):
        torch.testing.assert_close(alone, all_heads[1:2])


def test_every_element_is_written(monkeypatch):
    empty, empty_like = torch.Tensor.new_empty_strided, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty_strided", lambda *a: empty(*a).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *a: empty_like(*a).fill_(torch.nan))
    for function, _, inputs in pieces(torch.float32).values():
        inputs = [t.requires_grad_() for t in inputs]
        out = function(*inputs)
        assert all(t.isfinite().all() for t in (out, *torch.autograd.grad(out.sum(), inputs)))


def test_saved_bytes():
    """What the CPU's op keeps: nothing of the attention maps' size, and of the mix its inputs alone."""
    q, k, v = (torch.randn(1, 2, 300, 8, requires_grad=True) for _ in range(3))
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        nystrom_attention(q, k, v, 10, residual_weight=torch.randn(2, 1, 33, 1), backend="triton")
    assert max(t.numel() for t in saved.values()) <= q.numel()
    assert len([t for t in saved.values() if t.numel() == q.numel()]) <= 4  # q, k, v and SDPA's output


def test_opcheck():
    q, _, v = (heads(1, 2, 9, 4, dtype=torch.float16) for _ in range(3))
    means = [torch.randn(1, 2, 3, 4) for _ in range(2)]
    weight = torch.randn(2, 1, 5, 1).half()
    summary = torch.randn(1, 3, 2, 4).half().transpose(1, 2)  # as flash attention lays it out
    opcheck(OPS.nystrom_means, (q, 3))
    opcheck(OPS.nystrom_means_backward, (means[0], q))
    opcheck(OPS.nystrom_mix, (*means, summary))
    for needed in ([True] * 3, [True, False, False], [False, True, False], [False, False, True]):
        opcheck(OPS.nystrom_mix_backward, (summary, *means, summary, needed))
    opcheck(OPS.nystrom_residual, (q, v, weight))
    for needed in ([True, True], [True, False], [False, True]):
        opcheck(OPS.nystrom_residual_backward, (q, v, weight, needed))


def test_declines_what_does_not_fit():
    q, wide = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 129)
    with pytest.raises(RuntimeError, match="supports 1 to 128 channels, not 129"):
        nystrom_attention(q, q, wide, backend="triton")
