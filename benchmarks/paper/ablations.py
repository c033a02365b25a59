"""Train the ablations of the paper: stem convolutions (Table 2), optimizers (Table 3), augmentation (Table 4).

    python benchmarks/paper/ablations.py --tables 3 --small --data cifar10

Writes results/ablations-<device>.jsonl, one line per finished run. A repeated call skips finished runs and resumes
an interrupted one.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import _harness as bench  # imported before torch: it sets log levels
from _report import Table

from cxv.checkpoint import LAST, PREVIOUS
from cxv.cli.flags import add_option
from cxv.training import InputError, TrainConfig, train
from cxv.training.config import METRICS, OPTIMIZERS, RAND_AUGMENT
from cxv.training.logging import summarize

# isort: split
import torch

DATASETS = ("cifar10", "cifar100", "tiny-imagenet")
MODELS = {
    "2": ("cnv-5/4",),
    "3": ("cpv-5/4", "cltv-5/4", "hybrid-vilt-6/8"),
    "4": ("cnv-5/4", "cpv-5/4", "cltv-5/4"),
}
SMALL = {"embed_dim": 32, "limit_train": 5000, "limit_test": 2000, "batch_size": 32, "epochs": 4}
SMALL |= {"models": ("cpv-2/4", "hybrid-vilt-2/4"), "model_args": [("stem_stride", 2)]}
# The flags of cxv train that apply to every run, and their defaults. DualOpT spends a quarter of the epochs on SGD.
TRAINING = {
    "data": "cifar10",
    "batch_size": 128,
    "patience": 20,
    "precision": "fp32",
    "epochs": 400,
    "seeds": (0, 1, 2),
}
TRAINING |= dict.fromkeys(("data_dir", "limit_train", "limit_test", "validation", "embed_dim", "drop_rate"))
TRAINING |= {"model_args": []}
SETTINGS = (*(name for name in TRAINING if name not in ("epochs", "seeds", "model_args")), "threads", "device")

# Top-1 (%) in the paper. Table 2: by the number of stem convolutions. Table 3: AdamW alone, DualOpT. Table 4: no
# augmentation, RandAugment, then post-training.
TABLE_2 = {"cifar10": {1: 89.45, 2: 89.93, 3: 89.56}}
TABLE_3: dict[str, dict[str, tuple[float, float]]] = {
    "cifar10": {"hybrid-vilt": (76.42, 78.34), "cpv": (90.55, 91.42), "cltv": (85.10, 86.82)},
    "cifar100": {
        "hybrid-vin": (48.61, 50.06),
        "hybrid-vilt": (49.75, 52.38),
        "cltv": (57.62, 60.11),
        "cvt": (54.24, 57.82),
    },
    "tiny-imagenet": {
        "resnet": (39.93, 42.65),
        "hybrid-vin": (34.84, 36.84),
        "hybrid-vip": (35.20, 38.85),
        "vit": (20.86, 23.18),
        "wavemix": (31.81, 33.04),
        "cltv": (44.49, 46.69),
    },
}
TABLE_4 = {"cifar10": {"cnv": (89.56, 91.98, 92.26), "cpv": (91.42, 92.21, 94.46), "cltv": (86.99, 88.16, 91.40)}}
_FAMILIES = {"2": ("cnv",), "4": tuple(RAND_AUGMENT)}


# --- runs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One training run; ``augmented`` means RandAugment as in Table 4, then post-training on clean images."""

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


def planned(tables: Sequence[str], models: Sequence[str] | None, seeds: Sequence[int]) -> list[Run]:
    """The runs of the tables, seed by seed, so that an unfinished set compares like with like.

    Raises:
        InputError: none of ``models`` belongs to one of the tables.
    """
    runs = []
    for table in tables:
        mine = [model for model in models or MODELS[table] if table == "3" or family(model) in _FAMILIES[table]]
        if not mine:
            allowed = ", ".join(_FAMILIES[table])
            raise InputError(f"models of Table {table} must be {allowed}, got {', '.join(models or ())}")
        for model in mine:
            if table == "2":
                runs += [Run(model, model_args=(("stem_convs", n),)) for n in (1, 2, 3)]
            elif table == "3":
                runs += [Run(model, optimizer) for optimizer in ("adamw", "sgd", "dualopt")]
            else:
                runs += [Run(model), Run(model, augmented=True)]
    return list(dict.fromkeys(replace(run, seed=seed) for seed in seeds for run in runs))


def epochs_of(optimizer: str, epochs: int) -> dict[str, int]:
    """The same number of epochs for every optimizer; DualOpT spends a quarter on SGD, as the paper's 300 + 100."""
    if optimizer != OPTIMIZERS[0]:
        return {"epochs": epochs}
    sgd = max(epochs // 4, 1)
    return {"epochs": epochs - sgd, "sgd_epochs": sgd}


def execute(runs: Sequence[Run], arguments: argparse.Namespace, path: Path) -> list[dict[str, Any]]:
    """Train every run that ``path`` has no line of; returns the lines of all ``runs``.

    Raises:
        InputError: the lines in ``path`` were made with other settings.
    """
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    settings |= {"epochs": arguments.epochs, "model_args": dict(arguments.model_args)}
    # neither the folder of the images nor the number of threads changes the result
    shared = {name: value for name, value in settings.items() if name not in ("data_dir", "threads")}
    lines = read(path)
    for line in lines:
        changed = [name for name, value in shared.items() if line["settings"].get(name) != value]
        if changed:
            name = changed[0]
            raise InputError(f"the runs in {path} have {name} = {line['settings'].get(name)}, now it is {shared[name]}")
    done = {json.dumps(line["run"], sort_keys=True): line for line in lines}
    for number, run in enumerate(runs, start=1):
        key = json.dumps(asdict(run), sort_keys=True)
        if key not in done:
            print(f"{run}: run {number} of {len(runs)}", flush=True)
            done[key] = {"run": json.loads(key), "settings": shared, **_train(run, settings, arguments.runs)}
            with path.open("a") as file:
                file.write(json.dumps(done[key]) + "\n")
        summary = done[key]["summary"]
        print(f"{run}: test top-1 {summary['best_test']['test_top1']:.2f} %", flush=True)
    return [done[json.dumps(asdict(run), sort_keys=True)] for run in runs]


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
        **epochs_of(run.optimizer, settings["epochs"]),
    )
    if run.augmented:
        config = replace(config, rand_augment=RAND_AUGMENT[family(run.model)], post_train=True)
    result = train(config, log=lambda line: None)
    history = [json.loads(line) for line in (output / METRICS).read_text().splitlines()]
    before = [row for row in history if row["augmented"]]
    return {
        "summary": result.summary,
        "before_post_training": summarize(before) if before else None,
        "epochs": result.epochs,
        "seconds": round(sum(row["seconds"] for row in history), 1),
        "environment": bench.environment(torch.device(settings["device"])),
    }


def read(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file of runs; the incomplete last line of a killed run is removed.

    Raises:
        InputError: the file holds something else.
    """
    if not path.exists():
        return []
    text = path.read_text()
    complete = text[: text.rfind("\n") + 1]
    if complete != text:
        path.write_text(complete)
    try:
        lines = [json.loads(line) for line in complete.splitlines()]
        if all({"run", "settings", "summary"} <= line.keys() for line in lines):
            return lines
    except (ValueError, AttributeError):
        pass
    raise InputError(f"{path} is not a file of training runs")


# --- tables ------------------------------------------------------------------------------------------------------

_HEADER = ["paper, %", "best by test, %", "last epoch, %", "epochs"]


def tables_of(lines: Sequence[dict[str, Any]], dataset: str) -> dict[str, Table]:
    """Mean ± sample standard deviation (number of seeds) of the test top-1, next to the paper's figure."""
    stems = Table(["model", "convolutions", *_HEADER], left=2)
    optimizers = Table(["model", "optimizer", *_HEADER, "difference to AdamW"], left=2)
    augmentation = Table(["model", "training", *_HEADER], left=2)
    for model in dict.fromkeys(line["run"]["model"] for line in lines):
        name, mine = family(model), [line for line in lines if line["run"]["model"] == model]
        for convs in (1, 2, 3):
            rows = [line for line in mine if line["run"]["model_args"] == [["stem_convs", convs]]]
            stems.rows += _row(model, str(convs), rows, TABLE_2.get(dataset, {}).get(convs))
        clean = [line for line in mine if not line["run"]["model_args"] and not line["run"]["augmented"]]
        paper = dict(zip(("adamw", "dualopt"), TABLE_3[dataset].get(name, ()), strict=False))
        adamw = {line["run"]["seed"]: _top1(line) for line in clean if line["run"]["optimizer"] == "adamw"}
        if len({line["run"]["optimizer"] for line in clean}) > 1:
            for optimizer in ("adamw", "sgd", "dualopt"):
                rows = [line for line in clean if line["run"]["optimizer"] == optimizer]
                gains = [_top1(row) - adamw[row["run"]["seed"]] for row in rows if row["run"]["seed"] in adamw]
                gain = spread(gains) if optimizer != "adamw" else ""
                optimizers.rows += [[*row, gain] for row in _row(model, optimizer, rows, paper.get(optimizer))]
        augmented = [line for line in mine if line["run"]["augmented"]]
        if augmented:
            figures = TABLE_4.get(dataset, {}).get(name, (None, None, None))
            baseline = [line for line in clean if line["run"]["optimizer"] == OPTIMIZERS[0]]
            augmentation.rows += _row(model, "no augmentation", baseline, figures[0])
            augmentation.rows += _row(model, "RandAugment", augmented, figures[1], "before_post_training")
            augmentation.rows += _row(model, "then post-training", augmented, figures[2])
    titles = ("Table 2: convolutions in the stem of CNV", "Table 3: the optimizer", "Table 4: augmentation")
    tables = zip(titles, (stems, optimizers, augmentation), strict=True)
    return {title: table for title, table in tables if table.rows}


def _row(
    model: str, label: str, lines: Sequence[dict[str, Any]], paper: float | None, part: str = "summary"
) -> list[list[str]]:
    if not lines:
        return []
    best, last = (spread([_top1(line, part, by) for line in lines]) for by in ("best_test", "last"))
    epochs = sorted({line[part]["last"]["epoch"] for line in lines})
    return [[model, label, "" if paper is None else f"{paper:.2f}", best, last, "–".join(map(str, epochs))]]


def _top1(line: dict[str, Any], part: str = "summary", by: str = "best_test") -> float:
    return line[part][by]["test_top1"]


def spread(values: Sequence[float]) -> str:
    """``"91.42 ± 0.13 (3)"``: mean, sample standard deviation, number of values."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{deviation} ({len(values)})"


def described(lines: Sequence[dict[str, Any]]) -> str:
    """The settings that the runs of a file share, in one sentence."""
    settings, env = lines[0]["settings"], lines[0]["environment"]
    shared = ", ".join(f"{name} {value}" for name, value in settings.items() if value not in (None, {}))
    minutes = sum(line["seconds"] for line in lines) / 60
    return f"{len(lines)} runs, {minutes:.0f} minutes on {env['device_name']}, torch {env['torch']}: {shared}."


def report(lines: Sequence[dict[str, Any]], dataset: str) -> str:
    """The tables as Markdown."""
    parts = [f"{title}.\n\n{table.markdown()}" for title, table in tables_of(lines, dataset).items()]
    return "\n\n".join([described(lines), "Mean ± sample sd (number of seeds) of the test top-1.", *parts])


# --- the command line --------------------------------------------------------------------------------------------


def command_line() -> bench.Parser:
    """The flags."""
    parser = bench.Parser(__doc__.partition("\n")[0])
    parser.add_names("--tables", MODELS)
    parser.add_argument("--models", type=lambda text: tuple(text.split(",")), help="default: the paper's on CIFAR-10")
    parser.add_argument("--small", action="store_true", help=f"a CPU's size: {SMALL}")
    parser.add_argument("--dataset", choices=DATASETS, help="whose figures in the paper to show; default: --data")
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"), help="folder of the checkpoints")
    for name, default in TRAINING.items():
        add_option(parser, name, default=default, shown=None if default is None else str(default))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and print the tables."""
    parser = command_line()
    if parser.parse_args(argv).small:
        parser.set_defaults(**SMALL)
    arguments = parser.parse(argv)
    dataset = arguments.dataset or (arguments.data if arguments.data in DATASETS else DATASETS[0])
    path = arguments.output / f"ablations-{arguments.device}.jsonl"
    try:
        runs = planned(arguments.tables, arguments.models, arguments.seeds)
        lines = execute(runs[:1] if arguments.quick else runs, arguments, path)
    except InputError as error:
        parser.error(str(error))
    for title, table in tables_of(lines, dataset).items():
        print(f"\n{title}\n{table.text()}")
    print(f"Wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
