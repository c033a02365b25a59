"""Tables 2 to 4 as training runs: what is planned, resumed and tabulated."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import ablations
import training_runs
from training_runs import Run

from cxv.training import InputError

TINY = ["--data", "digits", "--embed-dim", "16", "--limit-train", "40", "--limit-test", "40", "--batch-size", "20"]
TINY += ["--threads", "1", "--device", "cpu", "--epochs", "2"]


def call(tmp_path, *arguments):
    return ablations.main([*TINY, "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "a.jsonl"), *arguments])


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]


def test_the_plan_is_seed_after_seed():
    runs = ablations.planned(("2", "3", "4"), None, (0, 1))
    assert len(runs) == 2 * (3 + 9 + 6)
    assert {run.seed for run in runs[: len(runs) // 2]} == {0}
    assert [run for run in runs if run.model_args][:3] == [
        Run("cnv-5/4", model_args=(("stem_convs", n),)) for n in (1, 2, 3)
    ]
    assert sum(run.augmented for run in runs) == 6
    with pytest.raises(InputError, match="--models: Table 2 is about cnv, got cpv-2/4"):
        ablations.planned(("2",), ("cpv-2/4",), (0,))


@pytest.mark.parametrize("epochs", [2, 3, 4, 8, 400])
def test_every_optimiser_has_as_many_epochs(epochs):
    totals = {sum(training_runs.budget(name, epochs).values()) for name in ("adamw", "sgd", "dualopt")}
    assert totals == {epochs}
    assert training_runs.budget("dualopt", 400) == {"epochs": 300, "sgd_epochs": 100}


def test_runs_are_not_done_twice_and_interrupted_ones_go_on(tmp_path, monkeypatch, capsys):
    trained, train = [], training_runs.train

    def cut(config, log):
        trained.append((Path(config.output).name, config.resume))
        if len(trained) == 2:
            result = train(training_runs.replace(config, epochs=1, sgd_epochs=None), log)
            raise KeyboardInterrupt(result)
        return train(config, log)

    monkeypatch.setattr(training_runs, "train", cut)
    arguments = ("--tables", "3", "--models", "cpv-1/2", "--seeds", "0")
    with pytest.raises(KeyboardInterrupt):
        call(tmp_path, *arguments)
    assert len(lines(tmp_path)) == 1
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"run": {"model"')  # a line that a kill left
    assert call(tmp_path, *arguments) == 0
    assert trained == [
        ("cpv-1-2-adamw-seed-0", False),
        ("cpv-1-2-sgd-seed-0", False),
        ("cpv-1-2-sgd-seed-0", True),
        ("cpv-1-2-dualopt-seed-0", False),
    ]
    found = lines(tmp_path)
    assert [line["run"]["optimizer"] for line in found] == ["adamw", "sgd", "dualopt"]
    assert [line["epochs"] for line in found] == [2, 2, 2]
    assert "Table 3: the optimiser" in capsys.readouterr().out
    assert call(tmp_path, *arguments) == 0
    assert len(trained) == 4
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        call(tmp_path, *arguments, "--batch-size", "10")
    assert "a.jsonl have batch_size = 20, and now it is 10" in capsys.readouterr().err


def test_one_augmented_run_gives_both_figures_of_table_4(tmp_path, capsys):
    assert call(tmp_path, "--tables", "2,4", "--models", "cnv-1/2", "--seeds", "3", "--limit-train", "20") == 0
    augmented = [line for line in lines(tmp_path) if line["run"]["augmented"]]
    assert [line["epochs"] for line in augmented] == [4]
    assert all(line["before_post_training"]["last"]["epoch"] == 2 for line in augmented)
    capsys.readouterr()
    assert ablations.main(["--markdown", str(tmp_path / "a.jsonl"), "--dataset", "cifar10"]) == 0
    printed = capsys.readouterr().out
    for start in (
        "| cnv-1/2 | 3 | 89.56 |",
        "| cnv-1/2 | RandAugment | 91.98 |",
        "| cnv-1/2 | then post-training | 92.26 |",
    ):
        assert start in printed


def test_the_spread_is_the_sample_deviation():
    assert training_runs.spread([]) == ""
    assert training_runs.spread([91.0]) == "91.00 (1)"
    assert training_runs.spread([90.0, 91.0, 92.0]) == "91.00 ± 1.00 (3)"


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text('{"no": "run"}\n')
    with pytest.raises(InputError, match=r"--out: .*other.jsonl is not a file of training runs"):
        training_runs.read(path)
