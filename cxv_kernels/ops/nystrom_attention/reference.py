"""Nyström attention in plain PyTorch.

``F.scaled_dot_product_attention`` computes the two softmaxes over tokens, so no N × 64 map is stored.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...validation import accumulate_dtype

PINV_INITS = ("head", "batch")


def segment_means(x: Tensor, num_segments: int) -> Tensor:
    """Return the means (B, H, num_segments, D) of segments of consecutive tokens of x (B, H, N, D), N ≥ num_segments.

    If num_segments does not divide N, the first N mod num_segments segments have one token more.
    """
    *lead, tokens, dim = x.shape
    size, longer = tokens // num_segments, tokens % num_segments
    traced = torch.compiler.is_exporting() or torch.jit.is_tracing()
    if traced and not isinstance(tokens, int):  # one graph for every number of tokens
        i = torch.arange(num_segments + 1, device=x.device)
        starts = i * size + torch.where(i < longer, i, longer)
        n = torch.arange(tokens, device=x.device)
        member = ((n >= starts[:-1, None]) & (n < starts[1:, None])).to(x.dtype)
        return member @ x / member.sum(dim=-1, keepdim=True)
    head, tail = x[..., : longer * (size + 1), :], x[..., longer * (size + 1) :, :]
    parts = [tail.reshape(*lead, num_segments - longer, size, dim).mean(dim=-2)]
    if longer:
        parts.insert(0, head.reshape(*lead, longer, size + 1, dim).mean(dim=-2))
    return torch.cat(parts, dim=-2)


def iterative_pinv(a: Tensor, iterations: int = 6, init: str = "head") -> Tensor:
    """Approximate the pseudo-inverse of each matrix of a (…, m, m) by cubic iterations (Xiong et al. 2021, eq. 11-14).

    The first iterate is aᵀ / (largest row sum · largest column sum). The sums are those of each matrix with
    ``init="head"``, and those of all matrices together with ``"batch"``.
    """
    row_sums, column_sums = a.abs().sum(dim=-1), a.abs().sum(dim=-2)
    if init == "batch":
        scale = row_sums.amax() * column_sums.amax()
    else:
        scale = (row_sums.amax(dim=-1) * column_sums.amax(dim=-1))[..., None, None]
    z = a.transpose(-2, -1) / scale
    identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for _ in range(iterations):
        az = a @ z
        z = 0.25 * z @ (13 * identity - az @ (15 * identity - az @ (7 * identity - az)))
    return z


def attend_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute softmax(D^-½ q kᵀ) v in v's dtype, twice differentiable; q or k can have a wider dtype than v."""
    dtype = torch.promote_types(q.dtype, k.dtype)
    weights = (q.to(dtype) @ k.to(dtype).transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return (weights @ v.to(dtype)).to(v.dtype)


def mix_reference(q_means: Tensor, k_means: Tensor, summary: Tensor, pinv_init: str = "head") -> Tensor:
    """Compute A⁺ summary (B, H, m, E) with A = softmax(D^-½ q_means k_meansᵀ), for means (B, H, m, D) in float32."""
    a = (q_means * q_means.shape[-1] ** -0.5 @ k_means.transpose(-2, -1)).softmax(dim=-1)
    inverse = iterative_pinv(a, init=pinv_init)
    return (inverse @ summary.to(inverse.dtype)).to(summary.dtype)


def residual_reference(v: Tensor, weight: Tensor) -> Tensor:
    """Convolve each head of v (B, H, N, E) along its tokens with weight (H, 1, K, 1).

    This is a one-dimensional convolution of H·E channels, which is also the fastest form in float32. A two-dimensional
    one has errors in PyTorch 2.14 with AVX-512: for 196 or 256 tokens along the height, oneDNN's gradient of the weight
    is wrong by 5 to 8 %; with tokens along the width, a step with ``torch.compile`` in bfloat16 takes many minutes.
    """
    if v.numel() == 0:
        return v * weight.sum()
    heads, channels = v.shape[1], int(v.shape[3])  # int: torch.onnx.export(dynamo=False) needs the taps' shape
    taps = weight[:, :, :, 0].repeat_interleave(channels, dim=0)  # (H·E, 1, K)
    out = F.conv1d(v.transpose(-2, -1).flatten(1, 2), taps, padding=weight.shape[2] // 2, groups=heads * channels)
    return out.view(out.shape[0], heads, channels, -1).transpose(-2, -1)


def nystrom_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    landmarks: int = 64,
    residual_weight: Tensor | None = None,
    pinv_init: str = "head",
) -> Tensor:
    """See :func:`cxv_kernels.nystrom_attention`."""
    landmarks = min(landmarks, q.shape[2], k.shape[2])
    if q.numel() == 0 or v.numel() == 0:  # PyTorch 2.11's attention divides by the number of heads and samples
        out = (q.sum(dim=-1, keepdim=True) * 0).expand(*q.shape[:3], v.shape[3])
    else:
        dtype = accumulate_dtype(q.dtype)
        q_means, k_means = segment_means(q.to(dtype), landmarks), segment_means(k.to(dtype), landmarks)
        summary = F.scaled_dot_product_attention(q_means.to(q.dtype), k, v)
        mixed = mix_reference(q_means, k_means, summary, pinv_init)
        out = F.scaled_dot_product_attention(q, k_means.to(q.dtype), mixed)
    return out if residual_weight is None else out + residual_reference(v, residual_weight)
