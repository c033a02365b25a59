"""How the Triton kernels are launched: a table of tile sizes and warps, read from ``triton_configs.json``.

Its entries are chosen by what the compiler reports (spills, shared memory, registers); they have not been measured
on a GPU yet. Nothing is tuned at run time.

The table: kernel (its function's name, so forward or backward) → architecture ("default", "80", "90", …), which has
what differs from the nearest lower one and serves those after it, "90" Hopper alone → size, "D" without and "DxM" with
a projection of up to M random features → bits of the dtype ("16" or "32") → options. Of sizes and bits "default" serves
what has no entry. Options: num_warps, num_stages, the kernel's BLOCK_ sizes (the dimensions of a head are padded to
powers of two by the launcher), TOKENS, those that one program folds one tile after another, and of
query_backward_kernel SEPARATE: query_state_kernel does a part of its work, two launches of fewer registers for one.
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


def _serves(level: int, arch: int) -> bool:
    return level <= arch and (level // 10 != 9 or arch // 10 == 9)  # Hopper's tiles are WGMMA's, which no other has


def sizes_of(table: Table, kernel: str, arch: int) -> dict[str, dict[str, dict[str, Any]]]:
    """What the table has for a kernel and an architecture, whichever of those that serve it has it."""
    levels = table[kernel]
    known = sorted((name for name in levels if name != "default" and _serves(int(name), arch)), key=int)
    return functools.reduce(lambda sizes, name: sizes | levels[name], known, levels.get("default", {}))


def size_of(sizes: dict[str, Any], dim: int, features: int | None) -> str:
    """Which of these sizes serves a head; the arguments are :func:`lookup`'s."""
    width = str(max(16, 1 << (dim - 1).bit_length()))
    if features is None:
        return width if width in sizes else "default"
    pairs = (name.partition("x") for name in sizes)
    enough = [int(most) for channels, _, most in pairs if channels == width and most and int(most) >= features]
    return f"{width}x{min(enough)}" if enough else "default"


def lookup(kernel: str, arch: int, dim: int, features: int | None, dtype: torch.dtype) -> dict[str, Any]:
    """A copy of the launch options of a kernel.

    Args:
        kernel: the function's name. arch: as :func:`architecture` has it: the table's nearest lower one serves.
        dim: the channels of a head, of the values if those are more; rounded up to a power of two, 16 or more.
        features: random features, None without a projection: the table's nearest higher number serves.
        dtype: the inputs'.

    Raises:
        KeyError: the table has no such kernel.
    """
    sizes = sizes_of(_packaged() if _override is None else _override, kernel, arch)
    bits = sizes[size_of(sizes, dim, features)]
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
