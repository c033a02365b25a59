"""A progress bar on a terminal, plain lines elsewhere."""

import math
import sys
import time


class Progress:
    """Shows how far a loop is: a tqdm bar on a terminal; in a log file a line every ``every`` seconds.

    Use it as a context manager; :meth:`update` takes the number of items done and what to show beside it. Without
    ``enabled`` it shows nothing.
    """

    def __init__(self, total: int, label: str, unit: str = "image", every: float = 30.0, enabled: bool = True):
        self.total, self.label, self.unit, self.every = total, label, unit, every
        self._done, self._start = 0, time.monotonic()
        self._last, self._shown = self._start, {}
        self._bar = None
        if not enabled:
            self.every = math.inf
        elif sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=total, desc=label, unit=f" {unit}s", leave=False, dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, n: int, **shown: str) -> None:
        self._done += n
        self._shown = shown or self._shown
        if self._bar is not None:
            if shown:
                self._bar.set_postfix(shown, refresh=False)
            self._bar.update(n)
            return
        now = time.monotonic()
        if now - self._last >= self.every:
            self._last = now
            rate = self._done / (now - self._start)
            extra = "".join(f"  {k} {v}" for k, v in self._shown.items())
            print(
                f"{self.label}: {self._done}/{self.total} {self.unit}s, {rate:.0f}/s{extra}",
                file=sys.stderr,
                flush=True,
            )
