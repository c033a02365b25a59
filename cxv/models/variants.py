"""CPV, CNV and CLTV with the ablations of section 5 of the paper, which do not improve the models.

``cxv.create_model("cnv-5/4", stem_convs=3)`` builds a variant if one of its arguments is passed.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from cxv_kernels.tracing import record_call
from cxv_kernels.validation import check_choice, python_numbers

from .arguments import check_at_least, image_size
from .blocks import ConvNorm
from .cxv import CLTV, CNV, CPV


class StdLayerNorm(nn.LayerNorm):
    """LayerNorm of the released code: (x − μ) / (σ + eps) instead of (x − μ) / √(σ² + eps).

    Its gradient is NaN if all channels are equal.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (…, C) over its channels."""
        std = x.var(dim=-1, correction=0, keepdim=True).sqrt()
        return (x - x.mean(dim=-1, keepdim=True)) / (std + self.eps) * self.weight + self.bias


NORMS = {"layer": nn.LayerNorm, "layer_std": StdLayerNorm, "batch": nn.BatchNorm2d}


class ConvNormVariant(ConvNorm):
    """ConvNorm with GELU before the norm, another norm or none, or a residual around the convolution or both.

    The residual is omitted if the numbers of input and output channels differ.
    """

    def __init__(
        self, in_chans: int, out_chans: int, use_fused: bool, act: bool, norm: str | None, residual: str | None
    ):
        super().__init__(in_chans, out_chans, use_fused)
        self.norm = nn.Identity() if norm is None else NORMS[norm](out_chans)
        self.act = nn.GELU() if act else None
        self.residual = residual if in_chans == out_chans else None

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, in_chans, H, W) to (B, out_chans, H, W)."""
        if isinstance(x, Proxy):
            return record_call(self, x)
        if self.act is None and self.residual != "conv":
            y = super().forward(x)
        else:
            y = self.conv(x)
            y = y if self.act is None else self.act(y)
            y = self.normalize(y + x if self.residual == "conv" else y)
        return y + x if self.residual == "conv_norm" else y


class Variant:
    """The arguments of section 5, for a subclass that also derives from one of our models.

    The results in parentheses are those of the paper.

    Args:
        stem_convs: Number of convolutions in the stem, 1 to 3. The last has C/2 channels, each one before it half as
            many (Table 2, CNV on CIFAR-10: 89.45, 89.93 and 89.56 %).
        stem_padding: With 0 the stem shrinks the image (17 % less memory, a loss of less than 2 points).
        stem_act: GELU between the convolutions of the stem (a loss of about 2 points).
        stem_pool: 3×3 max-pooling with stride 1 after each convolution, as in CCT ("similar decrease").
        conv_act: GELU between convolution and norm of a layer ("decrease").
        conv_every: With 2, only layers 0, 2, 4 … have convolution and norm ("degraded").
        conv_residual: Residual around the ``"conv"`` or the ``"conv_norm"`` of each layer except layer 0, whose numbers
            of channels differ ("no gain").
        positions: ``"learned"``, a vector per token before each attention, or ``"rotary"`` ("no gain"). Learned
            positions fix the size of the image.
        norm: ``"layer"``, ``"layer_std"`` (the norm of the released code, which adds eps to the standard deviation; its
            gradient is NaN if all channels of a pixel are equal) or ``"batch"`` (a loss of more than 4 points).
        norm_every: With 2, only layers 0, 2, 4 … have a norm ("the loss does not converge").
        pre_norm: Additional LayerNorm inside each residual branch ("degraded considerably").
        **kwargs: Arguments of the model.

    Raises:
        ValueError: If an argument is out of range.
    """

    @python_numbers
    def __init__(
        self,
        *,
        stem_convs: int = 2,
        stem_padding: int = 1,
        stem_act: bool = False,
        stem_pool: bool = False,
        conv_act: bool = False,
        conv_every: int = 1,
        conv_residual: str | None = None,
        positions: str | None = None,
        norm: str = "layer",
        norm_every: int = 1,
        pre_norm: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        check_at_least(1, conv_every=conv_every, norm_every=norm_every)
        check_choice("stem_convs", stem_convs, (1, 2, 3))
        check_choice("stem_padding", stem_padding, (0, 1))
        check_choice("norm", norm, tuple(NORMS))
        check_choice("conv_residual", conv_residual, (None, "conv", "conv_norm"))
        check_choice("positions", positions, (None, "learned", "rotary"))
        self.stem, tokens = self._make_stem(stem_convs, stem_padding, stem_act, stem_pool)
        for i, layer in enumerate(self.layers):
            old = layer.conv_norm
            layer.conv_norm = nn.Identity()
            if i % conv_every == 0:
                kind = None if i % norm_every else norm
                use_fused = old.backend is None
                layer.conv_norm = ConvNormVariant(
                    old.conv.in_channels, self.embed_dim, use_fused, conv_act, kind, conv_residual
                )
            for branch in (layer.attn, layer.mlp):
                branch.pre_norm = nn.LayerNorm(self.embed_dim) if pre_norm else None
            layer.attn.rotary = positions == "rotary"
            if positions == "learned":
                layer.attn.pos_embed = nn.Parameter(
                    nn.init.trunc_normal_(torch.empty(1, tokens, self.embed_dim), std=0.02)
                )

    def _make_stem(self, convs: int, padding: int, act: bool, pool: bool) -> tuple[nn.Sequential, int]:
        """Return the stem and the number of tokens after it."""
        if self.embed_dim % 2 ** max(convs, 2):
            raise ValueError(f"embed_dim must be a multiple of {2**convs}, got {self.embed_dim}")
        height, width = image_size(self.img_size)
        layers: list[nn.Module] = []
        for i in reversed(range(convs)):  # to C/8, C/4 and C/2 channels
            in_chans = self.embed_dim // 2 ** (i + 2) if layers else self.in_chans
            stride = 1 if layers else self.stem[0].stride[0]
            height, width = ((side + 2 * padding - 3) // stride + 1 for side in (height, width))
            layers.append(nn.Conv2d(in_chans, self.embed_dim // 2 ** (i + 1), 3, stride=stride, padding=padding))
            layers += [nn.GELU()] if act and i else []
            layers += [nn.MaxPool2d(3, stride=1, padding=1)] if pool else []
        return nn.Sequential(*layers), height * width


class CPVVariant(Variant, CPV):
    """CPV with the arguments of :class:`Variant`."""


class CNVVariant(Variant, CNV):
    """CNV with the arguments of :class:`Variant`."""


class CLTVVariant(Variant, CLTV):
    """CLTV with the arguments of :class:`Variant`."""


_VARIANTS = {CPV: CPVVariant, CNV: CNVVariant, CLTV: CLTVVariant}
_ARGUMENTS = inspect.signature(Variant).parameters.keys() - {"kwargs"}


def variant_of(build: Callable[..., nn.Module], kwargs: Mapping[str, Any]) -> Callable[..., nn.Module]:
    """Return the class for ``kwargs``: ``build``, or its variant if an argument of section 5 is among them."""
    return _VARIANTS.get(build, build) if _ARGUMENTS & kwargs.keys() else build
