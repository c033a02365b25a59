"""Nyström attention. README.md has the derivation."""

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
from .op import nystrom_attention_fused
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
    """Compute the Nyström approximation of softmax attention (Xiong et al. 2021, eq. 13; paper section 3.1).

    out = softmax(q·k̃ᵀ) A⁺ softmax(q̃·kᵀ) v with A = softmax(q̃·k̃ᵀ), all scaled by D^-½. The landmarks q̃ and k̃ are
    the means of ``num_landmarks`` segments of consecutive tokens. Six cubic iterations approximate the pseudo-inverse
    A⁺, in float32 (float64 for float64 inputs). Under autocast, q, k, v and ``residual_weight`` are cast to the
    autocast dtype.

    The fused op saves q, k, v and O(m·(D + E)) numbers per head for m landmarks. Triton and the reference compute the
    outer products with ``F.scaled_dot_product_attention`` and also save its output and one number per query. The fused
    CPU op has derivatives of any order; with Triton or the reference, second and higher derivatives require
    ``SDPBackend.MATH``. Forward-mode AD requires ``backend="reference"`` and ``SDPBackend.MATH``. ``torch.func.vmap``
    requires ``backend="reference"``.

    Args:
        q: Queries, shape (B, H, N_q, D), in float64, float32, float16 or bfloat16, with any strides.
        k: Keys, shape (B, H, N_k, D), in the dtype of q.
        v: Values, shape (B, H, N_k, E), in the dtype of q.
        num_landmarks: Number of landmarks, limited to the number of tokens.
        residual_weight: Optional weight of shape (H, 1, K, 1) with K odd, in the dtype of q, as ``nn.Conv2d`` stores
            it. Each head of v is convolved along its tokens, with zero padding, and added to the output. Requires
            N_q = N_k. The paper's CNV uses K = 33.
        pinv_init: Scale of the first iterate Aᵀ / (largest row sum · largest column sum). ``"head"`` uses the sums of
            each matrix A, one per (batch, head). ``"batch"`` uses the largest sums of all matrices, as the released
            code of the paper does. Six iterations do not converge, so an image then changes the output of other
            images. With ``"batch"`` plain PyTorch computes A⁺, whose backward pass needs about 40·m² numbers per head.
        backend: Backend for this call, see :func:`cxv_kernels.use_backend`. Default: the one set there.

    Returns:
        Tensor of shape (B, H, N_q, E) in the dtype of q.

    Raises:
        ValueError: If a rank, shape or device does not match, an option or ``backend`` is invalid, ``num_landmarks``
            is below 1, K is even, or N_q ≠ N_k with a residual.
        TypeError: If a dtype is not supported, or the tensors have different dtypes.
        RuntimeError: If the named backend does not support the call.
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
    selected = dispatch.resolve("nystrom_attention", q, backend, max(q.shape[3], v.shape[3]))
    with computing("nystrom_attention", q=q, k=k, v=v, residual_weight=residual_weight):
        if selected == "reference" or q.numel() == 0 or v.numel() == 0:
            return nystrom_attention_reference(q, k, v, landmarks, residual_weight, pinv_init)
        return nystrom_attention_fused(q, k, v, landmarks, residual_weight, pinv_init, selected)


def _check_residual(weight: Tensor, q: Tensor, v: Tensor) -> None:
    check_tensor("residual_weight", weight, 4, "(H, 1, K, 1)")
    check_same("residual_weight", weight, "q", q)
    heads, kernel = q.shape[1], weight.shape[2]
    if weight.shape != (heads, 1, kernel, 1) or kernel % 2 == 0:
        raise ValueError(f"residual_weight must have shape ({heads}, 1, K, 1) with K odd, got {tuple(weight.shape)}")
    if q.shape[2] != v.shape[2]:
        raise ValueError(f"residual_weight needs as many queries as keys, got {q.shape[2]} and {v.shape[2]}")
