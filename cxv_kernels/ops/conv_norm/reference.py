"""3×3 convolution and channel LayerNorm in plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor

from ...validation import accumulate_dtype


def conv_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor, beta: Tensor, eps: float = 1e-5
) -> Tensor:
    """See :func:`cxv_kernels.conv_norm`; statistics and the affine map in float32 (float64 for float64)."""
    y = F.conv2d(x, weight, bias, padding=1).permute(0, 2, 3, 1)
    dtype = accumulate_dtype(y.dtype)
    out = F.layer_norm(y.to(dtype), gamma.shape, gamma.to(dtype), beta.to(dtype), eps)
    return out.to(y.dtype).permute(0, 3, 1, 2)
