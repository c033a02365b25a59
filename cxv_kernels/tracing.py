"""Modules whose forward pass branches on shapes, modes and hooks, under torch.fx and TorchScript."""

from typing import Any, NoReturn

from torch import nn
from torch.fx import Proxy


def record_call(module: nn.Module, x: Proxy, *args: Any, **kwargs: Any) -> Proxy:
    """Record ``module(x, *args, **kwargs)`` as one node of the graph that torch.fx is tracing.

    The module then takes its branches when the graph runs. A tracer needs no list of leaf modules for this.

    Raises:
        TypeError: ``module`` is the root of the trace, so the graph could not contain a call of it.
    """
    path = x.tracer.path_of_module(module)
    if not path:
        name = type(module).__name__
        raise TypeError(f"torch.fx records {name} as one node: trace a model that contains it, not {name} itself")
    return x.tracer.create_proxy("call_module", path, (x, *args), kwargs)


def refuse_torchscript(module: nn.Module) -> NoReturn:
    """The ``__prepare_scriptable__`` of modules that ``torch.jit.script`` cannot compile.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        f"torch.jit.script does not support {type(module).__name__}: use torch.compile to run it faster, and "
        "torch.export.export or cxv.export.export_model to write it to a file"
    )
