"""What a model keeps between forward and backward, by kind: as autograd holds it, and as the shapes foretell."""

import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cxv
from cxv_kernels import dispatch
from cxv_kernels.testing import peak_memory

LOW = (torch.float16, torch.bfloat16)  # under autocast, with the weights in float32

LAYER_INPUT = "layers: input"
CONV_INPUT, CONV_OUTPUT, CONV_PIXELS = "conv + norm: input", "conv + norm: outputs", "conv + norm: rstd"
ATTENTION_INPUT, ATTENTION_INSIDE = "attention: input", "attention: inside"  # q, k, v, φ, …
MLP_INPUT, MLP_INSIDE = "MLP: input", "MLP: inside"
STEM, HEAD, WEIGHTS, OTHER = "stem", "head, loss", "16-bit weights", "seeds, other"
KINDS = (
    *(LAYER_INPUT, CONV_INPUT, CONV_OUTPUT, CONV_PIXELS, ATTENTION_INPUT, ATTENTION_INSIDE, MLP_INPUT, MLP_INSIDE),
    *(STEM, HEAD, WEIGHTS, OTHER),
)
RNG_STATE = 5056  # bytes: the CPU generator's, which a checkpoint that preserves it keeps


def build(name: str, mode: str) -> nn.Module:
    """The fused model, or the fused model with gradient checkpointing (``"checkpointed"``)."""
    torch.manual_seed(0)
    model = cxv.create_model(name, use_fused=True)
    model.set_grad_checkpointing(mode == "checkpointed")
    return model


def random_batch(batch: int, side: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Images (batch, 3, side, side) and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, side, side, generator=generator)
    labels = torch.randint(10, (batch,), generator=generator)
    return images.to(torch.float32 if dtype in LOW else dtype), labels


def autocast(dtype: torch.dtype) -> torch.autocast:
    """Autocast to ``dtype`` if it has 16 bits."""
    return torch.autocast("cpu", dtype, enabled=dtype in LOW)


def loss_of(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """The forward pass of a training step."""
    with autocast(dtype):
        return F.cross_entropy(model(images), labels)


@dataclass(frozen=True)
class Ledger:
    """Bytes kept after the forward pass, the loss alive, beyond the weights and the batch."""

    kinds: dict[str, int]  # distinct storages that autograd holds, each with the first op that asked for it
    allocated: int  # by the allocator's count

    @property
    def total(self) -> int:
        """The sum over the kinds."""
        return sum(self.kinds.values())


class _Kept:
    """What autograd holds in place of a saved tensor, and drops when it would have dropped the tensor."""

    __slots__ = ("__weakref__", "kind", "tensor")

    def __init__(self, tensor: Tensor, kind: str):
        self.tensor, self.kind = tensor.detach(), kind


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _copies_a_parameter(tensor: Tensor) -> bool:
    """Whether casts and views of one parameter alone made it."""
    node = tensor.grad_fn
    while node is not None:
        sources = [source for source, _ in node.next_functions if source is not None]
        if len(sources) != 1:
            return not sources and hasattr(node, "variable")
        node = sources[0]
    return False


class _Walk:
    """The saved-tensor hook, and hooks on the model's parts that tell it which of them runs."""

    def __init__(self, model: nn.Module, given: set[int]):
        self.given = given  # storages that exist anyway
        self.running: list[tuple[str, Tensor]] = []  # parts, the innermost last, and their inputs
        self.saved: list[weakref.ref[_Kept]] = []
        parts = {model: "model", model.stem: "stem", model.head: "head"}
        for layer in model.layers:
            parts |= {layer.conv_norm: "conv + norm", layer.attn: "attention", layer.mlp: "MLP"}
        self.handles = []
        for part, name in parts.items():
            self.handles.append(part.register_forward_pre_hook(lambda _, args, name=name: self._enter(name, args[0])))
            self.handles.append(part.register_forward_hook(lambda *_: self._leave()))

    def _enter(self, name: str, x: Tensor) -> None:
        self.running.append((name, x))

    def _leave(self) -> None:
        self.running.pop()

    def pack(self, tensor: Tensor) -> _Kept:
        kept = _Kept(tensor, self._kind(tensor))
        self.saved.append(weakref.ref(kept))
        return kept

    def _kind(self, tensor: Tensor) -> str:
        if tensor.dtype == torch.int64 and tensor.numel() == 1:
            return OTHER
        if _copies_a_parameter(tensor):
            return WEIGHTS
        part, x = self.running[-1] if self.running else ("loss", tensor)
        if part == "stem":
            return STEM
        if part == "conv + norm":
            if tensor.numel() <= x.numel() // x.shape[1]:
                return CONV_PIXELS
            return CONV_INPUT if _address(tensor) == _address(x) else CONV_OUTPUT
        if part in ("attention", "MLP"):
            return f"{part}: {'input' if _address(tensor) == _address(x) else 'inside'}"
        return LAYER_INPUT if part == "model" and tensor.dim() == 4 else HEAD

    def kinds(self) -> dict[str, int]:
        """Bytes of the storages still held."""
        seen, kinds = set(self.given), dict.fromkeys(KINDS, 0)
        for reference in self.saved:
            kept = reference()
            if kept is not None and _address(kept.tensor) not in seen:
                seen.add(_address(kept.tensor))
                kinds[kept.kind] += kept.tensor.untyped_storage().nbytes()
        return kinds

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def measured(model: cxv.CXV, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Ledger:
    """One forward pass with its loss, followed by the allocator and, tensor by tensor, by autograd's own hooks.

    These also see the arguments that ``torch.utils.checkpoint`` holds. Run the model once before: its first call may
    allocate what stays.
    """
    walk = _Walk(model, {_address(t) for t in (*model.parameters(), *model.buffers(), images, labels)})
    kinds: dict[str, int] = {}

    def run() -> Any:
        with torch.autograd.graph.saved_tensors_hooks(walk.pack, lambda kept: kept.tensor):
            loss = loss_of(model, images, labels, dtype)
        kinds.update(walk.kinds())
        return loss

    try:
        kept = peak_memory(run, images.device).kept
    finally:
        walk.close()
    return Ledger(kinds, kept)


def predicted(model: cxv.CXV, images: Tensor, dtype: torch.dtype) -> dict[str, int] | None:
    """The kinds as the shapes foretell them, for a model with ``use_fused``; None where conv_norm is not fused.

    Of a layer: what conv_norm reads and writes (which attention reads), what the MLP reads, and one number per pixel;
    under ``set_grad_checkpointing`` what the layer reads, alone.
    """
    if dispatch.resolve("conv_norm", images) == "reference":
        return None
    batch, _, height, width = images.shape
    channels, depth, size, stride = model.embed_dim, len(model.layers), dtype.itemsize, model.stem[0].stride[0]
    pixels = batch * -(-height // stride) * -(-width // stride)
    layer_inputs = pixels * (channels // 2 + (depth - 1) * channels) * size
    dropping = [b.num_dropouts for layer in model.layers for b in (layer.attn, layer.mlp) if b.drop_rate and b.training]
    kinds = dict.fromkeys(KINDS, 0)
    kinds[STEM] = images.numel() * size + pixels * (channels // 4) * size  # the image converted, the first output
    wide = max(size, 4)  # of what is never rounded to 16 bits
    # the pooled features, log-softmax, and what the loss divides by
    kinds[HEAD] = batch * channels * size + (batch * model.num_classes + 1) * wide
    cast = [model.stem[0].weight, model.stem[1].weight, model.head.weight]
    if model.grad_checkpointing:
        kinds[LAYER_INPUT] = layer_inputs
        kinds[OTHER] = depth * RNG_STATE
    else:
        kinds[CONV_INPUT] = layer_inputs
        kinds[CONV_OUTPUT] = kinds[MLP_INPUT] = depth * pixels * channels * size
        kinds[CONV_PIXELS] = depth * pixels * wide
        kinds[OTHER] = 8 * sum(dropping)
    if dtype in LOW:
        kinds[WEIGHTS] = sum(p.numel() for p in cast) * size
    return kinds
