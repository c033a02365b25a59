"""The fused op in pieces: fake implementations, autograd, and what the kernels support."""

import torch.nn.functional as F
from torch import Tensor

from ...autograd import fused_op, like_layout
from ...dispatch import Support, register
from ...validation import accumulate_dtype
from .reference import attend_reference, mix_reference, residual_reference, segment_means

_TRITON = "cxv_kernels.ops.nystrom_attention.triton"


def _like(x: Tensor) -> Tensor:
    return like_layout(x, tuple(x.shape))


def _fake_means(x, landmarks):
    return x.new_empty((*x.shape[:2], landmarks, x.shape[3]), dtype=accumulate_dtype(x.dtype))


def _means_backward(kernel, grad_means, x, landmarks):  # x is kept for its layout alone
    return kernel(grad_means, x)


def _means_reference(x, landmarks):
    return segment_means(x.to(accumulate_dtype(x.dtype)), landmarks)


def _fake_summary(q_means, k, v):
    landmarks = q_means.shape[2]
    return like_layout(v, (*v.shape[:2], landmarks, v.shape[3])), q_means.new_empty((*v.shape[:2], landmarks))


def _summary_reference(q_means, k, v):
    return attend_reference(q_means, k, v)


def _fake_mix(q_means, k_means, summary):
    return _like(summary)


def _fake_readout(q, k_means, mixed):
    return like_layout(q, (*q.shape[:3], mixed.shape[3]))


def _readout_reference(q, k_means, mixed):
    return attend_reference(q, k_means, mixed)


def _fake_residual(attention, v, weight):
    return _like(attention)


means_op = fused_op("nystrom_means", _means_reference, _fake_means, triton=_TRITON, backward=_means_backward)
summary_op = fused_op("nystrom_summary", _summary_reference, _fake_summary)
# backward computes the landmarks' matrix and its inverse again
mix_op = fused_op("nystrom_mix", mix_reference, _fake_mix, triton=_TRITON)
readout_op = fused_op("nystrom_readout", _readout_reference, _fake_readout)
residual_op = fused_op("nystrom_residual", residual_reference, _fake_residual, triton=_TRITON, passed_on="attention")


def nystrom_attention_fused(
    q: Tensor, k: Tensor, v: Tensor, landmarks: int, residual_weight: Tensor | None, backend: str
) -> Tensor:
    """See :func:`cxv_kernels.nystrom_attention`; 1 ≤ landmarks ≤ tokens."""
    q_means, k_means = means_op(q, landmarks, backend), means_op(k, landmarks, backend)
    if backend == "triton":  # PyTorch's own attention kernels are fast with few keys
        summary = F.scaled_dot_product_attention(q_means.to(q.dtype), k, v)
        mixed = mix_op(q_means, k_means, summary, backend)
        out = F.scaled_dot_product_attention(q, k_means.to(q.dtype), mixed)
    else:
        summary, _ = summary_op(q_means, k, v, backend)
        mixed = mix_op(q_means, k_means, summary, backend)
        out = readout_op(q, k_means, mixed, backend)
    return out if residual_weight is None else residual_op(out, v, residual_weight, backend)


def unsupported_options(pinv_init: str, backend: str) -> str | None:
    """Return the reason why the fused backends do not support these arguments, or None."""
    return None if pinv_init == "head" else f"does not support pinv_init={pinv_init!r}"


register("nystrom_attention", cpu=Support(), triton=Support(max_channels=128))
