"""Support of torch.fx and TorchScript for modules whose forward pass branches on shapes, modes and hooks."""

from typing import Any, NoReturn

from torch import nn
from torch.fx import Proxy


def record_call(module: nn.Module, x: Proxy, *args: Any, **kwargs: Any) -> Proxy:
    """Record ``module(x, *args, **kwargs)`` as one node of the graph that torch.fx is tracing.

    The module then takes its branches when the graph runs, and a tracer needs no list of leaf modules.

    Raises:
        TypeError: If ``module`` is the root of the trace, because the graph cannot contain a call of its root.
    """
    path = x.tracer.path_of_module(module)
    if not path:
        name = type(module).__name__
        raise TypeError(f"torch.fx records {name} as one node: trace a model that contains it, not {name} itself")
    return x.tracer.create_proxy("call_module", path, (x, *args), kwargs)


def refuse_torchscript(module: nn.Module) -> NoReturn:
    """Raise ``RuntimeError``: the ``__prepare_scriptable__`` of modules that ``torch.jit.script`` cannot compile."""
    raise RuntimeError(
        f"torch.jit.script does not support {type(module).__name__}: use torch.compile to run it faster, and "
        "torch.export.export or cxv.export.export_model to write it to a file"
    )
