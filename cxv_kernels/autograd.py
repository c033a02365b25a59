"""A factory, :func:`fused_op`, that makes fused ops differentiable.

The backward pass uses the fused backward kernels, and every higher order uses the reference. The schemas in
csrc/ops.cpp define the tensors that an op saves.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .library import SCHEMAS, overload, register_fake, register_triton
from .validation import without_autocast


def like_layout(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Return an empty tensor of this shape whose dimensions have the order of ``like``'s in memory (csrc: new_like)."""
    order = sorted(range(like.dim()), key=like.stride, reverse=True)
    strides, step = [0] * like.dim(), 1
    for dim in reversed(order):
        strides[dim] = step
        step = step * max(shape[dim], 1)
    return like.new_empty_strided(shape, strides)


def new_gradients(inputs: Sequence[Tensor], needed: Sequence[bool]) -> tuple[Tensor, ...]:
    """Return an empty tensor in the layout of each input, or one of shape (0) if its gradient is not needed."""
    return tuple(like_layout(t, t.shape) if need else t.new_empty(0) for t, need in zip(inputs, needed, strict=True))


class FusedFunction(torch.autograd.Function):
    """A Function of fused kernels; :func:`fused_op` makes its subclasses."""

    op = ""  # the op's name, for messages

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple, *args: Any) -> Any:
        raise _unsupported(cls, "torch.func.vmap, which torch.func.jacrev uses as well")


def apply_fused(function: type[FusedFunction], *args: Any) -> Any:
    """Call ``function.apply(*args)``, with an error message that says what to use for forward-mode AD.

    A ``jvp`` method that raises this error, or an ``apply`` method that catches it, would break
    ``torch.compile(fullgraph=True)``.

    Raises:
        NotImplementedError: If an input has a tangent.
    """
    try:
        return function.apply(*args)
    except NotImplementedError as error:
        if "jvp" not in str(error):
            raise
        raise _unsupported(function, "forward-mode AD, as in torch.func.jvp, jacfwd and hessian") from error


def _unsupported(function: type[FusedFunction], transform: str) -> NotImplementedError:
    return NotImplementedError(
        f'the fused kernels of {function.op} do not support {transform}: pass backend="reference" to the op, '
        "or use_fused=False to the model"
    )


def refuse_compiled_transforms() -> None:
    """Raise ``NotImplementedError`` in a torch.func transform inside torch.compile.

    Dynamo would differentiate the kernels themselves there, and PyTorch treats their results as constants.
    """
    if torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "the fused kernels do not support torch.func transforms inside torch.compile: compile a smaller part, pass "
            'backend="reference" to the op, or use_fused=False to the model'
        )


def records_gradients(*tensors: Tensor | None) -> bool:
    """Return False if a call with these tensors needs no autograd Function, which takes longer than a small kernel."""
    return (
        (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def fused_op(
    name: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    triton: str | None = None,
    triton_fake: Callable[..., Any] | None = None,
    fake_backward: Callable[..., Any] | None = None,
    forward: Callable[..., Any] | None = None,
    backward: Callable[..., Any] | None = None,
    passed_on: str = "",
    save: Callable[..., None] = lambda ctx, *tensors: ctx.save_for_backward(*tensors),
    saved: Callable[[Any], tuple[Tensor | None, ...]] = lambda ctx: ctx.saved_tensors,
) -> Callable[..., Any]:
    """Make a differentiable function from an operator of csrc/ops.cpp and its backward operator.

    The schemas of the two operators define the tensors to save. The backward operator takes, in this order: a gradient
    ``grad_…`` for each of the first outputs (the other outputs have no gradient); the saved tensors, which have the
    names of inputs and outputs of the forward operator; the options; and ``needed``. It returns one ``grad_<input>``
    for each differentiable input. A result without a name is the gradient of the first input.

    Args:
        name: Name of the op. Its operators are ``<name>_forward`` or ``<name>``, and ``<name>_backward``.
        reference: Function that defines the second and higher derivatives. Its arguments are the saved inputs and the
            options, passed by name.
        fake: Fake implementation of the forward operator.
        triton: Name of the module with the Triton kernels.
        triton_fake: Fake implementation of the Triton kernels, if their outputs have other shapes.
        fake_backward: Fake implementation of the backward operator, if the gradients do not have the inputs' layout.
        forward: Function of the forward operator and its arguments, for an op that does not call it by its schema.
        backward: The same for the backward operator. Its arguments then define the saved tensors.
        passed_on: Name of an input that is added to the result, so that its gradient is the gradient of the output.
        save: Function ``save(ctx, *tensors)`` that replaces ``ctx.save_for_backward``.
        saved: Function of ``ctx`` that returns the tensors of ``save``.

    Returns:
        A function of the forward operator's arguments and the name of a backend. Its attribute ``kernels`` maps the
        name of a backend to its two operators.
    """
    forward_name, backward_name = (f"{name}_forward" if f"{name}_forward" in SCHEMAS else name), f"{name}_backward"
    if triton:
        register_triton(forward_name, triton)
        register_triton(backward_name, triton)
    kernels = {b: (overload(forward_name, b), overload(backward_name, b)) for b in ("cpu", "cuda", "triton")}
    forward = forward or (lambda kernel, *arguments: kernel(*arguments))

    inputs = [argument.name for argument in SCHEMAS[forward_name].arguments]
    is_tensor = ["Tensor" in str(argument.type) for argument in SCHEMAS[forward_name].arguments]
    tensor_inputs = [i for i, tensor in enumerate(is_tensor) if tensor]
    outputs = [result.name for result in SCHEMAS[forward_name].returns]
    arguments = [argument.name for argument in SCHEMAS[backward_name].arguments]
    if backward:
        arguments = list(inspect.signature(backward).parameters)[1:]
    else:
        backward = lambda kernel, *arguments: kernel(*arguments)  # noqa: E731
    num_grads = sum(argument.startswith("grad_") for argument in arguments)
    takes_needed = "needed" in arguments
    kept = [argument for argument in arguments[num_grads:] if argument != "needed"]
    names = [*inputs, *outputs]  # everything that can be saved
    tensors = [n for n in kept if n in outputs or is_tensor[inputs.index(n)]]
    options = kept[len(tensors) :]
    tensors_at, options_at = ([names.index(n) for n in group] for group in (tensors, options))
    variables = [result.name.removeprefix("grad_") or inputs[0] for result in SCHEMAS[backward_name].returns]
    variables_at = [inputs.index(n) for n in variables]  # indices into the inputs
    in_kept = [tensors.index(n) for n in variables]  # indices into the saved tensors
    of_inputs = [i for i, n in enumerate(tensors) if n in inputs]  # the saved tensors that are inputs

    if fake_backward is None:

        def fake_backward(*values: Any) -> Any:
            like = [values[num_grads + i] for i in in_kept]
            grads = new_gradients(like, values[-1] if takes_needed else [True])
            return grads if takes_needed else grads[0]

    register_fake(forward_name, fake, triton_fake)
    register_fake(backward_name, fake_backward)

    def run_forward(*values: Any) -> Any:
        refuse_compiled_transforms()
        *values, backend = values
        return forward(kernels[backend][0], *values)

    def keep_for_backward(ctx: Any, values: tuple, results: Any) -> None:
        results = results if isinstance(results, tuple) else (results,)
        ctx.backend = values[-1]
        if results[num_grads:]:
            ctx.mark_non_differentiable(*results[num_grads:])
        ctx.set_materialize_grads(num_grads > 1)
        available = (*values[:-1], *results)
        ctx.options = [available[i] for i in options_at]
        save(ctx, *[available[i] for i in tensors_at])

    def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * (len(inputs) + 1)
        grads = grads[:num_grads]
        needed = [ctx.needs_input_grad[i] for i in variables_at]
        if grads[0] is None:
            return tuple(found)
        if passed_on and ctx.needs_input_grad[inputs.index(passed_on)]:
            found[inputs.index(passed_on)] = grads[0]
        if any(needed):
            # compiled code supports the first order only
            run = run_backward if torch.compiler.is_compiling() else backward_function.apply
            results = run(*grads, *saved(ctx), *ctx.options, needed, ctx.backend)
            for i, grad in zip(variables_at, results, strict=True):
                found[i] = grad
        return tuple(found)

    def run_backward(*values: Any) -> tuple[Tensor | None, ...]:
        refuse_compiled_transforms()
        *values, needed, backend = values
        results = backward(kernels[backend][1], *values, *([needed] if takes_needed else []))
        results = results if isinstance(results, tuple | list) else (results,)
        like = [values[num_grads + i] for i in in_kept]
        return tuple(grad.to(x.dtype) if need else None for grad, x, need in zip(results, like, needed, strict=True))

    def keep_for_double_backward(ctx: Any, values: tuple, results: tuple) -> None:
        ctx.set_materialize_grads(False)
        ctx.options = values[num_grads + len(tensors) : -2]
        save(ctx, *values[:num_grads], *[values[num_grads + i] for i in of_inputs])

    def differentiate_twice(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        values = saved(ctx)
        grads, values = values[:num_grads], values[num_grads:]
        fixed = dict(zip([tensors[i] for i in of_inputs], values, strict=True)) | dict(
            zip(options, ctx.options, strict=True)
        )
        given = [n for n in variables if fixed[n] is not None]  # a bias can be None

        def of_variables(*differentiable: Tensor) -> Any:
            return reference(**(fixed | dict(zip(given, differentiable, strict=True))))

        cotangents = [c for n, c in zip(variables, cotangents, strict=True) if n in given]
        of_grads, of_given = double_backward(of_variables, [fixed[n] for n in given], grads, cotangents)
        found = dict(zip(given, of_given, strict=True))
        return (*of_grads, *(found.get(n) for n in tensors), *(None,) * (len(options) + 2))

    op = reference.__module__.split(".")[-2]
    title = "".join(part.capitalize() for part in name.split("_")) + "Function"

    def make_function(title: str, *methods: Callable) -> type[FusedFunction]:
        members = zip(("forward", "setup_context", "backward"), map(staticmethod, methods), strict=True)
        return type(title, (FusedFunction,), {**dict(members), "op": op, "__module__": __name__})

    function = make_function(title, run_forward, keep_for_backward, differentiate)
    backward_function = make_function(f"{title}Backward", run_backward, keep_for_double_backward, differentiate_twice)

    def call(*values: Any) -> Any:
        if records_gradients(*[values[i] for i in tensor_inputs]):
            return apply_fused(function, *values)
        return run_forward(*values)

    call.kernels = kernels
    return call


def double_backward(
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor],
    grads: Sequence[Tensor | None],
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """Compute the gradient of a fused backward pass by differentiating the backward pass of ``reference(*inputs)``.

    With ``create_graph=True`` the results are differentiable in all arguments, so the reference defines the
    derivatives of every order.

    Args:
        reference: Function of the inputs.
        inputs: Inputs of the forward pass.
        grad_outputs: Arguments of the backward pass, one per output.
        grads: Gradients of the results of the backward pass, one per input.

    Returns:
        The gradients of ``grad_outputs`` and the gradients of ``inputs``.
    """
    with without_autocast(inputs[0]):
        if torch._C._are_functorch_transforms_active():  # requires_grad_() is not allowed in a transform
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
    """Return a view of x with x's history, so that a tensor passed as two arguments has two separate gradients."""
    return x.view_as(x) if x.requires_grad else x.detach().requires_grad_()


def _double_backward_in_transform(
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor],
    grads: Sequence[Tensor | None],
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    """Compute :func:`double_backward` with torch.func, whose levels compose. Saved tensor hooks do not work with it."""

    def backward(grad_outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        out, pull = torch.func.vjp(reference, *inputs)
        return pull(grad_outputs if isinstance(out, tuple) else grad_outputs[0])

    first, pull = torch.func.vjp(backward, tuple(grad_outputs), tuple(inputs))
    return pull(tuple(torch.zeros_like(f) if g is None else g for f, g in zip(first, grads, strict=True)))
