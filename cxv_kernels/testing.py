"""Memory probes for tests and benchmarks: the peak of a computation, and the bytes that autograd saves."""

import gc
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

__all__ = ["PeakMemory", "SavedBytes", "peak_memory", "saved_bytes"]


class PeakMemory(NamedTuple):
    """Bytes above the allocation at the start: the highest value, and the value at the end with the result alive."""

    peak: int
    kept: int


class SavedBytes(NamedTuple):
    """Bytes of the distinct storages saved for backward: without the storages of the inputs, and with them."""

    beyond_inputs: int
    total: int


def peak_memory(run: Callable[[], Any], device: str | torch.device = "cpu") -> PeakMemory:
    """Call ``run()`` once and follow PyTorch's allocator, also inside C++ ops.

    Args:
        run: the computation; its result stays alive until the end of the measurement.
        device: on CUDA the caching allocator's counters are read. On the CPU the allocations of this thread are
            recorded by ``torch.profiler``; memory that a library takes from malloc directly is not seen.

    Returns:
        Bytes above the start. Memory allocated before the start and freed by ``run`` does not lower the peak.
    """
    device = torch.device(device)
    return _peak_memory_cuda(run, device) if device.type == "cuda" else _peak_memory_cpu(run)


def _peak_memory_cuda(run: Callable[[], Any], device: torch.device) -> PeakMemory:
    gc.collect()  # garbage that is freed during the run would hide a part of the peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    result = run()
    torch.cuda.synchronize(device)
    peak, kept = torch.cuda.max_memory_allocated(device) - start, torch.cuda.memory_allocated(device) - start
    del result
    return PeakMemory(peak, kept)


def _peak_memory_cpu(run: Callable[[], Any]) -> PeakMemory:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()
    del result
    live: dict[int, int] = {}
    peak = current = 0
    for address, size in _allocations(recorded.profiler.kineto_results.experimental_event_tree()):
        if size > 0:
            live[address] = size
            current += size
            peak = max(peak, current)
        else:
            current -= live.pop(address, 0)  # memory from before the start was never counted
    return PeakMemory(peak, current)


def _allocations(roots: Iterable[Any]) -> list[tuple[int, int]]:
    """(address, bytes) of the CPU allocations in the order of time; a free has negative bytes."""
    allocations, pending = [], list(roots)
    while pending:
        node = pending.pop()
        pending.extend(node.children)
        if node.tag.name == "Allocation" and node.extra_fields.device.type == "cpu":
            allocations.append((node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size))
    return [(address, size) for _, address, size in sorted(allocations, key=lambda event: event[0])]


def saved_bytes(run: Callable[[], Any], inputs: Iterable[Tensor] = ()) -> SavedBytes:
    """Count the bytes that autograd keeps between the forward and the backward pass of ``run``.

    Each storage counts once and whole, however many of its views are saved. ``save_for_backward`` of a custom Function
    is included.

    Args:
        run: the forward pass; it must not call backward.
        inputs: tensors that exist anyway (inputs, parameters, buffers).
    """
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    known = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    sizes = {address: tensor.untyped_storage().nbytes() for address, tensor in saved.items()}
    del result
    return SavedBytes(sum(size for address, size in sizes.items() if address not in known), sum(sizes.values()))
