"""Launch Triton kernels. This module does not import Triton."""

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

TRITON_MISSING = None if importlib.util.find_spec("triton") else "needs the package triton, which is not installed"


def interpreting() -> bool:
    """Return True if Triton's interpreter runs the kernels on the CPU (``TRITON_INTERPRET=1`` at Triton's import)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def capability(device: torch.device) -> int:
    """Return the compute capability of a device as 10·major + minor, or 0 if the device is not a GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch(op: str, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run ``kernel[grid](*arguments, **options)`` on the device and current stream of the first tensor, asynchronously.

    Products and sums are fused unless ``enable_fp_fusion=False`` is passed, independently of Triton's default.

    Raises:
        RuntimeError: If the launch fails. The message has the op, the shapes and dtypes of the tensors, and the cause.
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
