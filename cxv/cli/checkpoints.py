"""The trained model that a command uses, and images for it."""

import argparse
from typing import Any

import torch
from torch import nn

from ..data import Data, load_data, normalize
from ..errors import InputError
from ..models.registry import load_model
from ..training.config import DEFAULTS


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
    checkpoint["args"] = DEFAULTS | dict.fromkeys(("data", "data_dir", "limit_test")) | checkpoint["args"]
    return model, checkpoint


def load_run_data(
    args: argparse.Namespace, checkpoint: dict[str, Any], *, same_classes: bool = False, **kwargs: Any
) -> Data:
    """Load the images of ``--data`` and ``--data-dir``, by default those of the run.

    Args:
        checkpoint: as :func:`open_checkpoint` returns it.
        same_classes: the classes must be the checkpoint's.
        **kwargs: arguments of :func:`load_data`; the run's own where they are None.

    Raises:
        InputError: the checkpoint does not name its dataset, or the images have other classes or channels.
    """
    run = checkpoint["args"]
    name = args.data or run["data"]
    if name is None:
        raise InputError(f"`data`: give it, as {args.checkpoint} does not say what the model was trained on")
    if name == run["data"]:
        if args.data_dir is None:
            kwargs["limit_test"] = kwargs.get("limit_test") or run["limit_test"]
        kwargs["data_dir"] = args.data_dir or run["data_dir"]
    else:
        kwargs["data_dir"] = args.data_dir
    kwargs["on_corrupt"] = kwargs.get("on_corrupt") or run["on_corrupt"]
    data = load_data(
        name,
        img_size=checkpoint["img_size"],
        seed=run["seed"],
        normalization=checkpoint["normalization"],
        **kwargs,
    )
    if same_classes and data.classes != checkpoint["classes"]:
        raise InputError(
            f"`data`: its classes ({', '.join(data.classes)}) are not those of the checkpoint "
            f"({', '.join(checkpoint['classes'])})"
        )
    if data.in_chans != checkpoint["in_chans"]:
        raise InputError(
            f"`data`: images of {data.in_chans} channels, and the checkpoint's model takes {checkpoint['in_chans']}"
        )
    return data
