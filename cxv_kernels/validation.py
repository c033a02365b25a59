"""Argument checks and autocast, shared by the ops."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from .sharding import register_shardings

F = TypeVar("F", bound=Callable[..., Any])

FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# The classes of tensors with PyTorch's own behavior. The last two stand for the first two while torch.export traces.
_PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)


def is_plain_tensor(x: Tensor) -> bool:
    """Return True if ``x`` is a dense tensor of a PyTorch class: not quantized, distributed or another subclass."""
    return type(x) in _PLAIN_TENSORS and x.layout == torch.strided


def check_dense(name: str, x: Tensor) -> None:
    """Raise ``TypeError`` unless ``x`` is a tensor that is neither nested nor sparse."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.is_nested:
        raise TypeError(
            f"{name} must not be a nested tensor: pad it (torch.nested.to_padded_tensor), and hide the padding with "
            "key_mask if the op has one"
        )
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {x.layout}: pass {name}.to_dense()")
    if is_dtensor(x) and not torch.compiler.is_compiling():
        register_shardings()


def is_dtensor(x: Tensor) -> bool:
    """Return True if ``x`` is a ``torch.distributed.tensor.DTensor``, without importing that module."""
    return type(x).__name__ == "DTensor"


def check_tensor(name: str, x: Tensor, ndim: int | None, layout: str = "") -> None:
    """Raise ``TypeError`` unless ``x`` is a dense floating tensor, ``ValueError`` unless it has ``ndim`` dimensions."""
    check_dense(name, x)
    if ndim is not None and x.dim() != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions {layout}, got shape {tuple(x.shape)}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float64, float32, float16 or bfloat16, got {x.dtype}")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def to_number(value: Any) -> Any:
    """Convert a NumPy number, or an array or tensor without dimensions, to a Python number. Return others unchanged."""
    if type(value) in (int, float, bool) or isinstance(value, torch.SymInt | torch.SymFloat):
        return value
    return value.item() if getattr(value, "ndim", None) == 0 else value


def to_numbers(value: Any) -> Any:
    """Apply :func:`to_number` to a value, or to the values in a list, tuple or dict."""
    if type(value) in (list, tuple):
        return type(value)(map(to_numbers, value))
    if type(value) is dict:
        return {key: to_numbers(item) for key, item in value.items()}
    return to_number(value)


def python_numbers(function: F) -> F:
    """Decorate a function so that it also accepts NumPy numbers, and arrays and tensors without dimensions."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*map(to_numbers, args), **to_numbers(kwargs))

    return call


def check_number(name: str, value: float) -> float:
    """Return the value as a Python number. Raise ``TypeError`` unless it is a number."""
    number = to_number(value)
    if not isinstance(number, int | float | torch.SymInt | torch.SymFloat) or isinstance(number, bool):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return number


def check_eps(eps: float) -> float:
    """Return ``eps`` as a Python number.

    Raise ``TypeError`` unless it is a number, and ``ValueError`` unless it is finite and not negative.
    """
    eps = check_number("eps", eps)
    if not 0 <= eps < math.inf:  # the comparison is false for NaN
        raise ValueError(f"eps must be a finite number of at least 0, got {eps}")
    return eps


def check_count(name: str, value: int, least: int = 1) -> int:
    """Return the value as a Python int. Raise ``TypeError`` unless it is an int, ``ValueError`` below ``least``."""
    number = to_number(value)
    if not isinstance(number, int | torch.SymInt) or isinstance(number, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def check_same(name: str, x: Tensor, other_name: str, other: Tensor, dtype: bool = True) -> None:
    """Raise ``ValueError`` unless both have the same device, ``TypeError`` unless both have the same dtype."""
    if x.device != other.device:
        raise ValueError(f"{name} is on {x.device}, {other_name} on {other.device}: they must be on the same device")
    if dtype and x.dtype != other.dtype:
        raise TypeError(f"{name} is {x.dtype}, {other_name} {other.dtype}: they must have the same dtype")


def check_keys_values(k: Tensor, v: Tensor) -> None:
    """Raise unless k (B, H, N, D) and v (B, H, N, E) have matching shapes, dtypes and devices."""
    check_tensor("k", k, 4, "(B, H, N, D)")
    check_tensor("v", v, 4, "(B, H, N, E)")
    check_same("v", v, "k", k)
    k_shape, v_shape = k.shape, v.shape
    if v_shape[:2] != k_shape[:2]:
        raise ValueError(f"v has batch and heads {tuple(v_shape[:2])}, k {tuple(k_shape[:2])}: they must agree")
    if v_shape[2] != k_shape[2]:
        raise ValueError(f"v has {v_shape[2]} tokens, k {k_shape[2]}: they must agree")
    if k_shape[3] == 0:
        raise ValueError(f"k must have at least one channel, got shape {tuple(k_shape)}")


def check_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise unless q (B, H, N_q, D), k (B, H, N_k, D) and v (B, H, N_k, E) have matching shapes, dtypes and devices."""
    check_tensor("q", q, 4, "(B, H, N_q, D)")
    check_keys_values(k, v)
    check_same("k", k, "q", q)
    q_shape, k_shape = q.shape, k.shape
    if k_shape[0] != q_shape[0]:
        raise ValueError(f"k has batch size {k_shape[0]}, q {q_shape[0]}: they must agree")
    if k_shape[1] != q_shape[1]:
        raise ValueError(f"k has {k_shape[1]} heads, q {q_shape[1]}: they must agree")
    if k_shape[3] != q_shape[3]:
        raise ValueError(f"k has head dimension {k_shape[3]}, q {q_shape[3]}: they must agree")


def check_key_mask(key_mask: Tensor | None, k: Tensor) -> None:
    """Raise unless ``key_mask`` is None or a boolean tensor of shape (B, N_k) on the device of k."""
    if key_mask is None:
        return
    if not isinstance(key_mask, Tensor) or key_mask.dtype != torch.bool:
        got = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
        raise TypeError(f"key_mask must be a bool tensor (B, N_k), got {got}")
    check_dense("key_mask", key_mask)
    if key_mask.shape != (k.shape[0], k.shape[2]):
        raise ValueError(f"key_mask must have shape {(k.shape[0], k.shape[2])} (B, N_k), got {tuple(key_mask.shape)}")
    check_same("key_mask", key_mask, "k", k, dtype=False)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of state, statistics and division: float64 for float64 inputs, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_enabled(device: torch.device) -> bool:
    """Return True if autocast is enabled for this device. The device "meta" has no autocast."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def autocast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast the tensors to the autocast dtype under autocast. float64 tensors are not cast, as in PyTorch.

    Each op calls this function with the tensors that may have low precision; projections and norm parameters keep
    their dtype.
    """
    first = tensors[0]
    if not isinstance(first, Tensor) or not autocast_enabled(first.device):
        return tensors
    dtype = torch.get_autocast_dtype(first.device.type)

    def cast(t: Tensor) -> Tensor:
        eligible = isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64
        return t.to(dtype) if eligible else t

    return tuple(map(cast, tensors))


def computing(op: str, **tensors: Tensor | None) -> contextlib.AbstractContextManager:
    """Return a context without autocast in which ``op`` is computed from these arguments.

    If an argument has a tensor subclass that does not support the op, the error names the argument.
    """
    first = next(iter(tensors.values()))
    subclasses = [name for name, t in tensors.items() if t is not None and type(t) not in _PLAIN_TENSORS]
    if not subclasses or torch.compiler.is_compiling():
        return without_autocast(first)
    return _naming(op, subclasses[0], tensors[subclasses[0]], first)


@contextlib.contextmanager
def _naming(op: str, name: str, x: Tensor, first: Tensor) -> Iterator[None]:
    try:
        with without_autocast(first):
            yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a subclass can raise any exception
        remedy = f"{name}.to_local()" if is_dtensor(x) else "plain tensors"
        reason = str(error).split("\n")[0]
        raise TypeError(
            f"{op} does not support {name} of class {type(x).__name__}: pass {remedy} ({reason})"
        ) from error


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Return a context that disables autocast, so that state and statistics keep their precision."""
    return torch.autocast(x.device.type, enabled=False) if autocast_enabled(x.device) else contextlib.nullcontext()
