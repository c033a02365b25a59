"""Augmentation of whole batches of images, on any device, and growing image sizes.

An augmentation has ``draws(num_images, epoch)``, random numbers (num_images, ``columns``) in int64 that depend only on
its seed and the epoch. Called with images (B, C, H, W), uint8, and their rows of the draws, it augments the images.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from cxv_kernels.validation import python_numbers, to_number

NUM_BINS = 31
"""The number of magnitudes of RandAugment, 0 to 30."""


def seed_of(*parts: str | int) -> int:
    """Return a seed that depends on all of ``parts``."""
    return zlib.crc32(" ".join(map(str, parts)).encode())


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """In the block, torch's random numbers on the CPU depend on ``seed`` alone. The state from before comes back."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@dataclass(frozen=True)
class FlipCrop:
    """Flip half of the images horizontally, pad them with ``padding`` black pixels, and crop them to their size.

    The crop is uniform over the (2·padding + 1)² positions. Every image has its own draws, unlike in torchvision's
    RandomHorizontalFlip and RandomCrop, which draw once for a batch.
    """

    hflip: bool
    padding: int = 0
    seed: int = 0
    columns = 3

    def draws(self, num_images: int, epoch: int) -> Tensor:
        """Return draws (num_images, 3), int64: the flip, and the top and left of the crop in the padded image."""
        generator = torch.Generator().manual_seed(seed_of("FlipCrop", self.seed, epoch))
        flip = torch.randint(1 + self.hflip, (num_images, 1), generator=generator)
        return torch.cat((flip, torch.randint(2 * self.padding + 1, (num_images, 2), generator=generator)), dim=1)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        flip, top, left = draws.to(images.device)[:, :, None, None].unbind(1)  # (B, 1, 1) each
        images = torch.where(flip[:, None].bool(), images.flip(-1), images)
        if not self.padding:
            return images
        image, y, x = (torch.arange(n, device=images.device) for n in (len(images), *images.shape[-2:]))
        padded = F.pad(images, (self.padding,) * 4)
        return padded[image[:, None, None], :, top + y[:, None], left + x].permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Chain:
    """Augmentations one after the other."""

    steps: tuple["Augmentation", ...]

    def draws(self, num_images: int, epoch: int) -> Tensor:
        return torch.cat([step.draws(num_images, epoch) for step in self.steps], dim=1)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        for step, step_draws in zip(self.steps, draws.split([step.columns for step in self.steps], dim=1), strict=True):
            images = step(images, step_draws)
        return images


@dataclass(frozen=True)
class PerImage:
    """A transform of ``torchvision.transforms.v2`` that draws for each image (its seed), not once for a batch."""

    transform: Callable[[Tensor], Tensor]
    seed: int = 0
    columns = 1

    def draws(self, num_images: int, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of("PerImage", self.seed, epoch))
        return torch.randint(2**48, (num_images, 1), generator=generator)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        out = []
        for image, seed in zip(images, draws.flatten().tolist(), strict=True):
            with seeded(seed):
                out.append(self.transform(image))
        return torch.stack(out)


@dataclass(frozen=True)
class BatchMix:
    """MixUp or CutMix of ``torchvision.transforms.v2``, which mix each image of a batch with the one before it."""

    transform: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    seed: int = 0

    def __call__(self, images: Tensor, labels: Tensor, *batch: int) -> tuple[Tensor, Tensor]:
        """Mix images (B, C, H, W) and labels (B,), int64, by draws that depend on the seed and the numbers of a batch.

        Returns:
            The images and the probabilities (B, classes) of the labels.
        """
        with seeded(seed_of("BatchMix", self.seed, *batch)):
            return self.transform(images, labels)


@dataclass(frozen=True)
class RandAugment:
    """RandAugment (Cubuk et al. 2020) on uint8 images, as in torchvision with nearest-neighbor interpolation.

    Each image gets ``num_ops`` of 14 operations, drawn with replacement, with one ``magnitude`` (0 to 30). The draws
    depend only on ``seed``, the epoch and the index of the image in the set, and not on the batches, the device or
    whether the run was resumed. An operation is applied at once to all images of a batch that drew it.
    """

    num_ops: int
    magnitude: int
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_ops", "magnitude", "seed"):
            object.__setattr__(self, name, to_number(getattr(self, name)))

    @property
    def columns(self) -> int:
        return self.num_ops

    @python_numbers
    def draws(self, num_images: int, epoch: int) -> Tensor:
        """Return draws (num_images, num_ops), int64: twice the operation's number, plus 1 for a negative magnitude."""
        generator = torch.Generator().manual_seed(seed_of("RandAugment", self.seed, epoch))
        shape = (num_images, self.num_ops)
        op = torch.randint(len(_OPS), shape, generator=generator)
        negative = torch.randint(2, shape, generator=generator)
        return 2 * op + negative * torch.tensor([signed for _, signed, _ in _OPS])[op]

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Augment ``images`` (B, C, H, W), uint8, C of 1 or 3, by their rows of :meth:`draws` (B, num_ops)."""
        from torchvision.transforms import functional

        out = images.clone()
        for column in draws.unbind(1):
            for draw in column.unique().tolist():
                top, _, apply = _OPS[draw // 2]
                bins = torch.linspace(0, top(*images.shape[-2:]), NUM_BINS)
                magnitude = bins[self.magnitude].item()  # its rounding too
                rows = (column == draw).nonzero().flatten().to(images.device)
                out[rows] = apply(functional, out[rows], -magnitude if draw % 2 else magnitude)
        return out


Augmentation = FlipCrop | Chain | PerImage | RandAugment


def _affine(f: ModuleType, x: Tensor, translate=(0, 0), shear=(0.0, 0.0), center=None) -> Tensor:
    return f.affine(x, angle=0.0, translate=list(translate), scale=1.0, shear=list(shear), center=center)


def _shear(magnitude: float) -> float:
    return math.degrees(math.atan(magnitude))


# the largest magnitude for images (H, W), whether it is signed, the operation; in torchvision's order
_OPS: tuple[tuple[Callable[[int, int], float], bool, Callable[[ModuleType, Tensor, float], Tensor]], ...] = (
    (lambda h, w: 0.0, False, lambda f, x, m: x),  # Identity
    (lambda h, w: 0.3, True, lambda f, x, m: _affine(f, x, shear=(_shear(m), 0.0), center=[0, 0])),  # ShearX
    (lambda h, w: 0.3, True, lambda f, x, m: _affine(f, x, shear=(0.0, _shear(m)), center=[0, 0])),  # ShearY
    (lambda h, w: 150.0 / 331.0 * w, True, lambda f, x, m: _affine(f, x, translate=(int(m), 0))),  # TranslateX
    (lambda h, w: 150.0 / 331.0 * h, True, lambda f, x, m: _affine(f, x, translate=(0, int(m)))),  # TranslateY
    (lambda h, w: 30.0, True, lambda f, x, m: f.rotate(x, m)),  # Rotate
    (lambda h, w: 0.9, True, lambda f, x, m: f.adjust_brightness(x, 1.0 + m)),  # Brightness
    (lambda h, w: 0.9, True, lambda f, x, m: f.adjust_saturation(x, 1.0 + m)),  # Color
    (lambda h, w: 0.9, True, lambda f, x, m: f.adjust_contrast(x, 1.0 + m)),  # Contrast
    (lambda h, w: 0.9, True, lambda f, x, m: f.adjust_sharpness(x, 1.0 + m)),  # Sharpness
    (lambda h, w: 4.0, False, lambda f, x, m: f.posterize(x, 8 - round(m))),  # Posterize
    (lambda h, w: 255.0, False, lambda f, x, m: f.solarize(x, 255.0 - m)),  # Solarize
    (lambda h, w: 0.0, False, lambda f, x, m: f.autocontrast(x)),  # AutoContrast
    (lambda h, w: 0.0, False, lambda f, x, m: import_module("torchvision.transforms.v2.functional").equalize(x)),
)


Stages = tuple[tuple[int, int], ...]
"""(the shorter side of the images in pixels, epochs), in order."""


def default_stages(side: int, epochs: int) -> Stages:
    """Half of the epochs at half the side, a fifth at three quarters, the rest at the full size."""
    first, second = epochs // 2, epochs // 5
    stages = ((side / 2, first), (0.75 * side, second), (side, epochs - first - second))
    return tuple((max(1, round(size)), count) for size, count in stages if count)


def image_size_of(stages: Stages | None, epoch: int) -> int | None:
    """The shorter side of the images in an epoch (from 1); None for that of the data."""
    for size, epochs in stages or ():
        epoch -= epochs
        if epoch <= 0:
            return size
    return None


def scaled_size(size: Sequence[int], side: int) -> tuple[int, int]:
    """Return (H, W) with the aspect ratio of ``size`` (H, W) and the shorter side ``side``."""
    height, width = (max(1, round(n * side / min(size))) for n in size)
    return height, width


def resize_batch(images: Tensor, side: int) -> Tensor:
    """Resize images (B, C, H, W), float, to the shorter side ``side``, bilinear and antialiased."""
    size = scaled_size(images.shape[-2:], side)
    return images if images.shape[-2:] == size else F.interpolate(images, size, mode="bilinear", antialias=True)
