"""Train CPV-5/4, CNV-5/4 and CLTV-5/4 on CIFAR-10 and compare with the accuracies of the paper.

    python benchmarks/paper/cifar10.py --data-dir cifar10 --minutes 8     # repeat the command to continue

Each call continues the runs in --runs and stops after --minutes. It starts ``cxv train``, which saves its state when it
is stopped. Exit status: 0 when every model is trained, 3 when there is more to do.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import _harness as bench  # imported before torch: it sets log levels
from _report import Table

from cxv.checkpoint import LAST, PREVIOUS
from cxv.training.config import METRICS, RECIPES, SUMMARY

# isort: split
import torch

PAPER = {
    "paper": {"cpv-5/4": 91.42, "cnv-5/4": 89.56, "cltv-5/4": 86.99},  # Table 1
    "paper-augmented": {"cpv-5/4": 94.46, "cnv-5/4": 92.26, "cltv-5/4": 91.40},  # Table 4, after post-training
}
GRACE_SECONDS = 60  # from SIGTERM until a run that does not stop is killed
MORE_TO_DO = 3


def train(model: str, run: Path, arguments: Any, deadline: float) -> int:
    """Run ``cxv train`` until it ends or until ``deadline`` of the monotonic clock; its exit status."""
    command = [sys.executable, "-m", "cxv", "train", "--output", str(run), "--device", arguments.device]
    if any((run / name).exists() for name in (LAST, PREVIOUS)):
        command.append("--resume")
    else:
        folder = arguments.data_dir and (Path(arguments.data_dir) / "train").is_dir()
        command += ["--model", model, "--data", "folder" if folder else "cifar10", "--recipe", arguments.recipe]
        command += ["--seed", str(arguments.seed), *(("--epochs", "1") if arguments.quick else ()), *arguments.train]
    if arguments.data_dir:
        command += ["--data-dir", arguments.data_dir]
    process = subprocess.Popen(command)
    try:
        return process.wait(max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def table(runs: Path, models: Sequence[str], recipe: str) -> Table:
    """The best and the last top-1 of each run, next to the paper's."""
    found = Table(["model", "epochs", "best top-1, %", "at epoch", "last, %", "paper, %", "difference"])
    for model in models:
        path = runs / model.replace("/", "-") / METRICS
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        rows = [row for row in rows if "test_top1" in row]  # with --validation the selected epoch only
        if rows:
            best = max(rows, key=lambda row: (row["test_top1"], row["epoch"]))
            paper = PAPER.get(recipe, PAPER["paper"])[model]
            cells = [f"{best['test_top1']:.2f}", str(best["epoch"]), f"{rows[-1]['test_top1']:.2f}", f"{paper:.2f}"]
            found.rows.append([model, str(rows[-1]["epoch"]), *cells, f"{best['test_top1'] - paper:+.2f}"])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Train for a limited time and print the table."""
    parser = bench.Parser(__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", help="train/CLASS/… and test/CLASS/…, or the folder of torchvision's archive")
    parser.add_argument("--runs", type=Path, default=Path("runs/cifar10"), help="folder of the runs")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of this call")
    parser.add_argument("--models", default=",".join(PAPER["paper"]), help="trained in this order")
    parser.add_argument("--recipe", choices=tuple(RECIPES), default="paper")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("train", nargs="*", metavar="-- FLAG", help="more flags of cxv train")
    arguments = parser.parse(argv)
    deadline = time.monotonic() + 60 * min(arguments.minutes, 1e6)
    models = arguments.models.split(",")
    for model in models:
        run = arguments.runs / model.replace("/", "-")
        if not (run / SUMMARY).exists() and time.monotonic() < deadline:
            status = train(model, run, arguments, deadline)
            if status not in (0, 128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL):
                return status
    env = bench.environment(torch.device(arguments.device))
    print(f"{env['device_name']}, torch {env['torch']}, {env['date']}, recipe {arguments.recipe}\n")
    print(table(arguments.runs, models, arguments.recipe).text())
    return 0 if all((arguments.runs / m.replace("/", "-") / SUMMARY).exists() for m in models) else MORE_TO_DO


if __name__ == "__main__":
    sys.exit(main())
