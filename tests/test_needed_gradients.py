"""Backward computes the gradients that are needed, of every op and for every set of inputs that require one.

tests/test_conv_norm.py has that of conv_norm.
"""

from functools import partial
from itertools import chain, combinations

import pytest
import torch
from conftest import heads, needs_cpp, qkv
from torch.utils._python_dispatch import TorchDispatchMode

import cxv_kernels
from cxv_kernels.ops.nystrom_attention.op import mix_op, readout_op, residual_op, summary_op
from cxv_kernels.testing import peak_memory

pytestmark = needs_cpp
OPS = torch.ops.cxv_kernels
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
B, H, N, D, E, M, LANDMARKS = 2, 2, 70, 12, 9, 21, 7


def acc(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def mask():
    return torch.arange(B * N).view(B, N) % 7 != 3


def attention(op, **options):
    return lambda *inputs: getattr(cxv_kernels, op)(*inputs, key_mask=mask(), backend="cpu", **options)


PROJECTION = cxv_kernels.orthogonal_projection(M, D, generator=torch.Generator().manual_seed(1))
performer = partial(attention, "performer_attention", projection=PROJECTION)


def inputs_of(name, dtype):
    torch.manual_seed(0)
    q, k, v = qkv(B, H, N, N, D, E, dtype)
    means = [heads(B, H, LANDMARKS, D, dtype=acc(dtype)) for _ in range(2)]
    values, weight = heads(B, H, LANDMARKS, E, dtype=dtype), heads(H, 1, 5, 1, dtype=dtype)
    kind = name.partition(" ")[0]
    return {
        "linear_attention": (q, k, v),
        "performer_attention": (q, k, v),
        "kv_state": (k, v),
        "nystrom_attention": (q, k, v, weight),
        "nystrom_summary": (means[0], k, v),
        "nystrom_readout": (q, means[1], values),
        "nystrom_mix": (*means, values),
        "nystrom_residual": (heads(B, H, N, E, dtype=dtype), v, weight),
        "dropout": (v, heads(B, H, N, E, dtype=dtype)),
    }[kind]


FUNCTIONS = {
    **{f"linear_attention {m}": attention("linear_attention", feature_map=m) for m in ("softmax", "elu", "relu")},
    **{f"kv_state {m}": attention("kv_state", feature_map=m) for m in ("softmax", "elu", "relu")},
    "performer_attention softmax": performer(eps=1e-4),
    "performer_attention exact": performer(eps=0.0),
    "performer_attention relu": performer(kernel="relu", eps=1e-3),
    "nystrom_attention": lambda q, k, v, weight: cxv_kernels.nystrom_attention(
        q, k, v, LANDMARKS, residual_weight=weight, backend="cpu"
    ),
    "nystrom_summary": lambda *inputs: summary_op(*inputs, "cpu")[0],
    "nystrom_readout": lambda *inputs: readout_op(*inputs, "cpu"),
    "nystrom_mix": lambda *inputs: mix_op(*inputs, "cpu"),
    "nystrom_residual": lambda *inputs: residual_op(*inputs, "cpu"),
    "dropout": lambda x, residual: cxv_kernels.dropout(x, 0.3, torch.tensor(5), residual=residual, backend="cpu"),
}


def subsets(count):
    """Every non-empty set of so many inputs."""
    return chain.from_iterable(combinations(range(count), size) for size in range(1, count + 1))


def gradients(function, inputs, needed):
    """Of a sum of the outputs with fixed weights: one per input, None where it requires no gradient."""
    leaves = [t.detach().clone().requires_grad_(i in needed) for i, t in enumerate(inputs)]
    out = function(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(outs, [torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape) for o in outs])
    return [t.grad for t in leaves]


@DTYPES
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_subset_has_the_bits_of_all_gradients(name, dtype):
    inputs = inputs_of(name, dtype)
    every = gradients(FUNCTIONS[name], inputs, range(len(inputs)))
    assert all(t.isfinite().all() and t.any() for t in every)
    for needed in subsets(len(inputs)):
        for i, (got, want) in enumerate(zip(gradients(FUNCTIONS[name], inputs, needed), every, strict=True)):
            assert torch.equal(got, want) if i in needed else got is None, (needed, i)


class Asked(TorchDispatchMode):
    """Records ``needed`` of the backward ops that are called."""

    def __init__(self):
        super().__init__()
        self.needed = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op._schema.arguments and op._schema.arguments[-1].name == "needed":
            self.needed.append(args[-1])
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in ("nystrom_attention", "dropout")])
def test_autograd_asks_for_the_needed_gradients(name):
    inputs = inputs_of(name, torch.float32)
    for needed in subsets(len(inputs)):
        with Asked() as asked:
            gradients(FUNCTIONS[name], inputs, needed)
        expected = [i in needed for i in range(len(inputs))]
        if name == "nystrom_residual":  # the gradient of attention is that of the result
            expected = expected[1:]
        assert asked.needed == ([expected] if any(expected) else [])


def direct(name, dtype):
    """(the backward op, its arguments but for ``needed``, the inputs that it may have gradients for)."""
    inputs = inputs_of(name, dtype)
    if name == "linear_attention":
        out, *kept = OPS.linear_attention_forward(*inputs, mask(), "elu", 0.0)
        return OPS.linear_attention_backward, (out, *inputs, mask(), *kept, "elu", 0.0), inputs
    if name == "performer_attention":
        projection = torch.randn(M, D, dtype=acc(dtype))
        out, *kept = OPS.performer_attention_forward(*inputs, projection, mask(), "softmax", 1e-4)
        arguments = (out, *inputs, projection, mask(), *kept, "softmax", 1e-4)
        return OPS.performer_attention_backward, arguments, inputs
    if name == "kv_state":
        state, stat = OPS.kv_state_forward(*inputs, mask(), "elu")
        return OPS.kv_state_backward, (state, stat, *inputs, mask(), stat, "elu"), inputs
    if name == "nystrom_residual":
        grad_out, *inputs = inputs
        return OPS.nystrom_residual_backward, (grad_out, *inputs), inputs
    out = getattr(OPS, name)(*inputs)
    grad, kept = (out[0], out) if isinstance(out, tuple) else (out, ())
    return getattr(OPS, f"{name}_backward"), (grad, *inputs, *kept), inputs


DIRECT = (
    *("linear_attention", "performer_attention", "kv_state"),
    *("nystrom_summary", "nystrom_readout", "nystrom_mix", "nystrom_residual"),
)


@DTYPES
@pytest.mark.parametrize("name", DIRECT)
def test_op_returns_empty_tensors_for_the_rest(name, dtype):
    op, arguments, inputs = direct(name, dtype)
    every = op(*arguments, [True] * len(inputs))
    for needed in [(), *subsets(len(inputs))]:
        found = op(*arguments, [i in needed for i in range(len(inputs))])
        for i, (got, want, like) in enumerate(zip(found, every, inputs, strict=True)):
            assert got.dtype == like.dtype
            assert torch.equal(got, want) if i in needed else got.shape == (0,), (needed, i)


@pytest.mark.parametrize("name", DIRECT)
def test_op_allocates_nothing_for_the_rest(name):
    """Less at the end by the gradients that are left out, and never more on the way."""
    op, arguments, inputs = direct(name, torch.float32)
    every = [True] * len(inputs)
    most = peak_memory(lambda: op(*arguments, every))
    for needed in subsets(len(inputs)):
        found = peak_memory(lambda: op(*arguments, [i in needed for i in range(len(inputs))]))  # noqa: B023
        unneeded = sum(t.numel() * t.itemsize for i, t in enumerate(inputs) if i not in needed)
        assert found.kept == most.kept - unneeded, needed
        assert found.peak <= most.peak - unneeded, needed


@pytest.mark.parametrize("name", ["linear_attention", "performer_attention"])
def test_queries_alone_need_no_state_gradient(name):
    """Without a gradient of k or v the workspace is gone: the queries' partial sums, and the gradient of the state."""
    op, arguments, inputs = direct(name, torch.float32)
    found = peak_memory(lambda: op(*arguments, [True, False, False]))
    assert found.peak == inputs[0].numel() * inputs[0].itemsize


@pytest.mark.parametrize("name", DIRECT)
def test_op_refuses_another_number_of_gradients(name):
    op, arguments, inputs = direct(name, torch.float32)
    match = f"needed must have {len(inputs)} elements, got {len(inputs) + 1}"
    with pytest.raises(RuntimeError, match=match):
        op(*arguments, [True] * (len(inputs) + 1))


@pytest.mark.parametrize("name", ["performer_attention softmax", "nystrom_attention"])
def test_compiled_backward_has_the_needed_gradients(name):
    """The fake implementations and the kernels agree on the empty results."""
    inputs = inputs_of(name, torch.float32)
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend="aot_eager")
    wants = gradients(FUNCTIONS[name], inputs, (2,))
    for i, (got, want) in enumerate(zip(gradients(compiled, inputs, (2,)), wants, strict=True)):
        assert torch.equal(got, want) if i == 2 else got is None
