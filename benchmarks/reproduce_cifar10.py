"""CIFAR-10 by the paper's recipe, in slices of minutes: CPV-5/4, CNV-5/4 and CLTV-5/4 beside the paper's accuracies.

    python benchmarks/reproduce_cifar10.py --data-dir cifar10 --checkpoint-out s1
    python benchmarks/reproduce_cifar10.py --data-dir cifar10 --checkpoint-in s1 --checkpoint-out s2    # and so on

Each call goes on for ``--slice-minutes`` where the one before stopped, on this machine or another: what it needs is in
the directory of ``--checkpoint-out``, of less than 64 MiB. It runs ``cxv train`` and stops it by SIGTERM, which saves
the batches done; on a CPU the slices give the same bits as one unbroken run. Exit status: 0 when every model is
trained, 3 when there is more to do.

A model that is trained leaves ``model.safetensors``, a model card and its accuracy per epoch;
``reproduce_cifar10.json`` has all of them beside the paper's.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import Parser, environment, gpu_facts, seconds, write_json

import cxv
from cxv.training.checkpoint import BEST, LAST, PREVIOUS
from cxv.training.config import ARGS, METRICS, RECIPES, SUMMARY

PAPER = {
    "paper": {"cpv-5/4": 91.42, "cnv-5/4": 89.56, "cltv-5/4": 86.99},  # Table 1
    "paper-augmented": {"cpv-5/4": 94.46, "cnv-5/4": 92.26, "cltv-5/4": 91.40},  # Table 4, post-trained
}
RESULTS = "reproduce_cifar10.json"
WEIGHTS, CARD = "model.safetensors", "README.md"
LARGEST = 64 * 2**20
"""Bytes that a directory passed between slices may have."""
STOPPED = (128 + signal.SIGTERM, -signal.SIGTERM)  # between two batches, or before the first
GRACE = 60
"""Seconds from SIGTERM until a run that does not stop is killed; it loses the epoch in progress."""
MORE_TO_DO = 3


def main() -> int:
    """The command line; see the module's docstring for the exit status."""
    start = time.monotonic()
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--data-dir", required=True, help="the images: train/CLASS/… and test/CLASS/…, or torchvision's archive"
    )
    parser.add_argument("--checkpoint-in", type=Path, help="what the slice before left (default: --checkpoint-out)")
    parser.add_argument("--checkpoint-out", type=Path, required=True, help="what this one leaves, and works in")
    parser.add_argument("--slice-minutes", type=lambda text: 60 * seconds(text), default=8 * 60, metavar="MINUTES")
    parser.add_argument("--models", default=",".join(PAPER["paper"]), help="comma-separated, trained in this order")
    parser.add_argument("--recipe", choices=tuple(RECIPES), default="paper")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("train", nargs="*", metavar="-- ARGUMENT", help="more arguments of cxv train")
    args = parser.parse_args()
    _take_over(parser, args.checkpoint_in, args.checkpoint_out)
    chosen = {"models": args.models.split(","), "recipe": args.recipe, "seed": args.seed, "train": args.train}
    results = _begin(parser, args.checkpoint_out, chosen)
    for model in chosen["models"]:
        run = args.checkpoint_out / model.replace("/", "-")
        if (run / WEIGHTS).exists():
            continue
        status = _train(model, run, args, start + args.slice_minutes)
        _collect(results, model, run)
        write_json(args.checkpoint_out / RESULTS, results)
        if status in STOPPED:
            (run / PREVIOUS).unlink(missing_ok=True)  # last.pt was just read: it is whole
            break
        if status != 0:
            return 1
        _share(run)
    print(table(results))
    size = sum(path.stat().st_size for path in args.checkpoint_out.rglob("*") if path.is_file())
    print(f"{args.checkpoint_out}: {size / 2**20:.1f} MiB")
    if size > LARGEST:
        print(
            f"more than the {LARGEST // 2**20} MiB of one load: train fewer --models in one directory", file=sys.stderr
        )
    if all(row["finished"] for row in results["models"].values()) and len(results["models"]) == len(chosen["models"]):
        return 0
    print(f"not finished: go on with --checkpoint-in {args.checkpoint_out}")
    return MORE_TO_DO


def table(results: dict[str, Any]) -> str:
    """What the models came to, in Markdown, beside the paper's."""
    lines = [
        "| model | epochs | best top-1, % | at epoch | last | paper, % | difference |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for model, row in results["models"].items():
        if not row["epochs"]:
            continue
        best = max(row["epochs"], key=lambda epoch: (epoch["test_top1"], epoch["epoch"]))
        paper, last = row["paper_top1"], row["epochs"][-1]
        beside = "| | " if paper is None else f"| {paper:.2f} | {best['test_top1'] - paper:+.2f} "
        done = f"{last['epoch']}" if row["finished"] else f"{last['epoch']} so far"
        ours = f"{best['test_top1']:.2f} | {best['epoch']} | {last['test_top1']:.2f}"
        lines.append(f"| {model} | {done} | {ours} {beside}|")
    return "\n".join(lines)


def _take_over(parser: Parser, before: Path | None, out: Path) -> None:
    """Make ``out`` what the slice before left."""
    if before is not None and not (before / RESULTS).is_file():
        parser.error(f"argument --checkpoint-in: {before} was not left by this script ({RESULTS} is not there)")
    if before is not None and out.exists() and before.resolve() != out.resolve():
        if any(out.iterdir()):
            parser.error(f"argument --checkpoint-out: {out} is not empty")
        out.rmdir()
    if out.exists() and any(out.iterdir()) and not (out / RESULTS).is_file():
        parser.error(f"argument --checkpoint-out: {out} holds something else ({RESULTS} is not there)")
    if before is not None and before.resolve() != out.resolve():
        shutil.copytree(before, out)
    out.mkdir(parents=True, exist_ok=True)


def _begin(parser: Parser, out: Path, chosen: dict[str, Any]) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = environment(device, torch.float32) | gpu_facts(device)
    results = {"benchmark": "reproduce_cifar10", **chosen, "slices": [], "models": {}}
    if (out / RESULTS).exists():
        results = parser.results("--checkpoint-in", out / RESULTS, "reproduce_cifar10")
        changed = [name for name in chosen if results[name] != chosen[name]]
        if changed:
            parser.error(
                f"argument --{changed[0]}: {results[changed[0]]} in the slices before, {chosen[changed[0]]} now"
            )
    results["slices"].append(where)
    write_json(out / RESULTS, results)
    return results


def _train(model: str, run: Path, args: Any, deadline: float) -> int:
    """Train until it is over or ``deadline`` (of the monotonic clock); the exit status of ``cxv train``."""
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        return STOPPED[0]
    folder = (Path(args.data_dir) / "train").is_dir()
    command = [sys.executable, "-m", "cxv.cli", "train", "--output", str(run), "--data-dir", args.data_dir]
    if (run / LAST).exists():
        command.append("--resume")
    else:
        command += ["--model", model, "--data", "folder" if folder else "cifar10", "--recipe", args.recipe]
        command += ["--seed", str(args.seed), *args.train]
    process = subprocess.Popen(command)
    try:
        return process.wait(remaining)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        try:
            return process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return STOPPED[0]
    except KeyboardInterrupt:
        process.wait()  # it got the same signal
        raise


def _collect(results: dict[str, Any], model: str, run: Path) -> None:
    rows = []
    if (run / METRICS).exists():
        rows = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    finished = (run / SUMMARY).exists()
    results["models"][model] = {
        "paper_top1": PAPER[results["recipe"]].get(model),
        "finished": finished,
        "summary": json.loads((run / SUMMARY).read_text()) if finished else None,
        "args": json.loads((run / ARGS).read_text()) if (run / ARGS).exists() else None,
        "epochs": rows,
    }


def _share(run: Path) -> None:
    """The trained weights with their card, in place of the checkpoints that they come from."""
    from cxv.hub import HubModel

    cxv.save_safetensors(run, run / WEIGHTS)
    (run / CARD).write_text(str(HubModel.from_checkpoint(run / WEIGHTS).generate_model_card()))
    for name in (LAST, PREVIOUS, BEST):
        (run / name).unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
