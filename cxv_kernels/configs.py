"""How the Triton kernels are launched: a table of tile sizes and warps, read from ``triton_configs.json``.

Its entries are chosen by what the compiler reports (no spills, shared memory, registers); they have not been measured
on a GPU yet. Nothing is tuned at run time.

The table: kernel (its function's name) → architecture ("default", "80", "90", …) → size "DxF" → bits of the dtype ("16"
or "32") → options; of each level but the first, "default" serves what has no entry. Options: num_warps, num_stages, the
kernel's BLOCK_ sizes (the dimensions of a head are padded to powers of two by the launcher), TOKENS, those that one
program folds one tile after another, and of query_backward_kernel SEPARATE: two launches of fewer registers for one.
"""

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import _triton

Table = dict[str, dict[str, dict[str, dict[str, dict[str, Any]]]]]

_override: Table | None = None


@functools.cache
def _packaged() -> Table:
    return json.loads(Path(__file__).with_name("triton_configs.json").read_text())


def architecture(device: torch.device) -> int:
    """10·major + minor of the device's compute capability, or of what is being compiled for; 0: not a GPU."""
    if _triton.recorded_arch:
        return _triton.recorded_arch
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _bucket(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def lookup(kernel: str, arch: int, dim: int, features: int, dtype: torch.dtype) -> dict[str, Any]:
    """A copy of the launch options of a kernel.

    Args:
        kernel: the function's name. arch: as :func:`architecture` has it: the table's nearest lower one serves.
        dim, features: of a head; each is rounded up to a power of two, 16 or more. dtype: the inputs'.

    Raises:
        KeyError: the table has no such kernel.
    """
    table = (_packaged() if _override is None else _override)[kernel]
    known = sorted(int(name) for name in table if name != "default" and int(name) <= arch)
    sizes = table[str(known[-1]) if known else "default"]
    bits = sizes.get(f"{_bucket(dim)}x{_bucket(features)}") or sizes["default"]
    return dict(bits.get(str(8 * dtype.itemsize)) or bits["default"])


@contextlib.contextmanager
def override(table: Table) -> Iterator[None]:
    """Launch by another table of the same form in the block; the kernels that it lacks by the packaged one."""
    global _override
    previous, _override = _override, _packaged() | table
    try:
        yield
    finally:
        _override = previous
