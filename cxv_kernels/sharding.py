"""Sharding rules of DTensor for the attention ops: by batch or by heads, as for scaled_dot_product_attention."""

import functools
from collections.abc import Sequence
from typing import Any

import torch

from .library import SCHEMAS, overload

ATTENTION = ("linear_attention", "kv_state", "performer", "nystrom")  # the operators' names begin with one of these


@functools.cache
def register_shardings() -> None:
    """Register the shardings of the attention ops. An op calls this at its first DTensor outside of compiled code."""
    from torch.distributed.tensor.experimental import register_sharding

    for name in SCHEMAS:
        for backend in ("cpu", "triton"):
            op = overload(name, backend) if name.startswith(ATTENTION) else None
            if op is not None:
                register_sharding(op)(functools.partial(_shardings, op._schema))


def _shardings(schema: Any, *values: Any) -> Sequence[tuple[list[Any], list[Any]]]:
    """Return the placements of the outputs and inputs of an op: all replicated, sharded by batch, or sharded by heads.

    All tensors have the shape (batch, heads, …), except the projection (M, D), the key mask (batch, tokens) and the
    weight of the residual (heads, 1, K, 1). The gradient of this weight is a sum over the batch.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    whole = Replicate()
    splits = (
        {None: whole},
        {"projection": whole, "weight": whole, "grad_weight": Partial(), None: Shard(0)},
        {"projection": whole, "key_mask": whole, "weight": Shard(0), "grad_weight": Shard(0), None: Shard(1)},
    )
    tensors = [
        argument.name if isinstance(argument.type, torch.TensorType | torch.OptionalType) and value is not None else ""
        for argument, value in zip(schema.arguments, values, strict=True)
    ]
    return [
        (
            [split.get(result.name, split[None]) for result in schema.returns],
            [split.get(name, split[None]) if name else None for name in tensors],
        )
        for split in splits
    ]
