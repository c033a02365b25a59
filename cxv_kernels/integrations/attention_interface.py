"""Our mechanisms as attention implementations of Hugging Face transformers."""

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..dispatch import use_backend
from ..ops.linear_attention.functional import linear_attention
from ..ops.nystrom_attention.functional import nystrom_attention
from ..ops.performer_attention.functional import num_random_features, orthogonal_projection, performer_attention

# Arguments of other attention functions that our ops do not support.
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias", "head_mask", "cache", "cu_seq_lens_q")


def register_with_transformers(
    *, num_features: int | None = None, eps: float = 0.0, feature_map: str = "elu", num_landmarks: int = 64
) -> tuple[str, ...]:
    """Register ``attn_implementation="cxv_performer"``, ``"cxv_linear"`` and ``"cxv_nystrom"`` with transformers.

    The implementations are for encoders, such as the vision models ViT, DINOv2, DeiT and SigLIP. The outputs of a model
    change: ``"cxv_performer"`` and ``"cxv_nystrom"`` approximate softmax attention, and ``"cxv_linear"`` is a different
    function of the same weights. Fine-tune the model afterwards.

    ``"cxv_performer"`` and ``"cxv_linear"`` support a padding mask (B, N). The models raise ``ValueError`` for other
    masks, for dropout of the attention map in training, and if they are causal. ``output_attentions=True`` returns
    None, because there is no attention map.

    Args:
        num_features: Number of random features of ``"cxv_performer"``. Default: ⌊D ln D⌋. The features depend only on
            their number and D, so a model computes the same in every process.
        eps: As in :func:`performer_attention`. 0 is the original FAVOR+.
        feature_map: Feature map of ``"cxv_linear"``, as in :func:`linear_attention`.
        num_landmarks: Landmarks of ``"cxv_nystrom"``, as in :func:`nystrom_attention`.

    Returns:
        The three names. A second call replaces the options.

    Raises:
        ImportError: If transformers is not installed, or too old to register attention implementations.
        ValueError: If an option is invalid.
        TypeError: If an option has the wrong type.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError("register_with_transformers needs transformers 5: pip install 'cxv[integrations]'") from error
    attend = {
        "cxv_performer": functools.partial(_performer, num_features, eps),
        "cxv_linear": functools.partial(linear_attention, feature_map=feature_map),
        "cxv_nystrom": functools.partial(_nystrom, num_landmarks),
    }
    torch.compiler.assume_constant_result(_projection)  # here, as it imports torch._dynamo
    head = torch.zeros(1, 1, 2, 4, device="cpu")
    with use_backend("reference"):  # raises now for a wrong option
        for function in attend.values():
            function(head, head, head, key_mask=None)
    for name, function in attend.items():
        AttentionInterface.register(name, functools.partial(_forward, name, function))
        AttentionMaskInterface.register(name, functools.partial(_mask, name))
    return tuple(attend)


def _forward(
    name: str,
    attend: Any,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend: query (B, H, N_q, D), key and value (B, H, N_k, D) → (B, N_q, H, D). transformers calls this."""
    if getattr(module, "is_causal", True) if is_causal is None else is_causal:
        raise ValueError(f"{name} is for encoders: {type(module).__name__} is causal. Use attn_implementation='sdpa'")
    if dropout:
        raise ValueError(
            f"{name} has no attention map to apply dropout to: set the attention dropout of the config, "
            f"which is {dropout}, to 0"
        )
    given = [argument for argument in _UNSUPPORTED if kwargs.get(argument) is not None]
    if given:
        raise ValueError(f"{name} does not support {given[0]}, which {type(module).__name__} passes")
    if attention_mask is not None and (attention_mask.dim() != 2 or attention_mask.dtype != torch.bool):
        raise ValueError(
            f"{name} cannot mask pairs of tokens: attention_mask must be a padding mask (B, N), "
            f"got shape {tuple(attention_mask.shape)}"
        )
    if scaling is not None:
        gain = scaling * query.shape[-1] ** 0.5  # the ops divide by √D themselves
        query = query if math.isclose(gain, 1) else query * gain
    return attend(query, key, value, key_mask=attention_mask).transpose(1, 2), None


def _mask(
    name: str,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Return the mask that transformers passes to :func:`_forward`: bool (B, N_k), or None if it hides no key."""
    from transformers.masking_utils import bidirectional_mask_function

    if mask_function is not bidirectional_mask_function:
        raise ValueError(f"{name} is for encoders: this model has a causal or custom mask")
    if attention_mask is None or (not torch.compiler.is_compiling() and bool(attention_mask.all())):
        return None
    return attention_mask


def _projection(num_features: int, dim: int, device: torch.device) -> Tensor:
    return _cached_projection(num_features, dim, device)


@functools.cache
def _cached_projection(num_features: int, dim: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(num_features)
    with torch.inference_mode(False):
        return orthogonal_projection(num_features, dim, generator=generator, device=device)


def _performer(
    num_features: int | None, eps: float, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None
) -> Tensor:
    dim = q.shape[-1]
    num_features = num_random_features(dim) if num_features is None else num_features
    # detach() because Dynamo knows the properties of a result but not those of a constant
    projection = _projection(num_features, dim, q.device).detach()
    return performer_attention(q, k, v, projection, eps=eps, key_mask=key_mask)


def _nystrom(num_landmarks: int, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    if key_mask is not None:
        raise ValueError(
            "cxv_nystrom does not support a padding mask: use cxv_performer or cxv_linear, or images of one size"
        )
    return nystrom_attention(q, k, v, num_landmarks)
