"""Hybrid ViP, ViN and ViLT: vision transformers with convolutional embedding and linear attention (Jeevan & Sethi,
arXiv 2107.02239; Table 1's hybrid rows)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cxv_kernels.validation import python_numbers

from .arguments import check_at_least, drop_path_rates, hidden_width, image_size
from .attention import LinearAttention, NystromAttention, PerformerAttention
from .backbone import Backbone
from .blocks import Mlp, to_tokens


def add_class_token(tokens: Tensor, cls_token: Tensor, pos_embed: Tensor, img_size: int | Sequence[int]) -> Tensor:
    """Put ``cls_token`` before ``tokens`` (B, N, C) and add ``pos_embed``, which must be (1, 1 + N, C)."""
    if tokens.shape[1] + 1 != pos_embed.shape[1]:
        height, width = image_size(img_size)
        raise ValueError(f"the model was made for images of {height}×{width} pixels")
    return torch.cat((cls_token.expand(tokens.shape[0], -1, -1), tokens), dim=1) + pos_embed


torch.fx.wrap("add_class_token")  # its branches depend on the shape, so a graph calls it as it is


class Hybrid(Backbone):
    """Base class of the hybrids: three 3×3 convolutions, pre-norm layers of attention and MLP, a linear classifier.

    Args:
        make_attention: Function (dim, num_heads=…, head_dim=…, drop_path_rate=…, use_fused=…, recompute=…,
            pre_norm=…) that returns the residual branch of a layer.
        cls_token: If True, the model has a class token and learned positions, and the class token is classified after a
            LayerNorm. If False (Hybrid ViLT), the average over the pixels is classified.
        img_size: Side of the images in pixels, or (H, W). Without a class token the model accepts any size.
        head_dim: Channels of a head. ``num_heads`` times ``head_dim`` can differ from C.
        drop_rate: Probability of dropout in the MLP. The attention has no dropout.
        global_pool: ``"token"`` with a class token, else ``"avg"`` (the default), or ``""`` for no pooling, which
            requires ``num_classes=0``. The output is then that of ``forward_features``.

    The other arguments are those of :class:`cxv.CXV`.

    Raises:
        ValueError: As in :class:`cxv.CXV`, and from ``forward`` for an image of another size with a class token.
    """

    @python_numbers
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
        drop_path_rate: float = 0.0,
        stem_stride: int = 1,
        global_pool: str | None = None,
        use_fused: bool = False,
        recompute: bool = True,
    ):
        check_at_least(1, num_heads=num_heads, head_dim=head_dim)
        pool = "token" if cls_token else "avg"
        super().__init__(img_size, in_chans, embed_dim, depth, drop_rate, drop_path_rate, stem_stride, pool)
        self.stem.append(nn.Conv2d(embed_dim // 2, embed_dim, 3, padding=1))
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim)) if cls_token else None
        height, width = (-(-side // stem_stride) for side in image_size(img_size))
        self.pos_embed = nn.Parameter(torch.randn(1, height * width + 1, embed_dim)) if cls_token else None
        hidden = hidden_width(embed_dim, mlp_ratio)
        options = {"pre_norm": True, "use_fused": use_fused, "recompute": recompute}
        self.layers = nn.ModuleList(
            nn.Sequential(
                make_attention(embed_dim, num_heads=num_heads, head_dim=head_dim, drop_path_rate=rate, **options),
                Mlp(embed_dim, hidden, drop_rate, drop_path_rate=rate, **options),
            )
            for rate in drop_path_rates(drop_path_rate, depth)
        )
        self.norm = nn.LayerNorm(embed_dim) if cls_token else nn.Identity()
        self.reset_classifier(num_classes, global_pool)

    def _embed(self, x: Tensor) -> Tensor:
        """Return the stem's output (B, C, H', W') or, with a class token before it, (B, C, 1 + H'·W', 1)."""
        if self.cls_token is None:
            return x
        tokens = add_class_token(to_tokens(x), self.cls_token, self.pos_embed, self.img_size)
        return tokens.transpose(1, 2).unsqueeze(-1)  # one column of pixels

    def _to_map(self, x: Tensor, size: Sequence[int], norm: bool) -> Tensor:
        if self.cls_token is None:
            return x
        tokens = to_tokens(x)[:, 1:]
        return (self.norm(tokens) if norm else tokens).transpose(1, 2).unflatten(2, size)

    def _pool(self, x: Tensor) -> Tensor:
        return super()._pool(x) if self.cls_token is None else self.norm(to_tokens(x)[:, 0])


class HybridViP(Hybrid):
    """Hybrid Vision Performer. The 6/8 model has 1,416,522 parameters with 10 classes.

    Args:
        attn_kernel: As in :class:`cxv.CPV`.
        attn_eps: As in :class:`cxv.CPV`.
        stabilizer: As in :class:`cxv.CPV`.
        **kwargs: See :class:`Hybrid`.
    """

    def __init__(
        self, *, attn_kernel: str = "softmax", attn_eps: float | None = None, stabilizer: str = "head", **kwargs: Any
    ):
        attention = partial(PerformerAttention, kernel=attn_kernel, eps=attn_eps, stabilizer=stabilizer)
        super().__init__(attention, cls_token=True, **kwargs)


class HybridViN(Hybrid):
    """Hybrid Vision Nyströmformer. The 6/8 model has 1,413,498 parameters with 10 classes.

    Zeros before the class token make the number of tokens a multiple of the landmarks, as in the released code. The
    multiply-adds of Table 1 include them.

    Args:
        num_landmarks: As in :class:`cxv.CNV`.
        residual_conv_kernel: As in :class:`cxv.CNV`.
        pinv_init: As in :class:`cxv.CNV`.
        **kwargs: See :class:`Hybrid`.
    """

    def __init__(
        self, *, num_landmarks: int = 64, residual_conv_kernel: int = 33, pinv_init: str = "head", **kwargs: Any
    ):
        options = {"num_landmarks": num_landmarks, "residual_conv_kernel": residual_conv_kernel, "pinv_init": pinv_init}
        super().__init__(partial(NystromAttention, front_pad=True, **options), cls_token=True, **kwargs)


class HybridViLT(Hybrid):
    """Hybrid Vision Linear Transformer. The 6/8 model has 1,284,938 parameters with 10 classes.

    The paper's authors did not release its code. Two-dimensional feature maps without a class token or positions
    reproduce the parameters and the memory of Table 1.

    Args:
        feature_map: As in :func:`cxv_kernels.linear_attention`.
        **kwargs: See :class:`Hybrid`.
    """

    def __init__(self, *, feature_map: str = "softmax", **kwargs: Any):
        super().__init__(partial(LinearAttention, feature_map=feature_map), cls_token=False, **kwargs)
