"""Checks of the models' arguments."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor, nn

from cxv_kernels.validation import to_numbers


def is_whole(value: Any) -> bool:
    """Return True for an integer that is not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_at_least(least: int, **values: Any) -> None:
    """Raise ``ValueError`` unless each of ``values`` is an integer of at least ``least``."""
    for name, value in values.items():
        if not is_whole(value) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_odd(**values: Any) -> None:
    """Raise ``ValueError`` unless each of ``values`` is an odd integer of at least 1."""
    check_at_least(1, **values)
    for name, value in values.items():
        if value % 2 == 0:
            raise ValueError(f"{name} must be odd, got {value}")


def check_rates(**rates: Any) -> None:
    """Raise ``ValueError`` unless each of ``rates`` is a number in [0, 1)."""
    for name, rate in rates.items():
        if not isinstance(rate, Real) or isinstance(rate, bool) or not 0 <= rate < 1:
            raise ValueError(f"{name} must be in [0, 1), got {rate!r}")


def drop_path_rates(drop_path_rate: float, depth: int) -> list[float]:
    """Return the rate of each layer. It rises linearly from 0 to ``drop_path_rate`` in the last layer, as in timm."""
    return [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]


def check_images(x: Tensor, in_chans: int) -> None:
    """Raise ``ValueError`` unless ``x`` is (B, in_chans, H, W)."""
    if x.dim() != 4 or x.shape[1] != in_chans:
        raise ValueError(f"input must be (B, {in_chans}, H, W), got shape {tuple(x.shape)}")


def hidden_width(dim: int, mlp_ratio: float) -> int:
    """Return the number of hidden channels of an MLP with ``dim`` input channels.

    Raises:
        ValueError: If ``mlp_ratio`` is not a number, or so small that no channel is left.
    """
    if not isinstance(mlp_ratio, Real) or isinstance(mlp_ratio, bool) or not 1 <= dim * mlp_ratio < math.inf:
        raise ValueError(f"mlp_ratio must be a number, at least 1/{dim} for {dim} channels, got {mlp_ratio!r}")
    return int(dim * mlp_ratio)


def image_size(img_size: int | Sequence[int]) -> tuple[int, int]:
    """Return (H, W) for an ``img_size``, which is the side of a square or (H, W).

    Raises:
        ValueError: If it is neither.
    """
    img_size = to_numbers(img_size)
    size = (img_size, img_size) if is_whole(img_size) else img_size
    if not isinstance(size, Sequence) or len(size) != 2 or not all(is_whole(s) and s >= 1 for s in size):
        raise ValueError(f"img_size must be an integer of at least 1, or two (H, W), got {img_size!r}")
    return int(size[0]), int(size[1])


def classifier(dim: int, num_classes: int) -> nn.Module:
    """Return the linear map to ``num_classes`` logits, or the identity for 0 classes."""
    return nn.Linear(dim, num_classes) if num_classes else nn.Identity()
