"""Share weights in one safetensors file that describes the model and its training."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from cxv_kernels.validation import is_plain_tensor, to_numbers

from .checkpoint import METADATA, METADATA_KEY, atomic_write, check_metadata, find_checkpoint, read_checkpoint
from .data.loader import MEAN, STD
from .errors import InputError
from .models.backbone import Backbone
from .models.registry import build_trained

_PRIVATE = ("init", "data_dir", "labels", "cache_dir", "data_on_device", "output", "device", "threads", "seeds")
"""Arguments of a run that are not written into a shared file."""


def save_safetensors(
    source: nn.Module | str | Path,
    path: str | Path,
    *,
    which: str = "best",
    dtype: torch.dtype | None = None,
    **metadata: Any,
) -> None:
    """Write the weights of a model and their metadata into one safetensors file, atomically.

    ``cxv.create_model(name, checkpoint=path)``, ``cxv eval``, ``cxv predict`` and every other reader of safetensors can
    read the file. Before it is written, the weights are loaded into a new model as a check.

    Args:
        source: A model of :func:`cxv.create_model`, also compiled or in (Distributed)DataParallel; or the ``--output``
            of ``cxv train``; or a ``.pt`` file in it.
        path: File to write. Its name ends in ``.safetensors``.
        which: Weights of the ``"best"`` or the ``"last"`` epoch of a run.
        dtype: Floating-point dtype of the file, for example ``torch.float16`` for half the size. Default: the dtype of
            the weights. A model that loads the file has float32 parameters.
        **metadata: Entries that replace the metadata of ``source`` (see ``cxv.checkpoint.METADATA``): ``classes``,
            names in label order (default: the labels); ``normalization``, mean and std of pixels in [0, 1] (default:
            0.5 and 0.5, as in the paper); ``seed``; ``metrics``, numbers by name; ``notes``, texts by
            name, for people. For a model that :func:`cxv.create_model` did not build, also ``model_name`` and
            ``model_kwargs``.

    Raises:
        InputError: If the checkpoint is missing or damaged, the metadata are unknown or do not fit the model, the
            weights are quantized or sharded, ``dtype`` is not a floating-point dtype, or the file cannot be written.

    Example::

        cxv.save_safetensors("runs/digits-cpv-2-4", "model.safetensors")
    """
    from safetensors.torch import save

    path = Path(path)
    if path.suffix != ".safetensors":
        raise InputError(f"path: expected a name that ends in .safetensors, got {path}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(f"dtype: expected a floating-point dtype or None, got {dtype!r}")
    if isinstance(source, nn.Module):
        if which != "best":
            raise InputError(f"which: chooses among the weights of a run, and source is a model; got {which!r}")
        source = _unwrapped(source)
        weights = dict(source.state_dict())
    else:
        source = read_checkpoint(find_checkpoint(source, which))
        weights = source["model"]
    metadata = describe(source, **metadata)
    for name, t in weights.items():
        if not isinstance(t, torch.Tensor) or not is_plain_tensor(t):
            raise InputError(
                f"{name}: expected a plain tensor, got {type(t).__name__}: save the model before it is quantized, and "
                "gather sharded weights"
            )
        weights[name] = t.detach().cpu().to(dtype if t.is_floating_point() else None).contiguous()
    with torch.random.fork_rng(devices=[]):  # the new model must not change the caller's random state
        build_trained({**metadata, "model": weights}, f"{path} (not written)", {})
    atomic_write(path, save(weights, {"format": "pt", METADATA_KEY: json.dumps(metadata)}))


def describe(source: nn.Module | Mapping[str, Any], **given: Any) -> dict[str, Any]:
    """Return the metadata of a model or a checkpoint; ``given`` replaces entries.

    Raises:
        InputError: If metadata are unknown, missing, of the wrong type or contradictory.
    """
    if unknown := sorted(given.keys() - METADATA.keys()):
        raise InputError(f"{unknown[0]}: no such metadata; allowed: {', '.join(METADATA)}")
    found = (_of_model(source) if isinstance(source, nn.Module) else _of_checkpoint(source)) | to_numbers(given)
    if found["model_name"] is None:
        raise InputError(
            "model_name and model_kwargs: give them, as cxv.create_model did not build this "
            f"{type(source).__name__} and they cannot be read from it"
        )
    kwargs = found["model_kwargs"]
    metadata = {
        "classes": [str(label) for label in range(kwargs.get("num_classes", 10))],
        "img_size": kwargs.get("img_size", 32),
        "in_chans": kwargs.get("in_chans", 3),
        "normalization": {"mean": MEAN, "std": STD},
        **dict.fromkeys(("preprocessing", "seed", "epoch")),
        **{name: {} for name in ("metrics", "args", "notes")},
        **found,
    }
    check_metadata(metadata)
    try:
        json.dumps(metadata)
    except (TypeError, ValueError) as error:
        raise InputError(f"metadata: expected numbers, strings, lists and dicts ({error})") from error
    return metadata


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of torch.compile and data parallelism."""
    while hasattr(model, "_orig_mod") or isinstance(model, DataParallel | DistributedDataParallel):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model


def _of_model(model: nn.Module) -> dict[str, Any]:
    model = _unwrapped(model)
    name, kwargs = getattr(model, "model_name", None), dict(getattr(model, "model_kwargs", {}))
    if hasattr(model, "num_classes"):  # reset_classifier changes it
        kwargs["num_classes"] = model.num_classes
    if isinstance(model, Backbone) and model.global_pool != kwargs.get("global_pool", model.pool):
        kwargs["global_pool"] = model.global_pool
    return {"model_name": name, "model_kwargs": kwargs}


def _of_checkpoint(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of a ``.pt`` file of ``cxv train``, or of a safetensors file."""
    found = {name: checkpoint[name] for name in METADATA if name in checkpoint}
    found["args"] = {k: v for k, v in checkpoint["args"].items() if v is not None and k not in _PRIVATE}
    if "history" in checkpoint:
        found["metrics"] = {k: v for k, v in _row_of_weights(checkpoint).items() if k.endswith(("_loss", "_top1"))}
        found["seed"] = checkpoint["args"].get("seed")
    return found


def _row_of_weights(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the metrics of the weights. Weights from the middle of an epoch have none."""
    history, optimizer = checkpoint["history"], checkpoint["optimizer"]
    if not history or checkpoint.get("resume_state") is not None:
        return {}
    if optimizer["phase_epoch"] > 0:
        return history[-1]
    return next(row for row in history if row["epoch"] == optimizer["best_epoch"])  # a new phase has reloaded them
