"""Draw docs/_static/confusion.png, the confusion matrix of a CPV-2/4 after ten epochs on scikit-learn's digits.

python docs/confusion_picture.py
"""

import tempfile
from contextlib import nullcontext
from pathlib import Path

import torch

from cxv.cli.report import Report
from cxv.data import load_data
from cxv.training import TrainConfig, load_model, train
from cxv.training.engine import predict
from cxv.training.logging import new_figure


def draw(path: Path) -> None:
    """Train the model, evaluate it, and write the picture to path."""
    with tempfile.TemporaryDirectory() as folder:
        train(TrainConfig(data="digits", epochs=8, sgd_epochs=2, output=folder))
        model, checkpoint = load_model(folder)
    images = load_data("digits").test
    logits = predict(model, images, 128, torch.device("cpu"), nullcontext)
    report = Report("", checkpoint["classes"], images, logits, files=[])
    figure = new_figure(6.4, 5.2)
    report._draw_confusion(figure, figure.subplots())
    figure.savefig(path)


if __name__ == "__main__":
    draw(Path(__file__).parent / "_static" / "confusion.png")
