"""``import cxv.timm`` makes timm know CPV, CNV and CLTV: ``timm.create_model("cpv_5_4", num_classes=100)``.

Every argument of :class:`cxv.CXV` and of the model can be given (``depth=2, embed_dim=64, use_fused=True``), and timm's
``features_only``, ``out_indices``, ``pretrained_cfg_overlay``. Weights of ``cxv train`` load with ``pretrained=True,
pretrained_cfg_overlay={"file": "a.safetensors"}``, a file of :func:`cxv.save_safetensors`, which also says for how many
classes, of what images and with which mean and std; none come with timm.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

try:
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
except ImportError as error:
    raise ImportError("cxv.timm needs timm, which is not installed: pip install 'cxv[baselines]'") from error

from .models import CLTV, CNV, CPV, CXV
from .models.arguments import image_size
from .training.checkpoint import read_checkpoint
from .training.data import MEAN, STD
from .training.errors import InputError

_CFG = {
    "url": "",
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "pool_size": None,
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "mean": (MEAN,) * 3,
    "std": (STD,) * 3,
    "first_conv": "stem.0",
    "classifier": "head",
}
default_cfgs = generate_default_cfgs({"cpv_5_4": _CFG, "cnv_5_4": _CFG, "cltv_5_4": _CFG})


def _described(overlay: Mapping[str, Any]) -> dict[str, Any]:
    """``overlay`` with what its file of ours, if it has one, says of the weights."""
    found: dict[str, Any] = {}
    with suppress(InputError):  # somebody else's weights, or none: timm's loader judges them
        if overlay.get("file"):
            checkpoint = read_checkpoint(overlay["file"])
            channels = checkpoint["in_chans"]
            size = image_size(checkpoint["img_size"])
            found = {"num_classes": len(checkpoint["classes"]), "input_size": (channels, *size)}
            for name, value in checkpoint["normalisation"].items():
                found[name] = tuple(value) if isinstance(value, list | tuple) else (value,) * channels
    return {**found, **overlay}


def _create(
    model: type[CXV],
    variant: str,
    pretrained: bool,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    **kwargs: Any,
) -> CXV:
    overlay = _described(pretrained_cfg_overlay or {})
    features = {"out_indices": (-1,), "feature_cls": "getter"}
    return build_model_with_cfg(
        model, variant, pretrained, feature_cfg=features, pretrained_cfg_overlay=overlay, **kwargs
    )


@register_model
def cpv_5_4(pretrained: bool = False, **kwargs: Any) -> CPV:
    """CPV-5/4, see :class:`cxv.CPV`."""
    return _create(CPV, "cpv_5_4", pretrained, **kwargs)


@register_model
def cnv_5_4(pretrained: bool = False, **kwargs: Any) -> CNV:
    """CNV-5/4, see :class:`cxv.CNV`."""
    return _create(CNV, "cnv_5_4", pretrained, **kwargs)


@register_model
def cltv_5_4(pretrained: bool = False, **kwargs: Any) -> CLTV:
    """CLTV-5/4, see :class:`cxv.CLTV`."""
    return _create(CLTV, "cltv_5_4", pretrained, **kwargs)
