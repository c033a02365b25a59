"""Recomputation in the backward pass with the state of the forward pass."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import cxv_kernels


def records_or_transforms() -> bool:
    """Return True while PyTorch records or transforms operations, which rules out chunks and recomputation.

    TorchScript tracing and ``make_fx`` would unroll the loop over chunks for the batch size of the example.
    ``torch.func`` and ``disable_saved_tensors_hooks`` do not support ``torch.utils.checkpoint``.
    """
    return (
        torch.jit.is_tracing()
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
        or torch._C._are_functorch_transforms_active()
        or not torch._C._autograd._saved_tensors_hooks_is_enabled()
    )


class ForwardState:
    """Hold what a forward pass reads, so that ``torch.utils.checkpoint`` can recompute it in the backward pass.

    Create it right before the forward pass. The recomputation then uses the backend, the ``training`` and
    ``requires_grad`` flags, the submodules and the weights of the forward pass (``torch.func.functional_call`` may have
    lent them). Afterwards the module is as it was before the recomputation.

    Args:
        module: the module that is recomputed.
        changing: its submodules whose forward pass may change their buffers, such as BatchNorm. The recomputation gets
            copies with the values from before the forward pass, so that nothing is updated twice.

    Raises:
        RuntimeError: in the backward pass, if a weight or another buffer was changed in place since the forward pass.
    """

    def __init__(self, module: nn.Module, changing: Iterable[nn.Module] = ()):
        self._backend = cxv_kernels.get_backend()
        self._attributes: list[tuple[dict, str, Any]] = []  # submodules and training flags
        self._tensors: list[tuple[dict, str, Tensor, int | None, bool]] = []  # with version and requires_grad
        self._copies: list[tuple[dict, str, Tensor]] = []
        changing = set(changing)
        for m in module.modules():
            self._attributes.append((m.__dict__, "training", m.training))
            self._attributes += [(m._modules, name, child) for name, child in m._modules.items()]
            for table in (m._parameters, m._buffers):
                for name, t in table.items():
                    if t is None:
                        continue
                    if table is m._buffers and m in changing:
                        self._copies.append((table, name, t.detach().clone()))
                    else:
                        self._tensors.append((table, name, t, _version(t), t.requires_grad))

    def recomputable(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return ``function`` for one ``checkpoint`` call: all calls but the first are recomputations."""
        is_forward = True

        def run(*args: Any) -> Tensor:
            nonlocal is_forward
            if is_forward:
                is_forward = False
                return function(*args)
            with self._restored():
                return function(*args)

        return run

    @contextmanager
    def _restored(self) -> Iterator[None]:
        state = self._attributes + [(table, name, copy.clone()) for table, name, copy in self._copies]
        for table, name, tensor, version, requires_grad in self._tensors:
            if _version(tensor) != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"{name!r} of shape {tuple(tensor.shape)} is at version {_version(tensor)}; expected version "
                    f"{version} instead. The model recomputes activations in the backward pass, so call backward() "
                    "before anything changes its weights or buffers (an optimizer's step(), redraw_projection_(), …)."
                )
            now = table.get(name)
            value = now if _is_sharded(tensor, now) else tensor
            if value.requires_grad != requires_grad:  # gradients flow through the graph of the forward pass alone
                value = value.detach().requires_grad_(requires_grad)
            state.append((table, name, value))
        replaced = []
        try:
            for table, name, value in state:
                if table.get(name) is not value:
                    replaced.append((table, name, table.get(name)))
                    table[name] = value
            with cxv_kernels.use_backend(self._backend):
                yield
        finally:
            for table, name, value in replaced:
                table[name] = value


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _is_sharded(then: Tensor, now: Tensor | None) -> bool:
    """Return True if FSDP has replaced the shard ``then`` by the whole parameter ``now``, outside of the forward pass.

    Its hooks do so again before the recomputation, so that ``now`` is to be used.
    """
    if now is None or now is then:
        return False
    like = (now.shape, now.dtype, now.device) == (then.shape, then.dtype, then.device)
    return type(then) not in (Tensor, nn.Parameter) or not like
