"""The numbers of a run for TensorBoard."""

import shutil
import sys

import pytest
from training_support import curve, run

from cxv.training import InputError, TrainConfig, train


def points(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder)).Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    texts = [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors("phase/text_summary")]
    return scalars, texts


def test_tensorboard_equals_metrics_jsonl(tmp_path):
    output = tmp_path / "a"
    _, log = run(output, epochs=2, tensorboard=True)
    assert "curves.png, tensorboard" in log
    # a killed run leaves points that its checkpoint does not know of; here the older ones are missing too
    shutil.rmtree(output / "tensorboard")
    train(TrainConfig(output=str(output), resume=True, sgd_epochs=3), log=str)
    rows = curve(output)
    scalars, texts = points(output / "tensorboard")
    for tag, key in (
        ("loss/train", "train_loss"),
        ("top1/test", "test_top1"),
        ("top1/best", "best_top1"),
        ("lr", "lr"),
    ):
        assert scalars[tag] == [(row["epoch"], pytest.approx(row[key])) for row in rows], tag
    assert len(rows) == len(scalars["images_per_second"]) == 5
    assert texts == [(1, "AdamW"), (3, "SGD")]
    train(TrainConfig(output=str(output), resume=True, tensorboard=False), log=str)


def test_without_tensorboard_the_flag_is_refused_before_an_epoch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(InputError, match=r"`tensorboard`: needs .*pip install 'cxv\[tensorboard\]'"):
        run(tmp_path / "a", tensorboard=True)
    assert curve(tmp_path / "a") == []
