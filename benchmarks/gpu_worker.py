"""Tasks in a process of their own, which may crash, hang or lose its GPU without taking the others along."""

import contextlib
import faulthandler
import multiprocessing
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

Emit = Callable[[dict[str, Any]], None]
STARTING = 120.0  # seconds that a new process may take before its first task: imports, CUDA


@dataclass
class Outcome:
    """How a task ended, with the rows that it had emitted by then."""

    # or "failed" (it raised), "crashed" (its process died), "out of time", "not started" (there was no process for it)
    status: str = "ok"
    rows: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    wall_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {"status": self.status, "error": self.error, "wall_s": round(self.wall_s, 1), "rows": self.rows}


class Worker:
    """Runs tasks one after the other in one process, and in a new one after it has died or was stopped.

    Args:
        start: called first in each process with ``arguments``; returns what does a task, ``perform(task, emit)``, and
            ``alive()``, which raises where no later task could run in this process.
    """

    def __init__(self, start: Callable[..., tuple[Callable[[Any, Emit], None], Callable[[], None]]], *arguments: Any):
        self._start, self._arguments = start, arguments
        self._process: Any = None
        self._connection: Connection | None = None

    def run(self, task: Mapping[str, Any], timeout: float) -> Outcome:
        """Do the task, for at most ``timeout`` seconds, to which a new process's start does not count."""
        outcome, begin = Outcome("not started"), time.perf_counter()
        try:
            self._open()
            outcome.status, begin = "ok", time.perf_counter()
            self._connection.send(task)
            self._listen(outcome, time.monotonic() + timeout)
        except TimeoutError:
            self._died(outcome, "out of time", f"stopped after {time.perf_counter() - begin:.0f} s")
        except (EOFError, OSError):  # the other end of the pipe is gone
            self._process.join(10)
            self._died(outcome, "crashed", f"its process ended with exit code {self._process.exitcode}")
        outcome.wall_s = time.perf_counter() - begin
        return outcome

    def _died(self, outcome: Outcome, status: str, error: str) -> None:
        outcome.error = error
        if outcome.status == "ok":  # else it had not begun: it is not what was wrong
            outcome.status = status
        self.close()

    def _receive(self, deadline: float) -> tuple[Any, ...]:
        if not self._connection.poll(max(0.0, deadline - time.monotonic())):
            raise TimeoutError
        return self._connection.recv()

    def _listen(self, outcome: Outcome, deadline: float) -> None:
        while True:
            kind, *content = self._receive(deadline)
            if kind == "row":
                outcome.rows.append(*content)
                continue
            if kind == "failed":
                outcome.error, alive = content
                outcome.status = kind
                if not alive:
                    self.close()
            return

    def _open(self) -> None:
        if self._process is not None:
            return
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._start, self._arguments))
        self._process.start()
        theirs.close()
        self._receive(time.monotonic() + STARTING)

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._connection.send(None)
            self._process.join(1)
            self._process.kill()
            self._process.join()
            self._connection.close()
        self._process = self._connection = None


def _serve(connection: Connection, start: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    faulthandler.enable()
    perform, alive = start(*arguments)
    connection.send(("started",))
    while (task := _next(connection)) is not None:
        try:
            perform(task, lambda row: connection.send(("row", row)))
            alive()
        except Exception:
            connection.send(("failed", traceback.format_exc(), _holds(alive)))
        else:
            connection.send(("done",))


def _next(connection: Connection) -> Any:
    """The next task; None at the end, or if nobody is left who could ask for one."""
    try:
        return connection.recv()
    except EOFError:
        return None


def _holds(alive: Callable[[], None]) -> bool:
    try:
        alive()
    except Exception:
        return False
    return True
