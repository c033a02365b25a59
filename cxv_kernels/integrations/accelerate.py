"""Find attention modules that compute exactly one of our ops, and make them call the op."""

import copy
import functools
import importlib
import importlib.metadata
from collections.abc import Iterator
from typing import Any, Literal, overload

import torch
from torch import nn

from ..dispatch import use_backend
from .swap import Swap

# The supported attention classes, and the module of this package that defines their swaps.
_SOURCES = {
    "timm.models.efficientvit_mit.LiteMLA": "timm",
    "transformers.models.nystromformer.modeling_nystromformer.NystromformerSelfAttention": "transformers",
    "performer_pytorch.performer_pytorch.FastAttention": "lucidrains_performer",
    "nystrom_attention.nystrom_attention.NystromAttention": "lucidrains_nystrom",
    "linear_attention_transformer.linear_attention_transformer.SelfAttention": "lucidrains_linear",
    "linear_attention_transformer.images.ImageLinearAttention": "lucidrains_linear",
    "diffusers.models.attention_processor.Attention": "diffusers",
    "diffusers.models.attention_processor.SanaMultiscaleLinearAttention": "diffusers",
}
# Wrappers that have already read the code or the modules of a model.
_WRAPPERS = {
    "torch._dynamo.eval_frame.OptimizedModule": "compiled by torch.compile",
    "torch.jit._script.ScriptModule": "compiled by torch.jit",
    "torch.fx.graph_module.GraphModule": "traced by torch.fx or torch.export",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": "wrapped by FSDP",
    "torch.distributed.fsdp.FSDPModule": "wrapped by fully_shard (FSDP)",
}


@overload
def accelerate(model: nn.Module, *, undo: bool = ..., return_reasons: Literal[False] = ...) -> list[str]: ...


@overload
def accelerate(
    model: nn.Module, *, undo: bool = ..., return_reasons: Literal[True]
) -> tuple[list[str], dict[str, str]]: ...


def accelerate(
    model: nn.Module, *, undo: bool = False, return_reasons: bool = False
) -> list[str] | tuple[list[str], dict[str, str]]:
    """Make the linear attention of a model call our ops, in place, with the same weights and outputs.

    Supported are ``LiteMLA`` of timm (EfficientViT B and L), ``NystromformerSelfAttention`` of transformers, the
    linear-attention processors of SANA and the multi-scale linear attention of DC-AE in diffusers, and the packages
    performer-pytorch, nystrom-attention and linear-attention-transformer. A package is imported only if the model has a
    module of it.

    Parameters, buffers, ``state_dict``, hooks and the training mode do not change, and an existing optimizer stays
    valid. Outputs differ only by rounding: the ops compute state and sums in float32 (float64 for float64 inputs). A
    module is skipped if it differs from the module of its package (a subclass, another ``forward``, a hook on a layer
    that the op replaces, an option that the ops do not have). All modules of a package are skipped if the installed
    version computes something else.

    Args:
        model: The model, or an attention module. Accelerate it before ``torch.compile`` and FSDP.
        undo: Restore the original code instead.
        return_reasons: Also return the reasons why modules were skipped.

    Returns:
        Names of the changed modules, as in ``named_modules()`` (``""`` is the model itself). With
        ``return_reasons=True``, these names and a dict from the name of a skipped module to the reason. The list is
        empty if the model is already accelerated, or with ``undo`` if it is not accelerated.

    Raises:
        ValueError: If the model has no supported module (the message lists its classes and the reasons), is compiled,
            or is wrapped by FSDP.
        TypeError: If ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    changed: list[tuple[str, nn.Module, Swap]] = []
    reasons: dict[str, str] = {}
    any_accelerated = False
    for name, module in model.named_modules():
        _check_unwrapped(name, module)
        try:
            swaps = list(_swaps(module))
        except ImportError as error:  # a version without the classes that the swaps name
            reasons[name] = _unsupported_version(type(module), error)
            continue
        for swap in swaps:
            if swap.is_accelerated(module):
                any_accelerated = True
                if undo:
                    changed.append((name, module, swap))
            elif not undo and swap.is_candidate(module):
                reason = swap.reason(module) or _disagreement(swap, swap.code())
                if reason is None:
                    changed.append((name, module, swap))
                else:
                    reasons[name] = reason
    if not undo and not changed and not any_accelerated:
        raise ValueError(_nothing_supported(model, reasons))
    for _, module, swap in changed:
        if undo:
            swap.undo(module)
        else:
            swap.apply(module)
    names = [name for name, *_ in changed]
    return (names, reasons) if return_reasons else names


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _swaps(module: nn.Module) -> Iterator[Swap]:
    """Yield the swaps that may apply to a module, after importing the module of this package that defines them."""
    for source in {_SOURCES[name] for name in map(_qualified, type(module).__mro__) if name in _SOURCES}:
        yield from importlib.import_module(f"{__package__}.{source}").SWAPS


def _check_unwrapped(name: str, module: nn.Module) -> None:
    how = next((_WRAPPERS[cls] for cls in map(_qualified, type(module).__mro__) if cls in _WRAPPERS), None)
    if how is None and getattr(module, "_compiled_call_impl", None) is not None:
        how = "compiled by Module.compile"
    if how is not None:
        raise ValueError(f"model: {f'its module {name}' if name else 'it'} is {how}: call accelerate before that")


def _nothing_supported(model: nn.Module, reasons: dict[str, str]) -> str:
    classes = sorted({type(module).__name__ for module in model.modules()})
    left_alone = "".join(f"; {name or 'the model'} {reason}" for name, reason in reasons.items())
    return (
        f"model: {type(model).__name__} has no attention that computes one of our ops exactly. Its module classes: "
        f"{', '.join(classes)}{left_alone}. cxv_kernels.replace_attention approximates softmax attention."
    )


@functools.cache
def _disagreement(swap: Swap, code: tuple[Any, ...]) -> str | None:
    """Compare the modules of a package with ours, once. Return why the installed version is not supported, or None."""
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
            torch.no_grad(),
            use_backend("reference"),
        ):
            torch.manual_seed(0)
            for module, arguments in swap.examples():
                module = module.float().eval()
                arguments = tuple(a.float() if a.is_floating_point() else a for a in arguments)
                fused = copy.deepcopy(module)
                swap.apply(fused)
                expected, result = (_tensor(m(*arguments)) for m in (module, fused))
                torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-5)
    except AssertionError:
        return _unsupported_version(swap.owner, "it computes something else")
    except Exception as error:  # another version can raise any exception
        return _unsupported_version(swap.owner, error)
    return None


def _tensor(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


def _unsupported_version(cls: type, difference: str | Exception) -> str:
    package, difference = cls.__module__.partition(".")[0], str(difference).strip().partition("\n")[0]
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        version = "unknown version"
    return f"comes from a version of {package} ({version}) that is not supported: {difference}"
