"""Linear attention as several packages compute it, by calls of our op."""

from collections.abc import Iterable

import torch
from torch import Tensor

from cxv_kernels import linear_attention


def softmax_linear_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Compute softmax(q) over D times softmax(k)ᵀ v over tokens, without the factors D^-¼ of our op."""
    scale = q.shape[-1] ** 0.25
    return linear_attention(q * scale, k * scale, v, key_mask=key_mask)


def multiscale_relu_attention(scales: Iterable[Tensor], dim: int, eps: float) -> Tensor:
    """Attend within every head of every scale, for EfficientViT and DC-AE.

    Args:
        scales: Tensors (B, H·3·D, height, width) with q, k and v of each head one after the other.
        dim: D, the channels of a head.
        eps: Number added to the denominator.

    Returns:
        Tensor (B, scales·H·D, height, width). The packages join the scales before the attention. Here their outputs are
        joined, which are a third as large.
    """
    outputs = []
    for qkv in scales:
        batch, _, height, width = qkv.shape
        q, k, v = qkv.reshape(batch, -1, 3, dim, height * width).transpose(-1, -2).unbind(2)
        out = linear_attention(q, k, v, "relu", eps=eps)
        outputs.append(out.transpose(-1, -2).reshape(batch, -1, height, width))
    return torch.cat(outputs, dim=1)
