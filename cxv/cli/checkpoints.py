"""The trained model that a command uses, and images for it."""

import argparse
import os
from typing import Any

import torch
from torch import nn

from ..data import Data, Preprocessing, load_data, normalize
from ..data.loader import locate
from ..errors import InputError
from ..models.registry import load_model
from ..training.config import DEFAULTS
from .flags import with_flags


def open_checkpoint(
    args: argparse.Namespace, device: torch.device | str, fused: bool | None
) -> tuple[nn.Module, dict[str, Any]]:
    """Load the model of ``--checkpoint``, and set ``--threads``.

    Returns:
        The model, in ``eval()`` mode, and the checkpoint; its ``args`` have the defaults where a shared file has none.
    """
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model, checkpoint = load_model(args.checkpoint, args.which, device, fused)
    try:
        normalize(torch.zeros(1, checkpoint["in_chans"], 1, 1, dtype=torch.uint8), **checkpoint["normalization"])
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"--checkpoint: {args.checkpoint} wants pixels normalized by {checkpoint['normalization']}; expected mean "
            f"and std, numbers or one for each of {checkpoint['in_chans']} channels"
        ) from error
    run = ("data", "data_dir", "labels", "limit_train", "limit_test", "validation", "max_pixels")
    checkpoint["args"] = DEFAULTS | dict.fromkeys(run) | checkpoint["args"]
    return model, checkpoint


def load_run_data(
    args: argparse.Namespace, checkpoint: dict[str, Any], *splits: str, match_classes: bool = True, **limits: int
) -> Data:
    """Load images that the flags name, by default those of the run, with the preprocessing of the checkpoint.

    Args:
        args: ``data``, ``data_dir``, and if the command has them ``labels``, ``cache_dir``, ``limit_test``,
            ``on_corrupt`` and ``max_pixels``.
        checkpoint: As :func:`open_checkpoint` returns it.
        *splits: ``"train"``, ``"validation"``, ``"test"``.
        match_classes: Match the classes to those of the checkpoint by name.
        **limits: ``limit_train`` and ``limit_test`` instead of those of the run.

    Raises:
        InputError: If the checkpoint does not name its dataset, or the images have classes that the model lacks.
    """
    run, options = checkpoint["args"], vars(args)
    own = locate(run["data"], run["data_dir"], run["labels"])
    given = (args.data, args.data_dir, options.get("labels"))
    if given == (None, None, None):
        if run["data"] is None:
            raise InputError(f"`data`: give it, as {args.checkpoint} does not say what the model was trained on")
        given = own
    elif given[0] is None and given[2] is None and own[0] != "digits":
        given = (own[0], given[1], None)  # another directory of the same kind
    name, data_dir, labels = locate(*given)
    is_own = name == own[0] and _same_file(labels, own[2]) and _same_file(data_dir, own[1])
    if name == own[0] and data_dir is None and labels is None:
        (name, data_dir, labels), is_own = own, True
    if is_own:
        limits = {k: run[k] for k in ("limit_train", "limit_test", "validation")} | limits
    if {"train", "validation"}.isdisjoint(splits):
        limits.pop("validation", None)
    if options.get("limit_test") is not None:
        limits["limit_test"] = args.limit_test
    data = load_data(
        name,
        data_dir,
        labels=labels,
        splits=splits,
        seed=run["seed"],
        cache_dir=options.get("cache_dir"),
        classes=checkpoint["classes"] if match_classes else None,
        divide=is_own,
        normalization=checkpoint["normalization"],
        **{k: options.get(k) or run[k] for k in ("on_corrupt", "max_pixels")},
        **Preprocessing.from_dict(checkpoint).of_pixels(),
        **limits,
        log=_log,
    )
    expected = checkpoint.get("data_fingerprint", {})
    if is_own and all(run[name] == value for name, value in limits.items()):
        for split in splits:
            if expected.get(split) not in (None, data.splits[split].fingerprint()):
                _log(f"the {split} images are not those of the run: files were added, removed or changed")
    return data


def _log(line: str) -> None:
    print(with_flags(line), flush=True)


def _same_file(path: str | None, other: str | None) -> bool:
    return path == other or (None not in (path, other) and os.path.realpath(path) == os.path.realpath(other))
