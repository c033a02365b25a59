"""Image datasets: where they come from, the cache of decoded images, batches, and augmentation."""

from .augment import FlipCrop, RandAugment
from .datasets import decode_image
from .loader import DATASETS, Data, ImageSet, batches, load_data, normalize

__all__ = [
    "DATASETS",
    "Data",
    "FlipCrop",
    "ImageSet",
    "RandAugment",
    "batches",
    "decode_image",
    "load_data",
    "normalize",
]
