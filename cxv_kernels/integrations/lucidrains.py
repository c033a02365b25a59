"""Functions shared by the swaps for the lucidrains packages."""

from torch import Tensor

from cxv_kernels import linear_attention


def softmax_linear_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None) -> Tensor:
    """Compute softmax(q) over D times softmax(k)ᵀ v over tokens, without the factors D^-¼ of our op."""
    scale = q.shape[-1] ** 0.25
    return linear_attention(q * scale, k * scale, v, key_mask=key_mask)
