"""The ``cxv`` command as a process, with its streams and signals; also ``python -m cxv``, as ``torchrun`` starts it."""

import codecs
import errno
import os
import signal
import sys

_PLAIN = {"×": "x", "…": "...", "→": "->", "±": "+-", "–": "-", "−": "-"}
"""What our lines have for the encodings without these characters."""


def run() -> int:
    """Run the command line, and return its exit status.

    The status is that of :func:`cxv.cli.main`, or 141 (128 + SIGPIPE) if the reader of the output has closed it.
    """
    quiet = signal.getsignal(signal.SIGINT) is not signal.default_int_handler  # as nohup sets it
    if not quiet:
        signal.signal(signal.SIGINT, _quit)  # an import of PyTorch can swallow a KeyboardInterrupt
    _prepare_streams()
    from .cli import main

    try:
        if not quiet:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return main()
        finally:
            if not quiet:
                signal.signal(signal.SIGINT, _quit)
            sys.stdout.flush()
    except KeyboardInterrupt:  # the second one, while main reports the first
        return 128 + signal.SIGINT
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes the rest at its end
        if error.errno == errno.EPIPE:
            return 141
        print(f"cxv: error: cannot write the output: {error.strerror}", file=sys.stderr)
        return 2


def _quit(*_: object) -> None:
    """End the process at once: nothing is under way."""
    os.write(2, b"cxv: interrupted\n")
    os._exit(128 + signal.SIGINT)


def _prepare_streams() -> None:
    """Let both streams take every character, and stand in for a stream that is closed (``2>&-``)."""
    codecs.register_error("cxv", _replace)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (it is open until the end)
        else:
            stream.reconfigure(errors="cxv")


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    escaped = (_PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text)
    return "".join(escaped), error.end


if __name__ == "__main__":
    sys.exit(run())
