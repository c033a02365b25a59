"""``cxv train``: train a model, or resume a run."""

import argparse
from dataclasses import replace
from pathlib import Path

from ..errors import InputError
from ..training.config import GROUPS, OPTIONS, TrainConfig
from ..training.distributed import World, process_group
from ..training.seeds import has_seeds, train_seeds
from ..training.trainer import train
from .flags import WHOLE_NUMBER, add_option, parser_of, with_flags

_RESUME = "continue the run in DIR, or in `output`, with its arguments where none are given"


HELP = "train a model"
DESCRIPTION = (
    "Train a model, by default with the paper's DualOpT: AdamW until top-1 has not improved for --patience epochs "
    "or --epochs are done, then SGD from the best weights for at most --sgd-epochs. Without arguments the command "
    "trains a small CPV (cpv-2/4, --embed-dim 64) on scikit-learn's digits, which takes minutes on a CPU. Ctrl-C "
    "and SIGTERM stop the run after the current batch and save it; the exit status is then 130 or 143."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    for name, option in OPTIONS.items():
        if name == "resume":
            groups["output"].add_argument(
                "--resume", nargs="?", const=True, default=False, metavar="DIR", help=with_flags(_RESUME)
            )
            continue
        add_option(groups[option.metadata["group"]], name, note=" (repeatable)" if name == "model_args" else "")
    groups["recipe"].add_argument(
        "--repeats",
        type=parser_of(*WHOLE_NUMBER),
        metavar="N",
        help="train with N seeds, from --seed on (default: one run)",
    )


def run(args: argparse.Namespace) -> None:
    if isinstance(args.resume, str):
        if args.output is not None and Path(args.output) != Path(args.resume):
            raise InputError(f"`resume` {args.resume} and `output` {args.output} are different directories: give one")
        args.output, args.resume = args.resume, True
    config = TrainConfig(**{name: getattr(args, name) for name in OPTIONS})
    config.model_args = dict(config.model_args) if config.model_args else None
    if args.repeats is not None:
        if config.seeds is not None:
            raise InputError("--repeats and --seeds exclude each other")
        if args.repeats < 1:
            raise InputError(f"--repeats: expected at least 1, got {args.repeats}")
        first = config.seed or 0
        config = replace(config, seed=None, seeds=tuple(range(first, first + args.repeats)))
    with process_group():
        if World.current().broadcast_from_rank0(lambda: has_seeds(config)):
            train_seeds(config, _log)
        else:
            train(config, _log)


def _log(line: str) -> None:
    print(with_flags(line), flush=True)
