"""The properties of every op on every backend: the table in CONTRIBUTING.md names them."""

from itertools import chain, combinations

import pytest
import torch
from cases import (
    ATTENTION_CASES,
    BACKENDS,
    CASES,
    MASKED,
    ODD,
    SIZES,
    TINY,
    Sizes,
    and_reference,
    assert_close_to_float64,
    device_of,
    every,
    every_backend,
    gradient_like,
    mask_of,
    run,
    with_dtypes,
)
from conftest import layouts, needs_cpp
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.library import opcheck
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from cxv_kernels._triton import interpreting
from cxv_kernels.checks import tolerance
from cxv_kernels.testing import saved_bytes

SMALL = Sizes(1, 2, 20, 23, 8, 5, (4, 5)) if interpreting() else ODD


def subsets(count: int):
    """Every non-empty set of places."""
    return chain.from_iterable(combinations(range(count), size) for size in range(1, count + 1))


@pytest.mark.parametrize("sizes", [name for name in SIZES if not (interpreting() and name in ("long", "wide"))])
@with_dtypes
@every(CASES)
def test_matches_float64(case, backend, dtype, sizes):
    sizes = SIZES[sizes]
    if backend != "cpu" and sizes == SIZES["wide"]:
        pytest.skip("heads of more than 64 or 128 channels are the reference's")
    # conv_norm: of few channels little more than the rounding of the deviation is left, over √eps
    few = case.op == "conv_norm" and sizes == SIZES["one"]
    assert_close_to_float64(case, backend, case.inputs(sizes, dtype), sizes, 1e5**0.5 if few else 1)


@with_dtypes
@every(MASKED)
def test_key_mask(case, backend, dtype):
    """Hidden keys have no influence and no gradient, whatever they hold; without a key there are zeros."""
    inputs, mask = case.inputs(SMALL, dtype), mask_of(SMALL)
    assert_close_to_float64(case, backend, inputs, SMALL, 4, key_mask=mask)
    call = case.bind(backend, SMALL, key_mask=torch.stack([mask, mask], -1)[..., 0])  # a strided mask
    inputs = [t.to(device_of(backend)) for t in inputs]
    want = run(call, inputs)
    hidden = ~mask[:, None, :, None].to(want[0].device)
    assert all(not gradient.masked_select(hidden).any() for gradient in want[-2:])
    for value in (torch.nan, torch.inf, -torch.inf):
        spoilt = [*inputs[:-2], *(t.masked_fill(hidden, value) for t in inputs[-2:])]
        assert all(map(torch.equal, run(call, spoilt), want))


@every_backend
@every([case for case in CASES if case.op not in ("conv_norm", "dropout", "gelu_dropout")])
@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1, 1)))
def test_strides(layout, case, backend):
    """Views are read as they lie; the output lies like the first input."""
    dtype = torch.float16
    contiguous = case.inputs(SMALL, dtype)
    strided = [layouts(t)[layout] if place < 3 else torch.stack([t, t], -1)[..., 0] for place, t in enumerate(contiguous)]
    assert not any(t.is_contiguous() for t in strided)
    assert_close_to_float64(case, backend, strided, SMALL, 4)
    assert_close_to_float64(case, backend, [*strided[:1], *contiguous[1:]], SMALL, 4)
    if layout == "(B, N, H, D)":
        out = case.bind(backend, SMALL)(*(t.to(device_of(backend)) for t in strided))[0]
        assert case.op in ("kv_state", "performer_features") or out.transpose(1, 2).is_contiguous()


@every_backend
@every(CASES)
@pytest.mark.parametrize("size", ["batch", "heads", "queries", "keys", "value_dim"])
def test_empty(size, case, backend):
    if case.op == "conv_norm" and size != "batch":
        pytest.skip("an image has at least one channel")
    if case.label == "residual" and case.op == "nystrom_attention" and size == "keys":
        pytest.skip("the residual needs as many queries as keys")
    sizes = Sizes(**(SMALL.__dict__ | {size: 0}))
    assert_close_to_float64(case, backend, case.inputs(sizes, torch.float32), sizes)
    if size == "keys":
        outs = case.bind(backend, sizes)(*(t.to(device_of(backend)) for t in case.inputs(sizes, torch.float32)))
        assert case.op not in ("linear_attention", "performer_attention") or not outs[0].any()


@and_reference
@every(CASES)
def test_gradcheck(case, backend):
    """Also of second order. With a detached maximum, tests/ops/test_derivatives.py compares with the reference."""
    if not case.smooth:
        pytest.skip("finite differences see the maximum, which is detached")
    if device_of(backend) == "cuda":
        pytest.skip("the GPU kernels take no float64")
    inputs, call = case.inputs(TINY, grad=True), case.bind(backend, TINY, **({"eps": 0.1} if "conv" in case.op else {}))
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradcheck(call, inputs, fast_mode=interpreting())
        assert torch.autograd.gradgradcheck(call, inputs, fast_mode=interpreting())


@every_backend
@every(CASES)
def test_needed_gradients(case, backend):
    """Any subset of the gradients has the bits of all of them, and autograd asks the ops for the subset alone."""
    inputs = [t.to(device_of(backend)) for t in case.inputs(SMALL, torch.float32)]
    call, count = case.bind(backend, SMALL), len(inputs)

    def gradients(needed):
        leaves = [t.detach().clone().requires_grad_(i in needed) for i, t in enumerate(inputs)]
        outs = call(*leaves)
        pairs = [(o, gradient_like(o)) for o in outs if o.requires_grad]
        if pairs:
            torch.autograd.backward(*zip(*pairs, strict=True))
        return [t.grad for t in leaves]

    every_gradient = gradients(range(count))
    assert all(t.isfinite().all() for t in every_gradient)
    for needed in subsets(count) if count < 5 else ((0,), (1,), (4,), (0, 2), (2, 3), (1, 2, 3, 4)):
        with OpCalls() as calls:
            found = gradients(needed)
        for i, (got, want) in enumerate(zip(found, every_gradient, strict=True)):
            same = torch.allclose if case.op == "conv_norm" else torch.equal  # PyTorch's convolution has its own order
            assert same(got, want) if i in needed else got is None
        for op, args in calls.made:
            if op._schema.arguments[-1].name == "needed" and case.op != "nystrom_attention":  # that one is in pieces
                assert sum(args[-1]) <= len(needed)


@every_backend
@every(CASES)
def test_nan_stays_visible_and_in_its_head(case, backend):
    for place in range(len(case.inputs(SMALL))):
        inputs = case.inputs(SMALL, torch.float32)
        if place == 3 or (case.op == "conv_norm" and place):
            continue  # a weight, which every image sees
        inputs[place][0, 0, 2, 1] = torch.nan
        want = case.bind("reference", SMALL)(*(t.double() for t in inputs))
        got = case.bind(backend, SMALL)(*(t.to(device_of(backend)) for t in inputs))
        if case.label.endswith("-key"):  # the reference's maximum spreads it over the head
            assert got[0][0, 0, 2].isnan().all()
            assert got[0][0, 1].isfinite().all()
            continue
        assert any(w.isnan().any() for w in want) or "dropout" in case.op
        assert all(torch.equal(g.isnan().cpu(), w.isnan()) for g, w in zip(got, want, strict=True))


@every_backend
@every(CASES)
def test_same_bits_in_any_batch_and_for_any_threads(case, backend):
    """Repeated, with other numbers of threads, in another layout, and as one image of a batch."""
    sizes = Sizes(3, *list(SMALL.__dict__.values())[1:])
    inputs = [t.to(device_of(backend)) for t in case.inputs(sizes, torch.float32)]
    if case.op == "conv_norm":  # a convolution that is exact in any order
        inputs[:2] = [(2 * inputs[0]).round(), (8 * inputs[1]).round()]
    call = case.bind(backend, sizes)
    first = run(call, inputs)
    per_image = [t.dim() == 4 and len(t) == 3 for t in inputs]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3) if backend == "cpu" else (1,):
            torch.set_num_threads(count)
            same = run(call, inputs)
            places = range(len(first)) if case.op != "conv_norm" else (0,)  # PyTorch's convolution has its own order
            assert all(torch.equal(first[i], same[i]) for i in places)
    finally:
        torch.set_num_threads(threads)
    if "dropout" in case.op:
        return  # its mask belongs to places in the whole batch: test_dropout.py
    alone = run(call, [t[1:2] if mine else t for t, mine in zip(inputs, per_image, strict=True)])
    outs = len(first) - len(inputs)
    for i, (got, want) in enumerate(zip(alone, first, strict=True)):
        if (i < outs or per_image[i - outs]) and (case.op not in ("conv_norm", "nystrom_attention") or i == 0):
            (torch.testing.assert_close if case.op == "nystrom_attention" else assert_equal)(got, want[1:2])


def assert_equal(got, want):
    assert torch.equal(got, want)


@every_backend
@every(CASES)
def test_every_element_is_written(case, backend):
    """Fresh memory is filled with NaN, which shows where a kernel leaves it."""
    inputs = [t.to(device_of(backend)) for t in case.inputs(SMALL, torch.float32)]
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(4).isnan().all()
        assert all(t.isfinite().all() for t in run(case.bind(backend, SMALL), inputs))
    finally:
        torch.use_deterministic_algorithms(False)


class OpCalls(TorchDispatchMode):
    """Records (op, arguments) of the calls of our ops."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace.startswith("cxv_kernels"):
            self.made.append((op, args))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", ["contiguous", "NCHW"])
@every_backend
@every(CASES)
def test_opcheck(case, backend, layout):
    """Every op that a forward and backward pass calls, with the arguments of that call."""
    if layout == "NCHW" and case.op in ("conv_norm", "dropout", "gelu_dropout"):
        pytest.skip("has layouts of its own")
    inputs = case.inputs(Sizes(1, 2, 20, 20, 4, 6, (3, 4)), torch.float32)
    inputs = [layouts(t)["NCHW"] if layout == "NCHW" and len(t) == 1 else t for t in inputs]
    inputs = [t.to(device_of(backend)) for t in inputs]
    masks = {"key_mask": torch.arange(20).view(1, 20).to(inputs[0].device) % 3 > 0} if case.takes_mask else {}
    with OpCalls() as calls:
        for needed in (range(len(inputs)), (0,), (len(inputs) - 1,)):
            leaves = [t.detach().requires_grad_(i in needed) for i, t in enumerate(inputs)]
            outs = case.bind(backend, Sizes(dim=4), **masks)(*leaves)
            outs = [o for o in outs if o.requires_grad]
            torch.autograd.grad(outs, [leaves[i] for i in needed], [gradient_like(o) for o in outs], allow_unused=True)
    assert calls.made
    seen = set()
    for op, args in calls.made:
        key = (str(op), str([a for a in args if not isinstance(a, torch.Tensor)]))
        if key not in seen:
            seen.add(key)
            opcheck(op, tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args))


@and_reference
@every(CASES)
def test_autocast(case, backend):
    """Inputs are cast to bfloat16 together; float64 and the parameters of a norm stay as they are."""
    low = torch.float16 if interpreting() else torch.bfloat16
    inputs = [t.to(device_of(backend)) for t in case.inputs(SMALL, torch.float32)]
    mixed = [inputs[0].to(low), *inputs[1:]]
    call, kept = case.bind(backend, SMALL), 2 if case.op == "conv_norm" else 0
    with torch.autocast(inputs[0].device.type, dtype=low):
        outs = call(*mixed)
        if device_of(backend) == "cpu":
            assert call(*(t.double() for t in inputs))[0].dtype == torch.float64
    exact = [t.to(low).double() if i < len(inputs) - kept else t.double() for i, t in enumerate(inputs)]
    wants = case.bind("reference", SMALL)(*(t.cpu() for t in exact))
    for out, want in zip(outs, wants, strict=True):
        assert out.dtype == (torch.float32 if case.op == "kv_state" else low)
        bound = tolerance(want, low, case.depth(SMALL), 2 * case.amplification)
        assert (out.cpu().double() - want).abs().max() <= bound


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@every_backend
@every(CASES)
def test_compile_without_graph_breaks(case, backend, dynamic):
    """The compiled step has the fused ops, forward and backward, and the eager results; also for other sizes."""
    torch._dynamo.reset()
    ops = []

    def spy(graph, _):
        ops.extend(node.target for node in graph.graph.nodes)
        return make_boxed_func(graph)

    call = case.bind(backend, SMALL)

    def loss(*inputs):
        return sum(out.square().sum() for out in call(inputs[0] * 2, *inputs[1:]))

    compiler = aot_autograd(fw_compiler=spy, bw_compiler=spy)
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=compiler)
    others = [Sizes(3, 2, 41, 29, SMALL.dim, 5, (7, 8))] if dynamic else []
    for sizes in (SMALL, *others):
        inputs = [t.to(device_of(backend)).requires_grad_() for t in case.inputs(sizes, torch.float32)]
        got, want = (torch.autograd.grad(f(*inputs), inputs) for f in (compiled, loss))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    names = {op._schema.name for op in ops if hasattr(op, "_schema")}
    ours = {name for name in names if name.startswith("cxv_kernels")}
    assert len(ours) >= (1 if case.op == "dropout" else 2)


@pytest.mark.slow
@every_backend
@every([case for case in CASES if case.label in ("softmax", "residual", "NCHW", "")])
def test_compile_by_inductor(case, backend):
    if interpreting():
        pytest.skip("Inductor compiles nothing in the interpreter")
    inputs = [t.to(device_of(backend)).requires_grad_() for t in case.inputs(SMALL, torch.float32)]
    call = case.bind(backend, SMALL)

    def loss(*inputs):
        return sum(out.sin().sum() for out in call(*inputs))

    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*inputs), inputs)
    torch.testing.assert_close(got, torch.autograd.grad(loss(*inputs), inputs), rtol=1e-4, atol=1e-4)


@needs_cpp
@every([case for case in CASES if not interpreting()])
def test_export(case):
    """An exported program has the fused ops and the same results."""

    call = case.bind(None, SMALL)

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return call(*inputs)

    inputs = tuple(case.inputs(SMALL, torch.float32))
    program = torch.export.export(Module(), inputs)
    targets = {getattr(node.target, "namespace", "") for node in program.graph.nodes}
    assert "cxv_kernels" in targets
    torch.testing.assert_close(program.module()(*inputs), Module()(*inputs))


@every_backend
@every([case for case in CASES if case.op not in ("performer_features", "kv_state")])
def test_saved_bytes(case, backend):
    """Between forward and backward: the inputs, and a state that does not grow with the number of tokens."""
    found = []
    for factor in (1, 2):
        sizes = Sizes(1, 2, 60 * factor, 60 * factor, 8, 8, (8, 8 * factor))
        inputs = [t.to(device_of(backend)).requires_grad_() for t in case.inputs(sizes, torch.float32)]
        call, outs = case.bind(backend, sizes), []
        saved = saved_bytes(lambda call=call, outs=outs, inputs=inputs: outs.extend(call(*inputs)), inputs)
        found.append(saved.beyond_inputs - (outs[0].nbytes if case.op == "conv_norm" else 0))
    pixels = 8 * 8 * 4  # conv_norm: one float32 per pixel besides its output
    assert found[1] - found[0] == (pixels if case.op == "conv_norm" else 0)
    if case in ATTENTION_CASES:
        reference = saved_bytes(lambda: case.bind("reference", sizes)(*inputs), inputs)
        assert found[1] < reference.beyond_inputs


@every_backend
@every([case for case in CASES if case.op != "conv_norm" and "dropout" not in case.op])
def test_no_copy_of_strided_inputs(case, backend):
    if backend != "cpu":
        pytest.skip("counted on the CPU")
    inputs = [layouts(t)["a chunk of qkv"] if t.dim() == 4 and len(t) == 2 else t for t in case.inputs(SMALL)]
    inputs = [t.float() if t.is_contiguous() else layouts(t.float())["a chunk of qkv"] for t in inputs]
    call = case.bind(backend, SMALL)
    with torch.profiler.profile(record_shapes=True) as profile:
        call(*inputs)
    copied = [e.input_shapes[0] for e in profile.events() if e.name in ("aten::copy_", "aten::clone")]
    assert not [shape for shape in copied if len(shape) == 4 and shape[2] in (SMALL.queries, SMALL.keys)]


def test_backends_of_this_process():
    """This file tests at least one fused backend."""
    assert BACKENDS
