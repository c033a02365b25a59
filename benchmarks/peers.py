"""The packages that a user would install instead, as functions of q, k and v (B, H, N, D). All are optional."""

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from common import version_of
from torch import Tensor, nn

# A peer counts as the same function if one head agrees with the float64 reference to this, relative to the largest
# entry, in float32: it leaves room for its roundings, not for another formula.
AGREEMENT = 1e-3


def _as_it_is(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors


@dataclass(frozen=True)
class Peer:
    """What is timed, and how it is compared with our op."""

    function: Callable[..., Tensor]  # of ``pack(q, k, v)``
    pack: Callable[..., tuple[Tensor, ...]] = _as_it_is  # q, k, v in the layout that the package itself makes
    unpack: Callable[[Tensor], Tensor] = lambda out: out  # its output as (B, H, N, D)
    pack_grad: Callable[[Tensor], Tensor] = lambda grad: grad  # the output's gradient as ``unpack`` undoes it
    before: float = 1.0  # by this q and k, and
    after: float = 1.0  # by this the output are multiplied for the comparison alone: its scaling is not ours

    def as_ours(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What our op computes, by the peer."""
        return self.unpack(self.function(*self.pack(q * self.before, k * self.before, v))) * self.after


def _module(name: str) -> ModuleType:
    with warnings.catch_warnings():  # old packages import what Python and PyTorch deprecate
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def performer(heads: int, projection: Tensor) -> Peer:
    """performer-pytorch's FastAttention with our projection."""
    fast = _module("performer_pytorch").FastAttention(projection.shape[1], nb_features=projection.shape[0])
    fast.to(projection.device)
    fast.projection_matrix.copy_(projection)
    return Peer(fast)


def linear(heads: int, projection: Tensor) -> Peer:
    """linear-attention-transformer's softmax pair: it scales the output by D^-½ where we scale q and k by D^-¼."""
    module = _module("linear_attention_transformer.linear_attention_transformer")
    dim = projection.shape[1]
    return Peer(module.linear_attn, before=dim**-0.25, after=dim**0.5)


def nystrom(heads: int, projection: Tensor) -> Peer:
    """nystrom-attention's module without its projections and its convolution: q, k and v come packed (B, N, 3·H·D), as
    its own linear layer would make them, and the output stays (B, N, H·D)."""
    dim = projection.shape[1]
    attention = _module("nystrom_attention").NystromAttention(
        heads * dim, dim_head=dim, heads=heads, num_landmarks=64, residual=False
    )
    attention.to_qkv = attention.to_out = nn.Identity()
    return Peer(
        attention,
        pack=lambda *qkv: (torch.cat([x.transpose(1, 2).flatten(2) for x in qkv], dim=-1),),
        unpack=lambda out: out.unflatten(-1, (heads, dim)).transpose(1, 2),
        pack_grad=lambda grad: grad.transpose(1, 2).flatten(2),
    )


def flash_bla(heads: int, projection: Tensor) -> Peer:
    """flash-bidirectional-linear-attention, whose features are its caller's to compute: elu + 1 as its layers do."""
    attend = _module("flash_bla.ops.linear_attn.fused").linear_attention
    return Peer(lambda q, k, v: attend(F.elu(q) + 1, F.elu(k) + 1, v))


PEERS: dict[str, tuple[str, Callable[[int, Tensor], Peer]]] = {
    "performer_attention": ("performer-pytorch", performer),
    "linear_attention": ("linear-attention-transformer", linear),
    "nystrom_attention": ("nystrom-attention", nystrom),
}
# On a GPU the other feature map has a peer, too.
GPU_PEERS = {(op, "softmax"): peer for op, peer in PEERS.items()} | {
    ("linear_attention", "elu"): ("flash_bla", flash_bla)
}


def versions() -> dict[str, str | None]:
    """Of each peer; None where it is not installed. flash-linear-attention's too, which is none: its ops are causal."""
    packages = [package for package, _ in GPU_PEERS.values()]
    return {package: version_of(package) for package in (*packages, "flash-linear-attention")}
