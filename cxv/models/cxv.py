"""Convolutional X-formers for Vision: CPV, CNV and CLTV (paper section 3)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

import cxv_kernels
from cxv_kernels.tracing import record_call, refuse_torchscript
from cxv_kernels.validation import check_choice, python_numbers

from .arguments import check_at_least, check_drop_rate, hidden_width, image_size
from .attention import LinearAttention, NystromAttention, PerformerAttention
from .backbone import Backbone
from .residual import Drop, ResidualBranch, convolve, is_plain, to_pixels, to_tokens, watched


class StdLayerNorm(nn.LayerNorm):
    """The released code's LayerNorm: (x − μ) / (σ + eps) instead of (x − μ) / √(σ² + eps).

    Its gradient is NaN where all channels are equal.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) → the same."""
        std = x.var(dim=-1, correction=0, keepdim=True).sqrt()
        return (x - x.mean(dim=-1, keepdim=True)) / (std + self.eps) * self.weight + self.bias


NORMS = {"layer": nn.LayerNorm, "layer_std": StdLayerNorm, "batch": nn.BatchNorm2d}
CONV_RESIDUALS = (None, "conv", "conv_norm")


class ConvNorm(nn.Module):
    """The convolutional sub-layer: 3×3 convolution, then LayerNorm over channels (section 3.3 and 3.4), in one op.

    The variants of section 5 (GELU between the two, batch norm or none, a residual around the convolution or both) and
    layers that are not plain are called one by one: a norm gets tokens (B, N, C) where it is a LayerNorm, else pixels.
    A residual needs as many channels out as in, and is left out elsewhere.
    """

    __prepare_scriptable__ = refuse_torchscript

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        use_fused: bool,
        act: bool = False,
        norm: str | None = "layer",
        residual: str | None = None,
    ):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, out_chans, 3, padding=1)
        self.norm = nn.Identity() if norm is None else NORMS[norm](out_chans)
        self.act = nn.GELU() if act else None
        self.residual = residual if in_chans == out_chans else None
        self.backend = None if use_fused else "reference"

    def returns_new(self) -> bool:
        """Return True if nobody else can hold the output: the layers are PyTorch's own."""
        return is_plain(self.conv) and type(self.norm) in (*NORMS.values(), nn.Identity)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_chans, H, W) → (B, out_chans, H, W)."""
        if isinstance(x, Proxy):
            return record_call(self, x)
        conv, norm = self.conv, self.norm
        one_op = type(norm) is nn.LayerNorm and self.act is None and self.residual != "conv"
        if one_op and is_plain(norm) and is_plain(conv) and conv.kernel_size == (3, 3) and conv.groups == 1:
            y = cxv_kernels.conv_norm(x, conv.weight, conv.bias, norm.weight, norm.bias, norm.eps, backend=self.backend)
        else:
            y = conv(x)
            y = y if self.act is None else self.act(y)
            y = y + x if self.residual == "conv" else y
            y = to_pixels(norm(to_tokens(y)), y) if isinstance(norm, nn.LayerNorm) else norm(y)
        return y + x if self.residual == "conv_norm" else y


class Mlp(ResidualBranch):
    """x + the MLP of x: 1×1 convolution, GELU, dropout, 1×1 convolution, dropout."""

    num_drops = 2

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        drop_rate: float,
        use_fused: bool = False,
        pre_norm: bool = False,
        recompute: bool = True,
    ):
        super().__init__(drop_rate, use_fused, dim if pre_norm else None, recompute)
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1)
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1)

    def branch(self, x: Tensor, drop: Drop, drop_out: Drop) -> Tensor:
        hidden = drop(to_tokens(convolve(self.fc1, self.entry(x))), gelu=True)
        return to_pixels(drop_out(to_tokens(convolve(self.fc2, to_pixels(hidden, x))), to_tokens(x)), x)


class Layer(nn.Module):
    """conv + norm (no residual), then attention and MLP, each with a residual connection and no norm of its own."""

    def __init__(self, conv_norm: nn.Module, attn: nn.Module, mlp: nn.Module):
        super().__init__()
        self.conv_norm, self.attn, self.mlp = conv_norm, attn, mlp

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_norm(x)
        ours = isinstance(self.attn, ResidualBranch) and isinstance(self.mlp, ResidualBranch)
        new = isinstance(self.conv_norm, ConvNorm) and self.conv_norm.returns_new()
        # without gradients nothing else holds the norm's output, unless a hook has seen it
        if ours and new and not (torch.is_grad_enabled() or watched(*self.modules())):
            return self.mlp(self.attn(x, True), True)
        return self.mlp(self.attn(x))


class CXV(Backbone):
    """What CPV, CNV and CLTV share; the defaults are Table 1's rows. Input (B, in_chans, H, W) of any size, float.

    Args:
        make_attention: (dim, num_heads=…, drop_rate=…, use_fused=…, pre_norm=…, positions=…, num_tokens=…,
            recompute=…) → a module (B, C, H, W) → (B, C, H, W).
        img_size: pixels a side, or (H, W); kept as ``model.img_size`` for data pipelines. Without learned positions the
            model takes any size.
        in_chans: input channels. num_classes: classes; 0 leaves out the classifier.
        embed_dim: C, a multiple of 4 and of ``num_heads``; the stem's two convolutions have C/4 and C/2 channels.
        depth: layers. num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over C.
        drop_rate: dropout after each MLP convolution and after the output map of CPV's and CNV's attention (the
            released CPV hard-codes 0.5 there; here it follows the argument).
        stem_stride: stride of the first convolution (the paper takes 2 for 64×64 images).
        global_pool: ``"avg"``, or ``""`` for none, where there is no classifier: the output is (B, C, H, W) then.
        use_fused: serve the ops from the fastest backend (see ``cxv_kernels.use_backend``) instead of the reference;
            parameters, ``state_dict`` and outputs are the same.
        recompute: False keeps the activations of attention and MLP for the backward pass instead of recomputing them.
            Training steps are faster and need more memory; outputs and gradients are the same. Only for ``use_fused``.
        stem_convs: 1 to 3 convolutions in the stem, to C/2 channels, halved towards the image (Table 2, CNV on
            CIFAR-10: 89.45, 89.93 and 89.56 %).
        stem_padding: 0 lets the stem shrink the image (17 % less memory, under 2 points lost).
        stem_act: GELU between the stem's convolutions (about 2 points lost).
        stem_pool: a 3×3 max-pooling of stride 1 after each, as in CCT ("similar decrease").
        conv_act: GELU between convolution and norm of a layer ("decrease").
        conv_every: 2 leaves convolution and norm to layers 0, 2, 4 … ("degraded").
        conv_residual: a residual around the ``"conv"`` or the ``"conv_norm"`` of a layer, where the channels agree, so
            not in layer 0 ("no gain").
        positions: ``"learned"``, a vector per token at the entry of each attention, or ``"rotary"`` ("no gain").
        norm: ``"layer"``, ``"layer_std"`` (the released code's, whose eps is added to the standard deviation; its
            gradient is NaN where a pixel's channels are equal) or ``"batch"`` (over 4 points lost).
        norm_every: 2 leaves the norm to layers 0, 2, 4 … ("the loss does not converge").
        pre_norm: a LayerNorm inside each residual branch, besides the others ("degraded considerably").

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
        stem_stride: int = 1,
        global_pool: str = "avg",
        use_fused: bool = False,
        recompute: bool = True,
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
    ):
        super().__init__()
        check_at_least(4, embed_dim=embed_dim)
        check_at_least(0, num_classes=num_classes)
        check_at_least(1, in_chans=in_chans, depth=depth, num_heads=num_heads, stem_stride=stem_stride)
        check_at_least(1, conv_every=conv_every, norm_every=norm_every)
        check_choice("stem_convs", stem_convs, (1, 2, 3))
        check_choice("stem_padding", stem_padding, (0, 1))
        check_choice("norm", norm, tuple(NORMS))
        check_choice("conv_residual", conv_residual, CONV_RESIDUALS)
        check_drop_rate(drop_rate)
        halved = 2 ** max(stem_convs, 2)
        if embed_dim % halved or embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of {halved} and of num_heads = {num_heads}, got {embed_dim}"
            )
        self.img_size, self.in_chans = img_size, in_chans
        self.embed_dim = embed_dim
        self._init_features(embed_dim, stem_stride, depth, "avg")
        stem: list[nn.Module] = []
        size = image_size(img_size)
        for i in reversed(range(stem_convs)):  # to C/8, C/4 and C/2 channels
            in_width = embed_dim // 2 ** (i + 2) if stem else in_chans
            stride = 1 if stem else stem_stride
            size = [(side + 2 * stem_padding - 3) // stride + 1 for side in size]
            stem.append(nn.Conv2d(in_width, embed_dim // 2 ** (i + 1), 3, stride=stride, padding=stem_padding))
            stem += [nn.GELU()] if stem_act and i else []
            stem += [nn.MaxPool2d(3, stride=1, padding=1)] if stem_pool else []
        self.stem = nn.Sequential(*stem)
        attention = {"num_heads": num_heads, "drop_rate": drop_rate, "use_fused": use_fused, "pre_norm": pre_norm}
        attention |= {"positions": positions, "num_tokens": size[0] * size[1], "recompute": recompute}

        hidden = hidden_width(embed_dim, mlp_ratio)

        def conv_norm(i: int) -> nn.Module:
            if i % conv_every:
                return nn.Identity()
            in_width = embed_dim if i else embed_dim // 2
            kind = None if i % norm_every else norm
            return ConvNorm(in_width, embed_dim, use_fused, conv_act, kind, conv_residual)

        self.layers = nn.ModuleList(
            Layer(
                conv_norm(i),
                make_attention(embed_dim, **attention),
                Mlp(embed_dim, hidden, drop_rate, use_fused, pre_norm, recompute),
            )
            for i in range(depth)
        )
        self.reset_classifier(num_classes, global_pool)


class CPV(CXV):
    """Convolutional Performer for Vision; CPV-5/4 has 1,345,994 parameters at 10 classes.

    Args:
        attn_kernel: ``"softmax"`` (what the released code runs) or ``"relu"`` (what the text says).
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
