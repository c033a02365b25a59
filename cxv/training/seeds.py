"""Several runs that differ only by their seed."""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..checkpoint import BEST, LAST, PREVIOUS, read_last, write_json
from ..errors import InputError
from .config import OPTIONS, SUMMARY, TrainConfig, default_output
from .distributed import World
from .logging import summarize_seeds, summary_lines
from .trainer import train


def has_seeds(config: TrainConfig) -> bool:
    """Return True for several runs: ``seeds`` are given, or the directory to resume has runs of several seeds."""
    if config.seeds is not None:
        return True
    root = Path(config.output or default_output(config))
    return config.resume and not (root / LAST).exists() and bool(_begun(root))


def train_seeds(config: TrainConfig, log: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Train once for each of ``config.seeds`` in ``output/seed-N``, and write ``output/summary.json``.

    The summary has the best, mean and standard deviation of top-1. With ``resume``, finished runs are not trained
    again, an interrupted run continues, and the other runs start. ``max_time`` is the time of all runs together; when
    it is over, there is no ``summary.json`` yet.

    Returns:
        The result of :func:`cxv.training.logging.summarize_seeds`, or an empty dict if ``max_time`` is over.

    Raises:
        InputError: As :func:`train`, or if ``output`` has something else.
    """
    world, start = World.current(), time.monotonic()
    log = (log or (lambda line: print(line, flush=True))) if world.is_main else (lambda line: None)
    root = Path(config.output or default_output(config))
    begun, run = world.broadcast_from_rank0(lambda: _check_root(config, root))
    seeds = config.seeds or run["seeds"]
    runs = {}
    for n, seed in enumerate(seeds, 1):
        log(f"seed {seed}, run {n} of {len(seeds)}")
        output = root / f"seed-{seed}"
        config_of_seed = replace(config, seed=seed, seeds=tuple(seeds), output=str(output))
        if config.resume and output not in begun:
            given = {k: v for k, v in asdict(config_of_seed).items() if v is not None}
            config_of_seed = TrainConfig(**{k: v for k, v in run.items() if k in OPTIONS} | given | {"resume": False})
        others = f"and the other seeds after it with  cxv train --resume {root}"
        try:
            result = train(config_of_seed, log, start)
        except KeyboardInterrupt:
            log(others)
            raise
        if not result.finished:
            log(others)
            return {}
        runs[seed] = result.summary
    total = summarize_seeds(runs)
    if world.is_main:
        write_json(root / SUMMARY, total)
    for line in summary_lines(total):
        log(line)
    log(f"in {root}: {SUMMARY}, and of each seed in its folder {BEST}, {LAST} and the rest")
    return total


def _check_root(config: TrainConfig, root: Path) -> tuple[list[Path], dict[str, Any]]:
    """The runs in ``root`` that have begun, and when resuming their arguments."""
    begun = _begun(root)
    if config.seed is not None:
        raise InputError("`seed`: with several seeds give `seeds` alone")
    if config.resume and not begun:
        raise InputError(f"`resume`: {root} holds no runs with several seeds to go on with")
    if begun and not config.resume and not config.overwrite:
        raise InputError(
            f"`output`: {root} holds other runs ({', '.join(path.name for path in begun)}); give `resume` to go on "
            "with them, `overwrite` to delete them, or another directory"
        )
    if (root / LAST).exists():
        raise InputError(f"`output`: {root} holds a single run: give another directory for several seeds")
    run = dict(read_last(begun[0])[0]["args"]) if config.resume else {}
    seeds = config.seeds or run["seeds"]
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise InputError(f"`seeds`: expected different whole numbers, at least 0, got {','.join(map(str, seeds))}")
    others = [path.name for path in begun if path.name not in {f"seed-{seed}" for seed in seeds}]
    if config.overwrite and others:
        raise InputError(
            f"`overwrite`: {root} holds runs of other seeds too ({', '.join(others)}): delete them yourself"
        )
    return begun, run


def _begun(root: Path) -> list[Path]:
    return sorted({path.parent for name in (LAST, PREVIOUS) for path in root.glob(f"seed-*/{name}")})
