"""Training: the DualOpT optimizer, the configuration of a run, the trainer, and evaluation."""

from ..data.loader import DATASETS, load_data
from ..errors import InputError
from ..models.registry import load_model
from .config import TrainConfig
from .dualopt import DualOpT
from .engine import evaluate, predict
from .seeds import train_seeds
from .trainer import TrainResult, train

__all__ = [
    "DATASETS",
    "DualOpT",
    "InputError",
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "load_data",
    "load_model",
    "predict",
    "train",
    "train_seeds",
]
