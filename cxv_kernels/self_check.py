"""Validate a GPU kernel on its first use and store the verdict.

The first time that ``"auto"`` would use a GPU kernel for an op and dtype, the cases of :mod:`cxv_kernels.testing` run
with it, forward and backward, against float64. A kernel that fails is not used. The verdicts are stored in memory and
in the file ``self_check.json``, together with the versions of everything that a kernel depends on. The file is in the
folder ``$CXV_CACHE``, by default ``cxv`` in ``$XDG_CACHE_HOME`` or ``~/.cache``; ``CXV_CACHE=none`` disables it.
``CXV_SELF_CHECK=0`` disables the self-check.
"""

import functools
import importlib.metadata
import json
import logging
import os
import re
import sys
import tempfile
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from . import dispatch, testing
from ._version import __version__

_log = logging.getLogger("cxv_kernels")
_verdicts: dict[tuple[int, str, str, torch.dtype], str | None] = {}  # (index of the GPU, op, backend, dtype) → reason
_cached: dict[str, dict[str, str | None]] | None = None  # content of the file after it has been read
_shown: set[str] = set()
_lock = threading.Lock()  # held while a check runs
_cache_lock = threading.Lock()


def reason_against(op: str, backend: str, device: torch.device, dtype: torch.dtype, may_run: bool = True) -> str | None:
    """Return None if "auto" may use the GPU kernels of ``backend`` for this op and dtype, else the reason.

    Args:
        may_run: Run the check if there is no verdict yet. If False, a kernel without a verdict may be used.

    Raises:
        RuntimeError: If the check has made the GPU unusable for this process.
    """
    key = (device.index or 0, op, backend, dtype)
    if key in _verdicts:
        return _verdicts[key]
    if os.environ.get("CXV_SELF_CHECK") == "0" or not (may_run or torch.cuda.is_available()):
        return None
    if not torch.cuda.is_available():
        return "cannot run its self-check, because PyTorch finds no GPU"
    cached, reason = _read_verdict(op, backend, device, dtype)
    if cached:
        return _set_verdict(key, reason)
    if not may_run:
        return None
    # In these two cases a check would break the capture of the graph, or block the autograd thread that it needs.
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            return "cannot run its self-check during CUDA graph capture: call the op once before the capture"
    if torch._C._current_graph_task_id() != -1:
        return "cannot run its self-check in a backward pass: call the op once before it"
    with _lock:
        if key in _verdicts:  # another thread has run the check
            return _verdicts[key]
        # A new thread does not inherit the caller's modes: autograd, autocast, streams, transforms, fake tensors.
        with ThreadPoolExecutor(1) as pool:
            reason = pool.submit(_check, op, backend, device, dtype).result()
        return _set_verdict(key, reason)


# torch.compile calls the function while it traces and treats the result as a constant. The decorator
# torch.compiler.assume_constant_result sets the same attribute but would import torch._dynamo.
reason_against._dynamo_marked_constant = True
dispatch._self_check = reason_against


def _set_verdict(key: tuple[int, str, str, torch.dtype], reason: str | None) -> str | None:
    _verdicts[key] = reason
    if reason is not None:
        index, op, backend, _ = key
        _warn_once(
            f"{op}: {backend} is not used on {torch.cuda.get_device_name(index)}, because it {reason}. "
            "Run `python -m cxv_kernels` for details."
        )
    return reason


def _warn_once(message: str) -> None:
    if message not in _shown:
        _shown.add(message)
        warnings.warn(f"{message} (This warning is shown once.)", stacklevel=5)


def _cases(op: str) -> list[testing.Case]:
    """Return the cases of a check: odd sizes, heads of 64 channels, and many tokens.

    The relu kernel of the Performer is checked with few tokens only. With many tokens some feature is close to 0, and
    rounding can flip its sign, which changes the gradient even if the kernel is correct.
    """
    short = [
        *testing.cases(batch=1, heads=2, tokens=70),
        *testing.cases(batch=1, heads=1, tokens=130, dim=64, ragged=False),
    ]
    long = testing.cases(batch=1, heads=2, tokens=1100, dim=64, ragged=False)
    long = [case for case in long if (case.op, case.label) != ("performer_attention", "relu")]
    return [case for case in [*short, *long] if case.op == op]


def _check(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Run the cases of an op; return None if all pass, else the reason not to use the kernels."""
    name, start = f"{op}, {dispatch.dtype_name(dtype)}", time.monotonic()
    _tell(f"validating {name}, on {torch.cuda.get_device_name(device)}: first use only")
    for case in _cases(op):
        reason = f"{dispatch.FAILED} in {dispatch.dtype_name(dtype)} ({case.label}: "
        try:
            with torch.cuda.device(device):
                result = testing.run(case, backend, device, dtype)
        except Exception as error:  # Triton's compiler and launcher raise classes of their own
            try:
                torch.cuda.synchronize(device)
            except RuntimeError as unusable:
                _write_verdict(op, backend, device, dtype, f"{reason}{unusable})")
                raise RuntimeError(
                    f"{op}: the self-check of {backend} in {dispatch.dtype_name(dtype)} has made {device} unusable for "
                    f"this process ({unusable}). Restart the process; if the error occurs again, use "
                    "cxv_kernels.use_backend('reference')"
                ) from error
            return f"{reason}{type(error).__name__}: {error})"  # not stored: the user can install a missing compiler
        if not result.passed:
            reason = f"{reason}error {result.error:.1e}, tolerance {result.tolerance:.1e})"
            _write_verdict(op, backend, device, dtype, reason)
            return reason
    _log.info("%s: %s passed in %.1f s", name, backend, time.monotonic() - start)
    _write_verdict(op, backend, device, dtype, None)
    return None


def _tell(message: str) -> None:
    """Log a line, or print it to stderr if the logger does not show it: Triton may compile for half a minute."""
    if _log.isEnabledFor(logging.INFO):
        _log.info(message)
    else:
        print(message, file=sys.stderr, flush=True)


# --- the file ---------------------------------------------------------------------------------------------------------


def cache_file() -> Path | None:
    """Return the path of the file with the verdicts, or None if the file is disabled."""
    folder = os.environ.get("CXV_CACHE")
    if folder == "none":
        return None
    try:
        default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cxv"
    except RuntimeError:  # the user has no home directory
        return None
    return (Path(folder) if folder else default) / "self_check.json"


def _driver() -> str:
    """Return the version of the NVIDIA driver, or of the CUDA version that it supports."""
    try:
        if found := re.search(r"Module\s+([\d.]+)", Path("/proc/driver/nvidia/version").read_text()):
            return found[1]
    except OSError:
        pass
    return f"for CUDA {getattr(torch._C, '_cuda_getDriverVersion', int)()}"


@functools.cache
def _environment(device: torch.device) -> str:
    """Describe everything that a verdict depends on: GPU, driver, versions, and the files of this package."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    package = Path(__file__).parent
    files = sorted(path for path in package.rglob("*") if path.suffix in (".py", ".json", ".so", ".pyd"))
    stats = [(str(path.relative_to(package)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return (
        f"{torch.cuda.get_device_name(device)}, driver {_driver()}, torch {torch.__version__}, triton {triton}, "
        f"cxv {__version__}, files {zlib.crc32(repr(stats).encode()):08x}"
    )


def _entry(op: str, backend: str, dtype: torch.dtype) -> str:
    return f"{op}, {dispatch.dtype_name(dtype)}, {backend}"


def _read_verdict(op: str, backend: str, device: torch.device, dtype: torch.dtype) -> tuple[bool, str | None]:
    """Return whether the file contains a verdict, and the verdict."""
    global _cached
    with _cache_lock:
        if _cached is None:
            _cached = _read_file()
        verdicts, entry = _cached.get(_environment(device), {}), _entry(op, backend, dtype)
        return entry in verdicts, verdicts.get(entry)


def _read_file() -> dict[str, dict[str, str | None]]:
    path = cache_file()
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.exists() else {}
        values = [verdict for verdicts in content.values() for verdict in verdicts.values()]
        if not all(verdict is None or isinstance(verdict, str) for verdict in values):
            raise ValueError("some entries are not verdicts")
    except (OSError, ValueError, AttributeError) as error:
        _warn_once(f"cxv_kernels: ignoring the self-check verdicts in {path}, which cannot be read ({error}).")
        return {}
    return content


def _write_verdict(op: str, backend: str, device: torch.device, dtype: torch.dtype, reason: str | None) -> None:
    """Add a verdict to the file. The file is replaced atomically, so several processes can do this at once."""
    global _cached
    path = cache_file()
    if path is None:
        return
    with _cache_lock:
        _cached = content = _read_file()  # other processes may have added to it
        content.setdefault(_environment(device), {})[_entry(op, backend, dtype)] = reason
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
                json.dump(content, file, indent=1)
            os.replace(file.name, path)
        except OSError as error:
            _warn_once(
                f"cxv_kernels: cannot write the self-check verdicts to {path} ({error.strerror}), so each process "
                "checks its GPU kernels again. Set CXV_CACHE to a writable folder, or to 'none'."
            )
