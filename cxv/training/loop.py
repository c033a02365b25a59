"""The training loop of ``cxv train``."""

import json
import math
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
from .curves import plot_curves
from .data import MEAN, STD, Data, ImageSet, batches, load_data
from .dualopt import DualOpT
from .errors import InputError
from .interrupt import deferred_interrupts, interruptible
from .progress import Progress

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
METRICS, ARGS, CURVES = "metrics.jsonl", "args.json", "curves.png"
DEFAULTS: dict[str, Any] = {
    "data": "digits",
    "epochs": 300,
    "patience": 20,
    "batch_size": 128,
    "lr": 1e-3,
    "sgd_lr": 1e-3,
    "precision": "fp32",
    "fused": True,
    "seed": 0,
    "device": "auto",
    "on_corrupt": "error",
    "model": "cpv-5/4",
}
"""The paper's recipe (section 4); its batch size is not given. ``sgd_epochs`` is a third of ``epochs``, rounded up."""
DIGITS_DEFAULTS: dict[str, Any] = {"epochs": 60}
DIGITS_MODEL: dict[str, Any] = {"model": "cpv-2/4", "embed_dim": 64}
"""For digits, when no model is named: enough for 8×8 images, and minutes on a laptop's CPU."""

_CHANGEABLE = {"epochs", "sgd_epochs", "device", "threads", "data_dir", "output", "on_corrupt"}
_CHANGEABLE |= {"resume", "overwrite"}
_CHECK_EVERY = 16  # batches between looks at the loss: each look makes a GPU wait


@dataclass
class TrainConfig:
    """The arguments of ``cxv train``. ``None`` takes the default, or what the run has when it is resumed.

    Rates are per step, sizes in pixels or images, ``epochs`` and ``sgd_epochs`` the caps of DualOpT's two
    phases.
    """

    model: str | None = None
    data: str | None = None
    data_dir: str | None = None
    epochs: int | None = None
    sgd_epochs: int | None = None
    patience: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    sgd_lr: float | None = None
    embed_dim: int | None = None
    drop_rate: float | None = None
    img_size: int | None = None
    precision: str | None = None
    fused: bool | None = None
    limit_train: int | None = None
    limit_test: int | None = None
    seed: int | None = None
    device: str | None = None
    output: str | None = None
    on_corrupt: str | None = None
    threads: int | None = None
    resume: bool = False
    overwrite: bool = False


@dataclass
class TrainResult:
    """``best_top1`` (per cent) was reached at ``best_epoch`` of ``epochs``; the files are in ``output``."""

    best_top1: float
    best_epoch: int
    epochs: int
    output: Path


def train(config: TrainConfig, log: Callable[[str], None] | None = None) -> TrainResult:
    """Train a model with DualOpT, or go on with a run (``resume``), and write everything into ``output``.

    After every epoch ``last.pt`` (and ``best.pt`` at a best) and ``metrics.jsonl`` are replaced atomically; a
    run that is killed goes on from ``last.pt``, on the CPU to the same bits as if nothing had happened. Top-1
    is of the test split and picks the best epoch, as in the paper: for an unbiased figure keep a third split
    aside. Sets torch's and Python's random seeds and, given ``threads``, torch's number of threads.

    Raises:
        InputError: bad arguments or files, a directory that holds another run, or a loss that is not finite.
    """
    log = log or (lambda line: print(line, flush=True))
    named = config.model is not None or config.resume
    config, saved = _resolve(config)
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
    opt = DualOpT(
        model,
        patience=config.patience,
        lr=config.lr,
        sgd_lr=config.sgd_lr,
        max_epochs=(config.epochs, config.sgd_epochs),
    )
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
                "scaler": scaler.state_dict(),
                "sampler": sampler.get_state(),
                "rng": rng_state(device),
                "epoch": opt.epoch,
                "history": history,
                "args": _arguments(config),
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
    log(
        f"{config.model}: {parameters:,} parameters, {'fused' if config.fused else 'plain PyTorch'}, {config.precision}"
    )
    log(
        f"{config.data}: {len(data.train):,} training and {len(data.test):,} test images, "
        f"{len(data.classes)} classes, {data.in_chans}×{data.img_size}×{data.img_size}"
    )
    log(f"on {device} with {torch.get_num_threads()} threads, output in {output}")
    if saved is None:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--output: cannot create {output} ({error.strerror})") from error
        if config.overwrite:
            for name in (LAST, BEST, METRICS, CURVES, ARGS):
                (output / name).unlink(missing_ok=True)
        save(best=False)  # so that a run killed in its first epoch can be resumed too
    else:
        log(f"resumed after epoch {opt.epoch}, in the {_NAMES[opt.phase]} phase")
        if opt.phase != saved["optimiser"]["phase"]:  # a changed cap ends the phase here
            log(_switch_line(opt, config))
        if opt.finished:
            log("both phases are over already: nothing left to train (raise --sgd-epochs to go on)")
        _write_metrics(output, history)
    atomic_write(output / ARGS, (json.dumps(_arguments(config), indent=2) + "\n").encode())

    try:
        with deferred_interrupts():
            while not opt.finished:
                row = _train_epoch(model, data, opt, scaler, sampler, config, device, autocast, output)
                best = opt.end_epoch(row["test_top1"])
                row["best_top1"] = opt.best_top1
                history.append(row)
                save(best)
                log(_epoch_line(row, best))
                if row["phase"] != opt.phase:
                    log(_switch_line(opt, config))
    except KeyboardInterrupt:
        epoch = read_checkpoint(output / LAST)["epoch"]
        log(f"interrupted; epoch {epoch} is saved: go on with  cxv train --resume --output {output}")
        raise
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"--batch-size {config.batch_size}: out of memory on {device} ({str(error).split('.')[0]}); use "
            f"a smaller one, --fused, or --precision fp16. The last good checkpoint is {output / LAST}"
        ) from error

    log(f"finished: {_NAMES[opt.phase]} {_why(opt.phase_over, opt.phase, config)}")
    drawn = plot_curves(history, output / CURVES, f"{config.model} on {config.data}", opt.switch_epoch)
    log(f"best top-1 {opt.best_top1:.2f} % at epoch {opt.best_epoch} of {opt.epoch}")
    files = [BEST, LAST, METRICS, ARGS] + ([CURVES] if drawn else [])
    log(f"in {output}: {', '.join(files)}" + ("" if drawn else " (no curves: pip install 'cxv[train]')"))
    return TrainResult(opt.best_top1, opt.best_epoch, opt.epoch, output)


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
    with Progress(total, f"epoch {epoch} {_NAMES[phase]}") as progress:
        for step, (x, y) in enumerate(interruptible(batches(data.train, config.batch_size, device, sampler)), 1):
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
    test_loss, test_top1 = evaluate(model, data.test, config.batch_size, device, autocast)
    # the last step of the epoch can break weights whose loss was still finite
    if not math.isfinite(test_loss):
        where = f"at epoch {epoch}, after batch {steps} of {steps}"
        raise _diverged(f"the test loss is {test_loss} {where}", output)
    return {
        "epoch": epoch,
        "phase": phase,
        "lr": lr,
        "train_loss": loss_sum / total,
        "train_top1": 100 * hits.item() / total,
        "test_loss": test_loss,
        "test_top1": test_top1,
        "images_per_second": total / train_seconds,
        "seconds": time.perf_counter() - start,
    }


_NAMES = {"adamw": "AdamW", "sgd": "SGD"}


def _diverged(what: str, output: Path) -> InputError:
    last = output / LAST
    return InputError(
        f"{what}; the last good checkpoint is {last} (after epoch {read_checkpoint(last)['epoch']}). "
        "Try a smaller --lr, or --precision fp32"
    )


def _epoch_line(row: dict[str, Any], best: bool) -> str:
    return (
        f"epoch {row['epoch']:3d} {_NAMES[row['phase']]:5s} lr {row['lr']:g}  loss {row['train_loss']:.4f} "
        f"top-1 {row['train_top1']:6.2f} %  "
        f"test loss {row['test_loss']:.4f} top-1 {row['test_top1']:6.2f} %  "
        f"{row['images_per_second']:.0f} images/s {row['seconds']:.1f} s" + ("  best" if best else "")
    )


def _switch_line(opt: DualOpT, config: TrainConfig) -> str:
    return (
        f"switch to SGD after epoch {opt.switch_epoch}: AdamW {_why(opt.switch_reason, 'adamw', config)}; "
        f"reloaded the best weights, of epoch {opt.best_epoch} ({opt.best_top1:.2f} %)"
    )


def _why(reason: str, phase: str, config: TrainConfig) -> str:
    if reason == "stale":
        return f"is stale (top-1 made no progress for {config.patience} epochs)"
    name = "epochs" if phase == "adamw" else "sgd_epochs"
    return f"is capped ({_flag(name)} {getattr(config, name)})"


def _resolve(config: TrainConfig) -> tuple[TrainConfig, dict[str, Any] | None]:
    """Fill in the defaults, or when resuming what the run has, and check what can be checked at once."""
    if config.resume and config.overwrite:
        raise InputError("--resume and --overwrite exclude each other")
    given = {k: v for k, v in asdict(config).items() if v is not None}
    defaults = dict(DEFAULTS)
    if given.get("data", "digits") == "digits":
        defaults |= DIGITS_DEFAULTS | ({} if "model" in given else DIGITS_MODEL)
    full = defaults | given
    full.setdefault("sgd_epochs", -(-full["epochs"] // 3))
    full.setdefault("output", f"runs/{full['data']}-{str(full['model']).replace('/', '-')}")
    output, saved = Path(full["output"]), None
    if config.resume:
        if not (output / LAST).is_file():
            raise InputError(f"--resume: {output} holds no run to go on with ({LAST} is not there)")
        saved = read_checkpoint(output / LAST)
        full = saved["args"] | given | {"output": full["output"]}
        changed = [
            f"{_flag(k)} ({saved['args'].get(k)} in the run, {v} now)"
            for k, v in given.items()
            if k not in _CHANGEABLE and saved["args"].get(k) != v
        ]
        if changed:
            raise InputError(f"--resume: the run in {output} has other arguments: {', '.join(changed)}")
    else:
        present = [name for name in (LAST, BEST, METRICS) if (output / name).exists()]
        if present and not config.overwrite:
            raise InputError(
                f"--output: {output} holds another run ({', '.join(present)}); give --resume to go on with "
                "it, --overwrite to delete it, or another directory"
            )
        if output.exists() and not output.is_dir():
            raise InputError(f"--output: {output} is not a directory")
    config = replace(config, **{f.name: full.get(f.name) for f in fields(TrainConfig) if f.name in full})
    for name, least in (("epochs", 0), ("sgd_epochs", 0), ("patience", 1), ("batch_size", 1), ("threads", 1)):
        value = getattr(config, name)
        if value is not None and value < least:
            raise InputError(f"{_flag(name)}: expected at least {least}, got {value}")
    for name in ("lr", "sgd_lr"):
        value = getattr(config, name)
        if not (value > 0 and math.isfinite(value)):
            raise InputError(f"{_flag(name)}: expected a finite number above 0, got {value}")
    if config.drop_rate is not None and not 0 <= config.drop_rate < 1:
        raise InputError(f"--drop-rate: expected at least 0 and less than 1, got {config.drop_rate}")
    if config.epochs == config.sgd_epochs == 0:
        raise InputError("--epochs and --sgd-epochs are both 0: nothing to train")
    if saved is not None:
        done = {phase: sum(row["phase"] == phase for row in saved["history"]) for phase in ("adamw", "sgd")}
        for name, phase in (("epochs", "adamw"), ("sgd_epochs", "sgd")):
            if getattr(config, name) < done[phase]:
                raise InputError(
                    f"{_flag(name)}: {getattr(config, name)}, but the run has done {done[phase]} epochs of "
                    f"{_NAMES[phase]} already"
                )
    return config, saved


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


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _arguments(config: TrainConfig) -> dict[str, Any]:
    return {k: v for k, v in asdict(config).items() if k not in ("resume", "overwrite")}


def _write_metrics(output: Path, history: list[dict[str, Any]]) -> None:
    atomic_write(output / METRICS, "".join(json.dumps(row) + "\n" for row in history).encode())
