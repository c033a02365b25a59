"""How the Triton kernels are launched: tile sizes and warps, read from ``configs.json``.

The entries are chosen by what the compiler reports (spills, shared memory, registers); they have not been measured on a
GPU yet. Nothing is tuned at run time. ``tools/tune.py`` writes the file.

The table has the options of each kernel, by its function's name, under keys such as ``"32x128 16-bit sm_90"``. The size
is the channels of a head ("32"), with a projection also the largest number of random features ("32x128"), or
"default". Without "-bit" an entry holds for all dtypes, without "sm_" for all architectures. An "sm_" entry holds for
that architecture and later ones, "sm_9x" for Hopper alone; the highest "sm_" wins, then "-bit". Options: num_warps,
num_stages, the kernel's BLOCK_ sizes (the launcher pads the dimensions of a head to powers of two), TOKENS, the least
tokens of a split, and for query_backward SEPARATE: query_backward_sums does a part of its work, in two launches with
fewer registers instead of one.
"""

import contextlib
import functools
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch

Options = dict[str, Any]
Table = dict[str, dict[str, Options]]

PATH = Path(__file__).with_name("configs.json")
_override: Table = {}


@functools.cache
def packaged() -> Table:
    """The table of the package."""
    return json.loads(PATH.read_text(encoding="utf-8"))


@functools.cache
def parse(key: str) -> tuple[str, int, int]:
    """(size, bits, architecture) of a key; 0 where it names none."""
    size, *words = key.split()
    bits = next((int(word.removesuffix("-bit")) for word in words if word.endswith("-bit")), 0)
    return size, bits, next((int(word.removeprefix("sm_")) for word in words if word.startswith("sm_")), 0)


def size_of(sizes: Collection[str], dim: int, features: int | None) -> str:
    """The one of these sizes that holds for a head; the arguments are :func:`lookup`'s."""
    width = str(max(16, 1 << (dim - 1).bit_length()))
    if features is None:
        return width if width in sizes else "default"
    pairs = (name.partition("x") for name in sizes)
    enough = [int(most) for channels, _, most in pairs if channels == width and most and int(most) >= features]
    return f"{width}x{min(enough)}" if enough else "default"


def find(kernel: str, arch: int, dim: int, features: int | None, dtype: torch.dtype) -> str:
    """The key of the entry that :func:`lookup` returns."""
    keys: dict[str, tuple[int, int, str]] = {}  # by size, the (architecture, bits, key) that wins
    for key in (packaged() | _override)[kernel]:
        size, bits, least = parse(key)
        later = least <= arch and (least // 10 != 9 or arch // 10 == 9)  # Hopper's tiles are for WGMMA
        if later and bits in (0, 8 * dtype.itemsize):
            keys[size] = max(keys.get(size, (0, 0, "")), (least, bits, key))
    return keys[size_of(keys, dim, features)][2]


@functools.cache
def _lookup(kernel: str, *arguments: Any) -> Options:
    return (packaged() | _override)[kernel][find(kernel, *arguments)]


def lookup(kernel: str, arch: int, dim: int, features: int | None, dtype: torch.dtype) -> Options:
    """A copy of the launch options of a kernel.

    Args:
        kernel: the function's name.
        arch: 10·major + minor of the compute capability; 0: not a GPU.
        dim: the channels of a head, of the values if those are more; rounded up to a power of two, 16 or more.
        features: random features, None without a projection; rounded up to the next number in the table.
        dtype: the inputs'.

    Raises:
        KeyError: the table has no such kernel.
    """
    return dict(_lookup(kernel, arch, dim, features, dtype))


@contextlib.contextmanager
def override(table: Table) -> Iterator[None]:
    """In the block, replace the entries of the kernels in ``table``."""
    global _override
    previous, _override = _override, table
    _lookup.cache_clear()
    try:
        yield
    finally:
        _override = previous
        _lookup.cache_clear()
