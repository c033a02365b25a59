"""What training saves and needs, as a contract: bytes saved for backward, peaks, and no copies between the ops."""

import gc

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_cpp
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import cxv
from cxv.models.blocks import CHUNK_TOKENS
from cxv_kernels.testing import peak_memory, saved_bytes

pytestmark = needs_cpp
NAMES = ("cpv-5/4", "cnv-5/4", "cltv-5/4")
MODES = ("fused", "checkpointed")
DTYPES = (torch.bfloat16, torch.float32)  # bfloat16 under autocast, with the weights in float32
CHANNELS = 128
KEPT_MB = {"cpv-5/4": 150, "cnv-5/4": 170, "cltv-5/4": 150}  # batch 32, bfloat16
CHECKPOINTED_MB = 60
PEAKS_MB = [  # dtype, mode, batch 8
    (torch.bfloat16, "fused", 67),
    (torch.bfloat16, "checkpointed", 50),
    (torch.float32, "fused", 116),
    (torch.float32, "checkpointed", 82),
]


def build(name: str, mode: str) -> nn.Module:
    """The fused model, or the fused model with gradient checkpointing (``"checkpointed"``)."""
    torch.manual_seed(0)
    model = cxv.create_model(name, use_fused=True)
    model.set_grad_checkpointing(mode == "checkpointed")
    return model


def random_batch(batch: int, side: int = 32) -> tuple[Tensor, Tensor]:
    """Images (batch, 3, side, side) and labels."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, side, side, generator=generator), torch.randint(10, (batch,), generator=generator)


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)


def loss_of(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """The forward pass of a training step."""
    with autocast(dtype):
        return F.cross_entropy(model(images), labels)


def measured(name: str, mode: str, dtype: torch.dtype, *size: int) -> tuple[int, int, int]:
    """The bytes of the tensors that autograd saves, of all that the allocator holds, and as the shapes foretell."""
    model, (images, labels) = build(name, mode).train(), random_batch(*size)
    loss_of(model, images[:1], labels[:1], dtype)  # the first call may allocate what stays

    def run() -> Tensor:
        return loss_of(model, images, labels, dtype)

    saved = saved_bytes(run, (*model.parameters(), *model.buffers(), images, labels)).beyond_inputs
    return saved, peak_memory(run).kept, predicted(model, images, dtype)


def predicted(model: cxv.CXV, images: Tensor, dtype: torch.dtype) -> int:
    """The bytes saved by a fused model, from the shapes.

    Of a layer: what conv_norm reads and writes (which attention reads), what the MLP reads, and one number per pixel;
    under ``set_grad_checkpointing`` what the layer reads, alone.
    """
    batch, _, height, width = images.shape
    channels, depth, size, pixels = model.embed_dim, len(model.layers), dtype.itemsize, batch * height * width
    total = images.numel() * size + pixels * (channels // 4) * size  # the image converted, the stem's first output
    total += pixels * (channels // 2 + (depth - 1) * channels) * size  # the inputs of the layers
    # the pooled features, log-softmax, and what the loss divides by; the last two are float32
    total += batch * channels * size + (batch * model.num_classes + 1) * 4
    if not model.grad_checkpointing:
        branches = [branch for layer in model.layers for branch in (layer.attn, layer.mlp)]
        total += 2 * depth * pixels * channels * size + depth * pixels * 4
        total += sum(8 * branch.num_dropouts for branch in branches if branch.drop_rate)  # the seeds
    if dtype != torch.float32:
        total += sum(w.numel() for w in (model.stem[0].weight, model.stem[1].weight, model.head.weight)) * size
    return total


@pytest.mark.parametrize(("name", "mode"), [("cpv-5/4", "fused"), ("cnv-5/4", "fused"), ("cltv-5/4", "checkpointed")])
def test_bytes_kept_for_backward(name, mode):
    saved, allocated, _ = measured(name, mode, torch.bfloat16, 32)
    assert allocated <= (KEPT_MB[name] if mode == "fused" else CHECKPOINTED_MB) * 1e6
    assert saved == pytest.approx(allocated, rel=0.02)


@pytest.mark.parametrize(
    ("name", "mode", "dtype"), [(n, m, DTYPES[(i + j) % 2]) for i, n in enumerate(NAMES) for j, m in enumerate(MODES)]
)
def test_saved_is_what_the_shapes_foretell(name, mode, dtype):
    """To the byte. The allocator also counts the random states of a checkpoint."""
    saved, allocated, foretold = measured(name, mode, dtype, 2)
    assert saved == foretold
    assert allocated == pytest.approx(foretold, rel=0.02)


@pytest.mark.parametrize(
    ("name", "mode"), [("cpv-5/4", "checkpointed"), ("cnv-5/4", "fused"), ("cltv-5/4", "checkpointed")]
)
def test_kept_is_linear_in_pixels(name, mode):
    one, two, wide = (measured(name, mode, torch.bfloat16, *size)[1] for size in ((1, 32), (2, 32), (1, 64)))
    assert (wide - one) / 3 == pytest.approx(two - one, rel=0.02)


def two_steps(name, mode, dtype, batch):
    """Two training steps with AdamW, which allocates its state in the first, with one image."""
    images, labels = random_batch(batch)
    model = build(name, mode).train()
    optimizer = torch.optim.AdamW(model.parameters())
    for count in (1, batch):
        optimizer.zero_grad()
        loss_of(model, images[:count], labels[:count], dtype).backward()
        optimizer.step()
    return model, optimizer, images, labels


@pytest.mark.parametrize(("dtype", "mode", "limit"), PEAKS_MB, ids=str)
def test_peak_of_a_training_step(dtype, mode, limit):
    gc.collect()
    assert peak_memory(lambda: two_steps("cpv-5/4", mode, dtype, 8)).peak <= limit * 1e6


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
    images, labels = random_batch(16)
    images = images.contiguous(memory_format=torch.channels_last)
    run = lambda: loss_of(model, images, labels, dtype).backward()  # noqa: E731
    assert copies(run, CHUNK_TOKENS * CHANNELS // 2) == []


def inference(name, dtype, batch=32):
    """The peak beyond weights and images, what tensors (B, C, H, W) take, and a chunk's worth, in bytes."""
    model = build(name, "fused").eval()
    images, _ = random_batch(batch)

    def run(count=batch):
        with torch.no_grad(), autocast(dtype):
            return model(images[:count])

    run(1)  # the first call may allocate what stays
    pixel = CHANNELS * dtype.itemsize
    # the MLP's hidden layer, twice as wide, before and after GELU; its output, and that with x added
    chunk = 6 * CHUNK_TOKENS * pixel
    weights = sum(p.numel() for p in model.parameters()) * dtype.itemsize if dtype != torch.float32 else 0
    return peak_memory(run).peak, batch * 32 * 32 * pixel, chunk + weights


@pytest.mark.parametrize(("name", "dtype"), [(NAMES[0], DTYPES[0]), (NAMES[1], DTYPES[1]), (NAMES[2], DTYPES[0])])
def test_inference_takes_two_tensors_and_a_chunk(name, dtype):
    """A layer's input, which its caller holds, and the norm's output, which attention and MLP write over."""
    peak, tensor, chunk = inference(name, dtype)
    assert peak <= 2 * tensor + chunk
