"""Classes that replace the attention of a module in place, and checks whether a module allows this."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import nn

Example = tuple[nn.Module, tuple[Any, ...]]
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Return True if a hook was registered on ``module`` itself."""
    return any(getattr(module, name) for name in _HOOKS)


def is_unmodified(layer: nn.Module, cls: type[nn.Module]) -> bool:
    """Return True if ``layer`` is exactly a ``cls``, without hooks or another ``forward``: it can be bypassed."""
    return type(layer) is cls and "forward" not in vars(layer) and not has_hooks(layer)


def other_residual(layer: nn.Module, heads: int) -> str | None:
    """Return the reason why ``residual_weight`` of nystrom_attention cannot replace a convolution, or None."""
    if is_unmodified(layer, nn.Conv2d):
        size = layer.kernel_size[0]
        same_size = size % 2 == 1 and layer.kernel_size == (size, 1) and layer.padding == (size // 2, 0)
        one_per_head = layer.in_channels == layer.out_channels == layer.groups == heads
        plain = layer.stride == layer.dilation == (1, 1) and layer.bias is None and layer.padding_mode == "zeros"
        if same_size and one_per_head and plain:
            return None
    return "has a residual convolution with a hook or with other options than the package's"


def other_feature_map(layer: nn.Module) -> str | None:
    """Return the reason why relu attention cannot bypass the layer with the feature map, or None."""
    if is_unmodified(layer, nn.ReLU):
        return None
    return f"has the feature map {type(layer).__name__}, or a hook on it, and not a plain ReLU"


def refuse_torchscript(module: nn.Module) -> NoReturn:
    """Raise ``RuntimeError``: the ``__prepare_scriptable__`` of modules that call our ops."""
    raise RuntimeError(
        f"torch.jit.script does not support {type(module).__name__}: restore the original code with "
        "cxv_kernels.accelerate(model, undo=True) first, or use torch.compile or torch.export"
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class Swap:
    """A class of attention modules of another package, and the code that makes them call our op.

    Either the class of a module is changed to ``fused``, or an attribute that its forward pass calls is replaced.

    Args:
        owner: Class of the modules. Subclasses can compute something else, so they are skipped.
        fused: A subclass of ``owner`` with another ``forward``; or for an attribute, a function, or a class whose
            constructor takes the original object and stores it as ``original``.
        attribute: Name of the attribute. Default: the class of the module is changed.
        original: Class of the attribute, or the function itself.
        unsupported: Function of a module that returns the reason why our op does not compute the same, or None.
        examples: Function that makes small modules of the package, each with the arguments of a call. They are used to
            check that the installed version computes the same as our code.
    """

    owner: type[nn.Module]
    fused: Any
    attribute: str = "__class__"
    original: Any = None
    unsupported: Callable[[nn.Module], str | None]
    examples: Callable[[], Iterable[Example]]

    def _has(self, module: nn.Module, expected: Any) -> bool:
        value = getattr(module, self.attribute, None) if isinstance(module, self.owner) else None
        return value is not None and (type(value) is expected or value is expected)

    def is_candidate(self, module: nn.Module) -> bool:
        """Return True if the module has the attention that this swap replaces, or a subclass of it."""
        if self.original is None or self._has(module, self.original):
            return isinstance(module, self.owner)
        return isinstance(module, self.owner) and self.unsupported(module) is not None

    def is_accelerated(self, module: nn.Module) -> bool:
        """Return True if :meth:`apply` has changed the module."""
        return self._has(module, self.fused)

    def apply(self, module: nn.Module) -> None:
        """Make the module call our op."""
        wraps = self.original is not None and isinstance(self.fused, type)
        setattr(module, self.attribute, self.fused(getattr(module, self.attribute)) if wraps else self.fused)

    def undo(self, module: nn.Module) -> None:
        """Undo :meth:`apply`."""
        original = self.original or self.owner
        setattr(module, self.attribute, getattr(getattr(module, self.attribute), "original", original))

    def code(self) -> tuple[Any, ...]:
        """Return the functions of the other package that our code replaces. They are compared again if they change."""
        called = self.original.__call__ if isinstance(self.original, type) else self.original
        return called, *(value for value in vars(self.owner).values() if callable(value))

    def reason(self, module: nn.Module) -> str | None:
        """Return the reason why the module must be skipped, or None."""
        if type(module) is not self.owner:
            return f"is a {type(module).__name__}, a subclass of {self.owner.__name__} that may compute something else"
        replaced = sorted(vars(module).keys() & vars(self.owner).keys() - {"__module__", "__doc__"})
        if replaced:
            return f"has its own {replaced[0]}, which is not that of {self.owner.__name__}"
        return self.unsupported(module)
