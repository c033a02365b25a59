"""The fused op in pieces: fake implementations, autograd, and what the kernels support."""

import torch.nn.functional as F
from torch import Tensor

from ...autograd import FusedOp, like_layout
from ...dispatch import Support, register
from ...validation import accumulate_dtype
from .reference import attend_reference, mix_reference, residual_reference, segment_means

_TRITON = "cxv_kernels.ops.nystrom_attention.triton"


def _fake_means(x, landmarks):
    return x.new_empty((*x.shape[:2], landmarks, x.shape[3]), dtype=accumulate_dtype(x.dtype))


def _means_backward(kernel, grad_means, x, landmarks):  # x is kept for its layout alone
    return kernel(grad_means, x)


def _means_reference(x, landmarks):
    return segment_means(x.to(accumulate_dtype(x.dtype)), landmarks)


def _fake_summary(q_means, k, v):
    landmarks = q_means.shape[2]
    return like_layout(v, (*v.shape[:2], landmarks, v.shape[3])), q_means.new_empty((*v.shape[:2], landmarks))


means_op = FusedOp("nystrom_means", _means_reference, _fake_means, triton=_TRITON, backward=_means_backward)
summary_op = FusedOp("nystrom_summary", lambda q_means, k, v: attend_reference(q_means, k, v), _fake_summary)
# backward computes the landmarks' matrix and its inverse again
mix_op = FusedOp(
    "nystrom_mix", mix_reference, lambda q_means, k_means, summary: like_layout(summary, summary.shape), triton=_TRITON
)
readout_op = FusedOp(
    "nystrom_readout",
    lambda q, k_means, mixed: attend_reference(q, k_means, mixed),
    lambda q, k_means, mixed: like_layout(q, (*q.shape[:3], mixed.shape[3])),
)
residual_op = FusedOp(
    "nystrom_residual",
    residual_reference,
    lambda attention, v, weight: like_layout(attention, attention.shape),
    triton=_TRITON,
    passed_on="attention",
)


def nystrom_attention_fused(
    q: Tensor, k: Tensor, v: Tensor, landmarks: int, residual_weight: Tensor | None, pinv_init: str, backend: str
) -> Tensor:
    """See :func:`cxv_kernels.nystrom_attention`; 1 ≤ landmarks ≤ tokens."""
    q_means, k_means = means_op(q, landmarks, backend), means_op(k, landmarks, backend)
    with_sdpa = backend == "triton"  # PyTorch's own attention kernels are fast with few keys
    if with_sdpa:
        summary = F.scaled_dot_product_attention(q_means.to(q.dtype), k, v)
    else:
        summary, _ = summary_op(q_means, k, v, backend)
    if pinv_init == "head":
        mixed = mix_op(q_means, k_means, summary, backend)
    else:  # a kernel sees one matrix at a time
        mixed = mix_reference(q_means, k_means, summary, pinv_init)
    if with_sdpa:
        out = F.scaled_dot_product_attention(q, k_means.to(q.dtype), mixed)
    else:
        out = readout_op(q, k_means, mixed, backend)
    return out if residual_weight is None else residual_op(out, v, residual_weight, backend)


register("nystrom_attention", cpu=Support(), triton=Support(max_channels=128))
