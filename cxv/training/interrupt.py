"""Ctrl-C between batches, where nothing is half done."""

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

_waiting = False


@contextlib.contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Within, Ctrl-C raises ``KeyboardInterrupt`` at the next item of :func:`interruptible`, and a second one at once.

    Raised anywhere else it can be lost in a callback or end the process inside autograd. Where another handler than
    Python's own is set, or in another thread than the main one, nothing is changed.
    """
    global _waiting
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def wait(*_: object) -> None:
        global _waiting
        _waiting = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    _waiting = False
    signal.signal(signal.SIGINT, wait)
    try:
        yield
        _raise_if_waiting()
    finally:
        _waiting = False
        signal.signal(signal.SIGINT, signal.default_int_handler)


def interruptible(items: Iterable[T]) -> Iterator[T]:
    """The items; a Ctrl-C that waits is raised before the next one."""
    for item in items:
        _raise_if_waiting()
        yield item
    _raise_if_waiting()


def _raise_if_waiting() -> None:
    if _waiting:
        raise KeyboardInterrupt
