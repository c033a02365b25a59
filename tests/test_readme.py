"""The README's Python runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), re.DOTALL)


def test_ops_and_models_run():
    names = {}
    for block in BLOCKS[:2]:
        exec(block, names)
    assert names["out"].shape == names["q"].shape
    assert names["y"].shape == (8, 128, 32, 32)
    assert names["model"].embed_dim == 64


def test_the_training_loop_runs():
    import cxv

    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 2
    scores = iter([50.0] * 1 + [0.0] * 60)
    model = cxv.CLTV(embed_dim=16, num_heads=2, depth=1, num_classes=2)
    names = {"cxv": cxv, "torch": torch, "model": model, "loader": [(images, labels)], "top1": lambda _: next(scores)}
    exec(BLOCKS[2], names)
    assert names["opt"].finished
    assert names["opt"].epoch == 41  # one best, 20 stale with AdamW, 20 stale with SGD
    with pytest.raises(RuntimeError):
        names["opt"].end_epoch(1.0)
