"""One epoch of training, evaluation and prediction."""

import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import WeightedRandomSampler

from cxv_kernels.validation import to_number

from ..checkpoint import LAST
from ..data.augment import Augmentation, BatchMix, image_size_of, resize_batch
from ..data.loader import Data, ImageSet, batches
from ..data.progress import Progress
from ..errors import InputError
from ..models.blocks import ResidualBranch
from .config import NAMES, PRECISIONS, TrainConfig
from .distributed import RemoteError, World
from .dualopt import DualOpT
from .interrupt import interruptible

_FLUSH_EVERY = 16  # batches between two reads of the loss: each read makes a GPU wait


@dataclass
class EpochState:
    """The progress of an epoch, from which a checkpoint continues after the last complete step.

    ``sampler`` is the state of the sampler's generator before the epoch, and ``lr`` the rate of the first step. The
    sums are over ``seen`` images. ``skipped`` counts the steps that were skipped after an fp16 overflow.
    """

    sampler: Tensor
    lr: float
    step: int = 0
    loss_sum: float = 0.0
    hits: int = 0
    seen: int = 0
    skipped: int = 0


@dataclass
class Engine:
    """Train a model for one epoch at a time and evaluate it.

    Every step steps ``scheduler`` and updates ``average``. If there is an average, its weights are evaluated.
    ``augment`` and ``mix`` can be changed between epochs. ``frozen`` modules stay in ``eval()`` mode. After
    ``deadline``, a time of ``time.monotonic``, the next step raises :class:`cxv.training.interrupt.OutOfTimeError`.
    """

    model: nn.Module
    data: Data
    opt: DualOpT
    config: TrainConfig
    device: torch.device
    autocast: Callable[[], AbstractContextManager]
    world: World
    average: AveragedModel | None = None
    scheduler: LRScheduler | None = None
    augment: Augmentation | None = None
    mix: BatchMix | None = None
    frozen: Sequence[nn.Module] = ()
    deadline: float = math.inf

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.config.precision == "fp16")
        self.sampler = torch.Generator().manual_seed(self.config.seed)
        self.evaluated = self.model if self.average is None else self.average.module
        self._parallel = self.world.wrap(self.model)
        self._branches = [module for module in self.model.modules() if isinstance(module, ResidualBranch)]
        self._step_size = self.config.batch_size * self.config.accumulate  # images
        self._num_steps = math.ceil(len(self.data.train) / self._step_size)
        labels = self.data.train.labels
        counts = labels.bincount(minlength=len(self.data.classes)).clamp(min=1)
        self._image_weights = (1 / counts)[labels].cpu()  # of balanced sampling
        balanced = (len(labels) / (len(counts) * counts)).to(self.device)  # the mean over all images is 1
        self._class_weights = balanced if self.config.class_weights == "balanced" else None
        self._state: EpochState | None = None
        # (this process's loss and hits, every process's images) of the batches since the last flush
        self._pending: list[tuple[Tensor, Tensor, int]] = []

    @property
    def _epoch(self) -> int:
        """The present epoch, or the last one while no epoch runs."""
        return self.opt.epoch + (self._state is not None)

    @property
    def resume_state(self) -> dict[str, Any] | None:
        """What :meth:`train_one_epoch` needs to continue the present epoch; None while no epoch runs."""
        if self._state is None:
            return None
        self.flush_metrics()
        return asdict(self._state)

    def train_one_epoch(self, resume_state: dict[str, Any] | None = None) -> dict[str, Any]:
        """Train for an epoch, or continue the one of ``resume_state``, and evaluate.

        Returns:
            A line of ``metrics.jsonl``.
        """
        start, phase, total = time.perf_counter(), self.opt.phase, len(self.data.train)
        begin = {"lr": self.opt.param_groups[0]["lr"], "sampler": self.sampler.get_state()}
        state = self._state = EpochState(**begin | (resume_state or {}))
        epoch, done = self._epoch, state.seen
        size = image_size_of(self.config.progressive, epoch)
        self._pending.clear()
        self._train_steps(size)
        train_seconds = time.perf_counter() - start
        for model in dict.fromkeys((self.model, self.evaluated)):
            self.world.broadcast_buffers(model)
        scores = self.evaluate_split("test" if self.data.validation is None else "validation")
        self._state = None
        return {
            "epoch": epoch,
            "phase": phase,
            "augmented": self.augment is not None and self.config.rand_augment is not None,
            **({} if size is None else {"img_size": size}),
            "lr": state.lr,
            "train_loss": state.loss_sum / total,
            "train_top1": 100 * state.hits / total,
            **scores,
            "skipped_steps": state.skipped,
            "images_per_second": (total - done) / train_seconds,
            "seconds": time.perf_counter() - start,
        }

    def evaluate_split(self, name: str) -> dict[str, float]:
        """Return ``NAME_loss`` and ``NAME_top1`` (per cent) of a split."""
        split = self.data.splits[name]
        loss, top1 = evaluate(self.evaluated, split, self.config.batch_size, self.device, self.autocast, self.world)
        if not math.isfinite(loss):  # the last step of an epoch can break weights whose loss was finite
            steps = self._num_steps
            self._diverged(f"the {name} loss is {loss} at epoch {self._epoch}, after batch {steps} of {steps}")
        return {f"{name}_loss": loss, f"{name}_top1": top1}

    def flush_metrics(self) -> None:
        """Add up the losses since the last flush, which makes a GPU wait. Raise ``InputError`` if one is not finite."""
        if not self._pending:
            return
        losses, hits, counts = zip(*self._pending, strict=True)
        self._pending.clear()
        state = self._state
        sums = self.world.sum(torch.stack([torch.stack(losses).double(), torch.stack(hits).double()]))
        for loss, hit, n in zip(*sums.tolist(), counts, strict=True):
            if not math.isfinite(loss):
                batch = state.seen // self._step_size + 1
                self._diverged(f"the loss is {loss / n} at epoch {self._epoch}, batch {batch} of {self._num_steps}")
            state.loss_sum, state.hits, state.seen = state.loss_sum + loss, state.hits + int(hit), state.seen + n

    def _train_steps(self, size: int | None) -> None:
        """Run the epoch's remaining steps, on images of ``size`` pixels or, for None, of the data's."""
        state, total = self._state, len(self.data.train)
        images, sampler = self.data.train, self.sampler
        if self.config.balanced_sampling:  # an image that is drawn twice is augmented in two ways
            order = WeightedRandomSampler(self._image_weights, total, generator=sampler)
            images, sampler = images.subset(torch.tensor(list(order))), None
        source = batches(
            images,
            self._step_size,
            self.device,
            sampler,
            augment=self.augment,
            epoch=self._epoch,
            skip=state.step,
            shard=_shard(self.world, self.config.batch_size),
        )
        self.model.train()
        for module in self.frozen:
            module.eval()
        label = f"epoch {self._epoch} {NAMES[self.opt.phase]}"
        with Progress(total, label, enabled=self.world.is_main, done=state.seen) as progress:
            for x, y in interruptible(source, self.world.max, self.deadline):
                num_images = min(self._step_size, total - state.step * self._step_size)
                self._train_step(x if size is None else resize_batch(x, size), y, num_images)
                state.step += 1
                shown = {}
                if state.step % _FLUSH_EVERY == 0 or state.step == self._num_steps:
                    self.flush_metrics()
                    top1 = 100 * state.hits / state.seen
                    shown = {"loss": f"{state.loss_sum / state.seen:.4f}", "top-1": f"{top1:.1f} %"}
                progress.update(num_images, **shown)

    def _train_step(self, images: Tensor, labels: Tensor, total: int) -> None:
        """Make one step of the optimizer from ``accumulate`` batches of ``total`` images over all processes."""
        self.opt.zero_grad()
        size, world = self.config.batch_size, self.world
        counts = [min(size, total - i) for i in range(0, total, size)]
        shards = [world.shard(n) for n in counts]
        lengths = [max(1, len(shard)) for shard in shards]  # an empty shard has a stand-in, of no weight
        self._seed_dropout()
        for i, (x, y) in enumerate(zip(images.split(lengths), labels.split(lengths), strict=True)):
            for branch in self._branches:
                branch.first_image = shards[i].start
            more = world.size > 1 and i + 1 < len(counts)
            with self._parallel.no_sync() if more else nullcontext():  # gradients are averaged once
                target = y
                if self.mix is not None:
                    x, target = self.mix(x, y, self._epoch, self._state.step, i)
                with self.autocast():
                    logits = self._parallel(x)
                loss = self._loss(logits.float(), target)
                mine = len(shards[i])
                # the mean over all images of all processes, whose mean DistributedDataParallel takes
                self.scaler.scale(loss * (world.size * mine / total)).backward()
            hits = (logits.detach().argmax(1) == y)[:mine].sum()
            self._pending.append((loss.detach() * mine, hits, counts[i]))
        self._update_weights()

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """The mean over the images; ``target`` has classes (B,) or probabilities (B, classes)."""
        smoothing = self.config.label_smoothing
        if self._class_weights is None:
            return F.cross_entropy(logits, target, label_smoothing=smoothing)
        # not PyTorch's weighted mean: its divisor would depend on how the images of a step are split into batches
        loss = F.cross_entropy(logits, target, self._class_weights, label_smoothing=smoothing, reduction="sum")
        return loss / len(logits)

    def _update_weights(self) -> None:
        if self.config.clip_grad is not None:
            self.scaler.unscale_(self.opt)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.scaler.step(self.opt)
        scale = self.scaler.get_scale()
        self.scaler.update()
        self._state.skipped += self.scaler.get_scale() < scale  # a gradient overflowed, and the step was skipped
        if self.scheduler is not None:
            self.scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def _seed_dropout(self) -> None:
        """Prevent processes from dropping the same elements of different images.

        All processes draw the same seeds, from which ``cxv_kernels.dropout`` makes masks for the whole batch. PyTorch's
        dropout makes masks for a shard alone: models that use it get another seed for every step and process.
        """
        if self.world.size > 1 and not self._branches:
            parts = (self.config.seed, self._epoch, self._state.step, self.world.rank)
            torch.manual_seed(zlib.crc32(f"dropout {parts}".encode()))

    def _diverged(self, problem: str) -> NoReturn:
        last = Path(self.config.output) / LAST
        raise (InputError if self.world.is_main else RemoteError)(
            f"{problem}; the last good checkpoint is {last} (after epoch {self.opt.epoch}). "
            "Try a smaller `lr`, or `precision` fp32"
        )


def _shard(world: World, batch_size: int) -> Callable[[Tensor], Tensor] | None:
    return None if world.size == 1 else partial(world.shard_rows, batch_size=batch_size)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: ImageSet | Iterable[tuple[Tensor, Tensor]],
    batch_size: int = 128,
    device: torch.device | str | None = None,
    autocast: Callable[[], AbstractContextManager] | None = None,
    world: World | None = None,
) -> tuple[float, float]:
    """Evaluate a model on every image, in ``eval()`` mode.

    Args:
        model: Module that maps images (B, C, H, W) to logits (B, classes). Its mode is restored afterwards.
        data: A split of :func:`load_data`, a ``DataLoader``, or an iterable of batches (images, labels) with labels of
            shape (B,) in int64.
        batch_size: Batch size for a split.
        device: Device of the batches. Default: the device of the model.
        autocast: Function that returns the context of a forward pass. Default: no autocast.
        world: Processes that share the images of a split. All of them must call the function.

    Returns:
        Mean cross-entropy (nats) and top-1 accuracy (per cent).

    Raises:
        InputError: If ``data`` is something else, or empty.
    """
    if not isinstance(data, ImageSet | Iterable):
        raise InputError(
            f"data: expected a split, as load_data(…).test, or batches (images, labels), got a {type(data).__name__}"
        )
    if device is None:
        device = next((p.device for p in model.parameters()), "cpu")
    world, device = world or World(), torch.device(device)
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # the loss, the hits, the images
    for logits, y in _logits(model, data, batch_size, device, autocast, world):
        loss, hits = F.cross_entropy(logits, y, reduction="sum"), (logits.argmax(1) == y).sum()
        sums += torch.stack([loss, hits, torch.full_like(hits, len(y))])
    loss, hits, images = world.sum(sums).tolist()
    if not images:
        raise InputError("data: expected at least one batch (images, labels), got none")
    return loss / images, 100 * hits / images


@torch.no_grad()
def predict(
    model: nn.Module,
    data: ImageSet,
    batch_size: int = 128,
    device: torch.device | str = "cpu",
    autocast: Callable[[], AbstractContextManager] | None = None,
) -> Tensor:
    """Compute the logits of every image, in ``eval()`` mode.

    Args:
        data: A split of :func:`load_data`.
        model, batch_size, device, autocast: As in :func:`evaluate`.

    Returns:
        Logits (images, classes) in float32, on the CPU, in the order of the split.
    """
    results = _logits(model, data, batch_size, torch.device(device), autocast, World())
    return torch.cat([logits.cpu() for logits, _ in results])


def _logits(
    model: nn.Module,
    data: ImageSet | Iterable[tuple[Tensor, Tensor]],
    batch_size: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager] | None,
    world: World,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this process's logits in float32 and its labels, batch by batch."""
    autocast, batch_size = autocast or autocast_for("fp32", device), to_number(batch_size)
    is_split = isinstance(data, ImageSet)
    if is_split:
        source = batches(data, batch_size, device, shard=_shard(world, batch_size))
    else:
        source = ((x.to(device), y.to(device)) for x, y in data)
    was_training = model.training
    model.eval()
    try:
        for i, (x, y) in enumerate(interruptible(source, world.max)):
            mine = len(world.shard(min(batch_size, len(data) - i * batch_size))) if is_split else len(y)
            with autocast():
                logits = model(x)
            yield logits[:mine].float(), y[:mine]
    finally:
        model.train(was_training)


def pick_device(name: str) -> torch.device:
    """Return the device of a name: ``"auto"`` (a GPU if there is one) or the name of a torch device.

    Raises:
        InputError: If the device is not available.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"`device`: {name!r} is not a device; allowed: auto, cpu, cuda, cuda:N") from error
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        raise InputError(f"`device`: {name!r} cannot be used here ({reason}); use auto or cpu") from error
    return device


def autocast_for(precision: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """Return a function that makes the context of a forward pass in this precision.

    Raises:
        InputError: If the precision is unknown, or is fp16 on a CPU, which has no fast fp16 arithmetic in torch.
    """
    if precision not in PRECISIONS:
        raise InputError(f"`precision`: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "fp16" and device.type != "cuda":
        raise InputError(f"`precision`: fp16 needs a CUDA device, and this is {device}; use bf16 or fp32")
    dtype = PRECISIONS[precision]
    return lambda: torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")
