"""The memory probes of cxv_kernels.testing, against allocations and saved tensors counted by hand."""

import weakref

import pytest
import torch
from conftest import qkv

import cxv_kernels
from cxv_kernels.testing import peak_memory, saved_bytes

MB = 1_000_000
SMALL = 4096  # bytes: alignment, and scalars that an op may need


def floats(megabytes):
    return torch.empty(megabytes * MB // 4)


# --- peak_memory ---


def test_peak_memory_of_consecutive_tensors():
    def run():
        first = floats(8)
        del first
        return floats(4)

    assert peak_memory(run) == (8 * MB, 4 * MB)


def test_peak_memory_of_simultaneous_tensors():
    def run():
        first, _second = floats(8), floats(4)
        return first[:10]  # keeps the whole storage

    assert peak_memory(run) == (12 * MB, 8 * MB)


@pytest.mark.parametrize("allocated_in_a_measurement", [False, True])
def test_peak_memory_ignores_frees_of_older_memory(allocated_in_a_measurement):
    held = []
    allocate = lambda: held.append(floats(16))  # noqa: E731
    peak_memory(allocate) if allocated_in_a_measurement else allocate()

    def run():
        held.clear()
        return floats(8)

    assert peak_memory(run) == (8 * MB, 8 * MB)


def test_peak_memory_without_allocations():
    assert peak_memory(lambda: None) == (0, 0)


def test_peak_memory_inside_cpp_ops():
    a, b = torch.randn(512, 512), torch.randn(512, 512)
    assert peak_memory(lambda: torch.matmul(a, b)) == (1024 * 1024, 1024 * 1024)
    q, k, v = qkv(dtype=torch.float32)
    peak, kept = peak_memory(lambda: cxv_kernels.linear_attention(q, k, v))
    assert q.nbytes <= kept <= peak


def test_peak_memory_in_backward():
    x = floats(4).zero_().requires_grad_()
    grad = torch.ones_like(x)
    # the output of exp, which backward needs, and the gradient
    assert peak_memory(lambda: torch.autograd.grad(x.exp(), x, grad)) == (8 * MB, 4 * MB)


# --- saved_bytes ---


def test_saved_bytes_of_exp():
    x = torch.randn(1000, requires_grad=True)
    assert saved_bytes(x.exp, [x]) == (4000, 4000)


def test_saved_bytes_frees_the_graph():
    x, results = torch.randn(1000, requires_grad=True), []

    def run():
        y = x.exp()  # which autograd saves
        results.append(weakref.ref(y))
        return y

    saved_bytes(run, [x])
    assert results[0]() is None


def test_saved_bytes_excludes_inputs_and_counts_storages_once():
    x = torch.randn(1000, requires_grad=True)
    assert saved_bytes(lambda: x * x, [x]) == (0, 4000)
    assert saved_bytes(lambda: x[:500].sin() + x[500:].sin(), [x]) == (0, 4000)
    assert saved_bytes(lambda: x * x) == (4000, 4000)


def test_saved_bytes_of_a_view():
    """A view keeps its whole storage alive."""
    x = torch.randn(1000, requires_grad=True)
    assert saved_bytes(lambda: (x + 1)[:10].sin(), [x]) == (4000, 4000)


def test_saved_bytes_of_a_custom_function():
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x, x.new_empty(50))
            return x.clone()

    x = torch.randn(1000, requires_grad=True)
    assert saved_bytes(lambda: Function.apply(x), [x]) == (200, 4200)


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("op", ["performer_attention", "linear_attention", "nystrom_attention"])
def test_saved_bytes_agree_with_peak_memory(op, backend):
    """Memory that the forward pass leaves allocated is saved for backward, or the output."""
    q, k, v = qkv(queries=256, keys=256, dtype=torch.float32, grad=True)
    projection = cxv_kernels.orthogonal_projection(110, 32, generator=torch.Generator().manual_seed(0))
    arguments = (q, k, v, projection) if op == "performer_attention" else (q, k, v)
    attend = lambda: getattr(cxv_kernels, op)(*arguments, backend=backend)  # noqa: E731
    attend()
    kept = peak_memory(attend).kept
    saved = saved_bytes(attend, (q, k, v, projection)).beyond_inputs
    assert saved - SMALL <= kept <= saved + q.nbytes + SMALL
