"""The packages that a user would install instead, as functions of q, k and v (B, H, N, D). All are optional."""

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# A package computes the same function if one head agrees with our float64 reference to this, relative to the largest
# entry, in float32. It leaves room for roundings, not for another formula.
AGREEMENT = 1e-3


def _identity(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors


@dataclass(frozen=True)
class Baseline:
    """What is timed, and how it is compared with our op.

    ``pack`` brings q, k, v into the layout that the package itself produces, ``unpack`` its output into (B, H, N, D).
    ``before`` multiplies q and k, ``after`` the output, for the comparison alone, where the package scales differently.
    """

    function: Callable[..., Tensor]
    pack: Callable[..., tuple[Tensor, ...]] = _identity
    unpack: Callable[[Tensor], Tensor] = lambda out: out
    pack_grad: Callable[[Tensor], Tensor] = lambda grad: grad
    before: float = 1.0
    after: float = 1.0

    def as_ours(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The function of our op, computed by the package."""
        return self.unpack(self.function(*self.pack(q * self.before, k * self.before, v))) * self.after


def _module(name: str):
    with warnings.catch_warnings():  # old packages import deprecated names
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def performer(heads: int, projection: Tensor) -> Baseline:
    """performer-pytorch's FastAttention with our projection."""
    fast = _module("performer_pytorch").FastAttention(projection.shape[1], nb_features=projection.shape[0])
    fast.to(projection.device)
    fast.projection_matrix.copy_(projection)
    return Baseline(fast)


def linear(heads: int, projection: Tensor) -> Baseline:
    """linear-attention-transformer's softmax pair, which scales the output by D^-½ where we scale q and k by D^-¼."""
    module = _module("linear_attention_transformer.linear_attention_transformer")
    dim = projection.shape[1]
    return Baseline(module.linear_attn, before=dim**-0.25, after=dim**0.5)


def nystrom(heads: int, projection: Tensor) -> Baseline:
    """nystrom-attention's module without its linear maps and its convolution, on packed q, k, v (B, N, 3·H·D)."""
    dim = projection.shape[1]
    attention = _module("nystrom_attention").NystromAttention(
        heads * dim, dim_head=dim, heads=heads, num_landmarks=64, residual=False
    )
    attention.to_qkv = attention.to_out = nn.Identity()
    return Baseline(
        attention,
        pack=lambda *qkv: (torch.cat([x.transpose(1, 2).flatten(2) for x in qkv], dim=-1),),
        unpack=lambda out: out.unflatten(-1, (heads, dim)).transpose(1, 2),
        pack_grad=lambda grad: grad.transpose(1, 2).flatten(2),
    )


BASELINES: dict[str, tuple[str, Callable[[int, Tensor], Baseline]]] = {
    "performer": ("performer-pytorch", performer),
    "linear": ("linear-attention-transformer", linear),
    "nystrom": ("nystrom-attention", nystrom),
}
