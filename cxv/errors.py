"""The one exception that bad input raises, and what PyTorch's mean."""

import torch

# How CUDA, its libraries, the CPU's allocator and the fused ops say that memory is short, where PyTorch's own class of
# exception is lost on the way.
_MEMORY_WORDS = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


class InputError(ValueError):
    """Something the user can put right: a bad argument, a missing file, a run that diverged.

    The message is one line that names the argument or the file, the value, and the allowed values. Arguments are in
    backticks. The command line prints the message without a traceback, and flags in place of the arguments.
    """


def out_of_memory(error: RuntimeError) -> bool:
    """Whether it says that memory is short, on a GPU or here."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _MEMORY_WORDS)


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return str(error).strip().split("\n")[0] or type(error).__name__
