"""Convolutional X-formers for Vision: CPV, CNV and CLTV (paper section 3)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cxv_kernels.validation import python_numbers

from .arguments import check_at_least, drop_path_rates, hidden_width
from .attention import LinearAttention, NystromAttention, PerformerAttention
from .backbone import Backbone
from .blocks import ConvNorm, Mlp, ResidualBranch, has_hooks


class Layer(nn.Module):
    """A CXV layer: conv + norm without a residual, then attention and MLP, each with a residual and without a norm."""

    def __init__(self, conv_norm: nn.Module, attn: nn.Module, mlp: nn.Module):
        super().__init__()
        self.conv_norm, self.attn, self.mlp = conv_norm, attn, mlp

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, C_in, H, W) to (B, C, H, W)."""
        x = self.conv_norm(x)
        if self._may_overwrite():
            return self.mlp(self.attn(x, inplace=True), inplace=True)
        return self.mlp(self.attn(x))

    def _may_overwrite(self) -> bool:
        """Return True if gradients are disabled and only this layer can hold the output of ``conv_norm``."""
        ours = isinstance(self.attn, ResidualBranch) and isinstance(self.mlp, ResidualBranch)
        new = isinstance(self.conv_norm, ConvNorm) and self.conv_norm.owns_output()
        return ours and new and not (torch.is_grad_enabled() or has_hooks(*self.modules()))


class CXV(Backbone):
    """Base class of CPV, CNV and CLTV (paper section 3). The default arguments are those of Table 1.

    The input is a float tensor of shape (B, in_chans, H, W) with any H and W, the output has shape (B, num_classes).
    :mod:`cxv.models.variants` has the ablations of section 5.

    Args:
        make_attention: Function (dim, num_heads=…, drop_rate=…, drop_path_rate=…, use_fused=…, recompute=…) that
            returns the attention of a layer, a module that maps (B, C, H, W) to (B, C, H, W).
        img_size: Side of the images in pixels, or (H, W). Data pipelines read it from ``model.img_size``; the model
            itself accepts any size.
        in_chans: Number of input channels.
        num_classes: Number of classes. 0 removes the classifier.
        embed_dim: C, a multiple of 4 and of ``num_heads``. The two convolutions of the stem have C/4 and C/2 channels.
        depth: Number of layers.
        num_heads: Number of attention heads.
        mlp_ratio: Hidden width of the MLP divided by C.
        drop_rate: Probability of dropout after each MLP convolution, and after the output map of the attention of CPV
            and CNV. (The released CPV always uses 0.5 after the attention.)
        drop_path_rate: Stochastic depth: the probability in training that an image skips the attention of the last
            layer, and that it skips the MLP. It rises linearly from 0 in the first layer.
        stem_stride: Stride of the first convolution. The paper uses 2 for 64×64 images.
        global_pool: ``"avg"``, or ``""`` for no pooling, which requires ``num_classes=0``. The output then has shape
            (B, C, H, W).
        use_fused: Use the fused ops (see :func:`cxv_kernels.use_backend`) instead of plain PyTorch. Parameters,
            ``state_dict`` and outputs are the same.
        recompute: If False, save the activations of attention and MLP for the backward pass instead of recomputing
            them. Training steps are faster and need more memory; outputs and gradients are the same. Without
            ``use_fused`` activations are always saved.

    Raises:
        ValueError: If an argument is out of range. ``forward`` raises it for an input of another rank or number of
            channels.
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
        check_at_least(1, num_heads=num_heads)
        super().__init__(img_size, in_chans, embed_dim, depth, drop_rate, drop_path_rate, stem_stride, "avg")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim must be a multiple of 4 and of num_heads = {num_heads}, got {embed_dim}")
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
    """Convolutional Performer for Vision. CPV-5/4 has 1,345,994 parameters with 10 classes.

    Args:
        attn_kernel: ``"softmax"`` (as in the released code) or ``"relu"`` (as in the text of the paper).
        attn_eps: As ``eps`` in :func:`cxv_kernels.performer_attention`. 0 is the original FAVOR+. With the default of
            1e-4, eps outweighs the key features during training, so heads mostly average.
        stabilizer: As in :func:`cxv_kernels.performer_attention`. The released code uses ``"batch"``.
        local_heads: Number of heads that attend to local windows instead. The released code has no local heads.
        local_window: Tokens of a window; a token attends to its window and the two neighboring windows. The text of the
            paper uses 256.
        **kwargs: See :class:`CXV`.

    Example::

        model = cxv.CPV(num_classes=10, use_fused=True)
        logits = model(torch.randn(8, 3, 32, 32))  # (8, 10)
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
    """Convolutional Nyströmformer for Vision. CNV-5/4 has 1,344,734 parameters with 10 classes.

    Args:
        num_landmarks: Number of landmarks of the Nyström approximation.
        residual_conv_kernel: Kernel size of the convolution of v along the tokens.
        front_pad: If True, zeros before the tokens make their number a multiple of the landmarks, as in the released
            code. If False, some segments are one token longer than others.
        pinv_init: As in :func:`cxv_kernels.nystrom_attention`. The released code uses ``"batch"``.
        **kwargs: See :class:`CXV`.
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
    """Convolutional Linear Transformer for Vision. CLTV-5/4 has 1,345,994 parameters with 10 classes.

    Args:
        attn_kernel_size: Kernel size of the convolutions for q, k, v and the output: 1 (as in Table 1) or 3 (as in the
            released code).
        feature_map: As in :func:`cxv_kernels.linear_attention`.
        **kwargs: See :class:`CXV`.
    """

    def __init__(self, *, attn_kernel_size: int = 1, feature_map: str = "softmax", **kwargs: Any):
        def attention(dim: int, drop_rate: float, **options: Any) -> nn.Module:  # no dropout in CLTV's attention
            return LinearAttention(dim, kernel_size=attn_kernel_size, feature_map=feature_map, **options)

        super().__init__(attention, **kwargs)
