"""Small training runs, and what tests read of their files."""

import json

import torch
from torch import nn

from cxv.checkpoint import read_checkpoint
from cxv.training import TrainConfig, train
from cxv.training import engine as engine_module

TINY = {
    "model": "cpv-1/2",
    "embed_dim": 16,
    "data": "digits",
    "limit_train": 96,
    "limit_test": 40,
    "batch_size": 32,
    "lr": 3e-3,
    "epochs": 3,
    "sgd_epochs": 2,
    "threads": 1,
}
AUGMENTED = {"rand_augment": (2, 9), "post_train": True, "validation": 40, "epochs": 2, "sgd_epochs": 1}
TIMES = ("images_per_second", "seconds")


def run(output, **kwargs):
    lines = []
    result = train(TrainConfig(**{**TINY, "output": str(output), **kwargs}), log=lines.append)
    return result, "\n".join(lines)


def resume(output, **kwargs):
    lines = []
    result = train(TrainConfig(output=str(output), resume=True, **kwargs), log=lines.append)
    return result, "\n".join(lines)


def before_batch(monkeypatch, epoch, batch, act, split="train"):
    """Call ``act()`` before a batch (from 0) of the training or evaluation of an epoch (from 1)."""
    batches, epochs = engine_module.batches, [0]

    def acting(*args, **kwargs):
        training = "augment" in kwargs
        epochs[0] += training
        here = epochs[0] == epoch and training == (split == "train")
        for i, pair in enumerate(batches(*args, **kwargs)):
            if here and i == batch:
                act()
            yield pair

    monkeypatch.setattr(engine_module, "batches", acting)


def cut_power():
    raise RuntimeError("the power is cut")


def curve(output):
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def flat(state, name=""):
    """Nested dictionaries and sequences as one dictionary."""
    if not isinstance(state, (dict, list, tuple)):
        return {name: state}
    items = state.items() if isinstance(state, dict) else enumerate(state)
    return {k: v for key, value in items for k, v in flat(value, f"{name}.{key}").items()}


def assert_same_run(a, b):
    """The same curve, and the same bits in every state that a checkpoint has."""
    assert curve(a) == curve(b)
    for name in ("last.pt", "best.pt"):
        x, y = (flat({**read_checkpoint(path / name), "args": None, "history": None}) for path in (a, b))
        assert x.keys() == y.keys()
        for k in x:
            assert torch.equal(x[k], y[k]) if torch.is_tensor(x[k]) else x[k] == y[k], (name, k)


class Probe(nn.Module):
    """Records the dtype that autocast gives a linear layer."""

    def __init__(self, num_classes, in_chans, img_size, use_fused):
        super().__init__()
        self.head = nn.Linear(in_chans * img_size**2, num_classes)
        self.seen = set()

    def forward(self, x):
        y = self.head(x.flatten(1))
        self.seen.add((self.training, x.dtype, y.dtype))
        return y
