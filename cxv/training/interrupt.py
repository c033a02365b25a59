"""Ctrl-C and SIGTERM between batches, where nothing is half done."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

_waiting: int | None = None  # the signal that came, for the main thread


class Interrupted(KeyboardInterrupt):
    """Raised between two batches: all that a step writes to is as a whole step left it. ``signal``: its number."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signal = signum


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Within, Ctrl-C and SIGTERM raise :class:`Interrupted` at the next item of :func:`interruptible`, and a second one
    acts at once.

    Raised anywhere else it can be lost in a callback or end the process inside autograd. Where another handler than
    Python's own is set, or in another thread than the main one, nothing is changed: only the main thread gets signals.
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
        yield
        _raise_if_waiting()
    finally:
        _waiting = None
        for number, handler in handlers.items():
            signal.signal(number, handler)


def interruptible(items: Iterable[T], agree: Callable[[int], int] = int) -> Iterator[T]:
    """The items; a signal that waits is raised before the next one.

    ``agree`` is called with its number (0: none) before each item and after the last one and returns the number to
    raise: several processes stop at the same item.
    """
    for item in items:
        _raise_if_waiting(agree)
        yield item
    _raise_if_waiting(agree)


def _in_main() -> bool:
    return threading.current_thread() is threading.main_thread()


def _raise_if_waiting(agree: Callable[[int], int] = int) -> None:
    number = agree((_in_main() and _waiting) or 0)
    if number:
        raise Interrupted(number)
