"""Handle Ctrl-C, SIGTERM and a time limit between batches, when no step is incomplete."""

import contextlib
import math
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

_waiting: int | None = None  # the signal that has arrived, for the main thread
_OUT_OF_TIME = 1  # in place of a signal's number, and less than any


class Interrupted(KeyboardInterrupt):
    """Raised between two batches, after a complete step. ``signal`` is the number of the signal."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signal = signum


class OutOfTimeError(Exception):
    """Raised between two batches, after a complete step, when the time limit has passed."""


@contextlib.contextmanager
def deferred_interrupts(announce: bool = True) -> Iterator[None]:
    """In the block, let Ctrl-C and SIGTERM raise :class:`Interrupted` at the next item of :func:`interruptible`.

    With ``announce``, a line on stderr answers the signal at once. A second signal acts at once. An exception raised
    elsewhere could be lost in a callback, or end the process inside autograd. The block changes nothing if another
    handler than Python's own is set, or outside of the main thread, because only the main thread receives signals.
    """
    global _waiting
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    handlers = {
        number: handler for number, handler in handlers.items() if _in_main() and signal.getsignal(number) is handler
    }
    if not handlers:
        yield
        return

    def wait(number: int, _: object) -> None:
        global _waiting
        _waiting = number
        signal.signal(number, handlers[number])

    for number in handlers:
        signal.signal(number, wait)
    try:
        with _announced(handlers) if announce else contextlib.nullcontext():
            yield
        _raise_if_waiting()
    finally:
        _waiting = None
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _announced(numbers: Collection[int]) -> Iterator[None]:
    """In the block, say on stderr when one of these signals arrives that the run will stop.

    Python calls a handler only between two instructions of the main thread, that is after a whole backward pass. A
    thread that reads from the wakeup socket is faster.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def announce() -> None:
        while received := reader.recv(1):
            if received[0] in numbers:
                print("\nstopping after this batch; press Ctrl-C again to stop at once", file=sys.stderr, flush=True)
                return

    thread = threading.Thread(target=announce, daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writer.close()  # ends the thread
        thread.join()
        reader.close()


def interruptible(items: Iterable[T], agree: Callable[[int], int] = int, deadline: float = math.inf) -> Iterator[T]:
    """Yield the items, and raise a pending signal, or :class:`OutOfTimeError` after ``deadline``, before the next one.

    ``agree`` is called before each item and after the last one with the number of the pending signal (0 for none), and
    returns the number to raise. With it, several processes stop at the same item. ``deadline`` is a time of
    ``time.monotonic``.
    """
    for item in items:
        _raise_if_waiting(agree, deadline)
        yield item
    _raise_if_waiting(agree)


def _in_main() -> bool:
    return threading.current_thread() is threading.main_thread()


def _raise_if_waiting(agree: Callable[[int], int] = int, deadline: float = math.inf) -> None:
    number = agree((_in_main() and _waiting) or _OUT_OF_TIME * (time.monotonic() >= deadline))
    if number == _OUT_OF_TIME:
        raise OutOfTimeError
    if number:
        raise Interrupted(number)
