"""Table 1's baselines that a well-kept library has, in the rows' configurations (timm, vit-pytorch, torchvision).

All take images (B, in_chans, H, W), H and W of ``img_size``, and give logits (B, num_classes), or features where that
is 0; those of timm and vit-pytorch raise ImportError where their library is not installed. ``**kwargs`` are arguments
of timm's model.
"""

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import image_size

IMAGES = {"img_size": 32, "in_chans": 3, "num_classes": 10}
"""The defaults of all models."""


def _library(name: str, model: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{model} is built with {name}, which is not installed: pip install 'cxv[baselines]'"
        ) from error


def _reset_parameters(model: nn.Module) -> nn.Module:
    """Draw the weights as PyTorch's layers do by default, as the authors' models are, instead of timm's way."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.reset_parameters()
    return model


def resnet(
    depth: int, img_size: int | Sequence[int] = 32, in_chans: int = 3, num_classes: int = 10, stem_stride: int = 1
) -> nn.Module:
    """torchvision's ResNet-18 or -34 (He et al. 2016) as for CIFAR: a 3×3 stem and no max-pooling; any image size.

    Raises:
        ValueError: ``depth`` is not 18 or 34.
    """
    if depth not in (18, 34):
        raise ValueError(f"depth of a resnet must be 18 or 34, got {depth}")
    model = getattr(_library("torchvision.models", "resnet"), f"resnet{depth}")(num_classes=num_classes or 1)
    if not num_classes:
        model.fc = nn.Identity()
    model.conv1 = nn.Conv2d(in_chans, 64, 3, stride=stem_stride, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


def vit(
    depth: int,
    num_heads: int,
    *,
    embed_dim: int = 128,
    mlp_ratio: float = 2.0,
    drop_rate: float = 0.5,
    patch_size: int = 1,
    **kwargs: Any,
) -> nn.Module:
    """timm's ViT (Dosovitskiy et al. 2021) on pixels, with the authors' dropout, norms and initialization.

    qkv has no bias; dropout follows the attention's projection and both layers of the MLP.
    """
    sizes = {"depth": depth, "num_heads": num_heads, "embed_dim": embed_dim, "mlp_ratio": mlp_ratio}
    options = {"patch_size": patch_size, "proj_drop_rate": drop_rate, "qkv_bias": False, "norm_layer": nn.LayerNorm}
    library = _library("timm.models.vision_transformer", "vit")
    model = library.VisionTransformer(**sizes, **options, **IMAGES | kwargs)
    nn.init.normal_(model.cls_token)
    nn.init.normal_(model.pos_embed)
    return _reset_parameters(model)


class FourierMixing(nn.Module):
    """FNet's mixing of tokens: the real part of the Fourier transform over channels and tokens."""

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        """Map x (B, N, C) to the same shape and dtype. The options of timm's attention have no effect."""
        wide = x if x.dtype == torch.float64 else x.float()  # autocast does not cast the transform
        return torch.fft.fft2(wide).real.to(x.dtype)


def fnet(depth: int, *, mlp_ratio: float = 4.0, patch_size: int = 1, **kwargs: Any) -> nn.Module:
    """FNet (Lee-Thorp et al. 2021) as :func:`vit` with Fourier transforms in place of the attention.

    Table 1's counts require an ``mlp_ratio`` of 4; the text says 2.
    """
    model = vit(depth, 1, mlp_ratio=mlp_ratio, patch_size=patch_size, **kwargs)
    for block in model.blocks:
        block.attn = FourierMixing()
    return model


def mlp_mixer(
    depth: int,
    *,
    img_size: int | Sequence[int] = 32,
    embed_dim: int = 128,
    mlp_ratio: float = 2.0,
    drop_rate: float = 0.5,
    patch_size: int = 1,
    **kwargs: Any,
) -> nn.Module:
    """timm's MLP-Mixer (Tolstikhin et al. 2021) on pixels, with the authors' dropout, norms and initialization.

    Both MLPs widen by ``mlp_ratio``. 128 channels: with the text's 256 neither the parameters nor the MACs are
    Table 1's.
    """
    height, width = image_size(img_size)
    tokens = (height // patch_size) * (width // patch_size)
    sizes = {"num_blocks": depth, "embed_dim": embed_dim, "mlp_ratio": (mlp_ratio * tokens / embed_dim, mlp_ratio)}
    options = {"patch_size": patch_size, "proj_drop_rate": drop_rate, "norm_layer": nn.LayerNorm}
    library = _library("timm.models.mlp_mixer", "mlp-mixer")
    return _reset_parameters(library.MlpMixer(**sizes, **options, **IMAGES | {"img_size": img_size} | kwargs))


def convmixer(
    depth: int,
    *,
    img_size: int | Sequence[int] = 32,
    in_chans: int = 3,
    num_classes: int = 10,
    embed_dim: int = 256,
    kernel_size: int = 8,
    patch_size: int = 1,
) -> nn.Module:
    """timm's ConvMixer (Trockman & Kolter 2022), any image size; a kernel of 8 is what Table 1's MACs count."""
    sizes = {"depth": depth, "dim": embed_dim, "kernel_size": kernel_size, "patch_size": patch_size}
    library = _library("timm.models.convmixer", "convmixer")
    return library.ConvMixer(in_chans=in_chans, num_classes=num_classes, **sizes)


def cct(
    depth: int,
    num_heads: int,
    img_size: int | Sequence[int] = 32,
    in_chans: int = 3,
    num_classes: int = 10,
    embed_dim: int = 128,
    mlp_ratio: float = 4.0,
    drop_rate: float = 0.0,
    stem_stride: int = 1,
) -> nn.Module:
    """vit-pytorch's CCT (Hassani et al. 2021): three convolutions with max-pooling, six layers, pooling by attention.

    As the authors ran it: attention dropout and stochastic depth 0.1, MLPs of four times the width (the misspelled
    keyword of their script left the default).
    """
    size = tuple(-(-side // stem_stride) for side in image_size(img_size))
    sizes = {"num_layers": depth, "num_heads": num_heads, "embedding_dim": embed_dim, "mlp_ratio": mlp_ratio}
    images = {"img_size": size, "n_input_channels": in_chans, "num_classes": num_classes or 1}
    convolutions = {"n_conv_layers": 3, "kernel_size": 3, "stride": 1, "padding": 1}
    pooling = {"pooling_kernel_size": 3, "pooling_stride": 1, "pooling_padding": 1}
    dropout = {"dropout_rate": drop_rate, "attention_dropout": 0.1, "stochastic_depth_rate": 0.1}
    options = sizes | images | convolutions | pooling | dropout
    model = _library("vit_pytorch.cct", "cct").CCT(positional_embedding="learnable", **options)
    model.tokenizer.conv_layers[0][0].stride = (stem_stride, stem_stride)
    if not num_classes:
        model.classifier.fc = nn.Identity()
    return model


def cvt(
    depth: int,
    num_heads: int,
    img_size: int | Sequence[int] = 32,
    in_chans: int = 3,
    num_classes: int = 10,
    embed_dim: int = 128,
    mlp_ratio: int = 2,
    drop_rate: float = 0.5,
    stem_stride: int = 1,
) -> nn.Module:
    """vit-pytorch's CvT (Wu et al. 2021) in three stages of one width, heads of 64 channels; any image size.

    The attention map has no dropout, as in vit-pytorch at the time of the paper; it was added in March 2022.

    Raises:
        ValueError: ``depth`` below 3.
    """
    if depth < 3:
        raise ValueError(f"depth of a cvt must be at least 3, one layer per stage, got {depth}")
    stages = {}
    for stage, layers in enumerate((-(-depth // 3), -(-(depth - 1) // 3), depth // 3), start=1):
        options = {"emb_dim": embed_dim, "emb_kernel": 3, "emb_stride": stem_stride if stage == 1 else 1}
        options |= {"proj_kernel": 3, "kv_proj_stride": 1, "heads": num_heads, "depth": layers, "mlp_mult": mlp_ratio}
        stages |= {f"s{stage}_{name}": value for name, value in options.items()}
    model = _library("vit_pytorch.cvt", "cvt").CvT(
        num_classes=num_classes or 1, channels=in_chans, dropout=drop_rate, **stages
    )
    for module in model.modules():
        if hasattr(module, "attend"):  # an attention, whose own dropout is that of its map
            module.dropout = nn.Identity()
    if not num_classes:
        model.to_logits[-1] = nn.Identity()
    return model
