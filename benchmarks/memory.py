"""What a computation needs: peak memory, bytes kept for backward, and time. Bytes are bytes, times are seconds."""

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cxv.training.errors import out_of_memory


class Allocated(NamedTuple):
    """Bytes above what was allocated at the start: the most at any time, and what is left with the result alive."""

    peak: int
    kept: int


class Saved(NamedTuple):
    """Bytes of the distinct storages saved for backward, without the inputs' own storages and with them."""

    beyond_inputs: int
    total: int


@dataclass(frozen=True)
class Timing:
    """Seconds of each repetition, in the order in which they ran."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile, seconds."""
        if len(self.samples) == 1:
            return self.samples * 2
        first, _, third = statistics.quantiles(self.samples, n=4, method="inclusive")
        return first, third

    @property
    def spread(self) -> float:
        """Interquartile range, seconds."""
        first, third = self.quartiles
        return third - first

    @property
    def noisy(self) -> bool:
        """Whether the interquartile range is over half the median: the machine was busy with something else."""
        return self.spread > self.median / 2


def allocated(run: Callable[[], Any], device: str | torch.device = "cpu") -> Allocated:
    """Run once and follow PyTorch's allocator of ``device``, also inside C++ ops; the result lives to the end.

    On CUDA these are the caching allocator's counters, on the CPU the allocation events of torch.profiler: bytes asked
    for, by this thread. What does not pass through PyTorch's allocator (malloc in a library) is not seen.
    """
    device = torch.device(device)
    return _allocated_cuda(run, device) if device.type == "cuda" else _allocated_cpu(run)


def _allocated_cuda(run: Callable[[], Any], device: torch.device) -> Allocated:
    gc.collect()  # what is freed in the meantime would hide as much of the peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    result = run()
    torch.cuda.synchronize(device)
    peak, kept = torch.cuda.max_memory_allocated(device) - start, torch.cuda.memory_allocated(device) - start
    del result
    return Allocated(peak, kept)


def _allocated_cpu(run: Callable[[], Any]) -> Allocated:
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
    return Allocated(peak, current)


def _allocations(roots: Iterable[Any]) -> list[tuple[int, int]]:
    """(address, bytes) of the CPU's allocations in the order of time; a free has negative bytes."""
    found, pending = [], list(roots)
    while pending:
        node = pending.pop()
        pending.extend(node.children)
        if node.tag.name == "Allocation" and node.extra_fields.device.type == "cpu":
            found.append((node.start_time_ns, node.extra_fields.ptr, node.extra_fields.alloc_size))
    return [(address, size) for _, address, size in sorted(found, key=lambda event: event[0])]


def saved_for_backward(run: Callable[[], Any], inputs: Iterable[Tensor] = ()) -> Saved:
    """Bytes that autograd keeps between forward and backward of ``run``, which must not run backward itself.

    Counted through ``saved_tensors_hooks``, so with whatever ``save_for_backward`` of a custom Function names. A
    storage counts once and whole, however many of its views are saved.

    Args:
        inputs: tensors that exist anyway (inputs, parameters, buffers); their storages are left out of the first count.
    """
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor  # held, or its address could come again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    given = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    sizes = {address: tensor.untyped_storage().nbytes() for address, tensor in saved.items()}
    del result
    return Saved(sum(size for address, size in sizes.items() if address not in given), sum(sizes.values()))


def interleaved(
    runs: Sequence[Callable[[], Any]],
    device: str | torch.device = "cpu",
    *,
    budget: float = 0.25,
    min_repeats: int = 3,
    max_repeats: int = 100,
    limit: float = 4.0,
    calls: int = 1,
    queue: "Queue | None" = None,
) -> list[Timing | None]:
    """Time each of ``runs``, in turn, round after round, so that whatever else the machine does meets them all alike.

    One leaves the rounds when it has run ``min_repeats`` times and spent ``budget`` seconds, or has run ``max_repeats``
    times, or has spent ``limit`` seconds. There is no warm-up: run each once before.

    Args:
        calls: of one repetition, back to back; the sample is the mean of these.
        queue: on CUDA, time the GPU alone; without one a repetition is what its caller waits for.

    Returns:
        A Timing for each; None for one that ran out of memory, which takes no more turns.
    """
    device = torch.device(device)
    samples: list[list[float] | None] = [[] for _ in runs]

    def goes_on(mine: list[float] | None) -> bool:
        if mine is None:
            return False
        spent = sum(mine) * calls
        return spent < limit and len(mine) < max_repeats and (len(mine) < min_repeats or spent < budget)

    while any(map(goes_on, samples)):
        for i, run in enumerate(runs):
            if goes_on(samples[i]):
                try:
                    samples[i].append(_seconds(run, device, calls) if queue is None else queue.seconds(run, calls))
                except RuntimeError as error:
                    if not out_of_memory(error):
                        raise
                    samples[i] = None
                if samples[i] is None and device.type == "cuda":
                    torch.cuda.empty_cache()  # the others may need what it had reserved
    return [None if mine is None else Timing(tuple(mine)) for mine in samples]


def _seconds(run: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """What the caller of ``run`` waits for, on CUDA by events: launching it counts where that is slower."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - begin) / calls


class Queue:
    """Times the GPU alone: the calls wait behind a kernel that spins until the CPU has launched them all.

    Before them the L2 cache is filled with something else (by reading, so that nothing is left to be written back), and
    what they return lives to the end, so that no call finds the memory of another's in the cache.
    """

    LONGEST = 0.05  # seconds of spinning: what takes longer to launch waits for the GPU in between

    def __init__(self, device: torch.device):
        properties = torch.cuda.get_device_properties(device)
        self.device = device
        self._other = torch.ones(max(properties.L2_cache_size, 1 << 20) // 2, device=device)  # twice the L2, in bytes
        self._sink = torch.empty((), device=device)
        self._clock = self._cycles_per_second()
        self._delays: dict[int, float] = {}

    def _cycles_per_second(self) -> float:
        cycles = 10_000_000
        for _ in range(2):  # the first call loads the kernel
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            torch.cuda._sleep(cycles)
            end.record()
            end.synchronize()
        return cycles / (start.elapsed_time(end) / 1e3)

    def seconds(self, run: Callable[[], Any], calls: int = 1) -> float:
        """Of one of ``calls`` calls; where launching waits for the GPU, with that."""
        delay = self._delays.get(id(run), 0.0005 * calls)
        while True:
            torch.cuda.synchronize(self.device)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.sum(self._other, dim=0, out=self._sink)
            torch.cuda._sleep(int(delay * self._clock))
            start.record()
            results = [run() for _ in range(calls)]
            end.record()
            in_time = not start.query()  # the GPU has not come that far: no call had to wait for its launch
            end.synchronize()
            del results
            if in_time or delay >= self.LONGEST:
                self._delays[id(run)] = delay
                return start.elapsed_time(end) / 1e3 / calls
            delay = min(2 * delay, self.LONGEST)
