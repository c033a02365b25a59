"""The models as the benchmarks build, check and train them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from common import relative_error
from torch import Tensor, nn

import cxv
from cxv.models.residual import Drop, ResidualBranch
from cxv_kernels import backends, checks

IMAGE_SIZE, CLASSES = 32, 10
TABLE1_GB = {"cpv-5/4": 3.2, "cnv-5/4": 3.1, "cltv-5/4": 1.8}  # "GPU GB" of the paper's Table 1
MODEL_TOLERANCE = 10  # times the op's: five layers deep
MODES = ("eager", "reference", "fused", "checkpointed")
LOW = (torch.float16, torch.bfloat16)  # here the weights stay float32, and autocast is on


def build(name: str, mode: str) -> nn.Module:
    """The model in one of ``MODES``: "eager" is the reference with PyTorch's own dropout in place of the package's."""
    model = cxv.create_model(name, num_classes=CLASSES, use_fused=mode in ("fused", "checkpointed"))
    if mode == "eager":
        use_plain_dropout(model)
    model.set_grad_checkpointing(mode == "checkpointed")
    return model


def use_plain_dropout(model: nn.Module) -> None:
    """Let every branch drop by ``F.dropout``, which draws and keeps a mask, as one writes it without this package."""
    for branch in model.modules():
        if isinstance(branch, ResidualBranch):
            branch._drop = _plain_drops(branch)


def _plain_drops(branch: ResidualBranch) -> Callable[..., Drop]:
    def drop(x: Tensor, residual: Tensor | None = None, gelu: bool = False) -> Tensor:
        x = F.dropout(F.gelu(x) if gelu else x, branch.drop_rate, branch.training)
        return x if residual is None else x + residual

    return lambda *_: drop


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Autocast to ``dtype`` if it has 16 bits."""
    return torch.autocast(device.type, dtype, enabled=dtype in LOW)


def weights_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the parameters and the images of a model that computes in ``dtype``."""
    return torch.float32 if dtype in LOW else dtype


def random_batch(batch: int, side: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Images (batch, 3, side, side) and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, side, side, generator=generator).to(device, weights_dtype(dtype))
    return images, torch.randint(CLASSES, (batch,), generator=generator).to(device)


def loss_of(model: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """The forward pass of training."""
    with autocast(images.device, dtype):
        return F.cross_entropy(model(images), labels)


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, dtype: torch.dtype
) -> None:
    """Forward, backward, update."""
    optimizer.zero_grad()
    loss_of(model, images, labels, dtype).backward()
    optimizer.step()


def train_two_steps(
    make: Callable[[], nn.Module], batch: int, side: int, device: torch.device, dtype: torch.dtype
) -> tuple[Any, ...]:
    """Make a model and take two steps with AdamW; what is alive after a step is returned.

    AdamW allocates its state at the end of the first step, so that one gets a single image, and the second, of the
    whole batch, holds all that every later step does.
    """
    torch.manual_seed(0)
    images, labels = random_batch(batch, side, device, dtype)
    model = make().to(device, images.dtype).train()
    optimizer = torch.optim.AdamW(model.parameters())
    for size in (1, batch):
        step(model, optimizer, images[:size], labels[:size], dtype)
    return model, optimizer, images, labels


@contextmanager
def served_ops() -> Iterator[dict[str, str]]:
    """In the block, fill a dict with the backend that serves each op called."""
    served: dict[str, str] = {}
    resolve = backends.resolve

    def record(op: str, *arguments: Any, **options: Any) -> str:
        served[op] = resolve(op, *arguments, **options)
        return served[op]

    backends.resolve = record
    try:
        yield served
    finally:
        backends.resolve = resolve


def check_model(
    name: str, device: torch.device, dtype: torch.dtype, side: int = IMAGE_SIZE
) -> tuple[dict[str, str], float | None]:
    """What serves the fused model's ops, and the error of its logits, for two images, against the reference in float64.

    No error where the reference serves them all.
    """
    images, _ = random_batch(2, side, device, torch.float32)

    def model(use_fused: bool, dtype: torch.dtype) -> nn.Module:
        torch.manual_seed(0)
        return cxv.create_model(name, use_fused=use_fused).to(device, dtype).eval()

    with torch.no_grad(), checks.without_tf32():
        with served_ops() as served, autocast(device, dtype):
            logits = model(True, weights_dtype(dtype))(images.to(weights_dtype(dtype)))
        if set(served.values()) == {"reference"}:
            return served, None
        return served, relative_error([logits], [model(False, torch.float64)(images.double())])
