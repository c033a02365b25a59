"""Hybrid ViP, ViN and ViLT: vision transformers with convolutional embedding and linear attention (Jeevan & Sethi,
arXiv 2107.02239; Table 1's hybrid rows)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import check_at_least, check_drop_rate, check_images, classifier, hidden_width, image_size
from .attention import LinearAttention, NystromAttention, PerformerAttention
from .cxv import Mlp
from .residual import to_channels_last, to_tokens


class Hybrid(nn.Module):
    """What the hybrids share: three 3×3 convolutions, pre-norm layers of attention and MLP, and a linear classifier.

    Args:
        make_attention: (dim, num_heads=…, head_dim=…, drop_rate=…, use_fused=…, pre_norm=…) → a residual branch.
        cls_token: a class token and learned positions, the class token being what is classified after a LayerNorm;
            without them (Hybrid ViLT) the average over the pixels is.
        img_size: pixels a side, or (H, W); without ``cls_token`` any size is taken.
        in_chans: channels of the input. num_classes: classes; 0 leaves out the classifier.
        embed_dim: C, a multiple of 4. depth: layers.
        num_heads, head_dim: of the attention; their product need not be C.
        mlp_ratio: hidden width of the MLP over C. drop_rate: dropout in the MLP (the attention has none).
        stem_stride: of the first convolution (2 for 64×64 images).
        use_fused: as in :class:`cxv.CXV`.

    Raises:
        ValueError: an argument out of range; from ``forward``, an image of another size or channel count.
    """

    def __init__(
        self,
        make_attention: Callable[..., nn.Module],
        cls_token: bool,
        img_size: int | Sequence[int] = 32,
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
        check_at_least(4, embed_dim=embed_dim)
        if embed_dim % 4:
            raise ValueError(f"embed_dim must be a multiple of 4, got {embed_dim}")
        check_at_least(1, in_chans=in_chans, depth=depth, num_heads=num_heads, head_dim=head_dim)
        check_at_least(1, stem_stride=stem_stride)
        check_drop_rate(drop_rate)
        self.img_size, self.in_chans, self.num_features = img_size, in_chans, embed_dim
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim // 4, 3, stride=stem_stride, padding=1),
            nn.Conv2d(embed_dim // 4, embed_dim // 2, 3, padding=1),
            nn.Conv2d(embed_dim // 2, embed_dim, 3, padding=1),
        )
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim)) if cls_token else None
        height, width = (-(-side // stem_stride) for side in image_size(img_size))
        self.pos_embed = nn.Parameter(torch.randn(1, height * width + 1, embed_dim)) if cls_token else None
        options = {"num_heads": num_heads, "head_dim": head_dim, "drop_rate": 0.0, "use_fused": use_fused}
        hidden = hidden_width(embed_dim, mlp_ratio)
        self.layers = nn.ModuleList(
            nn.Sequential(
                make_attention(embed_dim, **options, pre_norm=True),
                Mlp(embed_dim, hidden, drop_rate, use_fused, pre_norm=True),
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim) if cls_token else nn.Identity()
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a fresh one of ``num_classes`` (0: none), on the model's device and dtype.

        Raises:
            ValueError: fewer than 0 classes.
        """
        check_at_least(0, num_classes=num_classes)
        self.num_classes, weight = num_classes, self.stem[0].weight
        self.head = classifier(self.num_features, num_classes).to(weight.device, weight.dtype)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) → the last layer's output: (B, C, H/stem_stride, W/stem_stride), or with a class token,
        which is the first, (B, C, 1 + tokens, 1)."""
        check_images(x, self.in_chans)
        x = self.stem(to_channels_last(x))
        if self.cls_token is not None:
            tokens = to_tokens(x)
            if tokens.shape[1] + 1 != self.pos_embed.shape[1]:
                height, width = image_size(self.img_size)
                raise ValueError(f"the model was made for images of {height}×{width} pixels")
            tokens = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), tokens), dim=1) + self.pos_embed
            x = tokens.transpose(1, 2).unsqueeze(-1)  # one column of pixels
        for layer in self.layers:
            x = layer(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Of :meth:`forward_features`, (B, num_classes); (B, C) with ``pre_logits`` or without a classifier."""
        x = x.mean((2, 3)) if self.cls_token is None else self.norm(to_tokens(x)[:, 0])
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) → logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


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
