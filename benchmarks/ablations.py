"""The paper's Tables 2, 3 and 4 as training runs: the stem's convolutions, optimisers, RandAugment and post-training.

A killed or repeated call goes on where it was. See README.md.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from attn_speed_report import Table
from common import Parser, positive, some_of
from training_runs import DATASETS, Run, add_arguments, described, execute, family, read, spread

from cxv.training import InputError
from cxv.training.config import OPTIMIZERS, RAND_AUGMENT

MODELS = {
    "2": ("cnv-5/4",),
    "3": ("cpv-5/4", "cltv-5/4", "hybrid-vilt-6/8"),
    "4": ("cnv-5/4", "cpv-5/4", "cltv-5/4"),
}
SMALL = {"embed_dim": 32, "limit_train": 5000, "limit_test": 2000, "batch_size": 32, "epochs": 4}
SMALL |= {"models": ("cpv-2/4", "hybrid-vilt-2/4"), "model_arg": [("stem_stride", 2)]}

# Top-1 (%) by the dataset: Table 2 by CNV's stem convolutions, Table 3 as (AdamW alone, DualOpT), Table 4 as (no
# augmentation, RandAugment, then post-training). SGD alone has no figure.
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


def planned(tables: Sequence[str], models: Sequence[str] | None, seeds: Sequence[int]) -> list[Run]:
    """The runs of the tables, seed after seed, so that what there is at any time compares like with like.

    Raises:
        InputError: none of ``models`` has a place in one of the tables.
    """
    runs = []
    for table in tables:
        mine = [model for model in models or MODELS[table] if table == "3" or family(model) in _FAMILIES[table]]
        if not mine:
            allowed = ", ".join(_FAMILIES[table])
            raise InputError(f"--models: Table {table} is about {allowed}, got {', '.join(models or ())}")
        for model in mine:
            if table == "2":
                runs += [Run(model, model_args=(("stem_convs", n),)) for n in (1, 2, 3)]
            elif table == "3":
                runs += [Run(model, optimizer) for optimizer in ("adamw", "sgd", "dualopt")]
            else:
                runs += [Run(model), Run(model, augmented=True)]
    return [Run(run.model, run.optimizer, run.augmented, run.model_args, seed) for seed in seeds for run in runs]


_FAMILIES = {"2": ("cnv",), "4": tuple(RAND_AUGMENT)}


def tables_of(lines: Sequence[dict[str, Any]], dataset: str) -> list[Table]:
    """The tables that the lines of a file have runs of: mean ± sd over the seeds beside the paper's figure."""
    models = dict.fromkeys(line["run"]["model"] for line in lines)
    stems = Table(["Table 2: convolutions in CNV's stem"], ["model", "convolutions", *_HEADER], [], left=2)
    optimisers = Table(["Table 3: the optimiser"], ["model", "optimiser", *_HEADER, "− AdamW, by seed"], [], left=2)
    augmentation = Table(["Table 4: RandAugment and post-training"], ["model", "training", *_HEADER], [], left=2)
    for model in models:
        of, mine = family(model), [line for line in lines if line["run"]["model"] == model]
        for convs in (1, 2, 3):
            rows = [line for line in mine if line["run"]["model_args"] == [["stem_convs", convs]]]
            stems.rows += _row(model, str(convs), rows, TABLE_2.get(dataset, {}).get(convs))
        plain = [line for line in mine if not line["run"]["model_args"]]
        clean = [line for line in plain if not line["run"]["augmented"]]
        paper = dict(zip(("adamw", "dualopt"), TABLE_3[dataset].get(of, ()), strict=False))
        adamw = {line["run"]["seed"]: _top1(line) for line in clean if line["run"]["optimizer"] == "adamw"}
        if len({line["run"]["optimizer"] for line in clean}) > 1:
            for name in ("adamw", "sgd", "dualopt"):
                rows = [line for line in clean if line["run"]["optimizer"] == name]
                gains = [_top1(row) - adamw[row["run"]["seed"]] for row in rows if row["run"]["seed"] in adamw]
                gain = spread(gains) if name != "adamw" else ""
                optimisers.rows += [[*row, gain] for row in _row(model, name, rows, paper.get(name))]
        augmented = [line for line in plain if line["run"]["augmented"]]
        if augmented:
            figures = TABLE_4.get(dataset, {}).get(of, (None, None, None))
            baseline = [line for line in clean if line["run"]["optimizer"] == OPTIMIZERS[0]]
            augmentation.rows += _row(model, "no augmentation", baseline, figures[0])
            augmentation.rows += _row(model, "RandAugment", augmented, figures[1], "before_post_training")
            augmentation.rows += _row(model, "then post-training", augmented, figures[2])
    return [table for table in (stems, optimisers, augmentation) if table.rows]


_HEADER = ["paper, %", "best by test, %", "last epoch, %", "epochs"]


def _row(
    model: str, what: str, lines: Sequence[dict[str, Any]], paper: float | None, part: str = "summary"
) -> list[list[str]]:
    """One row of a table; none where there is no run."""
    if not lines:
        return []
    best, last = (spread([_top1(line, part, by) for line in lines]) for by in ("best_test", "last"))
    epochs = sorted({line[part]["last"]["epoch"] for line in lines})
    return [[model, what, "" if paper is None else f"{paper:.2f}", best, last, "–".join(map(str, epochs))]]


def _top1(line: dict[str, Any], part: str = "summary", by: str = "best_test") -> float:
    return line[part][by]["test_top1"]


def report(lines: Sequence[dict[str, Any]], dataset: str) -> str:
    """The tables as Markdown, with what the runs share."""
    parts = [f"{table.title[0]}.\n\n{table.markdown()}" for table in tables_of(lines, dataset)]
    return "\n\n".join([described(lines), "Mean ± sample sd (number of seeds) of the test top-1.", *parts])


def command_line() -> Parser:
    """What it understands."""
    parser = Parser("ablations", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--tables", type=some_of(tuple(MODELS)), default=tuple(MODELS), help="comma-separated")
    parser.add_argument(
        "--models",
        type=lambda text: tuple(text.split(",")),
        help="of any depth; unset: the tables' on CIFAR-10",
    )
    parser.add_argument("--small", action="store_true", help=f"for a CPU, unless given otherwise: {SMALL}")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=positive, help="of the CPU")
    default = Path(__file__).parent / "results" / "ablations.jsonl"
    parser.add_argument("--out", type=Path, default=default, help="file of the runs, a JSON line each")
    parser.add_argument("--markdown", type=Path, metavar="FILE.jsonl", help="train nothing: print FILE.jsonl's tables")
    add_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and print the tables; exits with status 2 and one line on a bad value."""
    parser = command_line()
    if parser.parse_args(argv).small:
        parser.set_defaults(**SMALL)
    arguments = parser.parse_args(argv)
    dataset = arguments.dataset or (arguments.data if arguments.data in DATASETS else DATASETS[0])
    try:
        if arguments.markdown:
            lines = read(arguments.markdown)
            if not lines:
                parser.error(f"argument --markdown: no runs in {arguments.markdown}")
            print(report(lines, dataset))
            return 0
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        runs = planned(arguments.tables, arguments.models, arguments.seeds)
        lines = execute(runs, arguments, arguments.out, log=lambda line: print(line, flush=True))
    except InputError as error:
        parser.error(str(error))
    print("\n" + "\n".join(table.text() for table in tables_of(lines, dataset)) + str(arguments.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
