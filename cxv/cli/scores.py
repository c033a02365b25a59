"""Scores of a classifier on labeled images."""

import torch
import torch.nn.functional as F
from torch import Tensor


class Scores:
    """Scores of N images, in per cent except ``loss``.

    ``top1`` and ``top5`` are the shares of images whose class is the first, or among the first five, of the predicted
    classes. ``f1`` is the mean F1 score of the classes that are in the labels or predictions (macro-F1), and
    ``balanced`` the mean accuracy of the classes in the labels (balanced accuracy); scikit-learn has the same
    definitions. ``loss`` is the mean cross-entropy in nats.

    Args:
        logits: Shape (N, classes), float32.
        labels: Shape (N,), int64.
    """

    def __init__(self, logits: Tensor, labels: Tensor):
        n = logits.shape[1]
        self.predicted = logits.argmax(1)
        self.probabilities = logits.softmax(1)
        self.confusion = torch.bincount(labels * n + self.predicted, minlength=n * n).view(n, n)
        """(true, predicted) counts."""
        hits, true, found = self.confusion.diag().double(), self.confusion.sum(1), self.confusion.sum(0)
        self.accuracy = 100 * hits / true
        """Per cent of the images of each class that are predicted as it; nan for a class without images."""
        self.precision = 100 * hits / found
        """Per cent of the images predicted as each class that belong to it; nan if there are none."""
        top5 = (logits.topk(min(5, n)).indices == labels[:, None]).any(1)
        self.top1, self.top5 = (100 * right.double().mean().item() for right in (self.predicted == labels, top5))
        self.f1 = (200 * hits / (true + found)).nanmean().item()
        self.balanced = self.accuracy.nanmean().item()
        self.loss = F.cross_entropy(logits, labels).item()

    def __str__(self) -> str:
        return (
            f"top-1 {self.top1:.2f} %, top-5 {self.top5:.2f} %, macro-F1 {self.f1:.2f} %, "
            f"balanced accuracy {self.balanced:.2f} %, loss {self.loss:.4f}"
        )
