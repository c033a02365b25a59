"""Training runs behind an accuracy: each a JSON line of a file, none done twice, an interrupted one gone on with.

ablations.py and ``table1.py --train`` are made of them. The training itself is ``cxv.training.train``.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import Parser, environment, positive

from cxv.cli import name_value
from cxv.training import InputError, TrainConfig, train
from cxv.training.checkpoint import LAST, PREVIOUS
from cxv.training.config import METRICS, OPTIMIZERS, RAND_AUGMENT
from cxv.training.loop import PRECISIONS, pick_device
from cxv.training.summary import summarise

SETTINGS = ("data", "data_dir", "limit_train", "limit_test", "validation", "batch_size", "embed_dim", "drop_rate")
SETTINGS += ("precision", "patience", "threads", "device")
DATASETS = ("cifar10", "cifar100", "tiny-imagenet")  # the paper's


@dataclass(frozen=True)
class Run:
    """What distinguishes a run from the others of its file.

    ``augmented``: RandAugment as in the paper's Table 4, then post-training on clean images.
    """

    model: str
    optimizer: str = "dualopt"
    augmented: bool = False
    model_args: tuple[tuple[str, Any], ...] = ()
    seed: int = 0

    def __str__(self) -> str:
        parts = [self.model.replace("/", "-"), self.optimizer, *(["augmented"] if self.augmented else [])]
        return "-".join([*parts, *(f"{name}={value}" for name, value in self.model_args), f"seed-{self.seed}"])


def family(model: str) -> str:
    """``"cpv"`` of ``"cpv-5/4"``."""
    return model.lower().rpartition("-")[0]


def add_arguments(parser: Parser) -> None:
    """The flags that all runs share."""
    g = parser.add_argument_group("training")
    g.add_argument("--data", default="cifar10", help="as for cxv train")
    g.add_argument("--data-dir", help="where its files are")
    g.add_argument("--dataset", choices=DATASETS, help="whose figures of the paper go beside; unset: --data's own")
    g.add_argument(
        "--epochs", type=positive, default=400, help="of a run, whatever the optimiser; DualOpT's SGD has a quarter"
    )
    g.add_argument("--seeds", type=_whole_numbers, default=(0, 1, 2), help="a run for each")
    g.add_argument("--validation", type=positive, help="training images held out to pick the epoch, not the test set")
    g.add_argument("--limit-train", type=positive, help="images, balanced over the classes")
    g.add_argument("--limit-test", type=positive, help="images, balanced over the classes")
    g.add_argument("--batch-size", type=positive, default=128, help="images of a step")
    g.add_argument("--patience", type=positive, default=20, help="stale epochs that end a phase")
    g.add_argument("--embed-dim", type=positive, help="channels, unless the model's own")
    g.add_argument("--drop-rate", type=float, help="dropout, unless the model's own")
    g.add_argument(
        "--model-arg", type=name_value, action="append", default=[], metavar="NAME=VALUE", help="of every model"
    )
    g.add_argument("--precision", choices=tuple(PRECISIONS), default="fp32", help="fp32, or autocast")
    g.add_argument("--runs", type=Path, default=Path("runs/benchmarks"), help="folder of the runs' checkpoints")


def execute(
    runs: Iterable[Run], arguments: argparse.Namespace, path: Path, log: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Train what ``path`` has no line of yet; returns the lines of all ``runs``.

    Raises:
        InputError: the lines in ``path`` were made with other settings, or see :func:`cxv.training.train`.
    """
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    settings |= {"epochs": arguments.epochs, "model_args": dict(arguments.model_arg)}
    settings["device"] = pick_device(arguments.device).type
    # where the images are and how many threads there were is no part of what a run computes
    shared = {name: value for name, value in settings.items() if name not in ("data_dir", "threads")}
    lines = read(path)
    for line in lines:
        odd = [name for name, value in shared.items() if line["settings"].get(name) != value]
        if odd:
            was, now = line["settings"].get(odd[0]), shared[odd[0]]
            raise InputError(f"--out: the runs in {path} have {odd[0]} = {was}, and now it is {now}: choose another")
    done = {json.dumps(line["run"], sort_keys=True): line for line in lines}
    found = []
    runs = list(dict.fromkeys(runs))
    for number, run in enumerate(runs, start=1):
        key = json.dumps(asdict(run), sort_keys=True)
        if key not in done:
            log(f"{run}: run {number} of {len(runs)}")
            done[key] = {
                "run": json.loads(key),
                "settings": shared,
                **_train(run, settings, arguments.runs / path.stem),
            }
            with path.open("a") as file:  # a line is whole or, after a kill, the last one and left out by ``read``
                file.write(json.dumps(done[key]) + "\n")
        summary = done[key]["summary"]
        log(f"{run}: test top-1 {summary['best_test']['test_top1']:.2f} %, last {summary['last']['test_top1']:.2f} %")
        found.append(done[key])
    return found


def _train(run: Run, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    output = folder / str(run)
    config = TrainConfig(
        **{name: settings[name] for name in SETTINGS},
        model=run.model,
        optimizer=run.optimizer,
        model_args={**settings["model_args"], **dict(run.model_args)} or None,
        seed=run.seed,
        output=str(output),
        resume=any((output / name).exists() for name in (LAST, PREVIOUS)),
        **budget(run.optimizer, settings["epochs"]),
    )
    if run.augmented:
        if family(run.model) not in RAND_AUGMENT:
            allowed = ", ".join(RAND_AUGMENT)
            raise InputError(f"--models: Table 4 has RandAugment for {allowed} alone, got {run.model}")
        config = replace(config, rand_augment=RAND_AUGMENT[family(run.model)], post_train=True)
    result = train(config, log=lambda line: None)
    history = [json.loads(line) for line in (output / METRICS).read_text().splitlines()]
    before = [row for row in history if row["augmented"]]
    device = torch.device(settings["device"])
    env = environment(device, PRECISIONS[settings["precision"]])
    return {
        "summary": result.summary,
        "before_post_training": summarise(before) if before else None,
        "epochs": result.epochs,
        "seconds": round(sum(row["seconds"] for row in history), 1),
        "environment": {name: env[name] for name in ("date", "device_name", "threads", "torch", "cxv")},
    }


def budget(optimizer: str, epochs: int) -> dict[str, int]:
    """The same number of epochs for every optimiser; a quarter of DualOpT's are SGD's, as of the paper's 300 + 100."""
    if optimizer != OPTIMIZERS[0]:
        return {"epochs": epochs}
    sgd = max(epochs // 4, 1)
    return {"epochs": epochs - sgd, "sgd_epochs": sgd}


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of runs; none if there is none. What a kill left of a last line is cut off.

    Raises:
        InputError: it holds something else.
    """
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    try:
        lines = [json.loads(line) for line in whole.splitlines()]
        if all({"run", "settings", "summary"} <= line.keys() for line in lines):
            return lines
    except (ValueError, AttributeError):
        pass
    raise InputError(f"--out: {path} is not a file of training runs")


def described(lines: Sequence[dict[str, Any]]) -> str:
    """What the runs of a file share, in a sentence."""
    settings, env = lines[0]["settings"], lines[0]["environment"]
    shared = ", ".join(f"{name} {value}" for name, value in settings.items() if value not in (None, {}))
    minutes = sum(line["seconds"] for line in lines) / 60
    return f"{len(lines)} runs, {minutes:.0f} minutes on {env['device_name']}, torch {env['torch']}: {shared}."


def spread(values: Sequence[float]) -> str:
    """``"91.42 ± 0.13 (3)"``: mean, sample standard deviation, number; no deviation of one."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation} ({len(values)})"


def _whole_numbers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise argparse.ArgumentTypeError(f"must be different whole numbers like 0,1,2, got {text!r}")
    return tuple(map(int, parts))
