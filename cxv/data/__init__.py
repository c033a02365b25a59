"""Image datasets: where they come from, the cache of decoded images, batches, and augmentation."""

from .augment import FlipCrop, RandAugment
from .decode import Preprocessing, decode_image, normalize
from .loader import DATASETS, Data, ImageSet, batches, load_data

__all__ = [
    "DATASETS",
    "Data",
    "FlipCrop",
    "ImageSet",
    "Preprocessing",
    "RandAugment",
    "batches",
    "decode_image",
    "load_data",
    "normalize",
]
