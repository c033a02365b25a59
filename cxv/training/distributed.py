"""Data-parallel training with the processes that ``torchrun`` starts."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import InputError

T = TypeVar("T")


class RemoteError(InputError):
    """An error that ends this process and that another process reports."""


@contextmanager
def process_group() -> Iterator[None]:
    """Create torch's default process group in the block if ``torchrun`` started several processes.

    The group uses gloo for CPU tensors and NCCL for GPU tensors.
    """
    if not (dist.is_available() and int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ):
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    yield
    dist.destroy_process_group()  # not after an error: a collective of another process may still be under way


@dataclass(frozen=True)
class World:
    """The processes that train one model together. This process is number ``rank`` of ``size``.

    Each process has the whole dataset, reads the same batches in the same order, and computes its :meth:`shard` of each
    batch. Decisions depend on sums over all processes, so they are the same in all processes.
    """

    rank: int = 0
    size: int = 1

    @staticmethod
    def current() -> "World":
        """Return the processes of torch's default group, or one process if there is no group."""
        if dist.is_available() and dist.is_initialized():
            return World(dist.get_rank(), dist.get_world_size())
        return World()

    @property
    def is_main(self) -> bool:
        """True if this process writes the files and the log."""
        return self.rank == 0

    def shard(self, n: int) -> range:
        """Return the range of ``n`` items for this process. The first processes can have one item more."""
        length, more = divmod(n, self.size)
        first = self.rank * length + min(self.rank, more)
        return range(first, first + length + (self.rank < more))

    def shard_rows(self, rows: Tensor, batch_size: int) -> Tensor:
        """Return this process's shard of each batch of ``rows``. An empty shard gets the first row of its batch."""
        shards = ((batch, self.shard(len(batch))) for batch in rows.split(batch_size))
        return torch.cat([batch[shard.start : shard.stop] if shard else batch[:1] for batch, shard in shards])

    def local_device(self, device: torch.device) -> torch.device:
        """Return the GPU of this process for the device "cuda", or raise ``InputError`` if it has none of its own."""
        if self.size == 1 or device.type != "cuda":
            return device
        if device.index is not None:
            raise InputError(f"`device`: {device} is one GPU and there are {self.size} processes; give cuda")
        local, gpus = int(os.environ.get("LOCAL_RANK", self.rank)), torch.cuda.device_count()
        if local >= gpus:
            raise InputError(f"`device`: process {local} of this machine has no GPU of its own, there are {gpus}")
        torch.cuda.set_device(local)
        return torch.device("cuda", local)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Wrap the model in DistributedDataParallel, which averages the gradients over the processes."""
        return model if self.size == 1 else nn.parallel.DistributedDataParallel(model)

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Copy the buffers of the main process to all processes.

        Each process computes the statistics of a batch norm from its own shards, and DistributedDataParallel does not
        synchronize them after the last batch.
        """
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def sum(self, values: Tensor) -> Tensor:
        """Add ``values`` over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def max(self, value: int) -> int:
        """Return the largest value of all processes."""
        if self.size == 1:
            return value
        largest = torch.tensor(value)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def lost_process(self, error: RuntimeError) -> bool:
        """Return True if ``error`` means that another process has ended."""
        return self.size > 1 and (isinstance(error, dist.DistError) or "by peer" in str(error))

    @contextmanager
    def sync_errors(self) -> Iterator[None]:
        """End all processes if one has an InputError in the block. The first process with an error reports it.

        No process may wait for another within the block.
        """
        if self.size == 1:
            yield
            return
        local_error = None
        try:
            yield
        except InputError as error:
            local_error = error
        messages: list[str | None] = [None] * self.size
        dist.all_gather_object(messages, None if local_error is None else str(local_error))
        reporter = next((rank for rank, message in enumerate(messages) if message is not None), None)
        if reporter == self.rank:
            raise local_error
        if reporter is not None:
            raise RemoteError(messages[reporter]) from local_error

    def broadcast_from_rank0(self, function: Callable[[], T]) -> T:
        """Call ``function()`` in the main process and return its result, or raise its InputError, in every process."""
        if self.size == 1:
            return function()
        box: list[T | None] = [None]
        with self.sync_errors():
            if self.is_main:
                box[0] = function()
        dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]

    def rank0_first(self, function: Callable[[], T]) -> T:
        """Call ``function()`` in the main process first, then in the others, which may read the files it wrote."""
        result: list[T] = []
        for turn in (True, False):
            with self.sync_errors():
                if self.is_main == turn:
                    result.append(function())
        return result[0]
