"""The entry points of timm's registry. timm calls a module of models by its file's name, so this one is ``cxv``."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch

try:
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
except ImportError as error:
    raise ImportError("cxv.timm needs timm, which is not installed: pip install 'cxv[baselines]'") from error

from ..checkpoint import read_checkpoint
from ..data.loader import MEAN, STD
from ..errors import InputError
from ..models import CLTV, CNV, CPV, HybridViLT, HybridViN, HybridViP
from ..models.arguments import image_size
from ..models.backbone import Backbone
from ..models.variants import variant_of

_CFG = {
    "url": "",
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "pool_size": (32, 32),
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "mean": (MEAN,) * 3,
    "std": (STD,) * 3,
    "first_conv": "stem.0",
    "classifier": "head",
}
# The class token and the pixels are one column, and the learned positions fix the size of the image.
_WITH_CLASS_TOKEN = _CFG | {"pool_size": (1 + 32 * 32, 1), "fixed_input_size": True}
default_cfgs = generate_default_cfgs(
    {
        "cpv_5_4": _CFG,
        "cnv_5_4": _CFG,
        "cltv_5_4": _CFG,
        "hybrid_vip_6_8": _WITH_CLASS_TOKEN,
        "hybrid_vin_6_8": _WITH_CLASS_TOKEN,
        "hybrid_vilt_6_8": _CFG,
    }
)


def _described(overlay: Mapping[str, Any]) -> dict[str, Any]:
    """``overlay`` with what its file of ours, if it has one, says of the weights."""
    found: dict[str, Any] = {}
    with suppress(InputError):  # no file, or not one of ours: timm loads it or raises
        if overlay.get("file"):
            checkpoint = read_checkpoint(overlay["file"])
            channels = checkpoint["in_chans"]
            size = image_size(checkpoint["img_size"])
            found = {"num_classes": len(checkpoint["classes"]), "input_size": (channels, *size)}
            for name, value in checkpoint["normalization"].items():
                found[name] = tuple(value) if isinstance(value, list | tuple) else (value,) * channels
    return {**found, **overlay}


def _create(
    model: type[Backbone],
    variant: str,
    pretrained: bool,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> torch.nn.Module:
    """Build a model as timm does.

    Args:
        model: the class. variant: its name in timm. pretrained: load weights.
        pretrained_cfg, pretrained_cfg_overlay: timm's; of a ``pretrained_cfg`` that is a dict, entries that are missing
            are those of the variant. device, dtype: of the model. **kwargs: timm's, and the model's own.
    """
    overlay = pretrained_cfg_overlay or {}
    if isinstance(pretrained_cfg, Mapping):
        pretrained_cfg, overlay = None, {**pretrained_cfg, **overlay}
    features = {"out_indices": min(3, kwargs.get("depth", 3)), "feature_cls": "getter"}
    built = build_model_with_cfg(
        variant_of(model, kwargs),
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=_described(overlay),
        feature_cfg=features,
        **kwargs,
    )
    return built.to(device=device, dtype=dtype)


def _entry_point(name: str, model: type[Backbone]) -> Callable[..., torch.nn.Module]:
    """Register ``timm.create_model(name)``."""

    def create(pretrained: bool = False, **kwargs: Any) -> torch.nn.Module:
        return _create(model, name, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{model.__name__} as in Table 1, see :class:`cxv.{model.__name__}`."
    return register_model(create)


cpv_5_4 = _entry_point("cpv_5_4", CPV)
cnv_5_4 = _entry_point("cnv_5_4", CNV)
cltv_5_4 = _entry_point("cltv_5_4", CLTV)
hybrid_vip_6_8 = _entry_point("hybrid_vip_6_8", HybridViP)
hybrid_vin_6_8 = _entry_point("hybrid_vin_6_8", HybridViN)
hybrid_vilt_6_8 = _entry_point("hybrid_vilt_6_8", HybridViLT)
