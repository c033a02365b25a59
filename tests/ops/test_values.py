"""The results of every op on every backend: right, finite, and the same bits wherever the inputs lie."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from cases import (
    ATTENTION_CASES,
    CASES,
    LINEAR_FAMILY,
    MASKED,
    SIZES,
    SMALL,
    VARIED,
    Sizes,
    assert_close_to_float64,
    device_of,
    every,
    every_backend,
    mask_of,
    poisoned_memory,
    run,
    threads,
    with_dtypes,
)
from conftest import layouts, needs_cpp

from cxv_kernels._triton import interpreting


@pytest.mark.parametrize("sizes", [name for name in SIZES if not (interpreting() and name in ("long", "wide"))])
@with_dtypes
@every(CASES)
def test_matches_float64(case, backend, dtype, sizes):
    sizes = SIZES[sizes]
    if backend != "cpu" and sizes == SIZES["wide"]:
        pytest.skip("heads of more than 64 or 128 channels are the reference's")
    if interpreting() and sizes == SIZES["power-of-two"] and dtype != torch.float16:
        pytest.skip("takes long in Triton's interpreter; float16 has tensor cores")
    # conv_norm: of few channels little more than the rounding of the deviation is left, over √eps
    few = case.op == "conv_norm" and sizes == SIZES["one"]
    if str(case) == "kv_state-softmax" and sizes == SIZES["one"] and dtype == torch.float16 and backend == "cuda":
        pytest.skip("of one key the gradient is 0, a difference of equal terms that tensor cores take in float16")
    assert_close_to_float64(case, backend, case.inputs(sizes, dtype), sizes, 1e5**0.5 if few else 1)


@with_dtypes
@every(MASKED)
def test_key_mask(case, backend, dtype):
    """Hidden keys have no influence and no gradient, whatever they hold; without a key there are zeros."""
    inputs, mask = case.inputs(SMALL, dtype), mask_of(SMALL)
    mask = torch.stack([mask, ~mask], -1)[..., 0]  # strided
    assert_close_to_float64(case, backend, inputs, SMALL, 4, key_mask=mask)
    inputs = [t.to(device_of(backend)) for t in inputs]
    hidden = ~mask[:, None, :, None].to(inputs[0].device)
    for computed_by in (backend, *(["reference"] if (backend, dtype) == ("cpu", torch.float32) else [])):
        call = case.bind(computed_by, SMALL, key_mask=mask)
        want = run(call, inputs)
        assert all(not gradient.masked_select(hidden).any() for gradient in want[-2:])
        for value in (torch.nan, torch.inf, -torch.inf) if (backend, dtype) == ("cpu", torch.float32) else (torch.nan,):
            spoilt = [*inputs[:-2], *(t.masked_fill(hidden, value) for t in inputs[-2:])]
            assert all(map(torch.equal, run(call, spoilt), want))
        call = case.bind(computed_by, SMALL, key_mask=torch.zeros_like(mask))
        assert not any(t.any() for t in run(call, inputs))


@every_backend
@every([case for case in VARIED if case.op not in ("conv_norm", "dropout", "gelu_dropout")])
@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1, 1, 1)))
def test_strides(layout, case, backend):
    """Views are read as they lie; the output lies like the first input, unless PyTorch's own attention makes it."""
    whole = SIZES["power-of-two"]  # its rows fill vectors
    calls = [(SMALL, torch.float16), *([(SMALL, torch.bfloat16), (whole, torch.float32)] if backend == "cpu" else [])]
    for sizes, dtype in calls:
        contiguous = case.inputs(sizes, dtype)
        strided = [layouts(t)[layout] if i < 3 else torch.stack([t, t], -1)[..., 0] for i, t in enumerate(contiguous)]
        assert not any(t.is_contiguous() for t in strided) or sizes.batch == 1
        assert_close_to_float64(case, backend, strided, sizes, 4)
        if not interpreting() or layout == "NCHW":
            assert_close_to_float64(case, backend, [*strided[:1], *contiguous[1:]], sizes, 4)
    if layout == "(B, N, H, D)":
        out = case.bind(backend, sizes)(*(t.to(device_of(backend)) for t in strided))[0]
        others = ("kv_state", "performer_features", *(["nystrom_attention"] if backend == "triton" else []))
        assert case.op in others or out.transpose(1, 2).is_contiguous()


@every_backend
@every(CASES)
@pytest.mark.parametrize("size", ["batch", "heads", "queries", "keys", "value_dim"])
def test_empty(size, case, backend):
    if case.op == "conv_norm" and size != "batch":
        pytest.skip("an image has at least one channel")
    if case.label == "residual" and case.op == "nystrom_attention" and size == "keys":
        pytest.skip("the residual needs as many queries as keys")
    sizes = Sizes(**(SMALL.__dict__ | {size: 0}))
    outs = assert_close_to_float64(case, backend, case.inputs(sizes, torch.float32), sizes)
    if size == "keys":
        assert case not in ATTENTION_CASES or not outs[0].any()


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
        if case in ATTENTION_CASES:
            wants = run(case.bind("reference", SMALL), [t.double() for t in inputs])
            gots = run(case.bind(backend, SMALL), [t.to(device_of(backend)) for t in inputs])
            assert case not in LINEAR_FAMILY or [g.isnan().any() for g in gots] == [w.isnan().any() for w in wants]
            assert all(t[0, 1].isfinite().all() for t in gots[:4])


@every_backend
@every(VARIED)
def test_same_bits_in_any_batch_and_for_any_threads(case, backend):
    """Repeated, with other numbers of threads, and as one image of a batch; tests/ops/test_triton_attention.py has
    several splits."""
    sizes = Sizes(3, *list((SIZES["long"] if backend == "cpu" else SMALL).__dict__.values())[1:])
    inputs = [t.to(device_of(backend)) for t in case.inputs(sizes, torch.float32)]
    if case.op == "conv_norm":  # a convolution that is exact in any order
        inputs[:2] = [(2 * inputs[0]).round(), (8 * inputs[1]).round()]
    call = case.bind(backend, sizes)
    first = run(call, inputs)
    per_image = [t.dim() == 4 and len(t) == 3 for t in inputs]
    by_sdpa = case.op == "nystrom_attention" and backend != "cpu"
    for count in (1, 2, 3) if backend == "cpu" else (1,):
        with threads(count):
            same = run(call, inputs)
        # PyTorch's convolution has its own order, on a GPU so does the backward pass of its attention
        places = (0,) if case.op == "conv_norm" or by_sdpa else range(len(first))
        assert all(torch.equal(first[i], same[i]) for i in places)
    if "dropout" in case.op:
        return  # its mask belongs to places in the whole batch: test_dropout.py
    alone = run(call, [t[1:2] if mine else t for t, mine in zip(inputs, per_image, strict=True)])
    outs = len(first) - len(inputs)
    for i, (got, want) in enumerate(zip(alone, first, strict=True)):
        if i < outs or (per_image[i - outs] and case.op != "conv_norm"):
            torch.testing.assert_close(got, want[1:2], **({} if by_sdpa else {"rtol": 0, "atol": 0}))


@every_backend
@every(VARIED)
def test_every_element_is_written(case, backend):
    for sizes in [SMALL] if backend != "cpu" else [SMALL, SIZES["one"], SIZES["power-of-two"]]:
        inputs = [t.to(device_of(backend)) for t in case.inputs(sizes, torch.float32)]
        with poisoned_memory():
            assert all(t.isfinite().all() for t in run(case.bind(backend, sizes), inputs))


@needs_cpp
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_every_instruction_set(isa):
    """The narrower kernels, chosen by the environment, in a process of their own."""
    code = (
        "import torch, cxv_kernels.library as e, cxv_kernels.testing as c\n"
        "print(e.build_info()['cpu_isa'])\n"
        "from cxv_kernels.dispatch import explain_backend\n"
        "for case in c.cases(dim=19):\n"
        "    for dtype in c.FLOAT_DTYPES:\n"
        "        if explain_backend(case.op)['cpu'] == 'supported':\n"
        "            assert c.run(case, 'cpu', 'cpu', dtype).passed, (case, dtype)\n"
        "x = torch.linspace(-87.3, 0, 100_000).reshape(1, 100, 1, 1000)\n"
        "_, z = c.kv_state(x, torch.ones(1, 100, 1, 1), 'elu', backend='cpu')\n"
        "assert (z.double() / x[:, :, 0].double().exp() - 1).abs().max() < 2 * 2**-23\n"
    )
    environment = os.environ | {"CXV_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] in (isa, "baseline")


@needs_cpp
@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere there is one instruction set")
def test_unknown_instruction_set():
    command = [sys.executable, "-c", "import cxv_kernels.library as e; e.build_info()"]
    environment = os.environ | {"CXV_CPU_ISA": "avx51"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "CXV_CPU_ISA must be baseline, avx2 or avx512, got avx51" in done.stderr
