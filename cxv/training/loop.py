"""The training loop of ``cxv train``."""

import json
import math
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.registry import has_fused_ops
from .augment import RandAugment
from .checkpoint import (
    BEST,
    LAST,
    atomic_write,
    build_model,
    load_weights,
    pack_checkpoint,
    read_checkpoint,
    rng_state,
    set_rng_state,
)
from .config import ARGS, CURVES, METRICS, NAMES, SUMMARY, TrainConfig, arguments, flag, resolve
from .curves import phase_name, plot_curves
from .data import MEAN, STD, Data, ImageSet, batches, load_data
from .dualopt import DualOpT
from .errors import InputError
from .interrupt import deferred_interrupts, interruptible
from .progress import Progress
from .summary import summarise, summary_line

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

    Raises:
        InputError: bad arguments or files, a directory that holds another run, or a loss that is not finite.
    """
    log = log or (lambda line: print(line, flush=True))
    named = config.model is not None or config.resume
    config, saved = resolve(config)
    output = Path(config.output)
    device = pick_device(config.device)
    autocast = autocast_for(config.precision, device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)

    data = load_data(
        config.data,
        config.data_dir,
        img_size=config.img_size,
        limit_train=config.limit_train,
        limit_test=config.limit_test,
        validation=config.validation,
        seed=config.seed,
        on_corrupt=config.on_corrupt,
    )
    config.img_size = data.img_size
    fingerprint = {name: split.fingerprint() for name, split in data.splits.items()}
    if saved is not None:
        _check_same_data(saved, data, fingerprint, output)
    random.seed(config.seed)
    torch.manual_seed(config.seed)
    kwargs = {
        "num_classes": len(data.classes),
        "in_chans": data.in_chans,
        "img_size": data.img_size,
        "use_fused": config.fused,
    }
    kwargs |= {k: getattr(config, k) for k in ("embed_dim", "drop_rate") if getattr(config, k) is not None}
    model = build_model(config.model, kwargs).to(device)
    opt = _optimiser(model, config)
    augment = None if config.rand_augment is None else RandAugment(*config.rand_augment, seed=config.seed)
    selection = "test" if data.validation is None else "validation"
    post_training = False
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
    sampler = torch.Generator().manual_seed(config.seed)
    history: list[dict[str, Any]] = []

    if saved is not None:
        load_weights(model, saved, output / LAST)
        opt.load_state_dict(saved["optimiser"])
        scaler.load_state_dict(saved["scaler"])
        sampler.set_state(saved["sampler"])
        set_rng_state(saved["rng"], device)
        history = saved["history"]
        post_training = saved.get("post_training", False)

    def post_train_if_due() -> None:
        nonlocal post_training
        if opt.finished and config.post_train and not post_training:
            why = _why(opt, config)
            opt.restart()
            post_training = True
            log(
                f"post-training on clean images after epoch {opt.epoch}: {why}; reloaded the best weights, of epoch "
                f"{opt.best_epoch} ({opt.best_top1:.2f} %)"
            )

    def save(best: bool) -> None:
        content = pack_checkpoint(
            {
                "model": model.state_dict(),
                "model_name": config.model,
                "model_kwargs": kwargs,
                "classes": data.classes,
                "img_size": data.img_size,
                "in_chans": data.in_chans,
                "normalisation": {"mean": MEAN, "std": STD},
                "data_fingerprint": fingerprint,
                "optimiser": opt.state_dict(),
                "post_training": post_training,
                "scaler": scaler.state_dict(),
                "sampler": sampler.get_state(),
                "rng": rng_state(device),
                "epoch": opt.epoch,
                "history": history,
                "args": arguments(config),
            }
        )
        if best:
            atomic_write(output / BEST, content)
        atomic_write(output / LAST, content)
        # after the checkpoint, which is the truth: a resumed run rewrites them
        _write_metrics(output, history)

    if not named:
        width = "" if config.embed_dim is None else f" with --embed-dim {config.embed_dim}"
        log(f"no --model given: {config.model}{width}, the default for {config.data}")
    parameters = sum(p.numel() for p in model.parameters())
    ops = "plain PyTorch" if not config.fused else "fused" if has_fused_ops(config.model) else "no fused ops in it"
    log(f"{config.model}: {parameters:,} parameters, {ops}, {config.precision}")
    held = "" if data.validation is None else f" {len(data.validation):,} validation"
    log(
        f"{config.data}: {len(data.train):,} training{',' if held else ''}{held} and {len(data.test):,} test images, "
        f"{len(data.classes)} classes, {data.in_chans}×{data.img_size}×{data.img_size}"
    )
    log(_recipe_line(config, selection))
    log(f"on {device} with {torch.get_num_threads()} threads, output in {output}")
    if saved is None:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--output: cannot create {output} ({error.strerror})") from error
        if config.overwrite:
            for name in (LAST, BEST, METRICS, CURVES, ARGS, SUMMARY):
                (output / name).unlink(missing_ok=True)
        save(best=False)  # so that a run killed in its first epoch can be resumed too
    else:
        log(f"resumed after epoch {opt.epoch}, in the {NAMES[opt.phase]} phase")
        if opt.phase != saved["optimiser"]["phase"]:  # a changed cap ends the phase here
            log(_switch_line(opt, config))
        post_train_if_due()  # --post-train can be given to a run that is over
        save(best=False)
        if opt.finished:
            name = "epochs" if config.optimizer != "dualopt" else "sgd_epochs"
            log(f"the training is over already: nothing left to train (raise {flag(name)} to go on)")
    atomic_write(output / ARGS, (json.dumps(arguments(config), indent=2) + "\n").encode())

    try:
        with deferred_interrupts():
            while not opt.finished:
                clean = augment is None or post_training
                row = _train_epoch(
                    model, data, opt, scaler, sampler, config, device, autocast, output, None if clean else augment
                )
                best = opt.end_epoch(row[f"{selection}_top1"])
                row["best_top1"] = opt.best_top1
                history.append(row)
                log(_epoch_line(row, best))
                if row["phase"] != opt.phase:
                    log(_switch_line(opt, config))
                post_train_if_due()
                save(best)
    except KeyboardInterrupt:
        epoch = read_checkpoint(output / LAST)["epoch"]
        log(f"interrupted; epoch {epoch} is saved: go on with  cxv train --resume --output {output}")
        raise
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"--batch-size {config.batch_size}: out of memory on {device} ({str(error).split('.')[0]}); use "
            f"a smaller one, --fused, or --precision fp16. The last good checkpoint is {output / LAST}"
        ) from error

    log(f"finished: {_why(opt, config)}")
    drawn = plot_curves(history, output / CURVES, f"{config.model} on {config.data}")
    summary = summarise(history)
    atomic_write(output / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
    what = "top-1" if selection == "test" else f"{selection} top-1"
    log(f"best {what} {opt.best_top1:.2f} % at epoch {opt.best_epoch} of {opt.epoch}")
    log(summary_line(summary))
    files = [BEST, LAST, METRICS, ARGS, SUMMARY] + ([CURVES] if drawn else [])
    log(f"in {output}: {', '.join(files)}" + ("" if drawn else " (no curves: pip install 'cxv[train]')"))
    return TrainResult(opt.best_top1, opt.best_epoch, opt.epoch, output, summary)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: ImageSet,
    batch_size: int = 128,
    device: torch.device | str = "cpu",
    autocast: Callable[[], AbstractContextManager] | None = None,
) -> tuple[float, float]:
    """Mean cross-entropy (nats) and exact top-1 (per cent) over every image, in ``eval()`` mode."""
    autocast = autocast or autocast_for("fp32", torch.device(device))
    was_training = model.training
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=device)
    hits = torch.zeros((), dtype=torch.int64, device=device)
    try:
        for x, y in interruptible(batches(data, batch_size, device)):
            with autocast():
                logits = model(x)
            loss += F.cross_entropy(logits.float(), y, reduction="sum")
            hits += (logits.argmax(1) == y).sum()
    finally:
        model.train(was_training)
    return loss.item() / len(data), 100 * hits.item() / len(data)


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
        raise InputError(f"--device: {name!r} is not a device; allowed: auto, cpu, cuda, cuda:N") from error
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        raise InputError(f"--device: {name!r} cannot be used here ({reason}); use auto or cpu") from error
    return device


def autocast_for(precision: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """A factory of the context that a forward pass of this precision runs in.

    Raises:
        InputError: unknown, or fp16 on a CPU, where torch has no fast half arithmetic to train with.
    """
    if precision not in PRECISIONS:
        raise InputError(f"--precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "fp16" and device.type != "cuda":
        raise InputError(f"--precision: fp16 needs a CUDA device, and this is {device}; use bf16 or fp32")
    dtype = PRECISIONS[precision]
    return lambda: torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


def _train_epoch(
    model: nn.Module,
    data: Data,
    opt: DualOpT,
    scaler: torch.amp.GradScaler,
    sampler: torch.Generator,
    config: TrainConfig,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    output: Path,
    augment: RandAugment | None,
) -> dict[str, Any]:
    """One epoch of training and the evaluation after it, as a line of ``metrics.jsonl``."""
    epoch, start = opt.epoch + 1, time.perf_counter()
    phase, lr = opt.phase, opt.param_groups[0]["lr"]
    total = len(data.train)
    steps = math.ceil(total / config.batch_size)
    pending: list[tuple[Tensor, int]] = []  # (loss, images) of the batches since the last look
    loss_sum, seen = 0.0, 0
    hits = torch.zeros((), dtype=torch.int64, device=device)
    model.train()
    source = batches(data.train, config.batch_size, device, sampler, augment=augment, epoch=epoch)
    with Progress(total, f"epoch {epoch} {NAMES[phase]}") as progress:
        for step, (x, y) in enumerate(interruptible(source), 1):
            opt.zero_grad()
            with autocast():
                logits = model(x)
            loss = F.cross_entropy(logits.float(), y)
            scaler.scale(loss).backward()
            scaler.step(opt.optimizer)
            scaler.update()
            pending.append((loss.detach(), len(y)))
            hits += (logits.detach().argmax(1) == y).sum()
            shown = {}
            if step % _CHECK_EVERY == 0 or step == steps:
                values = torch.stack([value for value, _ in pending]).tolist()
                for i, (value, (_, n)) in enumerate(zip(values, pending, strict=True)):
                    if not math.isfinite(value):
                        batch = step - len(pending) + i + 1
                        raise _diverged(f"the loss is {value} at epoch {epoch}, batch {batch} of {steps}", output)
                    loss_sum, seen = loss_sum + value * n, seen + n
                pending.clear()
                shown = {"loss": f"{loss_sum / seen:.4f}", "top-1": f"{100 * hits.item() / seen:.1f} %"}
            progress.update(len(y), **shown)
    train_seconds = time.perf_counter() - start
    scores: dict[str, float] = {}
    for name, split in data.splits.items():
        if name == "train":
            continue
        split_loss, scores[f"{name}_top1"] = evaluate(model, split, config.batch_size, device, autocast)
        # the last step of the epoch can break weights whose loss was still finite
        if not math.isfinite(split_loss):
            where = f"at epoch {epoch}, after batch {steps} of {steps}"
            raise _diverged(f"the {name} loss is {split_loss} {where}", output)
        scores[f"{name}_loss"] = split_loss
    return {
        "epoch": epoch,
        "phase": phase,
        "augmented": augment is not None,
        "lr": lr,
        "train_loss": loss_sum / total,
        "train_top1": 100 * hits.item() / total,
        **scores,
        "images_per_second": total / train_seconds,
        "seconds": time.perf_counter() - start,
    }


def _diverged(what: str, output: Path) -> InputError:
    last = output / LAST
    return InputError(
        f"{what}; the last good checkpoint is {last} (after epoch {read_checkpoint(last)['epoch']}). "
        "Try a smaller --lr, or --precision fp32"
    )


def _epoch_line(row: dict[str, Any], best: bool) -> str:
    held = ""
    if "validation_top1" in row:
        held = f"validation loss {row['validation_loss']:.4f} top-1 {row['validation_top1']:6.2f} %  "
    return (
        f"epoch {row['epoch']:3d} {phase_name(row):5s} lr {row['lr']:g}  loss {row['train_loss']:.4f} "
        f"top-1 {row['train_top1']:6.2f} %  {held}"
        f"test loss {row['test_loss']:.4f} top-1 {row['test_top1']:6.2f} %  "
        f"{row['images_per_second']:.0f} images/s {row['seconds']:.1f} s" + ("  best" if best else "")
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
        parts.append("RandAugment of {} at magnitude {}".format(*config.rand_augment))
    if config.post_train:
        parts.append("post-training on clean images")
    by = (
        "the test set, as in the paper"
        if selection == "test"
        else "held-out training images; the test set only reports"
    )
    return f"{', then '.join(parts)}; the best epoch by {by}"


def _optimiser(model: nn.Module, config: TrainConfig) -> DualOpT:
    if config.optimizer == "sgd":
        return DualOpT(model, patience=config.patience, sgd_lr=config.lr, max_epochs=(0, config.epochs))
    return DualOpT(
        model,
        patience=config.patience,
        lr=config.lr,
        sgd_lr=1e-3 if config.sgd_lr is None else config.sgd_lr,
        max_epochs=(config.epochs, config.sgd_epochs or 0),
    )


def _check_same_data(saved: dict[str, Any], data: Data, fingerprint: dict[str, int], output: Path) -> None:
    if saved["classes"] != data.classes:
        raise InputError(
            f"--resume: the run in {output} has the classes {_list(saved['classes'])}, the data has "
            f"{_list(data.classes)}"
        )
    changed = [split for split, value in fingerprint.items() if saved["data_fingerprint"][split] != value]
    if changed:
        raise InputError(
            f"--resume: the {' and the '.join(changed)} images of {data.name} are not those that the run "
            f"in {output} was started with"
        )


def _list(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f", … ({len(names)})" if len(names) > 10 else "")


def _write_metrics(output: Path, history: list[dict[str, Any]]) -> None:
    atomic_write(output / METRICS, "".join(json.dumps(row) + "\n" for row in history).encode())
