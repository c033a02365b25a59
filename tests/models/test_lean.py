"""What training keeps and needs, as a contract: bytes kept for backward, peaks, and no copies between the ops."""

import gc

import memory_breakdown
import pytest
import torch
from conftest import needs_cpp
from memory_breakdown import LOW, autocast, build, loss_of, random_batch
from torch.profiler import ProfilerActivity, profile

import cxv
from cxv.models.blocks import CHUNK_TOKENS
from cxv_kernels.testing import peak_memory

pytestmark = needs_cpp
NAMES = ("cpv-5/4", "cnv-5/4", "cltv-5/4")
MODES = ("fused", "checkpointed")
DTYPES = (torch.bfloat16, torch.float32)
CHANNELS = 128
KEPT_MB = {"cpv-5/4": 150, "cnv-5/4": 170, "cltv-5/4": 150}  # batch 32, bfloat16
CHECKPOINTED_MB = 60
PEAK_GB = {
    (torch.bfloat16, "fused"): 0.20,
    (torch.bfloat16, "checkpointed"): 0.12,
    (torch.float32, "fused"): 0.40,
    (torch.float32, "checkpointed"): 0.22,
}


def ledger(name, mode, dtype, batch=2, side=32):
    """The measured memory breakdown and the predicted sum."""
    model = build(name, mode).train()
    images, labels = random_batch(batch, side, dtype)
    loss_of(model, images[:1], labels[:1], dtype)
    found = memory_breakdown.measured(model, images, labels, dtype)
    return found, memory_breakdown.predicted(model, images, dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_bytes_kept_for_backward(name, mode):
    found, _ = ledger(name, mode, torch.bfloat16, batch=32)
    assert found.allocated <= (KEPT_MB[name] if mode == "fused" else CHECKPOINTED_MB) * 1e6
    assert found.total == pytest.approx(found.allocated, rel=0.02)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_kept_is_what_the_shapes_foretell(name, mode, dtype):
    found, foretold = ledger(name, mode, dtype)
    assert sum(foretold.values()) == pytest.approx(found.allocated, rel=0.02)
    exact = {kind: nbytes for kind, nbytes in foretold.items() if kind != memory_breakdown.OTHER}
    assert exact == {kind: nbytes for kind, nbytes in found.kinds.items() if kind != memory_breakdown.OTHER}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NAMES)
def test_kept_is_linear_in_pixels(name, mode):
    one, two, wide = (ledger(name, mode, torch.bfloat16, *size)[0].allocated for size in ((1, 32), (2, 32), (1, 64)))
    assert (wide - one) / 3 == pytest.approx(two - one, rel=0.02)


def two_steps(name, mode, dtype):
    """Two training steps of batch 32 with AdamW, which allocates its state in the first, with one image."""
    images, labels = random_batch(32, 32, dtype)
    model = build(name, mode).to(images.dtype).train()
    optimizer = torch.optim.AdamW(model.parameters())
    for count in (1, 32):
        optimizer.zero_grad()
        loss_of(model, images[:count], labels[:count], dtype).backward()
        optimizer.step()
    return model, optimizer, images, labels


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "mode"), PEAK_GB, ids=str)
def test_peak_of_a_training_step(dtype, mode):
    gc.collect()
    assert peak_memory(lambda: two_steps("cpv-5/4", mode, dtype)).peak <= PEAK_GB[dtype, mode] * 1e9


def copies(run, least):
    """(shape, strides from, strides to) of what aten::copy_ moves: no conversion, no broadcast, ``least`` elements."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as recorded:
        run()
    found, pending = [], list(recorded.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.name != "aten::copy_":
            continue
        to, source = event.extra_fields.inputs[:2]
        expanded = any(stride == 0 and size > 1 for size, stride in zip(source.sizes, source.strides, strict=True))
        whole = not expanded and torch.Size(source.sizes).numel() >= least
        if whole and to.dtype == source.dtype:
            found.append((tuple(to.sizes), tuple(source.strides), tuple(to.strides)))
    return found


def test_copies_are_found():
    x = torch.zeros(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    assert copies(x.contiguous, 256) == [((2, 8, 4, 4), (128, 1, 32, 8), (128, 16, 4, 1))]
    assert copies(lambda: (x.bfloat16(), x[:1].contiguous(), x + x[:, :1], x[:, :1].expand_as(x).clone()), 256) == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["cpv-2/2", "cnv-2/2", "cltv-2/2"])
def test_no_activation_is_copied(name, dtype):
    """From the stem to the head and back: convolution, norm, attention and MLP hand on what they have.

    What PyTorch's linear maps do is no such copy: some begin with the bias, broadcast into the result.
    """
    model = cxv.create_model(name, use_fused=True).train()
    images, labels = random_batch(16, 32, dtype)
    images = images.contiguous(memory_format=torch.channels_last)
    run = lambda: loss_of(model, images, labels, dtype).backward()  # noqa: E731
    assert copies(run, CHUNK_TOKENS * CHANNELS // 2) == []


def inference(name, dtype, batch=32):
    """The peak beyond weights and images, what tensors (B, C, H, W) take, and a chunk's worth, in bytes."""
    model = build(name, "fused").eval()
    images, _ = random_batch(batch, 32, dtype)

    def run():
        with torch.no_grad(), autocast(dtype):
            return model(images)

    run()
    pixel = CHANNELS * dtype.itemsize
    # the MLP's hidden layer, twice as wide, before and after GELU; its output, and that with x added
    chunk = 6 * CHUNK_TOKENS * pixel
    weights = sum(p.numel() for p in model.parameters()) * dtype.itemsize if dtype in LOW else 0
    return peak_memory(run).peak, batch * 32 * 32 * pixel, chunk + weights


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_inference_takes_two_tensors_and_a_chunk(name, dtype):
    """A layer's input, which its caller holds, and the norm's output, which attention and MLP write over."""
    peak, tensor, chunk = inference(name, dtype)
    assert peak <= 2 * tensor + chunk
