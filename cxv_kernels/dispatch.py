"""Select the implementation that runs a call of an op.

Each op registers the dtypes and channels that its kernels support (:class:`Support`). ``"auto"`` selects the first
backend of :func:`dispatch_order` that supports the call and, on a GPU, passes its self-check
(:mod:`cxv_kernels.self_check`). If no backend does, it selects the reference and shows one warning per reason.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from . import _triton
from .library import CPP_MISSING, CUDA_MISSING
from .validation import FLOAT_DTYPES

BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Support:
    """The dtypes and numbers of channels (of a head, or of the output of conv_norm) that a backend's kernels support.

    ``tensor_cores`` marks Triton kernels that multiply matrices; they require sm_80.
    """

    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
    min_channels: int = 1
    max_channels: int = 2**31
    tensor_cores: bool = False


CUDA_DTYPES = (torch.float16, torch.float32)  # of the CUDA C++ kernels; only Triton supports bfloat16

FAILED = "failed its self-check"  # begins the reason against a backend that the self-check has already warned about

# (op, backend, device, dtype, may_run) → the reason against a GPU kernel, or None; self_check.py sets it
_self_check: Callable[[str, str, torch.device, torch.dtype, bool], str | None] | None = None
_table: dict[str, dict[str, Support]] = {}
_announced: set[str] = set()
# Since PyTorch 2.14 Dynamo reads a ContextVar and compiles again when its value changes. It cannot set one.
_DYNAMO_READS_CONTEXTVARS = torch.__version__ >= (2, 14)


class _Setting:
    """A value of the current context (a thread or an asynchronous task) that compiled code can also read."""

    def __init__(self, name: str, default: Any):
        self._context = ContextVar(name, default=default)
        self._latest = default  # the latest value that any thread has set, for Dynamo before PyTorch 2.14
        self._traced: Any = None  # the value in a block that is being traced

    def get(self) -> Any:
        if torch.compiler.is_dynamo_compiling():
            if self._traced is not None:
                return self._traced
            if not _DYNAMO_READS_CONTEXTVARS:
                return self._latest
        return self._context.get()

    @contextlib.contextmanager
    def block(self, value: Any) -> Iterator[None]:
        """Set the value in the block."""
        if torch.compiler.is_dynamo_compiling():
            outer, self._traced = self._traced, value
            try:
                yield
            finally:
                self._traced = outer
            return
        outer = self._context.get()
        self._set(value)
        try:
            yield
        finally:
            self._set(outer)

    def _set(self, value: Any) -> None:
        self._context.set(value)
        self._latest = value


_active = _Setting("cxv_kernels backend", "auto")


def dispatch_order(device: torch.device) -> tuple[str, ...]:
    """Return the fused backends for a device, the preferred one first: the dispatch table.

    =====================  ================  ===================================
    device                 order             reason
    =====================  ================  ===================================
    CPU                    cpu
    CUDA, below sm_80      cuda, triton      Triton has no tensor cores there
    CUDA, sm_80 and later  triton, cuda      Triton pipelines the loads
    any other              (the reference)
    =====================  ================  ===================================
    """
    if device.type == "cpu":
        return ("cpu",)
    if device.type != "cuda":
        return ()
    pipelined = torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)
    return ("triton", "cuda") if pipelined else ("cuda", "triton")


def _validate(name: str) -> str:
    parts = [part.strip() for part in name.split(",")] if isinstance(name, str) else [name]
    if any(part not in BACKENDS for part in parts) or ("auto" in parts and len(parts) > 1):
        raise ValueError(
            f"backend must be one of {', '.join(map(repr, BACKENDS))}, or several of them without 'auto', separated by "
            f"commas, got {name!r}"
        )
    return ",".join(parts)


def register(op: str, **backends: Support) -> None:
    """Declare an op and what its kernels of each backend support."""
    _table[op] = backends


def registered_ops() -> tuple[str, ...]:
    """Return the names of all ops."""
    return tuple(_table)


def use_backend(name: str) -> contextlib.AbstractContextManager[None]:
    """Return a context manager that sets the backend of all ops in its block.

    The setting applies to the current context: the thread, or the asynchronous task. A new thread starts with
    ``"auto"``, and so do the replicas of ``nn.DataParallel``; ``asyncio.to_thread`` copies the caller's context. The
    backward pass uses the backend of its forward pass, whichever thread runs it. ``torch.compile`` compiles a function
    again when the setting changes (before PyTorch 2.14 the function follows the latest setting of any thread).
    ``torch.utils.checkpoint`` calls a function again in the backward pass: wrap the function in :func:`bind_backend`.

    Args:
        name: ``"auto"`` (the preferred backend of the device), ``"reference"``, ``"cpu"``, ``"cuda"`` or ``"triton"``.
            Several names, such as ``"cuda,triton"``, select for each call the first backend that supports it. If no
            named backend supports a call, the op raises ``RuntimeError`` with the reasons. Only ``"auto"`` falls back
            to the reference.

    Raises:
        ValueError: If the name is unknown.

    Example::

        with cxv_kernels.use_backend("reference"):
            out = cxv_kernels.linear_attention(q, k, v)
    """
    return _active.block(_validate(name))


def get_backend() -> str:
    """Return the name that :func:`use_backend` has set, or ``"auto"`` outside of its blocks."""
    return _active.get()


def bind_backend(function: Callable[..., Result]) -> Callable[..., Result]:
    """Wrap ``function`` so that it always runs with the backend that is set now.

    ``torch.utils.checkpoint`` calls a function again in the backward pass, where another backend may be set. Use
    ``checkpoint(bind_backend(function), x, use_reentrant=False)``.
    """
    name = get_backend()

    @functools.wraps(function)
    def bound(*args: Any, **kwargs: Any) -> Result:
        with use_backend(name):
            return function(*args, **kwargs)

    return bound


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as ``"float16"`` for ``torch.float16``."""
    return str(dtype).removeprefix("torch.")


def unsupported_reason(op: str, backend: str, device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
    """Return the reason why ``backend`` does not support ``op`` for this device, dtype and channels, or None."""
    support = _table[op].get(backend)
    if support is None:
        return f"has no kernel for {op}"
    reason = _DEVICE_CHECKS[backend](device, dtype, support)
    if reason is None and channels and not support.min_channels <= channels <= support.max_channels:
        reason = f"supports {support.min_channels} to {support.max_channels} channels, not {channels}"
    return reason


def _cpu_unsupported_reason(device: torch.device, dtype: torch.dtype, support: Support) -> str | None:
    return CPP_MISSING or (None if device.type == "cpu" else f"supports the CPU, not {device.type}")


@functools.cache
def cuda_compiled_for(device: int) -> int:
    """Return the architecture (10·major + minor) of the code that the CUDA library has for this GPU, or 0 for none.

    A library with nothing newer than the PTX of sm_75 returns 75 for all newer GPUs.
    """
    return torch.ops.cxv_kernels.cuda_compiled_for(device)


def _cuda_unsupported_reason(device: torch.device, dtype: torch.dtype, support: Support) -> str | None:
    if CUDA_MISSING or device.type != "cuda":
        return CUDA_MISSING or f"supports CUDA devices, not {device.type}"
    if dtype not in support.dtypes:
        return f"supports {' and '.join(map(dtype_name, support.dtypes))}, not {dtype_name(dtype)}"
    if not torch.cuda.is_available():
        return None  # the question is about GPUs in general
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (7, 5):
        return f"supports sm_75 and later, not sm_{major}{minor}"
    if torch.compiler.is_compiling():
        return None  # Dynamo cannot trace the check below; the kernels raise the same error at run time
    if cuda_compiled_for(torch.cuda.current_device() if device.index is None else device.index) == 0:
        built = f"build it with TORCH_CUDA_ARCH_LIST={major}.{minor}"
        return f"was not built for sm_{major}{minor}, the architecture of this GPU: {built}"
    return None


def _triton_unsupported_reason(device: torch.device, dtype: torch.dtype, support: Support) -> str | None:
    if _triton.TRITON_MISSING:
        return _triton.TRITON_MISSING
    if _triton.interpreting():
        if device.type != "cpu":
            return f"runs in its interpreter (TRITON_INTERPRET=1), which supports the CPU, not {device.type}"
        wrong = dtype == torch.bfloat16
        return "does not support bfloat16 in its interpreter, which computes wrong products" if wrong else None
    arch = _triton.capability(device)
    if not arch and device.type != "cuda":
        return f"supports CUDA devices, not {device.type} (except in its interpreter: TRITON_INTERPRET=1)"
    if dtype == torch.float64:
        return "supports float16, bfloat16 and float32 on a GPU, not float64"
    if not 0 < arch < 80 or not (support.tensor_cores or dtype == torch.bfloat16):  # 0 stands for GPUs in general
        return None
    return f"supports {'matrix products' if support.tensor_cores else 'bfloat16'} from sm_80 on, not sm_{arch}"


_DEVICE_CHECKS = {
    "cpu": _cpu_unsupported_reason,
    "cuda": _cuda_unsupported_reason,
    "triton": _triton_unsupported_reason,
}


def explain_backend(
    op: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, dim: int = 0
) -> dict[str, str]:
    """Report, for each backend, whether it supports ``op`` for this device and dtype.

    Args:
        op: Name of an op, one of ``cxv_kernels.OPS``.
        device: A device or its type, such as ``"cuda"``.
        dtype: float64, float32, float16 or bfloat16.
        dim: Channels of a head (of the output for ``conv_norm``). 0 stands for any number.

    Returns:
        Dict from the name of each backend to ``"supported"`` or the reason why the backend does not support the op. The
        entry ``"auto"`` has the backend that is used by default, with the reasons against the others if it is the
        reference. A GPU kernel that has not been validated yet is used if it passes its self-check at the first call.

    Raises:
        ValueError: If the op is unknown.
        TypeError: If the dtype is not supported.
    """
    if op not in _table:
        raise ValueError(f"op must be one of {', '.join(map(repr, _table))}, got {op!r}")
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be float64, float32, float16 or bfloat16, got {dtype}")
    device = torch.device(device)
    named = {name: unsupported_reason(op, name, device, dtype, dim) or "supported" for name in BACKENDS[2:]}
    selected, reasons = _first(op, None, device, dtype, dim, may_run=False)
    return {"auto": selected or f"reference ({_because(reasons, device)})", "reference": "supported"} | named


def _first(
    op: str,
    names: list[str] | None,
    device: torch.device,
    dtype: torch.dtype,
    dim: int,
    check_options: Callable[[str], str | None] = lambda _: None,
    may_run: bool = True,
) -> tuple[str | None, list[str]]:
    """Return the first backend that supports the call, or None, and the reasons against the backends before it.

    Args:
        names: Backends to try. None stands for the dispatch table, whose GPU kernels must have been validated.
        may_run: Run the self-check of a GPU kernel that has no verdict yet.
    """
    reasons: list[str] = []
    for name in dispatch_order(device) if names is None else names:
        reason = check_options(name) or unsupported_reason(op, name, device, dtype, dim)
        if reason is None and names is None and device.type == "cuda":
            reason = _self_check(op, name, device, dtype, may_run)
        if reason is None or name == "reference":
            return name, reasons
        reasons.append(f"{name} {reason}")
    return None, reasons


def _because(reasons: list[str], device: torch.device) -> str:
    return "; ".join(reasons) or f"there are no fused kernels for {device.type} devices"


def resolve(
    op: str,
    tensor: torch.Tensor,
    backend: str | None = None,
    dim: int = 0,
    check_options: Callable[[str], str | None] = lambda _: None,
) -> str:
    """Return the backend that computes ``op`` for inputs with the device and dtype of ``tensor``.

    Args:
        backend: Name of a backend. Default: the one that :func:`use_backend` has set.
        dim: Channels of a head (of the output for ``conv_norm``). 0 stands for any number.
        check_options: Function of a fused backend's name. It returns the reason why the backend does not support the
            other arguments of the call, or None.

    Returns:
        A name from :data:`BACKENDS` other than ``"auto"``.

    Raises:
        ValueError: If the backend is unknown.
        RuntimeError: If the named backend does not support the call, or the self-check of a kernel has made the GPU
            unusable. The message has the reason.
    """
    wanted = _active.get() if backend is None else _validate(backend)
    device, dtype = tensor.device, tensor.dtype
    names = None if wanted == "auto" else wanted.split(",")
    if names is None and torch.jit.is_tracing():  # a saved trace cannot contain an autograd.Function
        check_options = lambda _: "is not available to TorchScript"  # noqa: E731
    name, reasons = _first(op, names, device, dtype, dim, check_options)
    if name is not None:
        return name
    if wanted != "auto":
        raise RuntimeError(f"backend {wanted!r} does not support {op} for {dtype} on {device}: {'; '.join(reasons)}")
    announced = any(FAILED in reason for reason in reasons)
    if not announced and not torch.compiler.is_compiling() and device.type != "meta":  # meta tensors have no data
        _announce(op, device, reasons)
    return "reference"


def _announce(op: str, device: torch.device, reasons: list[str]) -> None:
    message = (
        f"{op}: using the plain PyTorch implementation on {device}, because {_because(reasons, device)}. "
        "Run `python -m cxv_kernels` for details. (This warning is shown once.)"
    )
    if message not in _announced:
        _announced.add(message)
        warnings.warn(message, stacklevel=4)
