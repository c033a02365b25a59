"""Models by name: Table 1's fifteen rows as ``family-layers`` or ``family-layers/heads``."""

import difflib
import fnmatch
import inspect
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cxv_kernels.validation import to_numbers

from ..checkpoint import find_checkpoint, load_weights, read_checkpoint
from ..errors import InputError, first_line
from . import baselines
from .cxv import CLTV, CNV, CPV
from .hybrid import HybridViLT, HybridViN, HybridViP
from .variants import variant_of

# Table 1's rows, and what builds a family: (depth=…, num_heads=…, **kwargs) → a model, without heads for some.
TABLE_1: dict[str, Callable[..., nn.Module]] = {
    "resnet-18": baselines.resnet,
    "resnet-34": baselines.resnet,
    "fnet-10": baselines.FNet,
    "mlp-mixer-5": baselines.mlp_mixer,
    "wavemix-5": baselines.WaveMix,
    "convmixer-16": baselines.convmixer,
    "vit-10/4": baselines.vit,
    "hybrid-vin-6/8": HybridViN,
    "hybrid-vip-6/8": HybridViP,
    "hybrid-vilt-6/8": HybridViLT,
    "cct-6/4": baselines.cct,
    "cvt-5/4": baselines.cvt,
    "cnv-5/4": CNV,
    "cltv-5/4": CLTV,
    "cpv-5/4": CPV,
}
_FUSED = (CLTV, CNV, CPV, HybridViLT, HybridViN, HybridViP)
_NAME = re.compile(r"([a-z-]+?)-(\d+)(?:/(\d+))?")
# family → (what builds it, whether its names have heads)
_FAMILIES = {m[1]: (build, m[3] is not None) for n, build in TABLE_1.items() if (m := _NAME.fullmatch(n))}

REFUSALS = (ValueError, TypeError, RuntimeError, ArithmeticError, AssertionError, ImportError)
"""What models, PyTorch's modules and the baselines' libraries raise about an argument, built or called."""


def list_models(filter: str = "") -> list[str]:
    """The names of the paper's models, those that match ``filter`` (shell wildcards) if it is given.

    Other depths and numbers of heads can be built too: ``create_model("cpv-3/8")``. The models of timm and vit-pytorch
    need the extra ``cxv[baselines]``.
    """
    return sorted(fnmatch.filter(TABLE_1, filter) if filter else TABLE_1)


def has_fused_ops(name: str) -> bool:
    """Whether ``use_fused`` makes a difference to the model of this name.

    Raises:
        ValueError: no such model.
    """
    return _parse(name)[0] in _FUSED


def downsampling(name: str) -> str:
    """The argument that makes a model's map smaller than the image: ``patch_size`` of one of patches, else
    ``stem_stride``, also for a name that :func:`create_model` refuses.
    """
    with suppress(ValueError):
        if "patch_size" in inspect.signature(_parse(name)[0]).parameters:
            return "patch_size"
    return "stem_stride"


def create_model(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a model by name; with ``checkpoint`` a trained one.

    Args:
        name: ``family-depth/heads``, e.g. ``"cpv-5/4"``, or ``family-depth`` for those without heads, e.g.
            ``"resnet-18"``; case does not matter.
        checkpoint: the weights: a file of :func:`cxv.save_safetensors`, the ``--output`` of a run of ``cxv train`` (its
            best epoch), or a ``.pt`` of it. Its arguments are the defaults then. Another ``num_classes`` than its own
            makes a fresh classifier on the trained features.
        device, dtype: of the model; None leaves parameters and buffers where and as they are made. The same seed gives
            the same weights on every device.
        **kwargs: the model's own, e.g. ``num_classes``, ``img_size``, ``in_chans``; see :class:`cxv.CXV`, and
            :class:`cxv.models.variants.Variant` for the ablations of CPV, CNV and CLTV. ``use_fused`` and
            ``recompute`` are accepted by all models; those without fused ops ignore them.

    Raises:
        ValueError: no such model, or ``depth`` or ``num_heads`` given besides the name; a checkpoint that is missing,
            damaged, of another model, or whose weights do not fit;
        ImportError: a baseline's library is not installed.
    """
    kwargs = to_numbers(kwargs)
    build, depth, heads = _parse(name)
    twice = {"depth", "num_heads"} & kwargs.keys()
    if twice:
        raise ValueError(f"{' and '.join(sorted(twice))} come from the name {name!r}: give them there")
    if checkpoint is not None:
        return _create_trained(name, checkpoint, kwargs).to(device=device, dtype=dtype)
    model = variant_of(build, kwargs)(
        depth=depth,
        **({} if heads is None else {"num_heads": heads}),
        **{k: v for k, v in kwargs.items() if build in _FUSED or k not in ("use_fused", "recompute")},
    )
    model.model_name, model.model_kwargs = name.lower(), kwargs  # what save_safetensors writes beside the weights
    return model.to(device=device, dtype=dtype)


def load_model(
    checkpoint_dir: str | Path,
    which: str = "best",
    device: torch.device | str = "cpu",
    use_fused: bool | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Rebuild a trained model from its run's directory or its file alone.

    Args:
        checkpoint_dir: the ``--output`` of the run, one of the checkpoint files in it, a file of
            :func:`cxv.save_safetensors`, or a directory with one named ``model.safetensors``.
        which: ``"best"`` or ``"last"``, of a run.
        device: where to put the model.
        use_fused: the fused kernels or plain PyTorch; default as in the run.

    Returns:
        The model, in ``eval()`` mode, and the checkpoint: ``classes`` (names in label order), ``img_size``
        (pixels), ``in_chans``, ``normalization``, ``args``, ``epoch`` …

    Raises:
        InputError: no such checkpoint, a damaged one, or one whose weights do not fit the model that it
        names.
    """
    path = find_checkpoint(checkpoint_dir, which)
    checkpoint = read_checkpoint(path)
    model = build_trained(checkpoint, path, {} if use_fused is None else {"use_fused": use_fused})
    return model.to(device).eval(), checkpoint


def build_trained(checkpoint: dict[str, Any], path: str | Path, kwargs: dict[str, Any]) -> nn.Module:
    """The model that a checkpoint describes, its arguments replaced by ``kwargs``, with its weights.

    Raises:
        InputError: the file, named ``path``, describes no model, or its weights are those of another.
    """
    try:
        model = build_model(checkpoint["model_name"], checkpoint["model_kwargs"] | kwargs)
    except MemoryError:
        raise
    except Exception as error:  # arguments that somebody else wrote raise nearly anything
        raise InputError(f"{path}: the model it names cannot be built ({first_line(error)})") from error
    load_weights(model, checkpoint, path)
    return model


def build_model(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """``cxv.create_model``, its refusals as :class:`InputError`."""
    try:
        return create_model(name, **kwargs)
    except REFUSALS as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None:
            raise InputError(f"`model` {name}: {first_line(error)}") from error
        argument = f"`{unknown[1]}`" if unknown[1] in ("embed_dim", "drop_rate") else f"`model_args` {unknown[1]}"
        raise InputError(f"{argument}: {name} has no such argument") from error


def _create_trained(name: str, path: str | Path, kwargs: dict[str, Any]) -> nn.Module:
    path = find_checkpoint(path)
    checkpoint = read_checkpoint(path)
    if checkpoint["model_name"].lower() != name.lower():
        raise ValueError(f"{path}: a checkpoint of {checkpoint['model_name']}, and not of {name}")
    trained = len(checkpoint["classes"])
    num_classes = kwargs.pop("num_classes", trained)
    fresh = num_classes != trained
    pool = {"global_pool": kwargs.pop("global_pool")} if fresh and "global_pool" in kwargs else {}
    model = build_trained(checkpoint, path, kwargs)
    if fresh:
        if not hasattr(model, "reset_classifier"):
            raise ValueError(f"num_classes of {name} must be {trained}, as in {path}, got {num_classes}")
        model.reset_classifier(num_classes, **pool)
    return model


def _parse(name: str) -> tuple[Callable[..., nn.Module], int, int | None]:
    match = _NAME.fullmatch(name.lower())
    build, has_heads = _FAMILIES.get(match[1], (None, False)) if match else (None, False)
    if match is None or build is None or has_heads != (match[3] is not None):
        close = difflib.get_close_matches(name.lower(), TABLE_1, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"model must be one of {', '.join(map(repr, list_models()))}, or the same families with other "
            f"layers/heads, got {name!r}{hint}"
        )
    return build, int(match[2]), int(match[3]) if has_heads else None
