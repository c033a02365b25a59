"""``import cxv.timm`` registers CPV, CNV, CLTV and the hybrids with timm, under timm's module name ``cxv``:
``timm.create_model("cpv_5_4", num_classes=100)``.

Every argument of the model can be given (``depth=2, embed_dim=64, use_fused=True``), and timm's ``features_only``,
``out_indices``, ``device``, ``dtype`` and ``pretrained_cfg_overlay``. ``pretrained=True`` loads the weights in this
package (see :func:`cxv.list_models`). To load other weights of ``cxv train``, also give
``pretrained_cfg_overlay={"file": "a.safetensors"}`` with a file of :func:`cxv.save_safetensors`. The number of classes,
the size of the images, their mean and std come from that file.
"""

from .cxv import cltv_5_4, cnv_5_4, cpv_5_4, default_cfgs, hybrid_vilt_6_8, hybrid_vin_6_8, hybrid_vip_6_8

__all__ = ["cltv_5_4", "cnv_5_4", "cpv_5_4", "default_cfgs", "hybrid_vilt_6_8", "hybrid_vin_6_8", "hybrid_vip_6_8"]
