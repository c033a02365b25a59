"""A progress bar on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Any

from tqdm import tqdm


class Progress:
    """Shows how many images a loop has done: a tqdm bar on a terminal; in a log file a line every 30 seconds.

    Use it as a context manager; :meth:`update` takes the number of images done and what to show beside it. ``done``
    images, of an earlier process, do not count for the speed. Without ``enabled`` it shows nothing.
    """

    def __init__(self, total: int, label: str, enabled: bool = True, done: int = 0):
        self.total, self.label, self.enabled = total, label, enabled
        self._done, self._earlier, self._shown = done, done, {}
        self._start = self._last = time.monotonic()
        self._bar = None
        if enabled and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, desc=label, unit=" images", leave=False, dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, n: int, **shown: Any) -> None:
        self._done, self._shown = self._done + n, shown or self._shown
        now = time.monotonic()
        if self._bar is not None:
            if shown:
                self._bar.set_postfix(shown, refresh=False)
            self._bar.update(n)
        elif self.enabled and now - self._last >= 30:
            self._last, rate = now, (self._done - self._earlier) / (now - self._start)
            extra = "".join(f"  {k} {v}" for k, v in self._shown.items())
            line = f"{self.label}: {self._done}/{self.total} images, {rate:.0f}/s{extra}"
            print(line, file=sys.stderr, flush=True)
