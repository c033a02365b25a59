"""The training loop of ``cxv train``."""

import json
import math
import random
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from cxv_kernels.validation import to_number

from ..checkpoint import (
    BEST,
    LAST,
    PREVIOUS,
    atomic_write,
    check_space,
    pack_checkpoint,
    read_last,
    rng_state,
    set_rng_state,
)
from ..errors import InputError, first_line, out_of_memory
from ..models.blocks import ResidualBranch
from ..models.registry import REFUSALS, build_model, create_model, downsampling, has_fused_ops
from .augment import Augmentation, Chain, FlipCrop, RandAugment
from .config import (
    ARGS,
    CURVES,
    METRICS,
    NAMES,
    SUMMARY,
    TENSORBOARD,
    TrainConfig,
    arguments,
    fit_to_data,
    flag,
    resolve,
)
from .curves import phase_name, plot_curves
from .data import Data, ImageSet, batches, load_data, to_device
from .distributed import PeerError, World
from .dualopt import DualOpT
from .interrupt import Interrupted, deferred_interrupts, interruptible
from .optim import (
    load_scheduler,
    load_weights_state,
    make_average,
    make_scheduler,
    weight_decay_groups,
    weights_state,
)
from .progress import Progress
from .progressive import image_size_of, resize_batch
from .summary import summarize, summary_line
from .tensorboard import TensorBoard

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CHECK_EVERY = 16  # batches between looks at the loss: each look makes a GPU wait


@dataclass
class TrainResult:
    """``best_top1`` (per cent) was reached at ``best_epoch`` of ``epochs``; the files are in ``output``.

    It is of the validation images where there are some, else of the test set; ``summary`` has the test set's top-1 by
    every way of selecting.
    """

    best_top1: float
    best_epoch: int
    epochs: int
    output: Path
    summary: dict[str, Any]


def train(config: TrainConfig, log: Callable[[str], None] | None = None) -> TrainResult:
    """Train a model with DualOpT (or one of its phases), or go on with a run (``resume``), and write everything into
    ``output``.

    After every epoch ``last.pt`` (and ``best.pt`` at a best) and ``metrics.jsonl`` are replaced atomically; a
    run that is killed goes on from ``last.pt``, on the CPU to the same bits as if nothing had happened. Top-1
    of the test split picks the best epoch, as in the paper; given ``validation`` it is that of the training images held
    out, and the test split is only reported. Sets torch's and Python's random seeds and, given ``threads``, torch's
    number of threads.

    Under torch's default process group (:func:`cxv.training.distributed.process_group`) its processes train one model
    together: each takes its part of every batch, and the main one writes. What comes out is what one process makes of
    the same batches, within rounding.

    Raises:
        InputError: bad arguments or files, a directory that holds another run, or a loss that is not finite.
    """
    world = World.current()
    log = (log or (lambda line: print(line, flush=True))) if world.is_main else (lambda line: None)
    named = config.model is not None or config.resume
    config, saved, fallback = world.from_main(partial(_resolve, config, world))
    output = Path(config.output)
    with world.together():
        device = world.local_device(pick_device(config.device))
        autocast = autocast_for(config.precision, device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)

    data = world.main_first(
        lambda: load_data(
            config.data,
            config.data_dir,
            img_size=config.img_size,
            limit_train=config.limit_train,
            limit_test=config.limit_test,
            validation=config.validation,
            seed=config.seed,
            on_corrupt=config.on_corrupt,
            cache_dir=config.cache_dir,
            log=log,
        )
    )
    with world.together():
        fit_to_data(config, data.img_size, len(data.train))
    fingerprint = {name: split.fingerprint() for name, split in data.splits.items()}
    theirs = world.from_main(lambda: fingerprint)
    with world.together():
        if theirs != fingerprint:
            raise InputError(f"`data`: the images that process {world.rank} finds are not those of process 0")
        if saved is not None:
            _check_same_data(saved, data, fingerprint, output)
        data = to_device(data, device, config.data_on_device)
    random.seed(config.seed)
    torch.manual_seed(config.seed)
    kwargs = {
        "num_classes": len(data.classes),
        "in_chans": data.in_chans,
        "img_size": data.img_size,
        "use_fused": config.fused,
    }
    kwargs |= {k: getattr(config, k) for k in ("embed_dim", "drop_rate") if getattr(config, k) is not None}
    if config.stem_stride is not None:
        kwargs[downsampling(config.model)] = config.stem_stride
    if not config.recompute or config.init is not None:  # of the file with the first weights, or the default
        kwargs["recompute"] = config.recompute
    kwargs |= config.model_args or {}
    with world.together():
        model, kwargs = _build_model(config, kwargs, saved)
        model.to(device)
        for size in dict.fromkeys((data.img_size, *(size for size, _ in config.progressive or ()))):
            _try_model(model, config.model, (data.in_chans, size, size), device, autocast)
    if config.compile:
        model.compile()  # in place: the same parameters by the same names
    opt = _optimizer(model, config)
    average = make_average(model, config.ema_decay)
    copies = 4 if average is None else 5  # of the weights in a checkpoint: these, the best, two moments
    augment = _augmentation(config)
    selection = "test" if data.validation is None else "validation"
    post_training, position = False, None
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    sampler = torch.Generator().manual_seed(config.seed)
    history: list[dict[str, Any]] = []

    if saved is not None:
        with world.together():
            load_weights_state(model, average, saved, output / (LAST if fallback is None else PREVIOUS))
        opt.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        sampler.set_state(saved["sampler"])
        set_rng_state(saved["rng"], device)
        history = saved["history"]
        post_training = saved.get("post_training", False)
        # of another phase, where a changed cap ended that one
        position = saved.get("position") if opt.phase == saved["optimizer"]["phase"] else None
    scheduler = _scheduler(opt, config, len(data.train), saved)

    def post_train_if_due() -> None:
        nonlocal post_training, position
        if opt.finished and config.post_train and not post_training:
            why = _why(opt, config)
            opt.restart()
            post_training, position = True, None
            log(
                f"post-training on clean images after epoch {opt.epoch}: {why}; reloaded the best weights, of epoch "
                f"{opt.best_epoch} ({opt.best_top1:.2f} %)"
            )

    def save(best: bool = False, position: dict[str, Any] | None = None, keep: bool = True) -> None:
        with world.together():
            if world.is_main:
                write(best, position, keep)

    def write(best: bool, position: dict[str, Any] | None, keep: bool) -> None:
        content = pack_checkpoint(
            {
                **weights_state(model, average),
                "model_name": config.model,
                "model_kwargs": kwargs,
                "classes": data.classes,
                "img_size": data.img_size,
                "in_chans": data.in_chans,
                "normalization": data.normalization,
                "data_fingerprint": fingerprint,
                "optimizer": opt.state_dict(),
                "post_training": post_training,
                "scheduler": None if scheduler is None else scheduler.state_dict(),
                "scaler": scaler.state_dict(),
                "sampler": sampler.get_state() if position is None else position.pop("sampler"),
                "position": position,
                "rng": rng_state(device),
                "epoch": opt.epoch,
                "history": history,
                "args": arguments(config),
            }
        )
        try:
            if best:
                atomic_write(output / BEST, content)
            atomic_write(output / LAST, content, output / PREVIOUS if keep else None)
            # after the checkpoint, which is the truth: a resumed run rewrites them
            _write_metrics(output, history)
        except InputError as error:
            kept = f"; what {output / LAST} has is kept, and `resume` goes on from it" if history else ""
            raise InputError(f"{error}{kept}") from error

    if not named:
        width = "" if config.embed_dim is None else f" with --embed-dim {config.embed_dim}"
        log(f"no --model given: {config.model}{width}, the default for {config.data}")
    parameters = sum(p.numel() for p in model.parameters())
    ops = "fused" if config.fused else "plain PyTorch"
    if not has_fused_ops(config.model):
        ops = "plain PyTorch (it has no fused ops)"
    compiled = ", compiled" if config.compile else ""
    log(f"{config.model}: {parameters:,} parameters, {ops}, {config.precision}{compiled}")
    held = "" if data.validation is None else f" {len(data.validation):,} validation"
    log(
        f"{config.data}: {len(data.train):,} training{',' if held else ''}{held} and {len(data.test):,} test images, "
        f"{len(data.classes)} classes, {data.in_chans}×{data.img_size}×{data.img_size}, {data.place}"
    )
    log(_recipe_line(config, selection))
    processes = "" if world.size == 1 else f" in each of {world.size} processes"
    log(f"on {device} with {torch.get_num_threads()} threads{processes}, output in {output}")
    if saved is None:
        with world.together():
            if world.is_main:
                _make_output(output, config.overwrite)
                check_space(output, model, copies)
        save()  # so that a run killed in its first epoch can be resumed too
    else:
        if fallback is not None:
            log(f"{fallback}; going on from {PREVIOUS}, which is one save older")
        part = "" if position is None else f" and {position['step']} batches of the next"
        log(f"resumed after epoch {opt.epoch}{part}, in the {NAMES[opt.phase]} phase")
        if opt.phase != saved["optimizer"]["phase"]:  # a changed cap ends the phase here
            log(_switch_line(opt, config))
        post_train_if_due()  # --post-train can be given to a run that is over
        save(position=position and {**position, "sampler": sampler.get_state()}, keep=fallback is None)
        if opt.finished:
            name = "epochs" if config.optimizer != "dualopt" else "sgd_epochs"
            log(f"the training is over already: nothing left to train (raise {flag(name)} to go on)")
    board = None
    with world.together():
        if world.is_main:
            atomic_write(output / ARGS, (json.dumps(arguments(config), indent=2) + "\n").encode())
            board = TensorBoard(output / TENSORBOARD, history) if config.tensorboard else None

    epoch = _Epoch(model, data, opt, scaler, sampler, config, device, autocast, output, world, scheduler, average)
    try:
        with deferred_interrupts():
            while not opt.finished:
                with world.together():
                    if world.is_main:
                        check_space(output, model, copies)
                epoch.augment = None if post_training else augment
                row = epoch(position)
                position = None
                best = opt.end_epoch(row[f"{selection}_top1"])
                row["best_top1"] = opt.best_top1
                history.append(row)
                log(_epoch_line(row, best))
                if row["phase"] != opt.phase:
                    log(_switch_line(opt, config))
                post_train_if_due()
                save(best)
                if board is not None:
                    board.add(row)
    except KeyboardInterrupt as error:
        if isinstance(error, Interrupted) and epoch.position is not None:
            save(position=epoch.position)
        if world.is_main:
            saved, _ = read_last(output)
            part = "" if saved["position"] is None else f" and {saved['position']['step']} batches of the next"
            log(f"interrupted; epoch {saved['epoch']}{part} is saved: go on with  cxv train --resume --output {output}")
        raise
    except RuntimeError as error:
        if out_of_memory(error):
            raise InputError(
                f"`batch_size` {config.batch_size}: out of memory on {device} ({str(error).split('.')[0]}); use "
                "a smaller one (`accumulate` keeps the step the same), `fused`, or `precision` fp16. The last good "
                f"checkpoint is {output / LAST}"
            ) from error
        if not world.has_lost_a_peer(error):
            raise
        raise InputError(
            f"process {world.rank} of {world.size}: another one has ended, and says why if it could; go on with  "
            f"cxv train --resume --output {output}"
        ) from error

    log(f"finished: {_why(opt, config)}")
    summary = summarize(history)
    result = TrainResult(opt.best_top1, opt.best_epoch, opt.epoch, output, summary)
    if not world.is_main:
        return result
    if board is not None:
        board.close()
    drawn = plot_curves(history, output / CURVES, f"{config.model} on {config.data}")
    atomic_write(output / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
    what = "top-1" if selection == "test" else f"{selection} top-1"
    log(f"best {what} {opt.best_top1:.2f} % at epoch {opt.best_epoch} of {opt.epoch}")
    log(summary_line(summary))
    files = [BEST, LAST, METRICS, ARGS, SUMMARY] + [CURVES] * drawn + [TENSORBOARD] * (board is not None)
    log(f"in {output}: {', '.join(files)}" + ("" if drawn else " (no curves: pip install 'cxv[train]')"))
    return result


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: ImageSet | Iterable[tuple[Tensor, Tensor]],
    batch_size: int = 128,
    device: torch.device | str | None = None,
    autocast: Callable[[], AbstractContextManager] | None = None,
    world: World | None = None,
) -> tuple[float, float]:
    """Mean cross-entropy (nats) and exact top-1 (per cent) over every image, in ``eval()`` mode.

    Args:
        model: images (B, C, H, W) → logits (B, classes); its mode is put back.
        data: a split of :func:`load_data`, or a ``DataLoader``, or any batches of images as the model takes them and
            labels (B,) int64.
        batch_size: of a split.
        device: where the batches go; default: the model's.
        autocast: makes the context of a forward pass; default: none.
        world: processes, all of which must call it, that share the images of a split; none is counted twice.

    Raises:
        InputError: ``data`` is something else, or empty.
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
    """Logits (images, classes) of every image, in ``eval()`` mode: float32, on the CPU."""
    found = _logits(model, data, batch_size, torch.device(device), autocast, World())
    return torch.cat([logits.cpu() for logits, _ in found])


def _logits(
    model: nn.Module,
    data: ImageSet | Iterable[tuple[Tensor, Tensor]],
    batch_size: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager] | None,
    world: World,
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's logits in float32 and its labels, batch by batch."""
    autocast, batch_size = autocast or autocast_for("fp32", device), to_number(batch_size)
    own = isinstance(data, ImageSet)
    if own:
        share = None if world.size == 1 else partial(world.share, batch_size=batch_size)
        source = batches(data, batch_size, device, share=share)
    else:
        source = ((x.to(device), y.to(device)) for x, y in data)
    was_training = model.training
    model.eval()
    try:
        for i, (x, y) in enumerate(interruptible(source, world.max)):
            mine = len(world.part(min(batch_size, len(data) - i * batch_size))) if own else len(y)
            with autocast():
                logits = model(x)
            yield logits[:mine].float(), y[:mine]
    finally:
        model.train(was_training)


def pick_device(name: str) -> torch.device:
    """``"auto"`` (a GPU if there is one) or a torch device name.

    Raises:
        InputError: no such device here.
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
    """A factory of the context that a forward pass of this precision runs in.

    Raises:
        InputError: unknown, or fp16 on a CPU, where torch has no fast half arithmetic to train with.
    """
    if precision not in PRECISIONS:
        raise InputError(f"`precision`: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "fp16" and device.type != "cuda":
        raise InputError(f"`precision`: fp16 needs a CUDA device, and this is {device}; use bf16 or fp32")
    dtype = PRECISIONS[precision]
    return lambda: torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


@dataclass
class _Epoch:
    """One epoch of training and the evaluation after it: called, gives a line of ``metrics.jsonl``.

    While it runs, ``position`` says how far it is, at a time when no step is half done.
    """

    model: nn.Module
    data: Data
    opt: DualOpT
    scaler: torch.amp.GradScaler
    sampler: torch.Generator
    config: TrainConfig
    device: torch.device
    autocast: Callable[[], AbstractContextManager]
    output: Path
    world: World
    scheduler: LRScheduler | None = None
    average: AveragedModel | None = None
    augment: Augmentation | None = None

    def __post_init__(self) -> None:
        self._parallel = self.world.wrap(self.model)
        self._branches = [module for module in self.model.modules() if isinstance(module, ResidualBranch)]
        self._evaluated = self.model if self.average is None else self.average.module
        self._start: Tensor | None = None  # the sampler's state before the epoch; None when none is running

    @property
    def position(self) -> dict[str, Any] | None:
        """Where to go on in this epoch; None when none is running."""
        if self._start is None:
            return None
        self._look()
        return {"sampler": self._start} | {k: getattr(self, f"_{k}") for k in _POSITION}

    def __call__(self, position: dict[str, Any] | None = None) -> dict[str, Any]:
        opt, config = self.opt, self.config
        self._number, start = opt.epoch + 1, time.perf_counter()
        size = image_size_of(config.progressive, self._number)
        phase = opt.phase
        total = len(self.data.train)
        batch_size = config.batch_size * config.accumulate
        self._steps = math.ceil(total / batch_size)
        # (this process's loss and hits, every process's images) of the batches since the last look
        self._pending: list[tuple[Tensor, Tensor, int]] = []
        self._start = self.sampler.get_state()
        position = dict.fromkeys(_POSITION, 0) | {"lr": opt.param_groups[0]["lr"]} | (position or {})
        self._step, self._loss_sum, self._hits, self._seen, self._skipped, self._lr = (position[k] for k in _POSITION)
        done = self._seen
        self.model.train()
        source = batches(
            self.data.train,
            batch_size,
            self.device,
            self.sampler,
            augment=self.augment,
            epoch=self._number,
            skip=self._step,
            share=None if self.world.size == 1 else partial(self.world.share, batch_size=config.batch_size),
        )
        with Progress(total, f"epoch {self._number} {NAMES[phase]}", enabled=self.world.is_main) as progress:
            progress.update(done)
            for x, y in interruptible(source, self.world.max):
                images = min(batch_size, total - self._step * batch_size)
                self._train_step(x if size is None else resize_batch(x, size), y, images)
                self._step += 1
                shown = {}
                if self._step % _CHECK_EVERY == 0 or self._step == self._steps:
                    self._look()
                    mean = self._loss_sum / self._seen
                    shown = {"loss": f"{mean:.4f}", "top-1": f"{100 * self._hits / self._seen:.1f} %"}
                progress.update(images, **shown)
        train_seconds = time.perf_counter() - start
        for model in dict.fromkeys((self.model, self._evaluated)):
            self.world.broadcast_buffers(model)
        scores = self._evaluate()
        self._start = None
        return {
            "epoch": self._number,
            "phase": phase,
            "augmented": self.augment is not None and config.rand_augment is not None,
            **({} if size is None else {"img_size": size}),
            "lr": self._lr,
            "train_loss": self._loss_sum / total,
            "train_top1": 100 * self._hits / total,
            **scores,
            "skipped_steps": self._skipped,
            "images_per_second": (total - done) / train_seconds,
            "seconds": time.perf_counter() - start,
        }

    def _train_step(self, images: Tensor, labels: Tensor, total: int) -> None:
        """One step of the optimizer by ``accumulate`` batches, ``total`` images over all processes."""
        self.opt.zero_grad()
        size, world = self.config.batch_size, self.world
        counts = [min(size, total - i) for i in range(0, total, size)]
        parts = [world.part(n) for n in counts]
        lengths = [max(1, len(part)) for part in parts]  # a part without images has a stand-in, of no weight
        self._seed_dropout()
        for i, (x, y) in enumerate(zip(images.split(lengths), labels.split(lengths), strict=True)):
            for branch in self._branches:
                branch.first_image = parts[i].start
            more = world.size > 1 and i + 1 < len(counts)
            with self._parallel.no_sync() if more else nullcontext():  # gradients are averaged once
                with self.autocast():
                    logits = self._parallel(x)
                loss = F.cross_entropy(logits.float(), y, label_smoothing=self.config.label_smoothing)
                mine = len(parts[i])
                # the mean over all images of all processes, whose mean DistributedDataParallel takes
                self.scaler.scale(loss * (world.size * mine / total)).backward()
            hits = (logits.detach().argmax(1) == y)[:mine].sum()
            self._pending.append((loss.detach() * mine, hits, counts[i]))
        if self.config.clip_grad is not None:
            self.scaler.unscale_(self.opt.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.scaler.step(self.opt.optimizer)
        scale = self.scaler.get_scale()
        self.scaler.update()
        self._skipped += self.scaler.get_scale() < scale  # a gradient overflowed, and the step was not made
        if self.scheduler is not None:
            self.scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.model)

    def _seed_dropout(self) -> None:
        """See that the processes do not drop the same elements of different images.

        All of them draw the same seeds, of which ``cxv_kernels.dropout`` makes masks for the whole batch. PyTorch's
        makes masks of a part alone: for models with that one, every step and process gets a seed of its own.
        """
        if self.world.size > 1 and not self._branches:
            parts = (self.config.seed, self._number, self._step, self.world.rank)
            torch.manual_seed(zlib.crc32(f"dropout {parts}".encode()))

    def _look(self) -> None:
        """Add up the losses since the last look, which makes a GPU wait, and stop at one that is not finite."""
        if not self._pending:
            return
        losses, hits, counts = zip(*self._pending, strict=True)
        self._pending.clear()
        sums = self.world.sum(torch.stack([torch.stack(losses).double(), torch.stack(hits).double()]))
        for loss, hit, n in zip(*sums.tolist(), counts, strict=True):
            if not math.isfinite(loss):
                batch = self._seen // (self.config.batch_size * self.config.accumulate) + 1
                self._diverged(f"the loss is {loss / n} at epoch {self._number}, batch {batch} of {self._steps}")
            self._loss_sum, self._hits, self._seen = self._loss_sum + loss, self._hits + int(hit), self._seen + n

    def _evaluate(self) -> dict[str, float]:
        scores: dict[str, float] = {}
        model = self._evaluated
        for name, split in self.data.splits.items():
            if name == "train":
                continue
            loss, top1 = evaluate(model, split, self.config.batch_size, self.device, self.autocast, self.world)
            # the last step of the epoch can break weights whose loss was still finite
            if not math.isfinite(loss):
                where = f"at epoch {self._number}, after batch {self._steps} of {self._steps}"
                self._diverged(f"the {name} loss is {loss} {where}")
            scores |= {f"{name}_loss": loss, f"{name}_top1": top1}
        return scores

    def _diverged(self, what: str) -> NoReturn:
        raise (InputError if self.world.is_main else PeerError)(
            f"{what}; the last good checkpoint is {self.output / LAST} (after epoch {self.opt.epoch}). "
            "Try a smaller `lr`, or `precision` fp32"
        )


_POSITION = ("step", "loss_sum", "hits", "seen", "skipped", "lr")  # "lr": that of the epoch's first step


def _resolve(config: TrainConfig, world: World) -> tuple[TrainConfig, dict[str, Any] | None, str | None]:
    resolved = resolve(config)
    if resolved[0].batch_size < world.size:
        raise InputError(
            f"`batch_size`: {resolved[0].batch_size}, of all processes, and there are {world.size} of them"
        )
    return resolved


def _build_model(
    config: TrainConfig, kwargs: dict[str, Any], saved: dict[str, Any] | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The model, with the weights of ``config.init`` if a run begins with those, and all of its arguments.

    Raises:
        InputError: the model cannot be built, or the weights are not of this model.
    """
    if saved is None and config.init is not None:
        try:
            model = create_model(config.model, checkpoint=config.init, **kwargs)
        except REFUSALS as error:
            raise InputError(f"`init`: {first_line(error)}") from error
        return model, model.model_kwargs | kwargs
    kwargs = kwargs if saved is None else saved["model_kwargs"] | kwargs
    return build_model(config.model, kwargs), kwargs


def _try_model(
    model: nn.Module,
    name: str,
    shape: tuple[int, int, int],
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> None:
    """One image (C, H, W) through the model, before the run writes anything: some arguments show only there.

    Raises:
        InputError: the model refuses it.
    """
    try:
        with torch.no_grad(), autocast():
            model.eval()(torch.zeros(1, *shape, device=device))
    except REFUSALS as error:
        size = "×".join(map(str, shape))
        raise InputError(f"`model` {name}: refuses an image of {size}: {first_line(error)}") from error
    model.train()


def _make_output(output: Path, overwrite: bool) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"`output`: cannot create {output} ({error.strerror})") from error
    if overwrite:
        for name in (LAST, PREVIOUS, BEST, METRICS, CURVES, ARGS, SUMMARY):
            (output / name).unlink(missing_ok=True)
        shutil.rmtree(output / TENSORBOARD, ignore_errors=True)


def _epoch_line(row: dict[str, Any], best: bool) -> str:
    held = ""
    size = f"at {row['img_size']} px  " if "img_size" in row else ""
    if "validation_top1" in row:
        held = f"validation loss {row['validation_loss']:.4f} top-1 {row['validation_top1']:6.2f} %  "
    return (
        f"epoch {row['epoch']:3d} {phase_name(row):5s} lr {row['lr']:g}  loss {row['train_loss']:.4f} "
        f"top-1 {row['train_top1']:6.2f} %  {size}{held}"
        f"test loss {row['test_loss']:.4f} top-1 {row['test_top1']:6.2f} %  "
        f"{row['images_per_second']:.0f} images/s {row['seconds']:.1f} s"
        + (f"  {row['skipped_steps']} steps skipped (fp16 overflow)" if row["skipped_steps"] else "")
        + ("  best" if best else "")
    )


def _switch_line(opt: DualOpT, config: TrainConfig) -> str:
    return (
        f"switch to SGD after epoch {opt.switch_epoch}: AdamW {_reason(opt.switch_reason, 'epochs', config)}; "
        f"reloaded the best weights, of epoch {opt.best_epoch} ({opt.best_top1:.2f} %)"
    )


def _why(opt: DualOpT, config: TrainConfig) -> str:
    cap = "sgd_epochs" if config.optimizer == "dualopt" and opt.phase == "sgd" else "epochs"
    return f"{NAMES[opt.phase]} {_reason(opt.phase_over, cap, config)}"


def _reason(reason: str, cap: str, config: TrainConfig) -> str:
    if reason == "stale":
        return f"is stale (top-1 made no progress for {config.patience} epochs)"
    return f"is capped ({flag(cap)} {getattr(config, cap)})"


def _recipe_line(config: TrainConfig, selection: str) -> str:
    parts = ["DualOpT" if config.optimizer == "dualopt" else f"{NAMES[config.optimizer]} alone"]
    if config.rand_augment is not None:
        parts[0] += " with RandAugment {},{}".format(*config.rand_augment)
    parts[0] += "".join(f", {extra}" for extra in _extras(config))
    if config.post_train:
        parts.append("post-training on clean images")
    by = (
        "the test set, as in the paper"
        if selection == "test"
        else "held-out training images; the test set only reports"
    )
    return f"{', then '.join(parts)}; the best epoch by {by}"


def _extras(config: TrainConfig) -> list[str]:
    """The parts of a recipe that the paper's does not have, for the log."""
    extras = (
        ("horizontal flips", config.hflip),
        (f"random crops with {config.random_crop} pixels of padding", config.random_crop),
        (f"{config.schedule} learning rate", config.schedule != "constant"),
        (f"weight decay {config.weight_decay} of matrices", config.weight_decay is not None),
        (f"label smoothing {config.label_smoothing}", config.label_smoothing),
        (f"EMA {config.ema_decay}", config.ema_decay),
    )
    stages = (f"{epochs} epochs at {size} px" for size, epochs in config.progressive or ())
    return [text for text, on in extras if on] + list(stages)


def _optimizer(model: nn.Module, config: TrainConfig) -> DualOpT:
    if config.optimizer == "sgd":
        return DualOpT(model, patience=config.patience, sgd_lr=config.lr, max_epochs=(0, config.epochs))
    return DualOpT(
        model if config.weight_decay is None else weight_decay_groups(model, config.weight_decay),
        patience=config.patience,
        lr=config.lr,
        sgd_lr=1e-3 if config.sgd_lr is None else config.sgd_lr,
        max_epochs=(config.epochs, config.sgd_epochs or 0),
        module=model,
    )


def _scheduler(opt: DualOpT, config: TrainConfig, num_images: int, saved: dict[str, Any] | None) -> LRScheduler | None:
    steps = math.ceil(num_images / (config.batch_size * config.accumulate))
    warmup = None if config.warmup_epochs is None else round(config.warmup_epochs * steps)
    scheduler = make_scheduler(opt.optimizer, config.schedule, config.lr, config.epochs * steps, warmup)
    if scheduler is not None and saved is not None:
        load_scheduler(scheduler, saved["scheduler"], saved["optimizer"]["optimizer"])
    return scheduler


def _augmentation(config: TrainConfig) -> Augmentation | None:
    steps: list[Augmentation] = []
    if config.hflip or config.random_crop:
        steps.append(FlipCrop(config.hflip, config.random_crop or 0, seed=config.seed))
    if config.rand_augment is not None:
        steps.append(RandAugment(*config.rand_augment, seed=config.seed))
    return Chain(tuple(steps)) if len(steps) > 1 else next(iter(steps), None)


def _check_same_data(saved: dict[str, Any], data: Data, fingerprint: dict[str, int], output: Path) -> None:
    if saved["classes"] != data.classes:
        raise InputError(
            f"`resume`: the run in {output} has the classes {_list(saved['classes'])}, the data has "
            f"{_list(data.classes)}"
        )
    changed = [split for split, value in fingerprint.items() if saved["data_fingerprint"][split] != value]
    if changed:
        raise InputError(
            f"`resume`: the {' and the '.join(changed)} images of {data.name} are not those that the run "
            f"in {output} was started with"
        )


def _list(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f", … ({len(names)})" if len(names) > 10 else "")


def _write_metrics(output: Path, history: list[dict[str, Any]]) -> None:
    atomic_write(output / METRICS, "".join(json.dumps(row) + "\n" for row in history).encode())
