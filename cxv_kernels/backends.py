"""Which implementation serves an op, and why another one declines.

A backend is registered per op with a capability check: a function of (device, dtype, dim) that returns ``None`` if it
can serve, else the reason in words; ``dim`` is the largest number of channels of a head (0: not known). ``"auto"``
takes the first that can in the device's order, and falls back to the reference, saying so once for each reason.

On a GPU the order is that of ``gpu_routes.json``, which ``benchmarks/gpu_routes.py`` makes of what gpu_suite.py has
checked and measured on such a card: architecture ("75", "80", …) → ``evidence``, the names of those files, and op →
dtype → backends, the fastest first. An architecture that is not there has the nearest lower one of its major, whose
machine code it runs. What no entry names serves only when it is named, or once :func:`cxv_kernels.verify` has found it
right on the very GPU.
"""

import contextlib
import functools
import json
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import torch

from .validation import FLOAT_DTYPES

BACKENDS = ("auto", "reference", "cpp", "cuda", "triton")
OPS = (
    "linear_attention",
    "kv_state",
    "performer_attention",
    "performer_features",
    "nystrom_attention",
    "conv_norm",
    "dropout",
    "gelu_dropout",
)

Result = TypeVar("Result")
Check = Callable[[torch.device, torch.dtype, int], str | None]

_GPU_ROUTES = json.loads(Path(__file__).with_name("gpu_routes.json").read_text())
_checks: dict[str, dict[str, Check]] = {op: {} for op in OPS}
_verified: dict[tuple[int, str, str], frozenset[str]] = {}  # (a GPU's index, op, dtype) → what verify() has found right
_announced: set[str] = set()
# Dynamo reads a ContextVar, and compiles again when its value changes, since PyTorch 2.14; it cannot set one.
_DYNAMO_READS_CONTEXTVARS = torch.__version__ >= (2, 14)


class _Setting:
    """A value of the current context (a thread or an asynchronous task) that compiled code can use too."""

    def __init__(self, name: str, default: Any):
        self._context = ContextVar(name, default=default)
        self._latest = default  # of any thread, for Dynamo before PyTorch 2.14
        self._traced: Any = None  # in a block that is being traced

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


def gpu_order(arch: int) -> tuple[str, ...]:
    """The GPU backends where nothing was measured, the likelier first; arch: 10·major + minor. Triton has no tensor
    cores below sm_80."""
    return ("cuda", "triton") if arch < 80 else ("triton", "cuda")


def _validate(name: str) -> str:
    parts = [part.strip() for part in name.split(",")] if isinstance(name, str) else [name]
    if any(part not in BACKENDS for part in parts) or ("auto" in parts and len(parts) > 1):
        raise ValueError(
            f"backend must be one of {', '.join(map(repr, BACKENDS))}, or several but 'auto' with commas between, "
            f"got {name!r}"
        )
    return ",".join(parts)


def register(op: str, backend: str, check: Check) -> None:
    """Declare that ``backend`` implements ``op`` wherever ``check(device, dtype, dim)`` returns ``None``."""
    _checks[op][backend] = check


def use_backend(name: str) -> contextlib.AbstractContextManager[None]:
    """Serve every op in the block from one backend.

    Args:
        name: ``"auto"`` (the fastest that can), ``"reference"``, ``"cpp"``, ``"cuda"`` or ``"triton"``; or several, as
            ``"cuda,triton"``: for each call the first that can. If none of the named can serve a call, it raises
            ``RuntimeError`` with their reasons; only ``"auto"`` falls back unasked.

    The setting applies to the current context: the thread, or the asynchronous task. A new thread starts with
    ``"auto"``, also a replica's of ``nn.DataParallel``; ``asyncio.to_thread`` copies the caller's context. The backward
    pass uses the backend of its forward pass, in whatever thread it runs. A function of ``torch.compile`` is compiled
    again when the setting changes (before PyTorch 2.14 it follows the setting made last in any thread).

    Raises:
        ValueError: unknown name.
    """
    return _active.block(_validate(name))


def get_backend() -> str:
    """The name that :func:`use_backend` has set, ``"auto"`` outside any block."""
    return _active.get()


def bind_backend(function: Callable[..., Result]) -> Callable[..., Result]:
    """Return ``function`` that always runs with the backend that :func:`use_backend` has set now.

    ``torch.utils.checkpoint`` calls a function again in the backward pass, where another backend may be set:
    ``checkpoint(bind_backend(function), x, use_reentrant=False)``.
    """
    name = get_backend()

    @functools.wraps(function)
    def bound(*args: Any, **kwargs: Any) -> Result:
        with use_backend(name):
            return function(*args, **kwargs)

    return bound


def _gpu_route(op: str, device: torch.device, dtype: torch.dtype) -> list[tuple[str, str | None]]:
    """The fused backends in the order of gpu_suite's results, each with what they have against it; ``"unknown"``: they
    have nothing on such a GPU."""
    major, minor = torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (0, 0)
    known = [str(arch) for arch in range(10 * major, 10 * major + minor + 1) if str(arch) in _GPU_ROUTES]
    route = _GPU_ROUTES[known[-1]] if known else {}
    chosen = route.get(op, {}).get(_name(dtype))
    why = "unknown" if chosen is None else f"gives way on {', '.join(route['evidence'])}"
    rest = [name for name in gpu_order(10 * major + minor) if name not in (chosen or ())]
    return [*((name, None) for name in chosen or ()), *((name, why) for name in rest)]


def _auto(op: str, device: torch.device, dtype: torch.dtype) -> list[tuple[str, str | None]]:
    """The fused backends that "auto" tries, in order, each with why it is passed over, if it is."""
    if device.type != "cuda":
        return [("cpp", None)] if device.type == "cpu" else []
    right = _verified.get((device.index or 0, op, _name(dtype)))
    found = []
    for name, against in _gpu_route(op, device, dtype):
        if right is not None and against in (None, "unknown"):
            against = None if name in right else "has not passed its check on this GPU"
        elif against == "unknown":
            against = "has not been checked on such a GPU yet, which cxv_kernels.verify() does,"
        found.append((name, against and f"{against} and serves only when it is named"))
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def to_verify(op: str, device: torch.device, dtype: torch.dtype, dim: int) -> list[str]:
    """The fused backends that "auto" would use on a GPU if they are right."""
    return [
        name
        for name, against in _gpu_route(op, device, dtype)
        if against in (None, "unknown") and _decline(op, name, device, dtype, dim) is None
    ]


def set_verified(op: str, device: torch.device, dtype: torch.dtype, backend: str, right: bool) -> None:
    """Whether "auto" uses this backend on this GPU from now on, in this process."""
    key = (device.index or 0, op, _name(dtype))
    others = _verified.get(key, frozenset()) - {backend}
    _verified[key] = others | {backend} if right else others


def _decline(op: str, backend: str, device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    check = _checks[op].get(backend)
    return f"has no {op} kernel yet" if check is None else check(device, dtype, dim)


def explain_backend(
    op: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, dim: int = 0
) -> dict[str, str]:
    """What each backend makes of ``op`` on this device and dtype, for heads of ``dim`` channels (0: any).

    Returns:
        A backend's name → ``"serves"``, where it serves when it is named, or the reason why it cannot; and ``"auto"`` →
        the one that serves unasked, with what keeps the others from it if that is the reference.

    Raises:
        ValueError: unknown op; TypeError: no floating dtype.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(map(repr, OPS))}, got {op!r}")
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be float64, float32, float16 or bfloat16, got {dtype}")
    device = torch.device(device)
    named = {name: _decline(op, name, device, dtype, dim) or "serves" for name in BACKENDS[2:]}
    serving, reasons = _first(op, _auto(op, device, dtype), device, dtype, dim)
    unasked = serving or f"reference ({_why(reasons)})"
    return {"auto": unasked, "reference": "serves"} | named


def _first(
    op: str,
    tried: list[tuple[str, str | None]],
    device: torch.device,
    dtype: torch.dtype,
    dim: int,
    declined: Callable[[str], str | None] = lambda _: None,
) -> tuple[str | None, list[str]]:
    """The first of these backends that serves, if one does, and the reasons of those before it."""
    reasons: list[str] = []
    for name, passed_over in tried:
        reason = declined(name) or _decline(op, name, device, dtype, dim) or passed_over
        if reason is None or name == "reference":
            return name, reasons
        reasons.append(f"{name} {reason}")
    return None, reasons


def _why(reasons: list[str]) -> str:
    return "; ".join(reasons) or "no fused backend knows this device type"


def resolve(
    op: str,
    tensor: torch.Tensor,
    backend: str | None = None,
    dim: int = 0,
    declined: Callable[[str], str | None] = lambda _: None,
) -> str:
    """The backend that will serve ``op`` for inputs like ``tensor`` (its device and dtype) with ``dim`` channels.

    Args:
        backend: a name from :data:`BACKENDS`, or ``None`` for the one :func:`use_backend` has set.
        declined: of a fused backend's name, why it does not take the call's other arguments, if so.

    Returns:
        A name from :data:`BACKENDS` other than "auto".

    Raises:
        ValueError: unknown backend.
        RuntimeError: a backend was named and cannot serve; the message gives its reason.
    """
    wanted = _active.get() if backend is None else _validate(backend)
    device, dtype = tensor.device, tensor.dtype
    tried = _auto(op, device, dtype) if wanted == "auto" else [(name, None) for name in wanted.split(",")]
    if wanted == "auto" and torch.jit.is_tracing():  # a file of the trace cannot hold an autograd.Function
        tried = [(name, "is not available to TorchScript") for name, _ in tried]
    name, reasons = _first(op, tried, device, dtype, dim, declined)
    if name is not None:
        return name
    if wanted != "auto":
        raise RuntimeError(f"backend {wanted!r} cannot serve {op} for {dtype} on {device}: {'; '.join(reasons)}")
    if not torch.compiler.is_compiling() and device.type != "meta":  # nothing is computed there
        _announce(op, device, reasons)
    return "reference"


def _announce(op: str, device: torch.device, reasons: list[str]) -> None:
    message = f"{op} on {device.type} is served by the reference ({_why(reasons)}); said once."
    if message in _announced:
        return
    _announced.add(message)
    warnings.warn(
        f"{message} cxv_kernels.explain_backend({op!r}, {device.type!r}) has what serves other calls.",
        stacklevel=4,
    )
