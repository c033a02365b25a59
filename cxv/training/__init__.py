"""Training: the DualOpT optimizer, datasets in memory, checkpoints, and the loop that ties them together."""

from ..errors import InputError
from ..models.registry import load_model
from .config import TrainConfig
from .data import DATASETS, load_data
from .dualopt import DualOpT
from .loop import evaluate, train
from .seeds import train_seeds

__all__ = [
    "DATASETS",
    "DualOpT",
    "InputError",
    "TrainConfig",
    "evaluate",
    "load_data",
    "load_model",
    "train",
    "train_seeds",
]
