"""What the fused ops' autograd shares."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._extension import CPP_MISSING, CUDA_MISSING
from ._triton import NAMESPACE
from .validation import without_autocast


def kernels(backend: str) -> Any:
    """The namespace of a backend's ops: ``kernels(backend).linear_attention_forward(…)``."""
    if torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        # Dynamo would differentiate the kernels themselves there, which PyTorch takes for constants.
        raise NotImplementedError(
            "the fused kernels do not support torch.func transforms inside torch.compile: compile less, pass "
            'backend="reference" to the op, or use_fused=False to the model'
        )
    return torch.ops.cxv_kernels_triton if backend == "triton" else torch.ops.cxv_kernels


def register_fake(name: str, *namespaces: str) -> Callable[[Callable], Callable]:
    """Decorate the fake implementation that the ops ``name`` of these namespaces share, or those of all."""

    def register(fake: Callable) -> Callable:
        for namespace in namespaces or ("cxv_kernels", NAMESPACE):
            if hasattr(getattr(torch.ops, namespace), name):
                torch.library.register_fake(f"{namespace}::{name}", fake)
        return fake

    return register


def serves_cpu(device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
    """The capability check of C++ kernels that take every dtype and size."""
    return CPP_MISSING or (None if device.type == "cpu" else f"serves the CPU, not {device.type}")


@functools.cache
def cuda_compiled_for(device: int) -> int:
    """10·major + minor of what the CUDA library's code for this GPU was compiled for: 75 on a newer one, if sm_75's
    PTX is all it has; 0: it has none."""
    return torch.ops.cxv_kernels.cuda_compiled_for(device)


def serves_cuda(
    widest: int, dtypes: Sequence[torch.dtype], narrowest: int = 1
) -> Callable[[torch.device, torch.dtype, int], str | None]:
    """The capability check of CUDA kernels that take these dtypes and numbers of channels."""

    def check(device: torch.device, dtype: torch.dtype, dim: int) -> str | None:
        if CUDA_MISSING or device.type != "cuda":
            return CUDA_MISSING or f"serves CUDA devices, not {device.type}"
        if dtype not in dtypes:
            return f"serves {', '.join(str(t).removeprefix('torch.') for t in dtypes)}, not {dtype}"
        if torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability(device)
            if (major, minor) < (7, 5):
                return f"serves sm_75 and later, not sm_{major}{minor}"
            if dtype == torch.bfloat16 and major < 8:
                return f"serves no bfloat16 on sm_{major}{minor}, which has none: use float16 or float32"
            if torch.compiler.is_compiling():
                arch = 10 * major + minor  # what cannot be asked here the kernels say themselves
            else:
                arch = cuda_compiled_for(torch.cuda.current_device() if device.index is None else device.index)
            built = f"build it with TORCH_CUDA_ARCH_LIST={major}.{minor}"
            if arch == 0:
                return f"was built for other cards than this sm_{major}{minor}: {built}"
            if dtype == torch.bfloat16 and arch < 80:
                return f"runs sm_{arch}'s code on this sm_{major}{minor}, without bfloat16: {built}, or use float16"
        if dim and not narrowest <= dim <= widest:
            return f"serves {narrowest} to {widest} channels, not {dim}"
        return None

    return check


def like_layout(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An empty tensor of this shape whose dimensions lie in memory in the order of ``like``'s (csrc: new_like)."""
    order = sorted(range(like.dim()), key=like.stride, reverse=True)
    strides, step = [0] * like.dim(), 1
    for dim in reversed(order):
        strides[dim] = step
        step = step * max(shape[dim], 1)
    return like.new_empty_strided(shape, strides)


def new_gradients(inputs: Sequence[Tensor], needed: Sequence[bool]) -> tuple[Tensor, ...]:
    """An empty tensor in the layout of each input, or of no elements (0) where its gradient is not needed."""
    return tuple(
        like_layout(t, tuple(t.shape)) if need else t.new_empty(0) for t, need in zip(inputs, needed, strict=True)
    )


def only_needed(grads: Sequence[Tensor], needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradients that an op with ``bool[] needed`` returns, None for those that are not needed."""
    return tuple(grad if need else None for grad, need in zip(grads, needed, strict=True))


class FusedFunction(torch.autograd.Function):
    """A Function of fused kernels; call it by :func:`apply_fused`."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple, *args: Any) -> Any:
        raise _unsupported(cls, "torch.func.vmap, which torch.func.jacrev uses as well")


def apply_fused(function: type[FusedFunction], *args: Any) -> Any:
    """``function.apply(*args)``, with an error that says what to use for forward-mode AD.

    A ``jvp`` of its own, which would raise that error, breaks ``torch.compile(fullgraph=True)``, and so does ``apply``.

    Raises:
        NotImplementedError: an input has a tangent.
    """
    try:
        return function.apply(*args)
    except NotImplementedError as error:
        if "jvp" not in str(error):
            raise
        raise _unsupported(function, "forward-mode AD, as in torch.func.jvp, jacfwd and hessian") from error


def _unsupported(function: type, transform: str) -> NotImplementedError:
    op = function.__module__.rpartition(".")[0]
    return NotImplementedError(
        f'the fused kernels of {op} do not support {transform}: pass backend="reference" to the op, '
        "or use_fused=False to the model"
    )


def double_backward(
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor],
    grads: Sequence[Tensor | None],
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """The gradient of a fused backward pass, by differentiating that of ``reference(*inputs)``.

    The results are differentiable in all arguments where a graph is wanted (``create_graph=True``), so that
    derivatives of any order are the reference's.

    Args:
        grad_outputs: what the backward pass was given, one per output; grads: one per input, for the gradients that it
            returned.

    Returns:
        The gradients of ``grad_outputs`` and those of ``inputs``.
    """
    with without_autocast(inputs[0]):
        if torch._C._are_functorch_transforms_active():  # nobody may call requires_grad_() there
            return _double_backward_in_transform(reference, inputs, grad_outputs, grads)
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            inputs, grad_outputs = ([_own_view(t) for t in group] for group in (inputs, grad_outputs))
            out = reference(*inputs)
            first = torch.autograd.grad(out, inputs, grad_outputs, create_graph=True)
            used = [(f, g) for f, g in zip(first, grads, strict=True) if g is not None and f.requires_grad]
            outputs, cotangents = zip(*used, strict=True) if used else ((), ())
            wanted = (*grad_outputs, *inputs)
            second = torch.autograd.grad(outputs, wanted, cotangents, create_graph=create_graph, allow_unused=True)
    return second[: len(grad_outputs)], second[len(grad_outputs) :]


def _own_view(x: Tensor) -> Tensor:
    """x as a tensor of its own, so that two arguments that are one tensor have separate gradients; with x's history."""
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


def _double_backward_in_transform(
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor],
    grads: Sequence[Tensor | None],
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """:func:`double_backward` by torch.func, whose levels compose; saved tensor hooks do not work with it."""

    def backward(grad_outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        out, pull = torch.func.vjp(reference, *inputs)
        return pull(grad_outputs if isinstance(out, tuple) else grad_outputs[0])

    first, pull = torch.func.vjp(backward, tuple(grad_outputs), tuple(inputs))
    return pull(tuple(torch.zeros_like(f) if g is None else g for f, g in zip(first, grads, strict=True)))
