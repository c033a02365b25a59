"""Convolutional X-formers for Vision: CPV, CNV and CLTV (paper section 3)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cxv_kernels

from .attention import LinearAttention, NystromAttention, PerformerAttention
from .residual import Drop, ResidualBranch, convolve, to_pixels, to_tokens, watched


class ConvNorm(nn.Module):
    """The convolutional sub-layer: 3×3 convolution, then LayerNorm over channels (section 3.3 and 3.4)."""

    def __init__(self, in_chans: int, out_chans: int, use_fused: bool):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, 3, padding=1)
        self.norm = nn.LayerNorm(out_chans)
        self.backend = None if use_fused else "reference"

    def forward(self, x: Tensor) -> Tensor:
        conv, norm = self.conv, self.norm
        return cxv_kernels.conv_norm(x, conv.weight, conv.bias, norm.weight, norm.bias, norm.eps, backend=self.backend)


class Mlp(ResidualBranch):
    """x + the MLP of x: 1×1 convolution, GELU, dropout, 1×1 convolution, dropout."""

    num_drops = 2

    def __init__(self, dim: int, hidden_dim: int, drop_rate: float, use_fused: bool = False):
        super().__init__(drop_rate, use_fused)
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1)

    def branch(self, x: Tensor, drop: Drop, drop_out: Drop) -> Tensor:
        hidden = drop(to_tokens(self.act(convolve(self.fc1, x))))
        return to_pixels(drop_out(to_tokens(convolve(self.fc2, to_pixels(hidden, x))), to_tokens(x)), x)


class Layer(nn.Module):
    """conv + norm (no residual), then attention and MLP, each with a residual connection and no norm of its own."""

    def __init__(self, conv_norm: nn.Module, attn: nn.Module, mlp: nn.Module):
        super().__init__()
        self.conv_norm, self.attn, self.mlp = conv_norm, attn, mlp

    def forward(self, x: Tensor) -> Tensor:
        # without gradients what the norm returns is this layer's alone, unless a hook has seen it
        inplace = not (torch.is_grad_enabled() or watched(self.conv_norm, self.attn, self.mlp))
        return self.mlp(self.attn(self.conv_norm(x), inplace), inplace)


class CXV(nn.Module):
    """What CPV, CNV and CLTV share; the defaults are Table 1's rows. Input (B, in_chans, H, W) of any size, float.

    Args:
        make_attention: (dim, num_heads, drop_rate, use_fused) → a module (B, C, H, W) → (B, C, H, W).
        img_size: kept as ``model.img_size`` for data pipelines; the model itself takes any size.
        in_chans: input channels. num_classes: classes; 0 leaves out the classifier.
        embed_dim: C, a multiple of 4 and of ``num_heads``; the stem's two convolutions have C/4 and C/2 channels.
        depth: layers. num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over C.
        drop_rate: dropout after each MLP convolution and after the output map of CPV's and CNV's attention (the
            released CPV hard-codes 0.5 there; here it follows the argument).
        stem_stride: stride of the first convolution (the paper takes 2 for 64×64 images).
        use_fused: serve the ops from the fastest backend (see ``cxv_kernels.use_backend``) instead of the reference;
            parameters, ``state_dict`` and outputs are the same.

    Raises:
        ValueError: an argument out of range; from ``forward``, an input of another rank or channel count.
    """

    def __init__(
        self,
        make_attention: Callable[[int, int, float, bool], nn.Module],
        img_size: int = 32,
        in_chans: int = 3,
        num_classes: int = 10,
        embed_dim: int = 128,
        depth: int = 5,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        drop_rate: float = 0.5,
        stem_stride: int = 1,
        use_fused: bool = False,
    ):
        super().__init__()
        at_least = {"img_size": 1, "in_chans": 1, "num_classes": 0, "embed_dim": 4, "depth": 1, "num_heads": 1}
        given = locals()
        for name, least in {**at_least, "stem_stride": 1}.items():
            if given[name] < least:
                raise ValueError(f"{name} must be at least {least}, got {given[name]}")
        if embed_dim % 4 or embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of 4 and of num_heads = {num_heads}, got {embed_dim}")
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate must be in [0, 1), got {drop_rate}")
        self.img_size, self.in_chans, self.num_classes = img_size, in_chans, num_classes
        self.embed_dim = self.num_features = embed_dim
        self.grad_checkpointing = False
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim // 4, 3, stride=stem_stride, padding=1),
            nn.Conv2d(embed_dim // 4, embed_dim // 2, 3, padding=1),
        )
        self.layers = nn.ModuleList(
            Layer(
                ConvNorm(embed_dim if i else embed_dim // 2, embed_dim, use_fused),
                make_attention(embed_dim, num_heads, drop_rate, use_fused),
                Mlp(embed_dim, int(embed_dim * mlp_ratio), drop_rate, use_fused),
            )
            for i in range(depth)
        )
        self.head = self._classifier()

    def _classifier(self) -> nn.Module:
        return nn.Linear(self.embed_dim, self.num_classes) if self.num_classes else nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each layer's input for backward and recompute the rest."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier by a fresh one of ``num_classes`` (0: none), on the model's device and dtype."""
        if num_classes < 0:
            raise ValueError(f"num_classes must be at least 0, got {num_classes}")
        self.num_classes = num_classes
        weight = self.stem[0].weight
        self.head = self._classifier().to(weight.device, weight.dtype)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) → (B, C, H/stem_stride, W/stem_stride), channels_last in memory."""
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"input must be (B, {self.in_chans}, H, W), got shape {tuple(x.shape)}")
        # channels_last from end to end: attention, MLP and norm read a pixel's channels together, and of all that could
        # be converted the image is the smallest
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        for layer in self.layers:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, C, H, W) → (B, num_classes), or the pooled features (B, C) with ``pre_logits``."""
        x = x.permute(0, 2, 3, 1).mean((1, 2))  # as AdaptiveAvgPool2d, but its gradient is channels_last too
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) → logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


class CPV(CXV):
    """Convolutional Performer for Vision; CPV-5/4 has 1,345,994 parameters at 10 classes.

    Args:
        attn_kernel: ``"softmax"`` (what the released code runs) or ``"relu"`` (what the text says).
        attn_eps, stabilizer: as in :func:`cxv_kernels.performer_attention`.
        **kwargs: see :class:`CXV`.
    """

    def __init__(
        self,
        *,
        attn_kernel: str = "softmax",
        attn_eps: float | None = None,
        stabilizer: str = "head",
        **kwargs: Any,
    ):
        def attention(dim: int, num_heads: int, drop_rate: float, use_fused: bool) -> nn.Module:
            return PerformerAttention(dim, num_heads, drop_rate, attn_kernel, attn_eps, stabilizer, use_fused)

        super().__init__(attention, **kwargs)


class CNV(CXV):
    """Convolutional Nyströmformer for Vision; CNV-5/4 has 1,344,734 parameters at 10 classes.

    Args:
        num_landmarks: landmarks of the Nyström approximation.
        residual_conv_kernel: taps of the convolution of v along the tokens.
        **kwargs: see :class:`CXV`.
    """

    def __init__(self, *, num_landmarks: int = 64, residual_conv_kernel: int = 33, **kwargs: Any):
        def attention(dim: int, num_heads: int, drop_rate: float, use_fused: bool) -> nn.Module:
            return NystromAttention(dim, num_heads, drop_rate, num_landmarks, residual_conv_kernel, use_fused)

        super().__init__(attention, **kwargs)


class CLTV(CXV):
    """Convolutional Linear Transformer for Vision; CLTV-5/4 has 1,345,994 parameters at 10 classes.

    Args:
        attn_kernel_size: of the q, k, v and output convolutions: 1 (Table 1) or 3 (the released file).
        feature_map: as in :func:`cxv_kernels.linear_attention`.
        **kwargs: see :class:`CXV`.
    """

    def __init__(self, *, attn_kernel_size: int = 1, feature_map: str = "softmax", **kwargs: Any):
        def attention(dim: int, num_heads: int, drop_rate: float, use_fused: bool) -> nn.Module:
            return LinearAttention(dim, num_heads, attn_kernel_size, feature_map, use_fused)

        super().__init__(attention, **kwargs)
