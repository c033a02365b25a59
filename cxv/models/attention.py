"""The three mechanisms of CXV as residual branches x + attention(x) of x (B, C, H, W) (paper section 3.1).

:class:`ResidualBranch` calls ``forward_chunk`` with a part of the batch.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cxv_kernels
from cxv_kernels.ops.linear_attention.reference import FEATURE_MAPS
from cxv_kernels.ops.nystrom_attention.reference import PINV_INITS
from cxv_kernels.ops.performer_attention.reference import KERNELS, STABILIZERS
from cxv_kernels.validation import check_choice, check_eps, python_numbers

from .arguments import check_at_least, check_odd
from .blocks import DropoutFn, ResidualBranch, convolve, is_unmodified, linear, to_pixels, to_tokens


def rotate(x: Tensor) -> Tensor:
    """Apply rotary positions to x (B, H, N, D) (Su et al. 2021, eq. 34).

    The channels i and i + D/2 of token n are rotated by n·10000^(−2i/D). If D is odd, the last channel is unchanged.
    """
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (torch.arange(half, device=x.device) / -max(half, 1))
    angle = torch.arange(x.shape[-2], device=x.device)[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def local_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Compute softmax attention of each window of tokens to itself and its two neighbor windows, (B, H, N, D)."""
    tokens = q.shape[2]
    pad = -tokens % window
    q, k, v = (F.pad(t, (0, 0, 0, pad)).unflatten(2, (-1, window)) for t in (q, k, v))
    count = q.shape[2]
    seen = torch.arange(count * window, device=q.device).unflatten(0, (count, window)) < tokens
    near = F.pad(seen, (0, 0, 1, 1))
    near = torch.cat((near[:-2], near[1:-1], near[2:]), dim=1)  # (count, 3·window)
    k, v = (F.pad(t, (0, 0, 0, 0, 1, 1)) for t in (k, v))
    k, v = (torch.cat((t[:, :, :-2], t[:, :, 1:-1], t[:, :, 2:]), dim=3) for t in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=near[:, None, :])
    return out.flatten(2, 3)[:, :, :tokens]


class Attention(ResidualBranch):
    """Base class of residual branches with attention heads over the tokens.

    Args:
        dim: C, the channels of the input.
        num_heads: Number of heads.
        head_dim: Channels of a head. Default: C / num_heads.
        **kwargs: Arguments of ``ResidualBranch``. Dropout follows the output map.
    """

    rotary = False  # rotate q and k by their positions

    def __init__(self, dim: int, num_heads: int, head_dim: int | None = None, **kwargs: Any):
        super().__init__(dim, **kwargs)
        if head_dim is None and dim % num_heads:
            raise ValueError(f"num_heads must divide the embedding dimension {dim}, got {num_heads}")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.inner_dim = num_heads * self.head_dim
        self.register_parameter("pos_embed", None)  # learned positions (1, H·W, C), or None

    def pre_attention(self, x: Tensor) -> Tensor:
        """Return the input of the maps to q, k and v: x with learned positions and norm, if the branch has them."""
        if self.pos_embed is not None:
            if x.shape[2] * x.shape[3] != self.pos_embed.shape[1]:
                raise ValueError(
                    f"learned positions were made for {self.pos_embed.shape[1]} tokens, got {tuple(x.shape[2:])} pixels"
                )
            x = to_pixels(to_tokens(x) + self.pos_embed.to(x.dtype), x)
        return self.normed(x)

    def apply_rotary(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate q and k (B, heads, N, D) by their positions if ``rotary`` is set."""
        return (rotate(q), rotate(k)) if self.rotary else (q, k)

    def split_heads(self, x: Tensor) -> Tensor:
        """Return x (B, heads·D, H, W) as a view (B, heads, N, D)."""
        tokens = to_tokens(x)
        return tokens.view(*tokens.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def merge_heads(self, out: Tensor, like: Tensor) -> Tensor:
        """Reshape (B, heads, N, D) to (B, heads·D, H, W)."""
        return to_pixels(out.transpose(1, 2).flatten(2), like)


class PerformerAttention(Attention):
    """The attention of CPV: FAVOR+ between linear maps for q, k, v and the output.

    The projection is a persistent buffer of ⌊D ln D⌋ rows, shared by the heads. It is drawn once (the paper never
    redraws it), from a generator that ``torch.manual_seed`` controls. ``local_heads`` of the heads use
    :func:`local_attention` instead, without relative positions. The text of the paper has a window of 256, and the
    released code has no local heads.
    """

    op = "performer_attention"

    @python_numbers
    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        kernel: str = "softmax",
        eps: float | None = None,
        stabilizer: str = "head",
        local_heads: int = 0,
        local_window: int = 256,
        **kwargs: Any,
    ):
        super().__init__(dim, num_heads, **kwargs)
        check_choice("attn_kernel", kernel, KERNELS)
        check_choice("stabilizer", stabilizer, STABILIZERS)
        if eps is not None:
            check_eps(eps)
        if not 0 <= local_heads <= num_heads:
            raise ValueError(f"local_heads must be in [0, {num_heads}], got {local_heads}")
        check_at_least(1, local_window=local_window)
        self.kernel, self.eps, self.stabilizer = kernel, eps, stabilizer
        self.couples_images = stabilizer != "head"
        self.local_heads, self.local_window = local_heads, local_window
        self.q, self.k, self.v = (nn.Linear(dim, self.inner_dim) for _ in range(3))
        self.proj = nn.Linear(self.inner_dim, dim)
        features = cxv_kernels.num_random_features(self.head_dim)
        self.register_buffer("projection", torch.empty(features, self.head_dim))
        self.redraw_projection_()

    @torch.no_grad()
    def redraw_projection_(self, generator: torch.Generator | None = None) -> None:
        """Draw new random features, except on the meta device.

        Args:
            generator: CPU generator. Default: a new one, seeded by PyTorch's global generator.
        """
        if self.projection.is_meta:
            return
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.randint(2**62, (), device="cpu")))
        self.projection.copy_(cxv_kernels.orthogonal_projection(*self.projection.shape, generator=generator))

    def forward_chunk(self, x: Tensor, dropout: DropoutFn) -> Tensor:
        y = self.pre_attention(x)
        q, k, v = (self.split_heads(linear(layer, y)) for layer in (self.q, self.k, self.v))
        q, k = self.apply_rotary(q, k)
        if self.local_heads:
            sizes = (self.num_heads - self.local_heads, self.local_heads)
            far, near = zip(*(t.split(sizes, dim=1) for t in (q, k, v)), strict=True)
            out = torch.cat((self.favor(*far), local_attention(*near, self.local_window)), dim=1)
        else:
            out = self.favor(q, k, v)
        return dropout(linear(self.proj, self.merge_heads(out, x)), residual=x)

    def favor(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Compute FAVOR+ of q, k and v (B, heads, N, D) with the features of this layer."""
        return cxv_kernels.performer_attention(
            q, k, v, self.projection, self.kernel, eps=self.eps, stabilizer=self.stabilizer, backend=self.backend
        )


class NystromAttention(Attention):
    """The attention of CNV: a bias-free qkv map, Nyström attention, and a 33×1 convolution of v along the tokens.

    With ``front_pad``, zeros before the tokens make their number a multiple of the landmarks, as in the released code;
    without it the first segments are one token longer. ``pinv_init``: see :func:`cxv_kernels.nystrom_attention`.
    """

    op = "nystrom_attention"

    @python_numbers
    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        num_landmarks: int = 64,
        residual_conv_kernel: int = 33,
        front_pad: bool = False,
        pinv_init: str = "head",
        **kwargs: Any,
    ):
        super().__init__(dim, num_heads, **kwargs)
        check_at_least(1, num_landmarks=num_landmarks)
        check_odd(residual_conv_kernel=residual_conv_kernel)
        check_choice("pinv_init", pinv_init, PINV_INITS)
        self.num_landmarks, self.front_pad, self.pinv_init = num_landmarks, front_pad, pinv_init
        self.couples_images = pinv_init == "batch"
        self.qkv = nn.Linear(dim, 3 * self.inner_dim, bias=False)
        self.res_conv = nn.Conv2d(
            num_heads,
            num_heads,
            (residual_conv_kernel, 1),
            padding=(residual_conv_kernel // 2, 0),
            groups=num_heads,
            bias=False,
        )
        self.proj = nn.Linear(self.inner_dim, dim)

    def forward_chunk(self, x: Tensor, dropout: DropoutFn) -> Tensor:
        y = self.pre_attention(x)
        pad = -(y.shape[2] * y.shape[3]) % self.num_landmarks if self.front_pad else 0
        if pad:
            y = F.pad(to_tokens(y), (0, 0, pad, 0)).transpose(1, 2).unsqueeze(-1)
        q, k, v = (self.split_heads(t) for t in linear(self.qkv, y).chunk(3, dim=1))
        q, k = self.apply_rotary(q, k)
        fused = is_unmodified(self.res_conv) and self.res_conv.bias is None
        taps = self.res_conv.weight if fused else None
        options = {"residual_weight": taps, "pinv_init": self.pinv_init, "backend": self.backend}
        out = cxv_kernels.nystrom_attention(q, k, v, self.num_landmarks, **options)
        out = out if fused else out + self.res_conv(v)
        return dropout(linear(self.proj, self.merge_heads(out[:, :, pad:], x)), residual=x)


class LinearAttention(Attention):
    """The attention of CLTV: linear attention between convolutions for q, k, v and the output.

    The parameters of Table 1 require ``kernel_size=1``; the released code has 3.
    """

    op = "linear_attention"

    @python_numbers
    def __init__(self, dim: int, num_heads: int = 4, kernel_size: int = 1, feature_map: str = "softmax", **kwargs: Any):
        super().__init__(dim, num_heads, **kwargs)
        check_odd(attn_kernel_size=kernel_size)
        check_choice("feature_map", feature_map, FEATURE_MAPS)
        self.feature_map = feature_map
        padding, inner = kernel_size // 2, self.inner_dim
        self.q, self.k, self.v = (nn.Conv2d(dim, inner, kernel_size, padding=padding) for _ in range(3))
        self.proj = nn.Conv2d(inner, dim, kernel_size, padding=padding)

    def forward_chunk(self, x: Tensor, dropout: DropoutFn) -> Tensor:
        y = self.pre_attention(x)
        q, k, v = (self.split_heads(convolve(layer, y)) for layer in (self.q, self.k, self.v))
        q, k = self.apply_rotary(q, k)
        out = cxv_kernels.linear_attention(q, k, v, self.feature_map, backend=self.backend)
        return dropout(convolve(self.proj, self.merge_heads(out, x)), residual=x)
