"""FNet for images (Lee-Thorp et al. 2021): token mixing by Fourier transforms."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from cxv_kernels.tracing import record_call, refuse_torchscript
from cxv_kernels.validation import python_numbers

from ..arguments import check_at_least, check_image_size, classifier, hidden_width, image_size

torch.fx.wrap("check_image_size")  # its branches depend on the shape, so a graph calls it as it is


class FourierMixing(nn.Module):
    """The real part of the Fourier transform over channels and tokens; float32 within autocast, which has none."""

    __prepare_scriptable__ = refuse_torchscript

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) → the same shape and dtype."""
        if isinstance(x, Proxy):
            return record_call(self, x)
        wide = x if x.dtype == torch.float64 else x.float()
        return torch.fft.fft2(wide).real.to(x.dtype)


class FNet(nn.Module):
    """Table 1's FNet: each pixel (or patch) a token, a class token, learned positions, pre-norm layers.

    Args:
        img_size: pixels a side, or (H, W). in_chans: input channels. num_classes: classes; 0 leaves out the classifier.
        embed_dim: channels of a token. depth: layers.
        mlp_ratio: hidden width of the MLP over ``embed_dim``; 4 is what Table 1's counts prove, the text says 2.
        drop_rate: dropout in the MLP. patch_size: in pixels.

    Raises:
        ValueError: an argument out of range, an ``img_size`` that is no multiple of ``patch_size``; from ``forward``,
            another image size.
    """

    __prepare_scriptable__ = refuse_torchscript

    @python_numbers
    def __init__(
        self,
        depth: int = 10,
        img_size: int | Sequence[int] = 32,
        in_chans: int = 3,
        num_classes: int = 10,
        embed_dim: int = 128,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.5,
        patch_size: int = 1,
    ):
        super().__init__()
        check_at_least(1, depth=depth, in_chans=in_chans, embed_dim=embed_dim, patch_size=patch_size)
        check_at_least(0, num_classes=num_classes)
        height, width = image_size(img_size)
        if height % patch_size or width % patch_size:
            raise ValueError(f"img_size must be a multiple of patch_size {patch_size}, got {img_size}")
        self.img_size = img_size
        hidden = hidden_width(embed_dim, mlp_ratio)
        self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.randn(1, height * width // patch_size**2 + 1, embed_dim))
        self.mixers = nn.ModuleList(nn.Sequential(nn.LayerNorm(embed_dim), FourierMixing()) for _ in range(depth))
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(embed_dim),
                nn.Linear(embed_dim, hidden),
                nn.GELU(),
                nn.Dropout(drop_rate),
                nn.Linear(hidden, embed_dim),
                nn.Dropout(drop_rate),
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head = classifier(embed_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) → logits (B, num_classes)."""
        check_image_size(x, self.img_size)
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        for mixer, mlp in zip(self.mixers, self.mlps, strict=True):
            x = x + mixer(x)
            x = x + mlp(x)
        return self.head(self.norm(x[:, 0]))
