"""The fused op: fake implementations, autograd, and what its kernels support."""

import torch
from torch import Tensor

from ...autograd import FusedOp
from ...dispatch import CUDA_DTYPES, Support, register
from ...validation import accumulate_dtype, without_autocast
from .reference import conv_norm_reference

_OPTIONS = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, transposed, output padding, groups


def convolution(x: Tensor, weight: Tensor) -> Tensor:
    """PyTorch's 3×3 convolution, without bias."""
    return torch.ops.aten.convolution(x, weight, None, *_OPTIONS)


def convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, needed: list[bool]) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight, or empty tensors (0) if they are not needed."""
    grads = torch.ops.aten.convolution_backward(grad, x, weight, None, *_OPTIONS, [*needed[:2], False])
    return tuple(g if need else x.new_empty(0) for g, need in zip(grads, needed[:2], strict=False))


def _fake(x, weight, bias, gamma, beta, eps):
    return convolution(x, weight), x.new_empty((x.shape[0], *x.shape[2:]), dtype=accumulate_dtype(x.dtype))


def _fake_backward(grad_out, x, weight, bias, out, rstd, gamma, beta, eps, needed):
    vectors = (bias if needed[2] else x, gamma, beta)
    return (
        *convolution_backward(out, x, weight, needed),
        *(t.new_empty(gamma.shape if need else 0) for t, need in zip(vectors, needed[2:], strict=True)),
    )


def _in_dtype_of(x: Tensor, *parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast the parameters to the dtype of x. Under autocast they differ, and no copies are saved for backward."""
    return tuple(None if t is None else t.to(x.dtype) for t in parameters)


def _forward(kernel, x, weight, bias, gamma, beta, eps):
    return kernel(x, *_in_dtype_of(x, weight, bias), gamma, beta, eps)


def _backward(kernel, grad_out, x, weight, bias, out, rstd, gamma, beta, eps, needed):
    with without_autocast(x):
        return kernel(grad_out, x, *_in_dtype_of(x, weight, bias), out, rstd, gamma, beta, eps, needed)


def _reference(x, weight, bias, gamma, beta, eps):
    return conv_norm_reference(x, *_in_dtype_of(x, weight, bias), gamma, beta, eps)


conv_norm_op = FusedOp(
    "conv_norm",
    _reference,
    _fake,
    triton="cxv_kernels.ops.conv_norm.triton",
    fake_backward=_fake_backward,
    forward=_forward,
    backward=_backward,
)
register(
    "conv_norm",
    cpu=Support(),
    cuda=Support(CUDA_DTYPES, min_channels=3, max_channels=3072),
    triton=Support(max_channels=4096),  # one program holds all channels of a pixel in registers
)
