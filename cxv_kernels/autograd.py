"""Make fused ops differentiable: :class:`FusedOp`.

The backward pass uses the fused backward kernels, and every higher order uses the reference. The schemas in
csrc/ops.cpp define the tensors that an op saves.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .library import NAMESPACES, SCHEMAS, overload, register_fake, register_triton
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
    """A Function of fused kernels; :class:`FusedOp` makes its subclasses."""

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


def differentiate_operator(name: str, function: type[FusedFunction]) -> None:
    """Give an operator the autograd of its Function, which calls the operator and has one more argument, the backend.

    An exported program contains the operators and not the Functions. Without this its training would have no gradients.
    """
    for namespace, backend in zip(NAMESPACES, ("cpu", "triton"), strict=True):  # the first one is also CUDA's

        def setup_context(ctx: Any, inputs: tuple, output: Any, backend: str = backend) -> None:
            function.setup_context(ctx, (*inputs, backend), output)

        if overload(name, backend) is not None:
            backward = lambda ctx, *grads: function.backward(ctx, *grads)[:-1]  # noqa: E731
            torch.library.register_autograd(f"{namespace}::{name}", backward, setup_context=setup_context)


def refuse_compiled_transforms() -> None:
    """Raise ``NotImplementedError`` in a torch.func transform inside torch.compile.

    Dynamo would differentiate the kernels themselves there, and PyTorch treats their results as constants.
    """
    if torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            "the fused kernels do not support torch.func transforms inside torch.compile: compile a smaller part, pass "
            'backend="reference" to the op, or use_fused=False to the model'
        )


def records_gradients(*arguments: Any) -> bool:
    """Return False if a call with these arguments needs no autograd Function, which takes longer than a kernel."""
    return (
        (torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in arguments))
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def _call(kernel: Callable[..., Any], *arguments: Any) -> Any:
    return kernel(*arguments)


class FusedOp:
    """A differentiable function, made from an operator of csrc/ops.cpp and its backward operator.

    The schemas of the two operators define the tensors to save. The backward operator takes, in this order: a gradient
    ``grad_…`` for each of the first outputs (the other outputs have no gradient); the saved tensors, which have the
    names of inputs and outputs of the forward operator; the options; and ``needed``. It returns one ``grad_<input>``
    for each differentiable input. A result without a name is the gradient of the first input.

    Call it with the arguments of the forward operator and the name of a backend. The methods are in the order in which
    they then run: the forward pass, the backward pass and the derivative of the backward pass.

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

    Attributes:
        kernels: Dict from the name of a backend to its two operators.
    """

    def __init__(
        self,
        name: str,
        reference: Callable[..., Any],
        fake: Callable[..., Any],
        *,
        triton: str | None = None,
        triton_fake: Callable[..., Any] | None = None,
        fake_backward: Callable[..., Any] | None = None,
        forward: Callable[..., Any] = _call,
        backward: Callable[..., Any] = _call,
        passed_on: str = "",
        save: Callable[..., None] = lambda ctx, *tensors: ctx.save_for_backward(*tensors),
        saved: Callable[[Any], tuple[Tensor | None, ...]] = lambda ctx: ctx.saved_tensors,
    ):
        operators = (f"{name}_forward" if f"{name}_forward" in SCHEMAS else name), f"{name}_backward"
        if triton:
            for operator in operators:
                register_triton(operator, triton)
        self.kernels = {b: tuple(overload(operator, b) for operator in operators) for b in ("cpu", "cuda", "triton")}
        self.reference, self.forward, self.backward, self.save, self.saved = reference, forward, backward, save, saved
        self._read_schemas(*(SCHEMAS[operator] for operator in operators))
        self.passed_on_at = self.inputs.index(passed_on) if passed_on else None
        register_fake(operators[0], fake, triton_fake)
        register_fake(operators[1], fake_backward or self._fake_backward)
        title = "".join(part.capitalize() for part in name.split("_")) + "Function"
        op = reference.__module__.split(".")[-2]
        first = self._run_forward, self._keep, self._differentiate
        second = self._run_backward, self._keep_for_second_order, self._differentiate_twice
        self._function = _make_function(title, op, *first)
        self._backward_function = _make_function(f"{title}Backward", op, *second)
        differentiate_operator(operators[0], self._function)

    def _read_schemas(self, forward: Any, backward: Any) -> None:
        """Find what is saved and what has a gradient. ``…_at`` are indices into the inputs, and then the outputs."""
        self.inputs = [argument.name for argument in forward.arguments]
        names = [*self.inputs, *(result.name for result in forward.returns)]
        others = {argument.name for argument in forward.arguments if "Tensor" not in str(argument.type)}
        arguments = [argument.name for argument in backward.arguments]
        if self.backward is not _call:
            arguments = list(inspect.signature(self.backward).parameters)[1:]
        self.num_grads = sum(argument.startswith("grad_") for argument in arguments)
        self.takes_needed = "needed" in arguments
        kept = [argument for argument in arguments[self.num_grads :] if argument != "needed"]
        self.tensors = [name for name in kept if name not in others]
        self.options = kept[len(self.tensors) :]
        self.tensors_at, self.options_at = ([names.index(n) for n in group] for group in (self.tensors, self.options))
        self.of_inputs = [i for i, name in enumerate(self.tensors) if name in self.inputs]  # indices into the tensors

        self.variables = [result.name.removeprefix("grad_") or self.inputs[0] for result in backward.returns]
        self.variables_at = [self.inputs.index(name) for name in self.variables]
        self.of_variables = [self.tensors.index(name) for name in self.variables]  # indices into the tensors

    def __call__(self, *values: Any) -> Any:
        if records_gradients(*values):
            return apply_fused(self._function, *values)
        return self._run_forward(*values)

    def _run_forward(self, *values: Any) -> Any:
        refuse_compiled_transforms()
        *values, backend = values
        return self.forward(self.kernels[backend][0], *values)

    def _keep(self, ctx: Any, values: tuple, results: Any) -> None:
        results = results if isinstance(results, tuple) else (results,)
        ctx.backend = values[-1]
        if results[self.num_grads :]:
            ctx.mark_non_differentiable(*results[self.num_grads :])
        ctx.set_materialize_grads(self.num_grads > 1)
        available = (*values[:-1], *results)
        ctx.options = [available[i] for i in self.options_at]
        self.save(ctx, *[available[i] for i in self.tensors_at])

    def _differentiate(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * (len(self.inputs) + 1)
        grads = grads[: self.num_grads]
        needed = [ctx.needs_input_grad[i] for i in self.variables_at]
        if grads[0] is None:
            return tuple(found)
        if self.passed_on_at is not None and ctx.needs_input_grad[self.passed_on_at]:
            found[self.passed_on_at] = grads[0]
        if any(needed):
            # compiled code supports the first order only
            run = self._run_backward if torch.compiler.is_compiling() else self._backward_function.apply
            results = run(*grads, *self.saved(ctx), *ctx.options, needed, ctx.backend)
            for i, grad in zip(self.variables_at, results, strict=True):
                found[i] = grad
        return tuple(found)

    def _fake_backward(self, *values: Any) -> Any:
        like = [values[self.num_grads + i] for i in self.of_variables]
        grads = new_gradients(like, values[-1] if self.takes_needed else [True])
        return grads if self.takes_needed else grads[0]

    def _run_backward(self, *values: Any) -> tuple[Tensor | None, ...]:
        refuse_compiled_transforms()
        *values, needed, backend = values
        results = self.backward(self.kernels[backend][1], *values, *([needed] if self.takes_needed else []))
        results = results if isinstance(results, tuple | list) else (results,)
        like = [values[self.num_grads + i] for i in self.of_variables]
        return tuple(grad.to(x.dtype) if need else None for grad, x, need in zip(results, like, needed, strict=True))

    def _keep_for_second_order(self, ctx: Any, values: tuple, results: tuple) -> None:
        ctx.set_materialize_grads(False)
        grads, tensors = values[: self.num_grads], values[self.num_grads :]
        ctx.options = tensors[len(self.tensors) : -2]
        self.save(ctx, *grads, *[tensors[i] for i in self.of_inputs])

    def _differentiate_twice(self, ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        values = self.saved(ctx)
        grads, values = values[: self.num_grads], values[self.num_grads :]
        fixed = dict(zip([self.tensors[i] for i in self.of_inputs], values, strict=True))
        fixed |= dict(zip(self.options, ctx.options, strict=True))
        given = [name for name in self.variables if fixed[name] is not None]  # a bias can be None

        def of_variables(*differentiable: Tensor) -> Any:
            return self.reference(**(fixed | dict(zip(given, differentiable, strict=True))))

        cotangents = [c for name, c in zip(self.variables, cotangents, strict=True) if name in given]
        of_grads, of_given = double_backward(of_variables, [fixed[name] for name in given], grads, cotangents)
        found = dict(zip(given, of_given, strict=True))
        return (*of_grads, *(found.get(name) for name in self.tensors), *(None,) * (len(self.options) + 2))


def _make_function(
    title: str, op: str, forward: Callable[..., Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> type[FusedFunction]:
    """Make a Function of bound methods. Dynamo supports only plain functions as its members."""
    members = {
        "forward": lambda *values: forward(*values),
        "setup_context": lambda ctx, values, results: setup_context(ctx, values, results),
        "backward": lambda ctx, *grads: backward(ctx, *grads),
    }
    return type(title, (FusedFunction,), {"op": op} | {name: staticmethod(f) for name, f in members.items()})


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
