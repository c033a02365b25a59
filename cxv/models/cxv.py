"""Convolutional X-formers for Vision: CPV, CNV and CLTV (paper section 3)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cxv_kernels.validation import python_numbers

from .arguments import check_at_least, check_rates, drop_path_rates, hidden_width
from .attention import LinearAttention, NystromAttention, PerformerAttention
from .backbone import Backbone
from .blocks import ConvNorm, Mlp, ResidualBranch, has_hooks


class Layer(nn.Module):
    """conv + norm (no residual), then attention and MLP, each with a residual connection and no norm of its own."""

    def __init__(self, conv_norm: nn.Module, attn: nn.Module, mlp: nn.Module):
        super().__init__()
        self.conv_norm, self.attn, self.mlp = conv_norm, attn, mlp

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) → (B, C, H, W)."""
        x = self.conv_norm(x)
        if self._may_overwrite():
            return self.mlp(self.attn(x, inplace=True), inplace=True)
        return self.mlp(self.attn(x))

    def _may_overwrite(self) -> bool:
        """Return True without gradients, if nothing but this layer can hold the output of ``conv_norm``."""
        ours = isinstance(self.attn, ResidualBranch) and isinstance(self.mlp, ResidualBranch)
        new = isinstance(self.conv_norm, ConvNorm) and self.conv_norm.owns_output()
        return ours and new and not (torch.is_grad_enabled() or has_hooks(*self.modules()))


class CXV(Backbone):
    """What CPV, CNV and CLTV share; the defaults are Table 1's rows. Input (B, in_chans, H, W) of any size, float.

    :mod:`cxv.models.variants` has the ablations of section 5.

    Args:
        make_attention: (dim, num_heads=…, drop_rate=…, drop_path_rate=…, use_fused=…, recompute=…) → a module
            (B, C, H, W) → (B, C, H, W).
        img_size: pixels a side, or (H, W); kept as ``model.img_size`` for data pipelines. The model takes any size.
        in_chans: input channels. num_classes: classes; 0 leaves out the classifier.
        embed_dim: C, a multiple of 4 and of ``num_heads``; the stem's two convolutions have C/4 and C/2 channels.
        depth: layers. num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over C.
        drop_rate: dropout after each MLP convolution and after the output map of CPV's and CNV's attention (the
            released CPV hard-codes 0.5 there; here it follows the argument).
        drop_path_rate: stochastic depth: the probability that an image skips the attention, and that it skips the MLP,
            of the last layer in training. It rises linearly from 0 in the first layer.
        stem_stride: stride of the first convolution (the paper takes 2 for 64×64 images).
        global_pool: ``"avg"``, or ``""`` for none, where there is no classifier: the output is (B, C, H, W) then.
        use_fused: use the fastest backend for the ops (see ``cxv_kernels.use_backend``) instead of the reference;
            parameters, ``state_dict`` and outputs are the same.
        recompute: False keeps the activations of attention and MLP for the backward pass instead of recomputing them.
            Training steps are faster and need more memory; outputs and gradients are the same. Only for ``use_fused``.

    Raises:
        ValueError: an argument out of range; from ``forward``, an input of another rank or channel count.
    """

    @python_numbers
    def __init__(
        self,
        make_attention: Callable[..., nn.Module],
        img_size: int | Sequence[int] = 32,
        in_chans: int = 3,
        num_classes: int = 10,
        embed_dim: int = 128,
        depth: int = 5,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        drop_rate: float = 0.5,
        drop_path_rate: float = 0.0,
        stem_stride: int = 1,
        global_pool: str = "avg",
        use_fused: bool = False,
        recompute: bool = True,
    ):
        super().__init__()
        check_at_least(4, embed_dim=embed_dim)
        check_at_least(1, in_chans=in_chans, depth=depth, num_heads=num_heads, stem_stride=stem_stride)
        check_rates(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        if embed_dim % 4 or embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of 4 and of num_heads = {num_heads}, got {embed_dim}")
        self._init_features(img_size, in_chans, embed_dim, stem_stride, depth, "avg")
        self.embed_dim = embed_dim
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim // 4, 3, stride=stem_stride, padding=1),
            nn.Conv2d(embed_dim // 4, embed_dim // 2, 3, padding=1),
        )
        hidden = hidden_width(embed_dim, mlp_ratio)
        options = {"drop_rate": drop_rate, "use_fused": use_fused, "recompute": recompute}
        self.layers = nn.ModuleList(
            Layer(
                ConvNorm(embed_dim if i else embed_dim // 2, embed_dim, use_fused),
                make_attention(embed_dim, num_heads=num_heads, drop_path_rate=rate, **options),
                Mlp(embed_dim, hidden, drop_path_rate=rate, **options),
            )
            for i, rate in enumerate(drop_path_rates(drop_path_rate, depth))
        )
        self.reset_classifier(num_classes, global_pool)


class CPV(CXV):
    """Convolutional Performer for Vision; CPV-5/4 has 1,345,994 parameters at 10 classes.

    Args:
        attn_kernel: ``"softmax"`` (the released code) or ``"relu"`` (the text).
        attn_eps, stabilizer: as in :func:`cxv_kernels.performer_attention`. ``attn_eps=0`` is FAVOR+ proper; the
            default's 1e-4 comes to outweigh the keys in training, so that heads mostly average.
            ``stabilizer="batch"`` is the released code.
        local_heads, local_window: heads that attend to windows of so many tokens and their neighbors instead (the
            text's window is 256; the released code has no local heads).
        **kwargs: see :class:`CXV`.
    """

    def __init__(
        self,
        *,
        attn_kernel: str = "softmax",
        attn_eps: float | None = None,
        stabilizer: str = "head",
        local_heads: int = 0,
        local_window: int = 256,
        **kwargs: Any,
    ):
        options = {"local_heads": local_heads, "local_window": local_window}
        attention = partial(PerformerAttention, kernel=attn_kernel, eps=attn_eps, stabilizer=stabilizer, **options)
        super().__init__(attention, **kwargs)


class CNV(CXV):
    """Convolutional Nyströmformer for Vision; CNV-5/4 has 1,344,734 parameters at 10 classes.

    Args:
        num_landmarks: landmarks of the Nyström approximation.
        residual_conv_kernel: taps of the convolution of v along the tokens.
        front_pad: zeros before the tokens up to a multiple of the landmarks, as in the released code, rather than
            segments of unequal length.
        pinv_init: as in :func:`cxv_kernels.nystrom_attention`; ``"batch"`` is the released code.
        **kwargs: see :class:`CXV`.
    """

    def __init__(
        self,
        *,
        num_landmarks: int = 64,
        residual_conv_kernel: int = 33,
        front_pad: bool = False,
        pinv_init: str = "head",
        **kwargs: Any,
    ):
        options = {"num_landmarks": num_landmarks, "residual_conv_kernel": residual_conv_kernel, "pinv_init": pinv_init}
        super().__init__(partial(NystromAttention, front_pad=front_pad, **options), **kwargs)


class CLTV(CXV):
    """Convolutional Linear Transformer for Vision; CLTV-5/4 has 1,345,994 parameters at 10 classes.

    Args:
        attn_kernel_size: of the q, k, v and output convolutions: 1 (Table 1) or 3 (the released file).
        feature_map: as in :func:`cxv_kernels.linear_attention`.
        **kwargs: see :class:`CXV`.
    """

    def __init__(self, *, attn_kernel_size: int = 1, feature_map: str = "softmax", **kwargs: Any):
        def attention(dim: int, drop_rate: float, **options: Any) -> nn.Module:  # no dropout in CLTV's attention
            return LinearAttention(dim, kernel_size=attn_kernel_size, feature_map=feature_map, **options)

        super().__init__(attention, **kwargs)
