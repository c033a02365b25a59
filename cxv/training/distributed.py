"""Data-parallel training: what the processes that ``torchrun`` started share, and how a batch is divided among them."""

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


class PeerError(InputError):
    """An error that ends this process and that another one reports."""


@contextmanager
def process_group() -> Iterator[None]:
    """The processes of this job as torch's default group, where ``torchrun`` started several: gloo for what is on the
    CPU, NCCL for what is on a GPU."""
    if not (dist.is_available() and int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ):
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    yield
    dist.destroy_process_group()  # not after an error: a collective of another process may still be under way


@dataclass(frozen=True)
class World:
    """The processes that train one model together: this one is number ``rank`` of ``size``.

    All of them hold the whole data set and go through the same batches in the same order; of each batch a process
    computes :meth:`part`. What they decide on is summed over all of them, so they decide alike.
    """

    rank: int = 0
    size: int = 1

    @staticmethod
    def current() -> "World":
        """Those of torch's default process group; one process where there is none."""
        if dist.is_available() and dist.is_initialized():
            return World(dist.get_rank(), dist.get_world_size())
        return World()

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and the log."""
        return self.rank == 0

    def part(self, n: int) -> range:
        """Which of ``n`` items are this process's: consecutive, one more in the first ones where it does not divide."""
        share, more = divmod(n, self.size)
        first = self.rank * share + min(self.rank, more)
        return range(first, first + share + (self.rank < more))

    def share(self, rows: Tensor, batch_size: int) -> Tensor:
        """This process's part of each batch of ``rows``; of a batch with none for it, the first row as a stand-in."""
        parts = ((batch, self.part(len(batch))) for batch in rows.split(batch_size))
        return torch.cat([batch[part.start : part.stop] if part else batch[:1] for batch, part in parts])

    def local_device(self, device: torch.device) -> torch.device:
        """This process's own GPU, where ``device`` is "cuda" without a number.

        Raises:
            InputError: there are more processes than GPUs, or all of them were given the same one.
        """
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
        """The model with its gradients averaged over the processes (DistributedDataParallel)."""
        return model if self.size == 1 else nn.parallel.DistributedDataParallel(model)

    def broadcast_buffers(self, model: nn.Module) -> None:
        """Give every process the main one's buffers: a batch norm's statistics are of its part of the batches, and
        DistributedDataParallel leaves those of the last batch as they are."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def max(self, value: int) -> int:
        """The largest value of any process."""
        if self.size == 1:
            return value
        largest = torch.tensor(value)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def has_lost_a_peer(self, error: RuntimeError) -> bool:
        """Whether ``error`` came of another process's end."""
        return self.size > 1 and (isinstance(error, dist.DistError) or "by peer" in str(error))

    @contextmanager
    def together(self) -> Iterator[None]:
        """An InputError of one process within is one of all of them; the first that has it reports it.

        Within, no process may wait for another.
        """
        if self.size == 1:
            yield
            return
        own = None
        try:
            yield
        except InputError as error:
            own = error
        found: list[str | None] = [None] * self.size
        dist.all_gather_object(found, None if own is None else str(own))
        reporter = next((rank for rank, message in enumerate(found) if message is not None), None)
        if reporter == self.rank:
            raise own
        if reporter is not None:
            raise PeerError(found[reporter]) from own

    def from_main(self, function: Callable[[], T]) -> T:
        """What the main process's ``function()`` returns, or raises as an InputError, in every process."""
        if self.size == 1:
            return function()
        box: list[T | None] = [None]
        with self.together():
            if self.is_main:
                box[0] = function()
        dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]

    def main_first(self, function: Callable[[], T]) -> T:
        """``function()``, in the main process before the others: it may write files that they then find."""
        result: list[T] = []
        for turn in (True, False):
            with self.together():
                if self.is_main == turn:
                    result.append(function())
        return result[0]
