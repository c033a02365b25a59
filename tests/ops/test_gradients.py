"""The gradients of every op on every backend: gradcheck, the needed ones alone, and the memory that they need."""

from itertools import chain, combinations

import pytest
import torch
from cases import (
    ATTENTION_CASES,
    CASES,
    LINEAR_FAMILY,
    SMALL,
    TINY,
    VARIED,
    OpCalls,
    Sizes,
    device_of,
    every,
    every_backend,
    in_float64,
    mask_of,
    needed_gradients,
    run,
    with_dtypes,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from cxv_kernels._triton import interpreting
from cxv_kernels.testing import peak_memory, saved_bytes
from cxv_kernels.validation import accumulate_dtype


def subsets(count):
    """Every non-empty set of places; fewer of many, and in Triton's interpreter."""
    if interpreting() or count > 4:
        return [*((i,) for i in range(count)), *([(0, 2), tuple(range(1, count))] if count > 2 else [])]
    return [*chain.from_iterable(combinations(range(count), size) for size in range(1, count + 1))]


def bind_masked(case, backend):
    return case.bind(backend, SMALL, **({"key_mask": mask_of(SMALL)} if case.takes_mask else {}))


@in_float64
@every([case for case in CASES if case.smooth])
def test_gradcheck(case, backend):
    """The reference also to second order, which is its own on every backend: test_derivatives.py compares them, also
    those with a detached maximum."""
    inputs, call = case.inputs(TINY, grad=True), case.bind(backend, TINY, **({"eps": 0.1} if "conv" in case.op else {}))
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradcheck(call, inputs, fast_mode=interpreting())
        assert backend != "reference" or torch.autograd.gradgradcheck(call, inputs)


@every_backend
@every(VARIED)
def test_needed_gradients(case, backend):
    """Any subset of the gradients has the bits of all of them, and autograd asks the ops for the subset alone."""
    inputs = [t.to(device_of(backend)) for t in case.inputs(SMALL, torch.float32)]
    call, count = bind_masked(case, backend), len(inputs)
    every_gradient = needed_gradients(call, inputs, range(count))
    assert all(t.isfinite().all() for t in every_gradient)
    for needed in subsets(count):
        with OpCalls() as calls:
            found = needed_gradients(call, inputs, needed)
        for i, (got, want) in enumerate(zip(found, every_gradient, strict=True)):
            same = torch.allclose if case.op == "conv_norm" else torch.equal  # PyTorch's convolution has its own order
            assert same(got, want) if i in needed else got is None
        asked = [args[-1] for op, args in calls.made if op._schema.arguments[-1].name == "needed"]
        if case.op == "conv_norm":
            assert [sum(a) for a in asked] == [len(needed)]
        elif case.op != "nystrom_attention":  # in pieces: test_nystrom_attention.py
            assert asked in ([[i in needed for i in range(count)]], [])


@every_backend
@every([case for case in CASES if case.op in ("linear_attention", "performer_attention", "kv_state")
        or str(case) == "nystrom_attention-residual"])  # fmt: skip
def test_unneeded_gradients_are_empty_and_allocate_nothing(case, backend):
    """Memory is less at the end by the gradients that are left out, and never more on the way."""
    inputs = [t.to(device_of(backend)) for t in case.inputs(SMALL, torch.float32)]
    with OpCalls() as calls:
        run(bind_masked(case, backend), inputs)
    backward = [(op, args) for op, args in calls.made if op._schema.arguments[-1].name == "needed"]
    assert backward
    for op, (*arguments, every_one) in backward:
        ask = torch.no_grad()(lambda *needed: op(*arguments, list(needed)))  # noqa: B023
        wants = ask(*every_one)
        most = peak_memory(lambda: ask(*every_one)) if backend == "cpu" else None  # noqa: B023
        for needed in [(), *subsets(len(wants))]:
            flags = [i in needed for i in range(len(wants))]
            for got, want, flag in zip(ask(*flags), wants, flags, strict=True):
                assert got.dtype == want.dtype
                assert torch.equal(got, want) if flag else got.shape == (0,)
            if most is not None and needed:
                found = peak_memory(lambda: ask(*flags))  # noqa: B023
                left_out = sum(want.nbytes for want, flag in zip(wants, flags, strict=True) if not flag)
                assert found.kept == most.kept - left_out
                assert found.peak <= most.peak - left_out
                if case in LINEAR_FAMILY and needed == (0,):  # no partial sums, and no gradient of the state
                    assert found.peak == wants[0].nbytes
        if backend == "cpu":
            with pytest.raises(RuntimeError, match=f"needed must have {len(wants)} elements, got {len(wants) + 1}"):
                ask(*every_one, True)


def saved_state(case, sizes, dtype):
    """The bytes that the C++ kernels save for backward beyond the inputs."""
    acc, heads = accumulate_dtype(dtype).itemsize, sizes.batch * sizes.heads
    if case.op == "linear_attention":  # S and z
        return heads * (sizes.value_dim + 1) * sizes.dim * acc
    if case.op == "performer_attention":  # S, z and the largest exponent of the keys; the projection
        features = sizes.dim + 4
        return (heads * (features * sizes.value_dim + features + 1) + features * sizes.dim) * acc
    if case.op == "nystrom_attention":  # means, sums of exponentials; the summary, mixed and not
        return heads * 3 * ((2 * sizes.dim + 1) * acc + 2 * sizes.value_dim * dtype.itemsize)
    if case.op == "conv_norm":  # the output, 1/σ of each pixel; γ and β if they are cast
        pixels, channels = sizes.batch * sizes.image[0] * sizes.image[1], sizes.value_dim
        return pixels * (channels * dtype.itemsize + acc) + (2 * channels * acc if dtype.itemsize < acc else 0)
    return 0  # dropout has a seed


@with_dtypes
@every([case for case in CASES if case.op not in ("performer_features", "kv_state")])
def test_saved_bytes(case, backend, dtype):
    """Between forward and backward: the inputs, and a state that does not grow with the number of tokens."""
    if backend != "cpu" and dtype != torch.float32:
        pytest.skip("exact on the CPU alone")
    found = []
    for factor in (1, 2):
        sizes = Sizes(1, 2, 60 * factor, 60 * factor, 8, 8, (8, 8 * factor))
        inputs = [t.to(device_of(backend)).requires_grad_() for t in case.inputs(sizes, dtype)]
        call, outs = case.bind(backend, sizes), []
        saved = saved_bytes(lambda call=call, outs=outs, inputs=inputs: outs.extend(call(*inputs)), inputs)
        found.append(saved.beyond_inputs)
        assert backend != "cpu" or saved.beyond_inputs == saved_state(case, sizes, dtype)
    growth = 0
    if case.op == "conv_norm":
        growth = outs[0].nbytes // 2 + 8 * 8 * accumulate_dtype(dtype).itemsize
    if case.op == "nystrom_attention" and backend != "cpu":  # the output of PyTorch's attention, and a sum per query
        growth = 2 * 60 * (8 * dtype.itemsize + accumulate_dtype(dtype).itemsize)
    assert found[1] - found[0] == growth
    if case in ATTENTION_CASES:
        reference = saved_bytes(lambda: case.bind("reference", sizes)(*inputs), inputs)
        assert found[1] < reference.beyond_inputs
