"""Replace the softmax attention of a vision transformer by one of our mechanisms."""

import copy
import inspect
import itertools
import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from .dispatch import use_backend
from .integrations.swap import has_hooks
from .ops.linear_attention.functional import linear_attention
from .ops.nystrom_attention.functional import nystrom_attention
from .ops.performer_attention.functional import num_random_features, orthogonal_projection, performer_attention
from .tracing import record_call, refuse_torchscript
from .validation import check_choice, check_count, is_plain_tensor, to_numbers

MECHANISMS: dict[str, tuple[str, ...]] = {
    "performer": ("num_features", "kernel", "eps", "stabilizer"),
    "linear": ("feature_map", "eps"),
    "nystrom": ("num_landmarks", "pinv_init"),
}
"""The mechanisms and their options. The ops have the same options."""

# The parts of timm.layers.Attention. A module can be replaced if it has no other parameters; the parts are kept.
_PARTS = ("qkv", "q_norm", "k_norm", "norm", "gate", "proj", "proj_drop")
_ARGUMENTS = ("attn_mask", "is_causal")


class ReplacedAttention(nn.Module):
    """Self-attention (B, N, C) → (B, N, C_out) with one of our mechanisms and the layers of a softmax attention.

    Args:
        attention: A module like ``timm.layers.Attention``. Its layers are shared, not copied.
        mechanism: See :func:`replace_attention`.
        backend: See :func:`replace_attention`.
        **options: See :func:`replace_attention`.
    """

    __prepare_scriptable__ = refuse_torchscript

    def __init__(self, attention: nn.Module, mechanism: str, backend: str | None = None, **options: Any):
        super().__init__()
        for name in _PARTS:
            setattr(self, name, getattr(attention, name, None))
        self.num_heads = attention.num_heads
        self.head_dim = self.qkv.out_features // (3 * self.num_heads)
        self.scale = getattr(attention, "scale", self.head_dim**-0.5)
        gain = self.scale * self.head_dim**0.5  # the ops divide by √D themselves
        self.gain = None if math.isclose(gain, 1) else gain
        self.mechanism, self.backend, self.options = mechanism, backend, to_numbers(options)
        if mechanism == "performer":
            num_features = self.options.pop("num_features", num_random_features(self.head_dim))
            num_features = check_count("num_features", num_features)
            self.register_buffer(
                "projection", self.qkv.weight.new_empty(num_features, self.head_dim, dtype=torch.float32)
            )
            self.redraw_projection_()
        self.train(attention.training)

    @torch.no_grad()
    def redraw_projection_(self, generator: torch.Generator | None = None) -> None:
        """Draw new random features from a CPU ``generator``. Default: PyTorch's global generator.

        On the meta device nothing is drawn: call this after ``to_empty``, unless a ``state_dict`` has the projection.

        Raises:
            ValueError: If the mechanism is not ``"performer"``.
        """
        if self.mechanism != "performer":
            raise ValueError(f"redraw_projection_: only 'performer' has random features, not {self.mechanism!r}")
        if not self.projection.is_meta:
            self.projection.copy_(orthogonal_projection(*self.projection.shape, generator=generator))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Map x (B, N, C) to (B, N, C_out), for any N.

        Raises:
            ValueError: If a mask is given, because linear mechanisms cannot mask pairs of tokens, or if the rank of x
                is not 3.
        """
        if isinstance(x, Proxy):
            return record_call(self, x, attn_mask=attn_mask, is_causal=is_causal)
        if attn_mask is not None or is_causal:
            name = "is_causal" if attn_mask is None else "attn_mask"
            raise ValueError(f"{name}: {self.mechanism} attention cannot mask pairs of tokens")
        if x.dim() != 3:
            raise ValueError(f"x must be (B, N, C), got shape {tuple(x.shape)}")
        return self._around(self._attend, x)

    def _around(self, attend: Any, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        y = attend(q if self.gain is None else q * self.gain, k, v).transpose(1, 2).flatten(2)
        y = y if self.norm is None else self.norm(y)
        y = y if self.gate is None else y * self.gate(x).sigmoid()
        y = self.proj(y)
        return y if self.proj_drop is None else self.proj_drop(y)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.mechanism == "performer":
            return performer_attention(q, k, v, self.projection, **self.options, backend=self.backend)
        op = linear_attention if self.mechanism == "linear" else nystrom_attention
        return op(q, k, v, **self.options, backend=self.backend)

    def extra_repr(self) -> str:
        return ", ".join([f"mechanism={self.mechanism!r}", *(f"{k}={v!r}" for k, v in self.options.items())])


def replace_attention(
    model: nn.Module, mechanism: str = "performer", *, backend: str | None = None, **options: Any
) -> list[str]:
    """Replace the softmax self-attention of a vision transformer by a linear mechanism, in place, with its weights.

    Supported are ``timm.layers.Attention`` and modules with the same structure: a linear ``qkv``, ``num_heads`` and
    ``proj``, optionally ``q_norm``, ``k_norm``, ``norm``, ``gate`` and ``proj_drop``. Each module is first compared
    with softmax attention on random tokens. If it computes something else (windows, relative or rotary positions,
    channel attention), it is skipped with a warning. Class tokens and any number of tokens are supported.

    The outputs change: ``"performer"`` and ``"nystrom"`` approximate softmax attention, and ``"linear"`` is a different
    function. Fine-tune the model afterwards; examples/replace_attention.py measures the accuracy before and after.

    On the meta device the comparison uses random weights, and no features are drawn: call ``redraw_projection_`` of
    each replaced module after ``to_empty``, unless you load a ``state_dict`` of a converted model.

    Args:
        model: The model. Parameters stay the same objects, so an existing optimizer stays valid. Replace the attention
            before you quantize or shard the model: modules with quantized or distributed weights are skipped.
        mechanism: ``"performer"``, ``"linear"`` or ``"nystrom"``.
        backend: Backend of the op, see :func:`cxv_kernels.use_backend`. Default: the one set there.
        **options: Options of the op. ``"performer"`` takes ``kernel``, ``eps`` and ``stabilizer`` of
            :func:`performer_attention`, and ``num_features`` (default: ⌊D ln D⌋), which are drawn once from PyTorch's
            global generator and stored in the ``state_dict``. ``"linear"`` takes ``feature_map`` and ``eps`` of
            :func:`linear_attention`. ``"nystrom"`` takes ``num_landmarks`` and ``pinv_init`` of
            :func:`nystrom_attention`.

    Returns:
        Names of the replaced modules, such as ``blocks.0.attn``.

    Raises:
        ValueError: If the mechanism, an option or its value is invalid, or no module can be replaced. The message has
            the reasons.
        TypeError: If ``model`` is not a module.

    Example::

        model = timm.create_model("vit_tiny_patch16_224")
        cxv_kernels.replace_attention(model, "nystrom", num_landmarks=64)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_choice("mechanism", mechanism, tuple(MECHANISMS))
    unknown = sorted(options.keys() - set(MECHANISMS[mechanism]))
    if unknown:
        raise ValueError(
            f"{unknown[0]}: not an option of {mechanism!r}; allowed: {', '.join(MECHANISMS[mechanism])}, got {options}"
        )
    found = [
        (f"{path}.{name}".lstrip("."), parent, name, child)
        for path, parent in model.named_modules()
        for name, child in parent.named_children()
        if hasattr(getattr(child, "qkv", None), "in_features")
        and hasattr(child, "num_heads")
        and hasattr(child, "proj")
    ]
    reasons = {path: reason for path, _, _, child in found if (reason := _why_not(child)) is not None}
    unsupported = "; ".join(f"{path} {reason}" for path, reason in reasons.items())
    if len(reasons) == len(found):
        raise ValueError(
            f"model: {type(model).__name__} has no softmax attention that can be replaced: "
            f"{unsupported or 'none of its modules has qkv, num_heads and proj'}"
        )
    if reasons:
        warnings.warn(f"replace_attention skips these modules: {unsupported}", stacklevel=2)
    if any(getattr(getattr(child, "attn_drop", None), "p", 0) for path, _, _, child in found if path not in reasons):
        warnings.warn(
            f"attn_drop is removed, because {mechanism} attention has no attention map to apply dropout to",
            stacklevel=2,
        )
    replacements: dict[int, ReplacedAttention] = {}  # a module can occur in several places
    for path, _, _, child in found:
        if path not in reasons and id(child) not in replacements:
            replacements[id(child)] = _replacement(child, mechanism, backend, options)
    for path, parent, name, child in found:
        if path not in reasons:
            setattr(parent, name, replacements[id(child)])
    return [path for path, *_ in found if path not in reasons]


def _replacement(child: nn.Module, mechanism: str, backend: str | None, options: dict[str, Any]) -> ReplacedAttention:
    new = ReplacedAttention(child, mechanism, backend, **options)
    weight = child.qkv.weight
    if weight.is_meta:  # the device of the model is not known yet, so only the options are checked
        use_backend(backend or "auto")  # raises for an unknown name
        new.backend = "reference"
    with torch.no_grad():  # raises the op's errors now
        head = weight.new_zeros(1, new.num_heads, 2, new.head_dim)
        new._attend(head, head, head)
    new.backend = backend
    return new


def _why_not(attention: nn.Module) -> str | None:
    """Return the reason why a module cannot be replaced, or None."""
    if not isinstance(attention.qkv, nn.Linear) or not all(map(is_plain_tensor, attention.parameters())):
        special = [type(t).__name__ for t in attention.parameters() if not is_plain_tensor(t)]
        kind = special[0] if special else f"{type(attention.qkv).__module__}.{type(attention.qkv).__name__}"
        return f"({kind}) is quantized, distributed or adapted: replace the attention before that"
    if has_hooks(attention):
        return "has hooks, which would be lost: replace the attention before you register them"
    own = [name for name, _ in attention.named_parameters() if name.split(".")[0] not in _PARTS]
    if own:
        return f"has other parameters: {', '.join(own)}"
    arguments = list(inspect.signature(attention.forward).parameters)[1:]
    other = [name for name in arguments if name not in _ARGUMENTS]
    if other:
        return f"({type(attention).__name__}) takes other arguments than the tokens: {', '.join(other)}"
    generator = torch.Generator().manual_seed(0)
    attention = _materialize(copy.deepcopy(attention), generator).to("cpu", torch.float64).eval()
    try:
        with torch.no_grad(), torch.device("cpu"):  # the default device may be another one
            x = torch.randn(2, 6, attention.qkv.in_features, dtype=torch.float64, generator=generator)
            ours = ReplacedAttention(attention, "softmax")._around(F.scaled_dot_product_attention, x)
            same = torch.allclose(attention(x), ours, rtol=1e-6, atol=1e-9)
    except Exception as error:  # a module of another package can raise any exception, such as AssertionError
        reason = str(error).split("\n")[0] or type(error).__name__
        return f"({type(attention).__name__}) does not take tokens (B, N, C): {reason}"
    return None if same else f"({type(attention).__name__}) is not softmax attention of its qkv"


@torch.no_grad()
def _materialize(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Move a module from the meta device to the CPU with random weights. Return other modules unchanged."""
    if any(t.is_meta for t in itertools.chain(module.parameters(), module.buffers())):
        module.to_empty(device="cpu")
        for t in itertools.chain(module.parameters(), module.buffers()):
            t.normal_(generator=generator) if t.is_floating_point() else t.zero_()
    return module
