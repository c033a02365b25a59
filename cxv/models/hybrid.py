"""Hybrid ViP, ViN and ViLT: vision transformers with convolutional embedding and linear attention (Jeevan & Sethi,
arXiv 2107.02239; Table 1's hybrid rows)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .attention import LinearAttention, NystromAttention, PerformerAttention
from .cxv import Mlp
from .residual import to_tokens


class Hybrid(nn.Module):
    """What the hybrids share: three 3×3 convolutions, pre-norm layers of attention and MLP, and a linear classifier.

    Args:
        make_attention: (dim, num_heads=…, head_dim=…, drop_rate=…, use_fused=…, pre_norm=…) → a residual branch.
        cls_token: a class token and learned positions, the class token being what is classified after a LayerNorm;
            without them (Hybrid ViLT) the average over the pixels is.
        img_size: height and width in pixels; without ``cls_token`` any size is taken.
        in_chans, num_classes: channels of the input, classes. embed_dim: C, a multiple of 4.
        depth: layers. num_heads, head_dim: of the attention; their product need not be C.
        mlp_ratio: hidden width of the MLP over C. drop_rate: dropout in the MLP (the attention has none).
        stem_stride: of the first convolution (2 for 64×64 images).
        use_fused: as in :class:`cxv.CXV`.

    Raises:
        ValueError: an argument out of range; from ``forward``, an image of another size.
    """

    def __init__(
        self,
        make_attention: Callable[..., nn.Module],
        cls_token: bool,
        img_size: int = 32,
        in_chans: int = 3,
        num_classes: int = 10,
        embed_dim: int = 128,
        depth: int = 6,
        num_heads: int = 8,
        head_dim: int = 32,
        mlp_ratio: float = 2.0,
        drop_rate: float = 0.5,
        stem_stride: int = 1,
        use_fused: bool = False,
    ):
        super().__init__()
        if embed_dim < 4 or embed_dim % 4:
            raise ValueError(f"embed_dim must be a multiple of 4, got {embed_dim}")
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate must be in [0, 1), got {drop_rate}")
        self.img_size, self.num_classes, self.num_features = img_size, num_classes, embed_dim
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim // 4, 3, stride=stem_stride, padding=1),
            nn.Conv2d(embed_dim // 4, embed_dim // 2, 3, padding=1),
            nn.Conv2d(embed_dim // 2, embed_dim, 3, padding=1),
        )
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim)) if cls_token else None
        side = -(-img_size // stem_stride)
        self.pos_embed = nn.Parameter(torch.randn(1, side * side + 1, embed_dim)) if cls_token else None
        options = {"num_heads": num_heads, "head_dim": head_dim, "drop_rate": 0.0, "use_fused": use_fused}
        hidden = int(embed_dim * mlp_ratio)
        self.layers = nn.ModuleList(
            nn.Sequential(
                make_attention(embed_dim, **options, pre_norm=True),
                Mlp(embed_dim, hidden, drop_rate, use_fused, pre_norm=True),
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim) if cls_token else nn.Identity()
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) → logits (B, num_classes)."""
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        if self.cls_token is not None:
            tokens = to_tokens(x)
            if tokens.shape[1] + 1 != self.pos_embed.shape[1]:
                raise ValueError(f"the model was made for images of {self.img_size}×{self.img_size} pixels")
            tokens = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), tokens), dim=1) + self.pos_embed
            x = tokens.transpose(1, 2).unsqueeze(-1)  # one column of pixels
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean((2, 3)) if self.cls_token is None else self.norm(to_tokens(x)[:, 0]))


class HybridViP(Hybrid):
    """Hybrid Vision Performer; 6/8 has 1,416,522 parameters at 10 classes.

    Args:
        attn_kernel, attn_eps, stabilizer: as in :class:`cxv.CPV`.
        **kwargs: see :class:`Hybrid`.
    """

    def __init__(
        self,
        *,
        attn_kernel: str = "softmax",
        attn_eps: float | None = None,
        stabilizer: str = "head",
        **kwargs: Any,
    ):
        attention = partial(PerformerAttention, kernel=attn_kernel, eps=attn_eps, stabilizer=stabilizer)
        super().__init__(attention, cls_token=True, **kwargs)


class HybridViN(Hybrid):
    """Hybrid Vision Nyströmformer; 6/8 has 1,413,498 parameters at 10 classes.

    Zeros before the class token make the tokens a multiple of the landmarks, as in the released code: Table 1's MACs
    count them.

    Args:
        num_landmarks, residual_conv_kernel: as in :class:`cxv.CNV`.
        **kwargs: see :class:`Hybrid`.
    """

    def __init__(self, *, num_landmarks: int = 64, residual_conv_kernel: int = 33, **kwargs: Any):
        attention = partial(
            NystromAttention, num_landmarks=num_landmarks, residual_conv_kernel=residual_conv_kernel, front_pad=True
        )
        super().__init__(attention, cls_token=True, **kwargs)


class HybridViLT(Hybrid):
    """Hybrid Vision Linear Transformer; 6/8 has 1,284,938 parameters at 10 classes. No code of it was released: two
    dimensions throughout, no class token and no positions reproduce Table 1's parameters and memory.

    Args:
        feature_map: as in :func:`cxv_kernels.linear_attention`.
        **kwargs: see :class:`Hybrid`.
    """

    def __init__(self, *, feature_map: str = "softmax", **kwargs: Any):
        super().__init__(partial(_linear_attention, feature_map=feature_map), cls_token=False, **kwargs)


def _linear_attention(dim: int, drop_rate: float, **kwargs: Any) -> nn.Module:
    return LinearAttention(dim, **kwargs)
