"""Parameters and multiply-adds of a model, by the paper's conventions and in truth."""

import math
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


def parameters(model: nn.Module) -> int:
    """All of them."""
    return sum(p.numel() for p in model.parameters())


def torchsummary_parameters(model: nn.Module, times: Mapping[str, int]) -> int:
    """What torchsummary 1.5 counts: the ``weight`` and ``bias`` of modules, once per call.

    Args:
        times: how often a parameter is counted, by shell wildcards of its name; the others, once. It is how what the
            authors held in tensors of other names (the norms' g and b) and what they called several times is told.
    """

    def count(name: str) -> int:
        for pattern, n in times.items():
            if fnmatchcase(name, pattern):
                return n
        return int(name.rpartition(".")[2] in ("weight", "bias"))

    return sum(count(name) * p.numel() for name, p in model.named_parameters())


class _LayerMacs(TorchDispatchMode):
    """Counts as thop and ptflops do: what multiplies a parameter, and nothing that is a function of data alone."""

    def __init__(self, parameters: Iterable[Tensor]):
        super().__init__()
        self.own = {p.untyped_storage().data_ptr() for p in parameters}
        self.copies: list[Tensor] = []  # held, or their addresses could come again
        self.macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        op = func.overloadpacket
        if op is aten.convolution and self._is_parameter(args[1]):
            weight, bias = args[1:3]
            # per output element; of a transposed convolution too, which is up to stride² times too many
            fan_in = weight.shape[0] // args[8] if args[6] else weight.shape[1]
            self.macs += out.numel() * (fan_in * math.prod(weight.shape[2:]) + (bias is not None))
        elif op in (aten.mm, aten.addmm):
            a, b = args[-2:]
            if self._is_parameter(a) or self._is_parameter(b):
                self.macs += a.shape[0] * a.shape[1] * b.shape[1]
        elif op in (aten.native_batch_norm, aten._native_batch_norm_legit, aten._native_batch_norm_legit_no_training):
            self.macs += 2 * args[0].numel()
        elif op is aten.clone and self._is_parameter(args[0]):  # a kernel repeated for several channels
            self.own.add(out.untyped_storage().data_ptr())
            self.copies.append(out)
        return out

    def _is_parameter(self, t: Tensor) -> bool:
        return t.untyped_storage().data_ptr() in self.own


def layer_macs(model: nn.Module, image: Tensor) -> int:
    """Multiply-adds of one image by Table 1's convention: convolutions (their bias counts one per output), linear maps
    without bias and batch norm (two per element). What multiplies data by data counts nothing: attention, FAVOR+'s
    features (a buffer's), the pseudo-inverse, FFT and wavelets. A transposed convolution counts its kernel at every
    output."""
    with torch.no_grad(), _LayerMacs(model.parameters()) as counter:
        model.eval()(image)
    return counter.macs


def flops(run: Callable[[], object]) -> int:
    """Of all convolutions and matrix products that ``run`` makes, attention's too (PyTorch's FlopCounterMode)."""
    # not every PyTorch knows the work of its fused attention on a CPU; of the products it is made of, each does
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def true_macs(model: nn.Module, image: Tensor) -> int:
    """Multiply-adds of all convolutions and matrix products, attention's too."""
    with torch.no_grad():
        return flops(lambda: model.eval()(image)) // 2
