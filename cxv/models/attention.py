"""The three mechanisms of CXV as residual branches, x (B, C, H, W) → x + attention(x) (paper section 3.1)."""

import torch
from torch import Tensor, nn

import cxv_kernels

from .residual import Drop, ResidualBranch, convolve, pointwise, to_pixels, to_tokens


class _Attention(ResidualBranch):
    """Heads over the tokens of a residual branch."""

    def __init__(self, dim: int, num_heads: int, drop_rate: float, use_fused: bool):
        super().__init__(drop_rate, use_fused)
        if dim % num_heads:
            raise ValueError(f"num_heads must divide the embedding dimension {dim}, got {num_heads}")
        self.num_heads = num_heads

    def split_heads(self, tokens: Tensor) -> Tensor:
        """(B, N, C) → (B, heads, N, C/heads), a view."""
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def merge_heads(self, x: Tensor) -> Tensor:
        """(B, heads, N, C/heads) → (B, N, C)."""
        return x.transpose(1, 2).flatten(2)

    def project(self, out: Tensor, drop: Drop, x: Tensor) -> Tensor:
        """x + dropout(proj(out)) of the heads' output (B, heads, N, C/heads)."""
        y = pointwise(to_pixels(self.merge_heads(out), x), self.proj.weight, self.proj.bias)
        return to_pixels(drop(to_tokens(y), to_tokens(x)), x)


class PerformerAttention(_Attention):
    """CPV's mixer: linear q, k, v and output maps around FAVOR+.

    The projection is a persistent buffer of ⌊D ln D⌋ rows, shared by the heads, drawn once (the paper never
    redraws it) from a generator that ``torch.manual_seed`` governs.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        drop_rate: float = 0.5,
        kernel: str = "softmax",
        eps: float | None = None,
        stabilizer: str = "head",
        use_fused: bool = False,
    ):
        super().__init__(dim, num_heads, drop_rate, use_fused)
        self.kernel, self.eps, self.stabilizer = kernel, eps, stabilizer
        self.q, self.k, self.v = (nn.Linear(dim, dim) for _ in range(3))
        self.proj = nn.Linear(dim, dim)
        head_dim = dim // num_heads
        self.register_buffer("projection", torch.empty(cxv_kernels.num_random_features(head_dim), head_dim))
        self.redraw_projection_()

    @torch.no_grad()
    def redraw_projection_(self, generator: torch.Generator | None = None) -> None:
        """Draw new random features, from a CPU ``generator`` or, with None, one seeded by the global state."""
        if generator is None:
            generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        self.projection.copy_(cxv_kernels.orthogonal_projection(*self.projection.shape, generator=generator))

    def branch(self, x: Tensor, drop: Drop) -> Tensor:
        q, k, v = (
            self.split_heads(to_tokens(pointwise(x, layer.weight, layer.bias))) for layer in (self.q, self.k, self.v)
        )
        out = cxv_kernels.performer_attention(
            q, k, v, self.projection, self.kernel, eps=self.eps, stabilizer=self.stabilizer, backend=self.backend
        )
        return self.project(out, drop, x)


class NystromAttention(_Attention):
    """CNV's mixer: a bias-free qkv map, Nyström attention, and a 33×1 convolution of v along the tokens."""

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        drop_rate: float = 0.5,
        num_landmarks: int = 64,
        residual_conv_kernel: int = 33,
        use_fused: bool = False,
    ):
        super().__init__(dim, num_heads, drop_rate, use_fused)
        if residual_conv_kernel % 2 == 0:
            raise ValueError(f"residual_conv_kernel must be odd, got {residual_conv_kernel}")
        self.num_landmarks = num_landmarks
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.res_conv = nn.Conv2d(
            num_heads,
            num_heads,
            (residual_conv_kernel, 1),
            padding=(residual_conv_kernel // 2, 0),
            groups=num_heads,
            bias=False,
        )
        self.proj = nn.Linear(dim, dim)

    def branch(self, x: Tensor, drop: Drop) -> Tensor:
        q, k, v = (self.split_heads(t) for t in to_tokens(pointwise(x, self.qkv.weight)).chunk(3, dim=-1))
        out = cxv_kernels.nystrom_attention(
            q, k, v, self.num_landmarks, residual_weight=self.res_conv.weight, backend=self.backend
        )
        return self.project(out, drop, x)


class LinearAttention(_Attention):
    """CLTV's mixer: q, k, v and output convolutions around linear attention; no dropout.

    ``kernel_size=1`` is what Table 1 counts, 3 what the released file has.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        kernel_size: int = 1,
        feature_map: str = "softmax",
        use_fused: bool = False,
    ):
        super().__init__(dim, num_heads, 0.0, use_fused)
        if kernel_size % 2 == 0:
            raise ValueError(f"attn_kernel_size must be odd, got {kernel_size}")
        self.feature_map = feature_map
        self.q, self.k, self.v = (nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2) for _ in range(3))
        self.proj = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2)

    def branch(self, x: Tensor, drop: Drop) -> Tensor:
        q, k, v = (self.split_heads(to_tokens(convolve(layer, x))) for layer in (self.q, self.k, self.v))
        out = cxv_kernels.linear_attention(q, k, v, self.feature_map, backend=self.backend)
        return x + convolve(self.proj, to_pixels(self.merge_heads(out), x))
