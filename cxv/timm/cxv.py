"""The entry points of timm's registry. timm calls a module of models by its file's name, so this one is ``cxv``."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch

try:
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
except ImportError as error:
    raise ImportError("cxv.timm needs timm, which is not installed: pip install 'cxv[baselines]'") from error

from ..checkpoint import find_pretrained, read_checkpoint
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


def _described(overlay: Mapping[str, Any]) -> dict[str, Any]:
    """Add the description of the weights to ``overlay``, if its ``file`` has one."""
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


def _pretrained(name: str) -> dict[str, Any]:
    """Return the entries of timm's configuration for the weights in this package, none if it has none."""
    family, depth, heads = name.rsplit("_", 2)
    with suppress(InputError):
        return _described({"file": str(find_pretrained(f"{family.replace('_', '-')}-{depth}/{heads}"))})
    return {}


default_cfgs = generate_default_cfgs(
    {
        name: (_WITH_CLASS_TOKEN if name in ("hybrid_vip_6_8", "hybrid_vin_6_8") else _CFG) | _pretrained(name)
        for name in ("cpv_5_4", "cnv_5_4", "cltv_5_4", "hybrid_vip_6_8", "hybrid_vin_6_8", "hybrid_vilt_6_8")
    }
)


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
    if overlay.get("url") or overlay.get("hf_hub_id"):  # in place of the weights in this package
        overlay = {"file": None, **overlay}
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
