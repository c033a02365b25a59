"""Every op on every backend as a part of PyTorch: opcheck, autocast, compile, export, and no hidden copies."""

import pytest
import torch
from cases import (
    CASES,
    NYSTROM,
    ONE_PER_OP,
    PERFORMER,
    SMALL,
    TRACED,
    VARIED,
    OpCalls,
    Sizes,
    and_reference,
    device_of,
    every,
    every_backend,
    gradient_like,
    name_of,
    run,
)
from conftest import layouts, needs_cpp
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.library import opcheck

from cxv_kernels._triton import interpreting
from cxv_kernels.testing import tolerance

SOME = [*ONE_PER_OP, NYSTROM[1]]
# In Triton's interpreter, an op whose results have shapes of their own there, and one in pieces.
COMPILED = [PERFORMER[0], NYSTROM[1]] if interpreting() else TRACED


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, torch.float16) for case in SOME), *((case, torch.float32) for case in TRACED if not interpreting())],
    ids=name_of,
)
@every_backend
def test_opcheck(case, backend, dtype):
    """Every op that a forward and backward pass calls, with the arguments of that call; in float16, where state and
    statistics have another dtype, of strided inputs."""
    inputs = case.inputs(Sizes(1, 2, 20, 20, 4, 6, (3, 4)), dtype)
    if dtype == torch.float16 and case.op not in ("conv_norm", "dropout", "gelu_dropout"):  # which have their own
        inputs = [layouts(t)["NCHW"] if len(t) == 1 else t for t in inputs]
    inputs = [t.to(device_of(backend)) for t in inputs]
    masks = {"key_mask": torch.arange(20).view(1, 20).to(inputs[0].device) % 3 > 0} if case.takes_mask else {}
    with OpCalls() as calls:
        some = [(0,), (len(inputs) - 1,)] if case in ONE_PER_OP and dtype == torch.float32 else []
        for needed in (range(len(inputs)), *some):
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
@every(VARIED)
def test_autocast(case, backend):
    """Inputs are cast to bfloat16 together; float64 and the parameters of a norm stay as they are."""
    low = torch.float16 if interpreting() else torch.bfloat16
    inputs = [t.to(device_of(backend)) for t in case.inputs(SMALL, torch.float32)]
    mixed = [t.requires_grad_() for t in (inputs[0].to(low), *inputs[1:])]
    call, kept = case.bind(backend, SMALL), 2 if case.op == "conv_norm" else 0
    with torch.autocast(inputs[0].device.type, dtype=low):
        outs = call(*mixed)
        if device_of(backend) == "cpu":
            assert call(*(t.double() for t in inputs))[0].dtype == torch.float64
    exact = [t.to(low).double() if i < len(inputs) - kept else t.double() for i, t in enumerate(inputs)]
    wants = case.bind("reference", SMALL)(*(t.detach().cpu() for t in exact))
    for out, want in zip(outs, wants, strict=True):
        assert out.dtype == (torch.float32 if case.op == "kv_state" else low)
        bound = tolerance(want.detach(), low, case.depth(SMALL), 2 * case.amplification)
        assert (out.cpu().double() - want).abs().max() <= bound
    outs = [out for out in outs if out.requires_grad]
    gradients = torch.autograd.grad(outs, mixed, [gradient_like(out) for out in outs])
    assert [g.dtype for g in gradients] == [t.dtype for t in mixed]


@every_backend
@every(COMPILED)
def test_compile_without_graph_breaks(case, backend):
    """The compiled step has the fused ops, forward and backward, and the eager results; one case of each op also for
    other sizes, and for some inputs without a gradient."""
    torch._dynamo.reset()
    ops, dynamic = [], case in ONE_PER_OP

    def spy(graph, _):
        ops.extend(node.target for node in graph.graph.nodes)
        return make_boxed_func(graph)

    call = case.bind(backend, SMALL)

    def loss(*inputs):
        return sum(out.square().sum() for out in call(inputs[0] * 2, *inputs[1:]))

    compiler = aot_autograd(fw_compiler=spy, bw_compiler=spy)
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend=compiler)
    batch = 1 if SMALL.batch == 1 else 3  # from 1 to another batch PyTorch compiles again
    others = [Sizes(batch, 3, 41, 29, SMALL.dim, 5, (7, 8))] if dynamic else []
    for sizes in (SMALL, *others):
        inputs = [t.to(device_of(backend)).requires_grad_() for t in case.inputs(sizes, torch.float32)]
        got, want = (torch.autograd.grad(f(*inputs), inputs) for f in (compiled, loss))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    if dynamic:
        inputs = [t.detach().requires_grad_(i == len(inputs) - 1) for i, t in enumerate(inputs)]
        got, want = (torch.autograd.grad(f(*inputs), inputs[-1]) for f in (compiled, loss))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    with OpCalls() as eager:
        torch.autograd.grad(loss(*inputs), [t for t in inputs if t.requires_grad])
    assert {op for op, _ in eager.made} <= set(ops)


@pytest.mark.slow
@every_backend
def test_compile_by_inductor(backend):
    """All ops in one graph, which takes one compilation, with a kernel of Inductor's own before and after one of them.

    More of these kernels, one for each shape and dtype, would take a second each.
    """
    if interpreting():
        pytest.skip("Inductor compiles nothing in the interpreter")
    calls, places, inputs = [], [], []
    for case in ONE_PER_OP:
        if case.support(backend) == "supported":
            calls.append(case.bind(backend, SMALL))
            start = len(inputs)
            inputs += [t.to(device_of(backend)) for t in case.inputs(SMALL, torch.float32)]
            places.append(slice(start, len(inputs)))

    def results(*inputs):
        first, *outs = (out for call, place in zip(calls, places, strict=True) for out in call(*inputs[place]))
        return first.sin(), *outs

    got = run(torch.compile(results, fullgraph=True), inputs)
    torch.testing.assert_close(got, run(results, inputs), rtol=1e-4, atol=1e-4)


@needs_cpp
@every([case for case in CASES if not interpreting()])
def test_export(case):
    """An exported program has the fused ops, and the same results and gradients."""

    call = case.bind(None, SMALL)

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return call(*inputs)

    inputs = tuple(case.inputs(SMALL, torch.float32))
    program = torch.export.export(Module(), inputs)
    targets = {getattr(node.target, "namespace", "") for node in program.graph.nodes}
    assert "cxv_kernels" in targets
    torch.testing.assert_close(program.module()(*inputs), Module()(*inputs))
    torch.testing.assert_close(run(program.module(), inputs), run(Module(), inputs))


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
