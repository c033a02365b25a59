"""Which implementation serves an op, and why another one declines.

A backend is registered per op with a capability check: a function of (device, dtype, dim) that returns ``None`` if it
can serve, else the reason in words; ``dim`` is the largest number of channels of a head (0: not known). ``"auto"``
walks :data:`_PREFERENCE` for the device, takes the first that can, and falls back to the reference, saying so once per
(op, device type).
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch

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

Check = Callable[[torch.device, torch.dtype, int], str | None]

_PREFERENCE = {"cpu": ("cpp",), "cuda": ("triton", "cuda")}
# What "auto" passes over until a GPU has judged it; naming it serves.
_UNPROVEN = dict.fromkeys(("triton", "cuda"), "has not been checked on a GPU yet and serves only when it is named")
_checks: dict[str, dict[str, Check]] = {op: {} for op in OPS}
_announced: set[tuple[str, str]] = set()
_active = "auto"


def _validate(name: str) -> str:
    parts = name.split(",")
    if any(part not in BACKENDS for part in parts) or ("auto" in parts and len(parts) > 1):
        raise ValueError(
            f"backend must be one of {', '.join(map(repr, BACKENDS))}, or several but 'auto' with commas between, "
            f"got {name!r}"
        )
    return name


def register(op: str, backend: str, check: Check) -> None:
    """Declare that ``backend`` implements ``op`` wherever ``check(device, dtype, dim)`` returns ``None``."""
    _checks[op][backend] = check


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every op in the block from one backend.

    Args:
        name: ``"auto"`` (the fastest that can), ``"reference"``, ``"cpp"``, ``"cuda"`` or ``"triton"``; or several, as
            ``"cuda,triton"``: for each call the first that can. If none of the named can serve a call, it raises
            ``RuntimeError`` with their reasons; only ``"auto"`` falls back unasked.

    The setting is the process's, not the thread's; the backward pass uses what its forward pass used.

    Raises:
        ValueError: unknown name.
    """
    global _active
    previous, _active = _active, _validate(name)
    try:
        yield
    finally:
        _active = previous


def get_backend() -> str:
    """The name that :func:`use_backend` has set, ``"auto"`` outside any block."""
    return _active


def _decline(op: str, backend: str, device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    check = _checks[op].get(backend)
    return f"has no {op} kernel yet" if check is None else check(device, dtype, dim)


def explain_backend(
    op: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, dim: int = 0
) -> dict[str, str]:
    """For each backend, ``"serves"`` or the reason why it does not serve ``op`` on this device and dtype,
    for heads of ``dim`` channels (0: any).

    Raises:
        ValueError: unknown op.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(map(repr, OPS))}, got {op!r}")
    device = torch.device(device)
    named = {name: _decline(op, name, device, dtype, dim) or "serves" for name in BACKENDS[2:]}
    return {"reference": "serves"} | named


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

    Raises:
        ValueError: unknown backend.
        RuntimeError: a backend was named and cannot serve; the message gives its reason.
    """
    wanted = _active if backend is None else _validate(backend)
    device, dtype = tensor.device, tensor.dtype
    reasons = []
    for name in _PREFERENCE.get(device.type, ()) if wanted == "auto" else wanted.split(","):
        if name == "reference":
            return name
        reason = declined(name) or _decline(op, name, device, dtype, dim)
        if reason is None and wanted == "auto":
            reason = _UNPROVEN.get(name)
        if reason is None:
            return name
        reasons.append(f"{name} {reason}")
    if wanted != "auto":
        raise RuntimeError(f"backend {wanted!r} cannot serve {op} for {dtype} on {device}: {'; '.join(reasons)}")
    if not torch.compiler.is_compiling():
        _announce(op, device, reasons)
    return "reference"


def _announce(op: str, device: torch.device, reasons: list[str]) -> None:
    if (op, device.type) in _announced:
        return
    _announced.add((op, device.type))
    why = "; ".join(reasons) or "no fused backend knows this device type"
    warnings.warn(
        f"{op} on {device.type} is served by the reference ({why}). "
        f"Ask cxv_kernels.explain_backend({op!r}, {device.type!r}); said once.",
        stacklevel=4,
    )
