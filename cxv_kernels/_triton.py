"""How Triton kernels are launched. Nothing here imports Triton."""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TRITON_MISSING = None if importlib.util.find_spec("triton") else "needs the package triton, which is not installed"

# What compiles kernels without a GPU takes the launches instead: (kernel, grid, arguments, options), as for the
# architecture ``recorded_arch`` (80, 90, …). Meanwhile the kernels support every device as they support that.
recorder: Callable[[Any, tuple[int, ...], tuple, dict[str, Any]], None] | None = None
recorded_arch: int | None = None


def interpreting() -> bool:
    """Whether Triton kernels run on the CPU, by its interpreter: ``TRITON_INTERPRET=1`` before Triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def launch(op: str, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """``kernel[grid](*arguments, **options)`` on the first tensor's device and its current stream, without waiting.
    Products and sums are fused, whatever Triton's default, unless ``enable_fp_fusion=False`` is given.

    Raises:
        RuntimeError: the launch failed; the message has the op, the tensors' shapes and dtypes, and the cause.
    """
    if 0 in grid:
        return
    options.setdefault("enable_fp_fusion", True)
    if recorder is not None:
        return recorder(kernel, grid, arguments, options)
    device = next(a for a in arguments if isinstance(a, Tensor)).device
    try:
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                kernel[grid](*arguments, **options)
        else:
            kernel[grid](*arguments, **options)
    except Exception as error:
        tensors = ", ".join(f"{tuple(a.shape)} {a.dtype}" for a in arguments if isinstance(a, Tensor))
        raise RuntimeError(f"{op}: Triton could not run {kernel.__name__} on {device} ({tensors}): {error}") from error
