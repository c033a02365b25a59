"""WaveMix as of November 2021 (Jeevan & Sethi, arXiv 2203.03689 describes a later form): mixing by Haar wavelets.

The authors' package holds later architectures, none of which has Table 1's counts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cxv_kernels.tracing import refuse_torchscript
from cxv_kernels.validation import python_numbers

from ..arguments import check_at_least, classifier

LEVELS = 4


def haar(x: Tensor) -> tuple[Tensor, Tensor]:
    """One level of the orthonormal 2-D Haar transform.

    Args:
        x: (B, C, H, W); an odd height or width is zero-padded at its end.

    Returns:
        The approximation (B, C, ⌈H/2⌉, ⌈W/2⌉), and the vertical, horizontal and diagonal details (B, 3C, ⌈H/2⌉, ⌈W/2⌉).
    """
    x = F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2))
    a, b, c, d = x[..., ::2, ::2], x[..., ::2, 1::2], x[..., 1::2, ::2], x[..., 1::2, 1::2]
    low, high = (a + b, c + d), (a - b, c - d)
    details = (low[0] - low[1], high[0] + high[1], high[0] - high[1])
    return (low[0] + low[1]) / 2, torch.cat(details, dim=1) / 2


class WaveMixBlock(nn.Module):
    """x + the mixing of x: four levels of the transform, one MLP for all of them, each brought back to x's size."""

    def __init__(self, dim: int, hidden_dim: int, drop_rate: float):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Conv2d(4 * dim, hidden_dim, 1),
            nn.GELU(),
            nn.Dropout(drop_rate),
            nn.Conv2d(hidden_dim, hidden_dim, 1),
            nn.Dropout(drop_rate),
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(hidden_dim, dim // LEVELS, 2**level + 2, stride=2**level, padding=1)
            for level in range(1, LEVELS + 1)
        )
        self.mix = nn.Sequential(nn.Conv2d(dim, dim, 5, padding=2, groups=dim), nn.GELU(), nn.BatchNorm2d(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, H, W) → the same; H and W of at least 16."""
        low, levels = x, []
        for up in self.up:
            low, details = haar(low)
            y = up(self.mlp(torch.cat((low, details), dim=1)))
            levels.append(y[..., : x.shape[-2], : x.shape[-1]])
        return x + self.mix(torch.cat(levels, dim=1))


class WaveMix(nn.Module):
    """Table 1's WaveMix; any image size.

    Args:
        depth: blocks. embed_dim: channels, a multiple of 4. ff_channel: width of the MLP; 32 is inferred from Table 1.
        in_chans: input channels. num_classes: classes; 0 leaves out the classifier. drop_rate: dropout in the MLP.
        stem_stride: of the first convolution. img_size: not used.

    Raises:
        ValueError: an argument out of range.
    """

    __prepare_scriptable__ = refuse_torchscript

    @python_numbers
    def __init__(
        self,
        depth: int = 5,
        img_size: int = 32,
        in_chans: int = 3,
        num_classes: int = 10,
        embed_dim: int = 64,
        ff_channel: int = 32,
        drop_rate: float = 0.5,
        stem_stride: int = 1,
    ):
        super().__init__()
        check_at_least(1, depth=depth, ff_channel=ff_channel, in_chans=in_chans, stem_stride=stem_stride)
        check_at_least(0, num_classes=num_classes)
        check_at_least(LEVELS, embed_dim=embed_dim)
        if embed_dim % LEVELS:
            raise ValueError(f"embed_dim must be a multiple of {LEVELS}, got {embed_dim}")
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim // 2, 3, stride=stem_stride, padding=1),
            nn.Conv2d(embed_dim // 2, embed_dim, 3, padding=1),
        )
        self.blocks = nn.Sequential(*(WaveMixBlock(embed_dim, ff_channel, drop_rate) for _ in range(depth)))
        self.head = classifier(embed_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) → logits (B, num_classes)."""
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))
