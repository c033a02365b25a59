"""What a run, or several with different seeds, came to."""

import statistics
from typing import Any


def summarize(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The test set's top-1 (per cent) by each way of selecting an epoch, from the lines of ``metrics.jsonl``.

    ``best_test``: the paper's, the best epoch by the test set itself, which flatters. ``best_validation``: the best
    epoch by the held-out training images, where there are any: an unbiased figure. ``last``: the last epoch. The latest
    one of a tie, as in DualOpT.
    """

    def pick(key: str) -> dict[str, Any]:
        row = max(history, key=lambda row: (row[key], row["epoch"]))
        return {k: row[k] for k in ("epoch", "test_top1", "validation_top1") if k in row}

    found = {"best_test": pick("test_top1"), "last": pick("epoch")}
    if "validation_top1" in history[0]:
        found["best_validation"] = pick("validation_top1")
    return found


def summary_line(summary: dict[str, Any]) -> str:
    """One line that gives every number of :func:`summarize`."""
    parts = [f"best by test {_at(summary['best_test'])}"]
    if "best_validation" in summary:
        found = summary["best_validation"]
        parts.append(f"at the best validation ({found['validation_top1']:.2f} %) {_at(found)}")
    return "test top-1: " + ", ".join([*parts, f"last {_at(summary['last'])}"])


def summarize_seeds(runs: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Best, mean and sample standard deviation of the test top-1 over runs, given by seed as :func:`summarize` does.

    The deviation of a single run is None.
    """
    total: dict[str, Any] = {"runs": {str(seed): run for seed, run in runs.items()}}
    for key in next(iter(runs.values())):
        values = [run[key]["test_top1"] for run in runs.values()]
        total[key] = {
            "best": max(values),
            "mean": statistics.fmean(values),
            "sd": statistics.stdev(values) if len(values) > 1 else None,
        }
    return total


def summary_lines(total: dict[str, Any]) -> list[str]:
    """:func:`summarize_seeds` in words, a line for each way of selecting."""
    names = {"best_test": "best by test", "best_validation": "at the best validation", "last": "last epoch"}
    lines, n = [], len(total["runs"])
    for key in (key for key in names if key in total):
        found = total[key]
        spread = "" if found["sd"] is None else f" ± {found['sd']:.2f}"
        lines.append(
            f"test top-1 over {n} seeds, {names[key]}: mean {found['mean']:.2f}{spread} %, best {found['best']:.2f} %"
        )
    return lines


def _at(found: dict[str, Any]) -> str:
    return f"{found['test_top1']:.2f} % (epoch {found['epoch']})"
