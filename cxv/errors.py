"""The exception for invalid input, and helpers for messages and for exceptions of PyTorch."""

import importlib
from collections.abc import Sequence
from types import ModuleType

import torch

# Messages of CUDA, its libraries, the CPU allocator and the fused ops when memory is exhausted. These errors do not
# always have PyTorch's class OutOfMemoryError.
_MEMORY_WORDS = (
    "can't allocate memory",
    "out of memory",
    "bad_alloc",  # of the scratch memory of a C++ kernel
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


class InputError(ValueError):
    """An error that the user can correct: an invalid argument, a missing file, a run that diverged.

    The message is one line with the argument or file, the value and the allowed values. Arguments are in backticks. The
    command line prints the message without a traceback, with flags instead of arguments.
    """


def printable(text: object) -> str:
    """Return the text in one line that every program can show.

    Line ends, other control characters and bytes of a file name that are not UTF-8 are escaped: ``\\n``, ``\\udcff``.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def listed(names: Sequence[str], limit: int = 10) -> str:
    """Join names for a message: at most ``limit`` of them, then "… and 190 more"."""
    more = len(names) - limit
    return ", ".join(map(printable, names[:limit])) + (f", … and {more} more" if more > 0 else "")


def need(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say how to install it: with the extra ``cxv[extra]``."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0].replace("sklearn", "scikit-learn")
        raise InputError(f"{package} is needed here and cannot be imported: pip install 'cxv[{extra}]'") from error


def out_of_memory(error: RuntimeError) -> bool:
    """Return True if the error says that the memory of a GPU or of the CPU is exhausted."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _MEMORY_WORDS)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message."""
    return str(error).strip().split("\n")[0] or type(error).__name__
