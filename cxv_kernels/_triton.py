"""Triton's side of the ops: the namespace its kernels register in, and where they run. Nothing here imports Triton."""

import functools
import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "cxv_kernels_triton"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")

TRITON_MISSING = None if importlib.util.find_spec("triton") else "needs the package triton, which is not installed"


def define(schema: str, module: str) -> None:
    """Declare ``cxv_kernels_triton::<schema>``, whose kernels are launched by the function of that name in ``module``.

    The module, and Triton with it, is imported at the first call. The fake implementation is the op's own to register.
    """
    name = schema.partition("(")[0]

    @functools.cache
    def launcher():
        return getattr(importlib.import_module(module), name)

    _library.define(schema)
    for key in ("CUDA", "CPU"):  # the CPU: by Triton's interpreter
        _library.impl(name, lambda *args: launcher()(*args), key)


def interpreting() -> bool:
    """Whether Triton kernels run on the CPU, by its interpreter: ``TRITON_INTERPRET=1`` before Triton is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def capability(device: torch.device) -> int:
    """10·major + minor of the device's compute capability; 0: not a GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def serves_triton(device: torch.device, dtype: torch.dtype, dim: int, tensor_cores: bool = True) -> str | None:
    """The capability check of the Triton kernels; ``tensor_cores``: they multiply matrices."""
    if TRITON_MISSING:
        return TRITON_MISSING
    if interpreting():
        if device.type != "cpu":
            return f"runs in its interpreter (TRITON_INTERPRET=1), which serves the CPU, not {device.type}"
        return (
            "serves no bfloat16 in its interpreter, whose products would be wrong" if dtype == torch.bfloat16 else None
        )
    arch = capability(device)
    if not arch and device.type != "cuda":
        return f"serves CUDA devices, not {device.type} (but for its interpreter: TRITON_INTERPRET=1)"
    if dtype == torch.float64:
        return "serves float16, bfloat16 and float32 on a GPU, not float64"
    return _before_ampere(arch or 80, dtype, tensor_cores)  # 80: asked about a GPU in general


def _before_ampere(arch: int, dtype: torch.dtype, tensor_cores: bool) -> str | None:
    if arch >= 80 or not (tensor_cores or dtype == torch.bfloat16):
        return None
    return f"serves {'matrix products' if tensor_cores else 'bfloat16'} from sm_80 on, not sm_{arch}"


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
