"""The tuner selects what is correct and fast, on kernels that Triton's interpreter runs."""

import json
import sys
from pathlib import Path

import pytest
import torch

from cxv_kernels import _triton
from cxv_kernels.ops.linear_attention.triton import configs

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))


@pytest.fixture(autouse=True)
def _as_on_a_hopper(monkeypatch):
    monkeypatch.setattr(_triton, "capability", lambda _: 90)


def entry(tune, **changes):
    packaged = configs.lookup("key_pass", 90, 16, None, torch.float32)
    made = tune.Entry("key_pass", 90, 16, None, "float32", packaged, ["linear_attention elu"])
    made.candidates = [packaged | change for change in ({}, changes)]
    made.notes, made.seconds = ["", ""], [None, None]
    return made


def test_selection_of_correct_candidates(monkeypatch):
    import tune

    monkeypatch.setattr(tune, "SHAPE", (1, 1, 64))
    arguments = (configs.packaged(), torch.device("cpu"), 0.0)
    mine = entry(tune, BLOCK_N=32)
    tune.time_candidates(mine, *arguments)
    assert mine.notes == ["", ""]
    assert all(seconds > 0 for seconds in mine.seconds)
    assert mine.chosen in mine.candidates
    monkeypatch.setattr(tune, "relative_error", lambda *_: 1.0)
    mine = entry(tune, BLOCK_N=32)
    tune.time_candidates(mine, *arguments)
    assert mine.notes == ["wrong: 1.0e+00"] * 2
    assert mine.seconds == [None, None]
    assert mine.chosen == mine.packaged


def test_selection_without_launch_errors(monkeypatch):
    import tune

    monkeypatch.setattr(tune, "SHAPE", (1, 1, 64))
    mine = entry(tune, BLOCK_N="many")
    tune.time_candidates(mine, configs.packaged(), torch.device("cpu"), 0.0)
    assert mine.notes[0] == ""
    assert mine.notes[1]
    assert mine.chosen == mine.packaged


def test_lookup_of_a_new_entry():
    import tune

    mine = entry(tune, num_warps=2)
    table = configs.packaged()
    with configs.override(mine.put(table, mine.candidates[1])):
        assert configs.lookup("key_pass", 90, 16, None, torch.float32) == mine.candidates[1]
        others = ((80, 16, torch.float32), (90, 64, torch.float32), (90, 16, torch.float16), (100, 16, torch.float32))
        for arch, dim, dtype in others:
            with configs.override({}):
                packaged = configs.lookup("key_pass", arch, dim, None, dtype)
            assert configs.lookup("key_pass", arch, dim, None, dtype) == packaged
    assert table == json.loads(configs.PATH.read_text())
    assert tune.table_text(table) == configs.PATH.read_text()
