"""Models by name: the fifteen rows of Table 1 as ``family-layers`` or ``family-layers/heads``."""

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

from ..checkpoint import find_checkpoint, find_pretrained, load_weights, pretrained_models, read_checkpoint
from ..errors import InputError, first_line
from . import baselines
from .cxv import CLTV, CNV, CPV
from .hybrid import HybridViLT, HybridViN, HybridViP
from .variants import variant_of

# The rows of Table 1, with the function (depth=…, num_heads=…, **kwargs) that builds a model of the family. Some
# families have no heads.
TABLE_1: dict[str, Callable[..., nn.Module]] = {
    "resnet-18": baselines.resnet,
    "resnet-34": baselines.resnet,
    "fnet-10": baselines.fnet,
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
# family → (the function that builds it, True if its names have heads)
_FAMILIES = {m[1]: (build, m[3] is not None) for n, build in TABLE_1.items() if (m := _NAME.fullmatch(n))}

REFUSALS = (ValueError, TypeError, RuntimeError, ArithmeticError, AssertionError, ImportError)
"""Exceptions that models, PyTorch's modules and the libraries of the baselines raise for an invalid argument."""


def list_models(filter: str = "", pretrained: bool = False) -> list[str]:
    """Return the names of the paper's models, sorted.

    :func:`create_model` also builds other depths and numbers of heads, such as ``"cpv-3/8"``. The models of timm and
    vit-pytorch require the extra ``cxv[baselines]``.

    Args:
        filter: Pattern with shell wildcards. Default: all names.
        pretrained: Return only models that have pretrained weights in this package.
    """
    return sorted(fnmatch.filter(pretrained_models() if pretrained else TABLE_1, filter or "*"))


def has_fused_ops(name: str) -> bool:
    """Return True if ``use_fused`` has an effect on the model. Raise ``ValueError`` if the name is unknown."""
    return _parse(name)[0] in _FUSED


def downsampling(name: str) -> str:
    """Return the argument that reduces a model's feature map, ``patch_size``, or ``stem_stride`` by default."""
    with suppress(ValueError):
        if "patch_size" in inspect.signature(_parse(name)[0]).parameters:
            return "patch_size"
    return "stem_stride"


def create_model(
    name: str,
    *,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a model by name, optionally with the weights of a checkpoint.

    Args:
        name: ``family-depth/heads``, such as ``"cpv-5/4"``, or ``family-depth`` for a family without heads, such as
            ``"resnet-18"``. Upper and lower case are equivalent.
        pretrained: Load the weights of this package, see :func:`cxv.list_models`. The same as ``checkpoint=name``.
        checkpoint: Weights to load: a file of :func:`cxv.save_safetensors`, the ``--output`` of ``cxv train`` (its best
            epoch), a ``.pt`` file in it, or the name of a pretrained model. The arguments in the checkpoint are the
            defaults of ``**kwargs``. If ``num_classes`` differs from the checkpoint, the model gets a new classifier.
        device: Device of the model. Default: PyTorch's default device. A seed gives the same weights on every device.
        dtype: Dtype of the model. Default: PyTorch's default dtype.
        **kwargs: Arguments of the model, such as ``num_classes``, ``img_size`` and ``in_chans``. See :class:`cxv.CXV`,
            and :class:`cxv.models.variants.Variant` for the ablations of CPV, CNV and CLTV. All models accept
            ``use_fused`` and ``recompute``; models without fused ops ignore them.

    Returns:
        The model, a ``torch.nn.Module``.

    Raises:
        ValueError: If the name is unknown, ``depth`` or ``num_heads`` is passed in addition to the name, the model has
            no pretrained weights, or the checkpoint is missing, damaged, belongs to another model or has weights that
            do not fit.
        ImportError: If the library of a baseline is not installed.

    Example::

        model = cxv.create_model("cpv-5/4", num_classes=100, use_fused=True)
    """
    kwargs = to_numbers(kwargs)
    build, depth, heads = _parse(name)
    twice = {"depth", "num_heads"} & kwargs.keys()
    if twice:
        raise ValueError(f"{' and '.join(sorted(twice))} come from the name {name!r}: give them there")
    if pretrained and checkpoint is not None:
        raise ValueError(f"pretrained and checkpoint: give one of them, got checkpoint={str(checkpoint)!r} too")
    if pretrained:
        checkpoint = find_pretrained(name)
    if checkpoint is not None:
        return _create_trained(name, checkpoint, kwargs).to(device=device, dtype=dtype)
    model = variant_of(build, kwargs)(
        depth=depth,
        **({} if heads is None else {"num_heads": heads}),
        **{k: v for k, v in kwargs.items() if build in _FUSED or k not in ("use_fused", "recompute")},
    )
    model.model_name, model.model_kwargs = name.lower(), kwargs  # save_safetensors writes them with the weights
    return model.to(device=device, dtype=dtype)


def load_model(
    checkpoint_dir: str | Path, which: str = "best", device: torch.device | str = "cpu", use_fused: bool | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Load a trained model from the directory of its run or from a file.

    Args:
        checkpoint_dir: The ``--output`` of the run, a checkpoint file in it, a file of :func:`cxv.save_safetensors`, a
            directory with a file ``model.safetensors``, or the name of a pretrained model.
        which: The ``"best"`` or the ``"last"`` epoch of a run.
        device: Device of the model.
        use_fused: Use fused kernels, or plain PyTorch. Default: as in the run.

    Returns:
        The model in ``eval()`` mode, and the checkpoint, a dict with ``classes`` (names in label order), ``img_size``
        (pixels), ``in_chans``, ``normalization``, ``args``, ``epoch`` and more.

    Raises:
        InputError: If the checkpoint is missing or damaged, or its weights do not fit the model that it names.
    """
    path = find_checkpoint(checkpoint_dir, which)
    checkpoint = read_checkpoint(path)
    model = build_trained(checkpoint, path, {} if use_fused is None else {"use_fused": use_fused})
    return model.to(device).eval(), checkpoint


def build_trained(checkpoint: dict[str, Any], path: str | Path, kwargs: dict[str, Any]) -> nn.Module:
    """Build the model of the checkpoint ``path`` with its weights; ``kwargs`` replace the arguments in it.

    ``InputError`` is raised if the checkpoint does not describe a model, or its weights do not fit.
    """
    try:
        model = build_model(checkpoint["model_name"], checkpoint["model_kwargs"] | kwargs)
    except MemoryError:
        raise
    except Exception as error:  # arguments in a foreign file can raise almost any exception
        raise InputError(f"{path}: the model it names cannot be built ({first_line(error)})") from error
    load_weights(model, checkpoint, path)
    return model


def build_model(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """Call :func:`create_model` and convert errors about arguments to :class:`InputError`."""
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
