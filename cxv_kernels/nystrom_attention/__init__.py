"""Nyström attention. README.md has the math."""

from torch import Tensor

from .. import backends
from ..validation import autocast_inputs, check_attention, without_autocast
from .reference import nystrom_attention_reference

__all__ = ["nystrom_attention"]


def nystrom_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_landmarks: int = 64,
    *,
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
        backend: see :func:`cxv_kernels.use_backend`.

    Returns:
        (B, H, N_q, E) in q's dtype; the landmarks' matrices are float32 (float64 for float64).

    Raises:
        ValueError: a wrong rank, shape, device or backend, ``num_landmarks`` below 1; TypeError: a wrong or mixed
        dtype; RuntimeError: the named backend cannot serve.
    """
    q, k, v = autocast_inputs(q, k, v)
    check_attention(q, k, v)
    if num_landmarks < 1:
        raise ValueError(f"num_landmarks must be at least 1, got {num_landmarks}")
    backends.resolve("nystrom_attention", q, backend)
    with without_autocast(q):
        return nystrom_attention_reference(q, k, v, num_landmarks)
