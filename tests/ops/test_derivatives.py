"""Derivatives of the fused ops: any order is the reference's, or an error says what to use instead."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import cases
import pytest
import torch
from cases import Case, Sizes, every, projection
from conftest import heads, needs_cpp
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import cxv
from cxv_kernels import dropout, dropout_seed, gelu_dropout, kv_state, linear_attention, performer_attention
from cxv_kernels.ops.linear_attention.op import linear_attention_op

pytestmark = needs_cpp
SAME = Sizes(1, 2, 5, 5, 3, 3, (3, 3))  # q, k and v may be one tensor
TOKENS = (1, 2, 5, 3)
CHANGED = "modified by an inplace operation"


def variants(case: Case) -> Iterator[Case]:
    """The case with other constants: with a key mask, too."""

    def constants(sizes: Sizes) -> dict[str, Tensor | float]:
        # a pixel of three channels may have hardly any variance, which the higher orders divide by
        return case.constants(sizes) | ({"eps": 0.1} if case.op == "conv_norm" else {})

    yield replace(case, constants=constants)
    if case.takes_mask:
        key_mask = torch.tensor([[True, False, True, True, True]])
        masked = lambda sizes: constants(sizes) | {"key_mask": key_mask.clone()}  # noqa: E731
        yield replace(case, label=f"{case.label}-masked", constants=masked)


CASES = [variant for case in cases.CASES if case.label != "channels_last" for variant in variants(case)]
OPS = {case.op: case for case in reversed(CASES)}
every_case = every(CASES)
every_op = pytest.mark.parametrize("op", OPS)


def leaves(case: Case, *requires_grad: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Inputs that all require grad, or those of these places alone."""
    inputs = case.inputs(SAME, dtype)
    return [t.requires_grad_(not requires_grad or i in requires_grad) for i, t in enumerate(inputs)]


def bind(case: Case, backend: str, **constants: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    return case.bind(backend, SAME, **constants)


@contextmanager
def differentiable_sdpa():
    """The form of scaled-dot-product attention that the reference of Nyström attention needs for a second order."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def scalar(tensors: Sequence[Tensor | None]) -> Tensor:
    """A function whose derivatives of every order are not zero."""
    return sum((t.sin() * torch.linspace(0.5, 1.5, t.numel()).view(t.shape)).sum() for t in tensors if t is not None)


def derivatives(function: Callable, inputs: Sequence[Tensor], orders: int = 3) -> list[Tensor]:
    """The gradients of the first to the last order, each the gradient of a function of the one before."""
    wanted, found = [t for t in dict.fromkeys(inputs) if t.requires_grad], []
    current = function(*inputs)
    for order in range(1, orders + 1):
        loss = scalar(current)
        if not loss.requires_grad:  # an op that is linear has no more
            break
        current = torch.autograd.grad(loss, wanted, create_graph=order < orders, allow_unused=True)
        found += [torch.zeros_like(t) if g is None else g for g, t in zip(current, wanted, strict=True)]
    return found


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor], relative: float = 1e-10) -> None:
    """Within ``relative`` of the largest element of each tensor."""
    for got, want in zip(found, expected, strict=True):
        scale = float(want.detach().abs().max()) if want.numel() else 0.0
        torch.testing.assert_close(got.detach(), want.detach(), rtol=0, atol=relative * max(scale, 1e-4))


def assert_derivatives(case: Case, inputs: Sequence[Tensor]) -> None:
    with differentiable_sdpa():
        found, expected = (derivatives(bind(case, backend), inputs) for backend in ("cpu", "reference"))
    assert_same(found, expected)


@every_case
def test_three_orders_are_the_references(case):
    assert_derivatives(case, leaves(case))


@every_case
def test_three_orders_where_one_input_requires_grad(case):
    for place in range(len(case.shapes(SAME))):
        assert_derivatives(case, leaves(case, place))


@every_case
def test_three_orders_where_inputs_are_one_tensor(case):
    by_shape = {tuple(t.shape): t for t in leaves(case)}
    assert_derivatives(case, [by_shape[shape] for shape in case.shapes(SAME)])


@pytest.mark.parametrize("shape", [(0, 2, 5, 3), (1, 0, 5, 3), (1, 2, 0, 3)], ids=["batch", "heads", "tokens"])
@pytest.mark.parametrize("op", ["linear_attention", "kv_state", "performer_attention", "performer_features"])
def test_three_orders_where_a_size_is_zero(op, shape):
    assert_derivatives(OPS[op], [heads(*shape, grad=True) for _ in OPS[op].shapes(SAME)])


@every_op
def test_three_orders_in_float16(op):
    """State and statistics are float32 there; the roundings of both sides enter the higher orders."""
    case = OPS[op]
    inputs = [(t.detach() / 2).requires_grad_() for t in leaves(case, dtype=torch.float16)]
    with differentiable_sdpa():
        found, expected = (derivatives(bind(case, backend), inputs) for backend in ("cpu", "reference"))
    assert all(t.dtype == torch.float16 for t in found)
    assert_same([t.double() for t in found], [t.double() for t in expected], relative=0.02)


@every_op
def test_second_order_without_create_graph_keeps_no_graph(op):
    """Its results have no history, so what they were computed from is freed."""
    case = OPS[op]
    inputs = leaves(case)
    first = torch.autograd.grad(scalar(bind(case, "cpu")(*inputs)), inputs, create_graph=True)
    for create_graph in (True, False):
        second = torch.autograd.grad(scalar(first), inputs, create_graph=create_graph, retain_graph=True)
        assert all(t.requires_grad == create_graph for t in second)


# --- the ways to ask for derivatives ---


def composed(function: Callable, inputs: Sequence[Tensor]) -> dict[str, Callable[[], object]]:
    """torch.func and torch.autograd.functional, as functions of the first input; v is a vector of its shape."""
    x, *rest = (t.detach() for t in inputs)
    loss = lambda x: scalar(function(x, *rest))  # noqa: E731
    first = lambda x: function(x, *rest)[0]  # noqa: E731
    second = lambda x: scalar((torch.func.grad(loss)(x),))  # noqa: E731
    cotangent, v = torch.randn(first(x).shape, dtype=x.dtype), torch.randn(x.shape, dtype=x.dtype)
    by_cotangent = lambda g: scalar(torch.func.vjp(first, x)[1](g))  # noqa: E731

    def of_eager_cotangent() -> Tensor:
        g = cotangent.clone().requires_grad_()
        return torch.autograd.grad(by_cotangent(g), g)[0]

    def batched() -> Tensor:
        y = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss(y), y, create_graph=True)
        return torch.autograd.grad(grad, y, torch.stack([v, 2 * v]), is_grads_batched=True)[0]

    functional = torch.autograd.functional
    return {
        "grad": lambda: torch.func.grad(loss)(x),
        "grad of grad": lambda: torch.func.grad(second)(x),
        "grad of grad of grad": lambda: torch.func.grad(lambda x: scalar((torch.func.grad(second)(x),)))(x),
        "grad by the cotangent of vjp": lambda: torch.func.grad(by_cotangent)(cotangent),
        "autograd by the cotangent of vjp": of_eager_cotangent,
        "jacrev in chunks of one": lambda: torch.func.jacrev(first, chunk_size=1)(x),
        "functional.hessian": lambda: functional.hessian(loss, x),
        "functional.jvp": lambda: functional.jvp(first, x, v)[1],
        "functional.hvp": lambda: functional.hvp(loss, x, v)[1],
        "functional.vhp": lambda: functional.vhp(loss, x, v)[1],
        "is_grads_batched": batched,
    }


@pytest.mark.filterwarnings("ignore:.*performance drop.*")
@pytest.mark.parametrize("way", composed(lambda x: (x,), [torch.zeros(1)]))
@pytest.mark.parametrize("op", [op for op in OPS if op != "dropout"])
def test_ways_to_ask_for_derivatives(op, way):
    """Of a function of the first input; dropout is linear in it."""
    case, inputs = OPS[op], leaves(OPS[op])
    state = torch.get_rng_state()
    found = []
    with differentiable_sdpa():
        for backend in ("cpu", "reference"):
            torch.set_rng_state(state)
            found.append(composed(bind(case, backend), inputs)[way]())
    assert_same(found[:1], found[1:])
    assert found[1].any()


def forward_mode(function: Callable, x: Tensor) -> None:
    with forward_ad.dual_level():
        function(forward_ad.make_dual(x, x))


UNSUPPORTED = {
    "vmap": (lambda f, x: torch.func.vmap(f)(x[None]), "vmap"),
    "jacrev": (lambda f, x: torch.func.jacrev(f)(x), "vmap"),
    "jvp": (lambda f, x: torch.func.jvp(f, (x,), (x,)), "forward-mode AD"),
    "jacfwd": (lambda f, x: torch.func.jacfwd(f)(x), "forward-mode AD"),
    "hessian": (lambda f, x: torch.func.hessian(lambda x: f(x).sum())(x), "forward-mode AD"),
    "forward_ad": (forward_mode, "forward-mode AD"),
}


@every_op
@pytest.mark.parametrize("way", UNSUPPORTED)
def test_unsupported_transform_names_the_reference(way, op):
    x, *rest = leaves(OPS[op])
    call, (transform, name) = bind(OPS[op], "cpu"), UNSUPPORTED[way]
    with pytest.raises(NotImplementedError, match=rf'{name}.* pass backend="reference".* use_fused=False'):
        transform(lambda x: call(x, *rest)[0], x.detach())


@pytest.mark.parametrize("op", ["linear_attention", "nystrom_attention", "conv_norm"])
def test_transform_inside_compile_raises(op):
    """Dynamo differentiates what is inside the kernels' calls, and PyTorch takes those for constants."""
    x, *rest = (t.detach() for t in leaves(OPS[op]))
    gradient = torch.func.grad(lambda x: scalar(bind(OPS[op], "cpu")(x, *rest)))
    with pytest.raises(RuntimeError, match="use_fused=False"):
        torch.compile(gradient, fullgraph=True, backend="eager")(x)


# --- tensors that change between forward and backward ---


def gradient_of_order(case: Case, order: int, changed: str | None) -> tuple[Tensor | None, ...]:
    """The gradient of that order, where a tensor changes between the last forward and the last backward pass."""
    torch.manual_seed(0)
    inputs, constants = leaves(case), case.constants(SAME)
    current = bind(case, "cpu", **constants)(*inputs)
    for _ in range(order - 1):
        current = torch.autograd.grad(scalar(current), inputs, create_graph=True, allow_unused=True)
    loss = scalar(current)
    if changed is not None:
        tensor = constants[changed] if changed in constants else inputs[int(changed)]
        with torch.no_grad():
            _ = tensor.logical_not_() if tensor.dtype == torch.bool else tensor.add_(1)
    return torch.autograd.grad(loss, inputs, allow_unused=True)


@pytest.mark.parametrize("order", [1, 2, 3])
@every_case
def test_change_before_backward_is_an_error_or_has_no_effect(case, order):
    """Whichever tensor changes in place: PyTorch's error, or the gradients of the tensors as they were."""
    expected = gradient_of_order(case, order, None)
    tensors = [name for name, value in case.constants(SAME).items() if isinstance(value, Tensor)]
    for name in (*map(str, range(len(case.shapes(SAME)))), *tensors):
        try:
            found = gradient_of_order(case, order, name)
        except RuntimeError as error:
            assert CHANGED in str(error)  # noqa: PT017
        else:
            assert all((f is None and e is None) or torch.equal(f, e) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("function", [dropout, gelu_dropout])
@pytest.mark.parametrize(("compiled", "order"), [(False, 1), (False, 2), (True, 1)], ids=["eager", "twice", "compiled"])
def test_seed_buffer_that_is_refilled_before_backward(order, compiled, function):
    """As one does for a CUDA graph: without an error elements would get the gradient of another mask."""
    buffer, x = dropout_seed(), torch.randn(300, requires_grad=True)
    call = lambda x, seed: function(x * x, 0.5, seed, backend="cpu").sin().sum()  # noqa: E731
    loss = (torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call)(x, buffer)
    if order == 2:
        loss = torch.autograd.grad(loss, x, create_graph=True)[0].sin().sum()
    buffer.random_()
    with pytest.raises(RuntimeError, match=CHANGED):
        loss.backward()


def test_seed_drawn_in_inference_mode():
    """It has no version; it is used as any other."""
    x = torch.randn(300, requires_grad=True)
    with torch.inference_mode():
        drawn = dropout_seed()
        assert gelu_dropout(x, 0.5, drawn, backend="cpu").shape == x.shape
    for function in (dropout, gelu_dropout):
        found, expected = (
            torch.autograd.grad(function(x, 0.5, s, backend="cpu").sum(), x) for s in (drawn, drawn.clone())
        )
        assert torch.equal(*found, *expected)


@every_case
def test_output_that_is_changed_before_backward(case):
    """PyTorch's error where backward reads the output, else the gradients of what was done."""
    inputs = leaves(case)
    for place in range(len(bind(case, "cpu")(*inputs))):
        outs = bind(case, "cpu")(*inputs)
        outs[place].mul_(2)
        doubled = [2 * out if i == place else out for i, out in enumerate(bind(case, "reference")(*inputs))]
        expected = torch.autograd.grad(scalar(doubled), inputs, allow_unused=True)
        try:
            found = torch.autograd.grad(scalar(outs), inputs, allow_unused=True)
        except RuntimeError as error:
            assert CHANGED in str(error)  # noqa: PT017
        else:
            assert_same(found, expected)


# --- modes ---


@every_op
def test_backward_twice(op):
    case = OPS[op]
    inputs = leaves(case)
    loss = scalar(bind(case, "cpu")(*inputs))
    once, again = (torch.autograd.grad(loss, inputs, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, once, again))


@every_op
def test_autocast_in_backward_changes_nothing(op):
    case = OPS[op]
    inputs = [t.detach().float().requires_grad_() for t in leaves(case)]

    def second(enabled: bool) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(scalar(bind(case, "cpu")(*inputs)), inputs, create_graph=True)
        loss = scalar(first)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            return torch.autograd.grad(loss, inputs, allow_unused=True)

    assert all(map(torch.equal, second(True), second(False)))


@every_op
def test_second_order_under_hooks_and_anomaly_detection(op):
    """Hooks on saved tensors and on gradients."""
    case, inputs = OPS[op], leaves(OPS[op])
    seen = []
    with differentiable_sdpa():
        expected = derivatives(bind(case, "reference"), inputs, 2)
        inputs[0].register_hook(lambda g: seen.append(g.shape))
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
            torch.autograd.detect_anomaly(check_nan=True),
        ):
            found = derivatives(bind(case, "cpu"), inputs, 2)
    assert_same(found, expected)
    assert seen == [inputs[0].shape] * 2


@pytest.mark.parametrize("output", [0, 1], ids=["S alone", "z alone"])
@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
def test_one_output_of_kv_state(feature_map, output):
    """z is constant for softmax."""
    inputs = [heads(*TOKENS, grad=True) for _ in range(2)]

    def alone(backend: str) -> list[Tensor]:
        return derivatives(lambda k, v: kv_state(k, v, feature_map, backend=backend)[output : output + 1], inputs)

    assert_same(alone("cpu"), alone("reference"))


def test_projection_that_requires_grad_goes_to_the_reference():
    """In autograd and torch.func alike; a backend that is named does not take it, except where grad mode is off."""
    q, k, v = (heads(*TOKENS) for _ in range(3))

    def loss(w: Tensor, backend: str | None = None) -> Tensor:
        return scalar([performer_attention(q, k, v, w, backend=backend)])

    w = projection(7, 3).requires_grad_()
    expected = torch.autograd.grad(loss(w, "reference"), w)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the announcement, once in a process
        assert_same([*torch.autograd.grad(loss(w), w), torch.func.grad(loss)(w.detach())], expected * 2)
    with pytest.raises(RuntimeError, match="projection that requires grad"):
        torch.func.grad(partial(loss, backend="cpu"))(w.detach())
    with torch.no_grad():
        assert_same([loss(w, "cpu")], [loss(w, "reference")])


def test_jvp_errors_of_others_are_not_renamed(monkeypatch):
    def missing(*_):
        raise NotImplementedError("no kernel for this device")

    monkeypatch.setitem(linear_attention_op.kernels, "cpu", (missing, missing))
    q, k, v = (heads(*TOKENS) for _ in range(3))
    with pytest.raises(NotImplementedError, match=r"^no kernel for this device$"):
        linear_attention(q, k, v, backend="cpu")


# --- models ---

NAMES = ("cpv-1/2", "cnv-1/2", "cltv-1/2")


def models(name: str) -> list[nn.Module]:
    """The model with and without the fused ops, with the same weights."""
    found = [cxv.create_model(name, num_classes=3, img_size=6, embed_dim=16, use_fused=f) for f in (True, False)]
    found[1].load_state_dict(found[0].state_dict())
    return [model.double() for model in found]


def gradients_by_torch_func(model: nn.Module, x: Tensor) -> list[Tensor]:
    """functional_call with grad by the weights, and grad of grad by the images, in training."""
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        torch.manual_seed(1)
        return nn.functional.cross_entropy(torch.func.functional_call(model, weights, (x,)), torch.arange(len(x)))

    first = torch.func.grad(loss)(weights, x)
    return [*first.values(), torch.func.grad(lambda x: scalar([torch.func.grad(loss, 1)(weights, x)]))(x)]


@pytest.mark.parametrize("grad_checkpointing", [False, True], ids=["", "grad_checkpointing"])
@pytest.mark.parametrize("name", NAMES)
def test_torch_func_of_a_fused_model(name, grad_checkpointing):
    fused, reference = models(name)
    fused.set_grad_checkpointing(grad_checkpointing)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    with differentiable_sdpa():
        assert_same(gradients_by_torch_func(fused, x), gradients_by_torch_func(reference, x))


@pytest.mark.parametrize("name", NAMES)
def test_three_orders_of_a_fused_model(name):
    """Through the checkpoints of its residual branches, dropout included."""
    x = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    found = []
    for model in models(name):
        torch.manual_seed(1)
        with differentiable_sdpa():
            found.append(derivatives(lambda x, model=model: (model(x),), (x.clone().requires_grad_(),)))
    assert_same(*found)


@pytest.mark.parametrize("way", ["vmap", "jvp"])
def test_unsupported_transform_of_a_fused_model_names_the_option(way):
    fused, _ = models("cpv-1/2")
    transform, name = UNSUPPORTED[way]
    with pytest.raises(NotImplementedError, match=f"{name}.* use_fused=False"):
        transform(fused.eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64))
