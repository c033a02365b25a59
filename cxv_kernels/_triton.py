"""How Triton kernels are launched. Nothing here imports Triton."""

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

TRITON_MISSING = None if importlib.util.find_spec("triton") else "needs the package triton, which is not installed"


def interpreting() -> bool:
    """Whether Triton kernels run on the CPU, by its interpreter: ``TRITON_INTERPRET=1`` before Triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def capability(device: torch.device) -> int:
    """10·major + minor of the device's compute capability; 0: not a GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch(op: str, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """``kernel[grid](*arguments, **options)`` on the first tensor's device and its current stream, without waiting.
    Products and sums are fused, whatever Triton's default, unless ``enable_fp_fusion=False`` is given.

    Raises:
        RuntimeError: the launch failed; the message has the op, the tensors' shapes and dtypes, and the cause.
    """
    if 0 in grid:
        return
    options.setdefault("enable_fp_fusion", True)
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
