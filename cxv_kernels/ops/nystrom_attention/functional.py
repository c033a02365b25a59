"""Nyström attention. README.md has the math."""

from functools import partial

from torch import Tensor

from ... import dispatch
from ...validation import (
    autocast_inputs,
    check_attention,
    check_choice,
    check_count,
    check_same,
    check_tensor,
    computing,
)
from .op import nystrom_attention_fused, unsupported_options
from .reference import PINV_INITS, nystrom_attention_reference

__all__ = ["nystrom_attention"]


def nystrom_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_landmarks: int = 64,
    *,
    residual_weight: Tensor | None = None,
    pinv_init: str = "head",
    backend: str | None = None,
) -> Tensor:
    """Nyström approximation of softmax attention (Xiong et al. 2021, eq. 13; paper section 3.1).

    out = softmax(q·k̃ᵀ) A⁺ softmax(q̃·kᵀ) v with A = softmax(q̃·k̃ᵀ), all scaled by D^-½; q̃ and k̃ are the means of
    ``num_landmarks`` runs of consecutive tokens, A⁺ six cubic iterations. The outer products are
    ``F.scaled_dot_product_attention``.

    Args:
        q: (B, H, N_q, D); k: (B, H, N_k, D); v: (B, H, N_k, E). float64, float32, float16 or bfloat16, one dtype,
            any strides. Under autocast they are cast to its dtype.
        num_landmarks: at most this many landmarks; no more than tokens are used.
        residual_weight: (H, 1, K, 1) in q's dtype (cast with it under autocast), K odd, as ``nn.Conv2d`` holds it. Each
            head of v, convolved along its tokens with its row and zeros beyond both ends, is added to the output;
            N_q = N_k then. With K = 33 it is the residual of the paper's CNV.
        pinv_init: the scale of the first iterate Aᵀ / (largest row sum · largest column sum). ``"head"`` takes the
            maxima of each matrix A, one per (batch, head). ``"batch"`` takes them over all matrices, as the paper's
            released code does: six iterations do not converge, so one image changes another's output.
        backend: see :func:`cxv_kernels.use_backend`.

    Returns:
        (B, H, N_q, E) in q's dtype; the landmarks' matrices are float32 (float64 for float64).

    Saved for backward by the fused op: q, k, v, O(m·(D + E)) per head for m landmarks, and what
    ``F.scaled_dot_product_attention`` keeps (its output and one number per query). On the CPU the fused op
    has derivatives of any order. The reference and Triton, whose outer products are PyTorch's, need
    ``SDPBackend.MATH`` from the second order on. Forward-mode AD needs that too, and like vmap
    ``backend="reference"``. The fused op supports ``pinv_init="head"`` only.

    Raises:
        ValueError: a wrong rank, shape, device, option or backend, ``num_landmarks`` below 1, an even K, a residual
        where N_q ≠ N_k; TypeError: a wrong or mixed dtype; RuntimeError: the named backend does not support the call.
    """
    if residual_weight is None:
        q, k, v = autocast_inputs(q, k, v)
    else:
        q, k, v, residual_weight = autocast_inputs(q, k, v, residual_weight)
    check_attention(q, k, v)
    num_landmarks = check_count("num_landmarks", num_landmarks)
    check_choice("pinv_init", pinv_init, PINV_INITS)
    if residual_weight is not None:
        _check_residual(residual_weight, q, v)
    landmarks = min(num_landmarks, q.shape[2], k.shape[2])
    with computing("nystrom_attention", q=q, k=k, v=v, residual_weight=residual_weight):
        dim, check_options = max(q.shape[3], v.shape[3]), partial(unsupported_options, pinv_init)
        selected = dispatch.resolve("nystrom_attention", q, backend, dim, check_options)
        if selected == "reference" or q.numel() == 0 or v.numel() == 0:
            return nystrom_attention_reference(q, k, v, landmarks, residual_weight, pinv_init)
        return nystrom_attention_fused(q, k, v, landmarks, residual_weight, selected)


def _check_residual(weight: Tensor, q: Tensor, v: Tensor) -> None:
    check_tensor("residual_weight", weight, 4, "(H, 1, K, 1)")
    check_same("residual_weight", weight, "q", q)
    heads, kernel = q.shape[1], weight.shape[2]
    if weight.shape != (heads, 1, kernel, 1) or kernel % 2 == 0:
        raise ValueError(f"residual_weight must have shape ({heads}, 1, K, 1) with K odd, got {tuple(weight.shape)}")
    if q.shape[2] != v.shape[2]:
        raise ValueError(f"residual_weight needs as many queries as keys, got {q.shape[2]} and {v.shape[2]}")
