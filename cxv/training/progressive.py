"""Progressive resolution: small images in the first epochs, which cost less, and whole ones in the last."""

import torch.nn.functional as F
from torch import Tensor

Stages = tuple[tuple[int, int], ...]
"""(side in pixels, epochs), in order."""

SIDES = (0.5, 0.75, 1.0)
"""The sides of a recipe's stages, over that of the images."""
SHARES = (0.5, 0.2)
"""The epochs of a recipe's first stages, over all; the last stage has the rest."""


def default_stages(img_size: int, epochs: int) -> Stages:
    """Half of the epochs at half the side, a fifth at three quarters, the rest at the full size."""
    first, second = (int(share * epochs) for share in SHARES)
    counts = (first, second, epochs - first - second)
    sizes = (max(1, round(side * img_size)) for side in SIDES)
    return tuple((size, count) for size, count in zip(sizes, counts, strict=True) if count)


def image_size_of(stages: Stages | None, epoch: int) -> int | None:
    """The side of the images in an epoch (from 1); None for that of the data."""
    for size, epochs in stages or ():
        epoch -= epochs
        if epoch <= 0:
            return size
    return None


def resize_batch(images: Tensor, size: int) -> Tensor:
    """Images (B, C, S, S), float → (B, C, size, size), bilinear and antialiased."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
