"""The fused ops: fake implementations, autograd, and what the kernels support."""

import torch
from torch import Tensor

from ...autograd import FusedOp, like_layout
from ...dispatch import CUDA_DTYPES, Support, register
from ...validation import accumulate_dtype
from ..linear_attention.op import fake_out, fake_state, triton_state
from .reference import LEAST_EPS, performer_attention_reference, performer_features_reference

_TRITON = "cxv_kernels.ops.performer_attention.triton"


def _fake(q, k, v, projection, key_mask, kernel, eps):
    return fake_out(q, v), *fake_state(q, projection.shape[0], v.shape[3]), projection.new_empty(q.shape[:2])


def _triton_fake(q, k, v, projection, key_mask, kernel, eps):
    return fake_out(q, v), *triton_state(q, projection.shape[0], v.shape[3]), projection.new_empty(q.shape[:2])


def _fake_features(x, projection, is_query, kernel, eps):
    phi = like_layout(x, (*x.shape[:3], projection.shape[0]))
    return phi, x.new_empty(x.shape[:2], dtype=accumulate_dtype(x.dtype))


performer_attention_op = FusedOp(
    "performer_attention", performer_attention_reference, _fake, triton=_TRITON, triton_fake=_triton_fake
)
performer_features_op = FusedOp("performer_features", performer_features_reference, _fake_features, triton=_TRITON)

for _op in ("performer_attention", "performer_features"):
    register(
        _op,
        cpu=Support(),
        cuda=Support(CUDA_DTYPES, max_channels=64),
        triton=Support(max_channels=128, tensor_cores=True),
    )


def unsupported_options(
    projection: Tensor, stabilizer: str, eps: float | None, dtype: torch.dtype, backend: str
) -> str | None:
    """Return the reason why a fused backend does not support these arguments, or None.

    Args:
        eps: ``eps`` of the attention, None for the default.
    """
    if eps is not None and 0 < eps < LEAST_EPS and backend != "cpu":
        return f"does not support an eps between 0 and {LEAST_EPS:g}, which needs float64"
    # Triton multiplies by the weights of the features, and float16 rounds them with an absolute error of 1e-10
    if eps is not None and 0 < eps < 1e-5 and backend == "triton" and dtype == torch.float16:
        return "does not support an eps between 0 and 1e-05 in float16"
    if stabilizer != "head":
        return f"does not support stabilizer={stabilizer!r}"
    if projection.requires_grad and torch.is_grad_enabled():
        return "does not support a projection that requires grad"
    features = projection.shape[0]
    return f"supports at most 512 features, not {features}" if backend == "triton" and features > 512 else None
