"""A training run: its setup, its epochs, its checkpoints, and how it continues after an interruption."""

import copy
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn

from ..checkpoint import (
    BEST,
    LAST,
    PREVIOUS,
    atomic_write,
    check_space,
    pack_checkpoint,
    read_checkpoint,
    read_last,
    rng_state,
    set_rng_state,
    write_json,
)
from ..data.augment import Augmentation, BatchMix, Chain, FlipCrop, PerImage, RandAugment, scaled_size
from ..data.loader import load_data, to_device
from ..errors import InputError, first_line, listed, out_of_memory
from ..models.arguments import image_size
from ..models.registry import REFUSALS, build_model, create_model, downsampling
from .config import (
    ARGS,
    CURVES,
    DATA_ARGUMENTS,
    METRICS,
    NAMES,
    SUMMARY,
    TABLE,
    TENSORBOARD,
    TrainConfig,
    check_output,
    default_output,
    fit_to_data,
    resolve,
    seconds,
    to_dict,
)
from .distributed import World
from .engine import Engine, autocast_for, pick_device
from .interrupt import Interrupted, OutOfTimeError, deferred_interrupts
from .logging import (
    TensorBoard,
    epoch_line,
    header_lines,
    plot_curves,
    restart_line,
    stop_reason,
    summarize,
    summary_line,
    to_csv,
)
from .optim import freeze, load_weights_state, make_average, make_optimizer, make_scheduler, weights_state

_LOCK = ".lock"


@dataclass
class TrainResult:
    """The result of a run. Its files are in ``output``.

    ``best_top1`` (per cent) was reached at ``best_epoch`` of ``epochs``, on the validation images if there are any,
    else on the test set. ``summary`` has the top-1 accuracy on the test set. A run that ``max_time`` has stopped is not
    ``finished``: its summary is empty, and before its first epoch is over its best top-1 and epoch are None.
    """

    best_top1: float | None
    best_epoch: int | None
    epochs: int
    output: Path
    summary: dict[str, Any]
    finished: bool = True


def train(config: TrainConfig, log: Callable[[str], None] | None = None, start: float | None = None) -> TrainResult:
    """Train a model with DualOpT (or one of its phases), or resume a run, and write the run into ``config.output``.

    After every epoch ``last.pt`` and ``metrics.jsonl`` are replaced atomically, and ``best.pt`` if the epoch is the
    best. A run that was killed continues from ``last.pt``; on the CPU it gives the same bits as an uninterrupted run.
    Top-1 accuracy on the test set selects the best epoch, as in the paper. With ``validation``, top-1 on held-out
    training images selects it, and the test set is evaluated once, after the last epoch, with the selected weights. The
    function sets the random seeds of torch and Python and, with ``threads``, the number of threads of torch.

    In torch's default process group (:func:`cxv.training.distributed.process_group`) all processes train one model
    together: each computes its shard of every batch, and the main process writes the files. The result equals that of
    one process with the same batches, up to rounding. Batch norms, PyTorch's dropout, MixUp and CutMix are exceptions,
    because they work on the images of one process.

    Args:
        config: The arguments of the run.
        log: Function that receives the log lines. Default: print them.
        start: The time of ``time.monotonic`` from which ``max_time`` counts. Default: now.

    Raises:
        InputError: If arguments or files are invalid, the directory has another run, or the loss is not finite.
    """
    with ExitStack() as locks:
        return Trainer(config, log, start, locks).run()


class Trainer:
    """A run of :func:`train`: the constructor prepares everything and writes nothing, :meth:`run` trains.

    ``locks`` keeps other processes out of the output directory until it is closed.
    """

    def __init__(self, config: TrainConfig, log: Callable[[str], None] | None, start: float | None, locks: ExitStack):
        start = time.monotonic() if start is None else start
        world, self._locks = World.current(), locks
        self.world = world
        self.log = (log or (lambda line: print(line, flush=True))) if world.is_main else (lambda line: None)
        self._model_is_default = config.model is None and not config.resume
        world.broadcast_from_rank0(lambda: _lock(Path(config.output or default_output(config)), locks))
        self.config, saved, self._fallback = world.broadcast_from_rank0(partial(resolve, config))
        config = self.config
        self.output = Path(config.output)
        with world.sync_errors():
            if config.batch_size < world.size:
                size = config.batch_size
                raise InputError(f"`batch_size`: {size}, of all processes, and there are {world.size} of them")
            self.device = world.local_device(pick_device(config.device))
            self.autocast = autocast_for(config.precision, self.device)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self._load_data(saved)
        self._build_model(saved)
        self.opt = make_optimizer(self.model, config)
        self.average = make_average(self.model, config.ema_decay)
        self._copies = 4 if self.average is None else 5  # of the weights in a checkpoint: these, the best, two moments
        self.history: list[dict[str, Any]] = []
        self.post_training, self.resume_state = False, None
        self._saved_phase = None if saved is None else saved["optimizer"]["phase"]
        self.engine = Engine(self.model, self.data, self.opt, config, self.device, self.autocast, world, self.average)
        if saved is not None:
            self._restore(saved)
        steps = config.epochs * math.ceil(len(self.data.train) / (config.batch_size * config.accumulate))
        self.engine.scheduler = make_scheduler(self.opt, config, steps, saved)
        self.engine.frozen = self.frozen
        if config.max_time is not None:
            self.engine.deadline = start + seconds(config.max_time)
        self.augment = _make_augmentation(config, self.data.train.normalization["mean"])
        self.mix = _make_mixing(config, len(self.data.classes))

    def run(self) -> TrainResult:
        """Train to the end. Ctrl-C and SIGTERM raise ``KeyboardInterrupt`` when the run is saved."""
        self._begin()
        try:
            with self._explained_errors(), deferred_interrupts(self.world.is_main):
                while not self.opt.finished:
                    self._train_epoch()
                if self.data.validation is not None:
                    self._test_once()
        except OutOfTimeError:
            opt = self.opt
            return TrainResult(opt.best_top1, opt.best_epoch, opt.epoch, self.output, {}, finished=False)
        return self._finish()

    def _load_data(self, saved: dict[str, Any] | None) -> None:
        config, world = self.config, self.world
        kwargs = {name: getattr(config, name) for name in DATA_ARGUMENTS}
        data = world.rank0_first(lambda: load_data(config.data, log=self.log, **kwargs))
        with world.sync_errors():
            fit_to_data(config, data.img_size, len(data.train))
        self.fingerprint = {name: split.fingerprint() for name, split in data.splits.items()}
        expected = world.broadcast_from_rank0(lambda: self.fingerprint)
        with world.sync_errors():
            if expected != self.fingerprint:
                raise InputError(f"`data`: the images that process {world.rank} finds are not those of process 0")
            if saved is not None:
                self._check_same_data(saved, data.classes)
            self.data = to_device(data, self.device, config.data_on_device)

    def _check_same_data(self, saved: dict[str, Any], classes: list[str]) -> None:
        if saved["classes"] != classes:
            raise InputError(
                f"`resume`: the run in {self.output} has the classes {listed(saved['classes'])}, the data "
                f"has {listed(classes)}"
            )
        before = saved["data_fingerprint"]  # a split can be new or gone: the validation images select the best epoch
        changed = [s for s in (self.fingerprint | before) if self.fingerprint.get(s) != before.get(s)]
        if changed:
            raise InputError(
                f"`resume`: the {' and the '.join(changed)} images of {self.config.data} are not those that the run "
                f"in {self.output} was started with"
            )

    def _build_model(self, saved: dict[str, Any] | None) -> None:
        config, data = self.config, self.data
        random.seed(config.seed)
        torch.manual_seed(config.seed)
        kwargs = {"num_classes": len(data.classes), "in_chans": data.in_chans, "img_size": data.img_size}
        optional = {name: getattr(config, name) for name in ("embed_dim", "drop_rate", "drop_path_rate")}
        optional[downsampling(config.model)] = config.stem_stride
        kwargs |= {"use_fused": config.fused} | {k: v for k, v in optional.items() if v is not None}
        if not config.recompute or config.init is not None:  # of the file with the first weights, or the default
            kwargs["recompute"] = config.recompute
        kwargs |= config.model_args or {}
        with self.world.sync_errors():
            self.model, self.model_kwargs = _create(config, kwargs, saved)
            self.model.to(self.device)
            size = image_size(data.img_size)
            for shape in dict.fromkeys((size, *(scaled_size(size, side) for side, _ in config.progressive or ()))):
                self._try_model((data.in_chans, *shape))
            self.frozen = freeze(self.model, config.freeze)
        if config.compile:
            self.model.compile()  # in place: the same parameters by the same names

    def _try_model(self, shape: tuple[int, int, int]) -> None:
        """Run one image (C, H, W) through the model before the run writes anything: some arguments fail only there."""
        try:
            with torch.no_grad(), self.autocast():
                self.model.eval()(torch.zeros(1, *shape, device=self.device))
        except REFUSALS as error:
            size, side = "×".join(map(str, shape)), min(image_size(self.data.img_size))
            hint = f"; `progressive` {side}:{self.config.epochs} keeps one size" if min(shape[1:]) != side else ""
            raise InputError(
                f"`model` {self.config.model}: refuses an image of {size}: {first_line(error)}{hint}"
            ) from error
        self.model.train()

    def _restore(self, saved: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        with self.world.sync_errors():
            load_weights_state(self.model, self.average, saved, self.output)
        self.opt.load_state_dict(saved["optimizer"])
        self.engine.scaler.load_state_dict(saved["scaler"])
        self.engine.sampler.set_state(saved["sampler"])
        set_rng_state(saved["rng"], self.device)
        self.history = saved["history"]
        self.post_training = saved.get("post_training", False)
        if self.opt.phase == self._saved_phase:  # else a changed cap ended that phase, and its epoch
            self.resume_state = saved.get("resume_state")

    def _begin(self) -> None:
        """Log the configuration of the run, and create or check the output directory."""
        config, log = self.config, self.log
        if self._model_is_default:
            width = "" if config.embed_dim is None else f" with `embed_dim` {config.embed_dim}"
            log(f"no `model` given: {config.model}{width}, the default for {config.data}")
        parameters = sum(p.numel() for p in self.model.parameters())
        for line in header_lines(config, self.data, parameters, self.device, self.world):
            log(line)
        if self._saved_phase is None:
            self.world.broadcast_from_rank0(lambda: _make_output(self.output, config.overwrite, self._locks))
            self._check_space()
            self._save()  # so that a run killed in its first epoch can be resumed too
        else:
            self._begin_resumed()
        self._board = None
        with self.world.sync_errors():
            if self.world.is_main:
                write_json(self.output / ARGS, to_dict(config))
                self._board = TensorBoard(self.output / TENSORBOARD, self.history) if config.tensorboard else None

    def _check_space(self) -> None:
        self.world.broadcast_from_rank0(lambda: check_space(self.output, self.model, self._copies))

    def _begin_resumed(self) -> None:
        opt, log = self.opt, self.log
        if self._fallback is not None:
            log(self._fallback)
        log(f"resumed after epoch {_progress(opt.epoch, self.resume_state)}, in the {NAMES[opt.phase]} phase")
        if opt.phase != self._saved_phase:  # a changed cap ends the phase here
            self._log_switch()
        self._post_train_if_due()  # post_train can be given to a run that is over
        if self.data.validation is not None and not opt.finished:  # another epoch may be selected
            self.history = [{k: v for k, v in row.items() if not k.startswith("test_")} for row in self.history]
        state = self.resume_state and {**self.resume_state, "sampler": self.engine.sampler.get_state()}
        self._save(resume_state=state, keep=self._fallback is None)
        if opt.finished:
            name = "epochs" if self.config.optimizer != "dualopt" else "sgd_epochs"
            log(f"the training is over already: nothing left to train (raise `{name}` to go on)")

    def _train_epoch(self) -> None:
        opt = self.opt
        self._check_space()
        self.engine.augment, self.engine.mix = (None, None) if self.post_training else (self.augment, self.mix)
        row = self.engine.train_one_epoch(self.resume_state)
        self.resume_state = None
        best = opt.end_epoch(row["test_top1" if self.data.validation is None else "validation_top1"])
        row["best_top1"] = opt.best_top1
        self.history.append(row)
        self.log(epoch_line(row, best))
        if row["phase"] != opt.phase:
            self._log_switch()
        self._post_train_if_due()
        self._save(best)
        if self._board is not None:
            self._board.add(row)

    def _log_switch(self) -> None:
        self.log(restart_line("switch to SGD", self.opt, stop_reason("adamw", self.opt.switch_reason, self.config)))

    def _post_train_if_due(self) -> None:
        if self.opt.finished and self.config.post_train and not self.post_training:
            reason = stop_reason(self.opt.phase, self.opt.stop_reason, self.config)
            self.opt.restart()
            self.post_training, self.resume_state = True, None
            self.log(restart_line("post-training on clean images", self.opt, reason))

    def _test_once(self) -> None:
        """Evaluate the test set with the selected weights, once, and add the result to the line of their epoch."""
        row = next(row for row in self.history if row["epoch"] == self.opt.best_epoch)
        if "test_top1" in row:
            return
        selected = self.world.broadcast_from_rank0(lambda: read_checkpoint(self.output / BEST))
        model = self.engine.evaluated
        weights = copy.deepcopy(model.state_dict())
        model.load_state_dict(selected["model"])
        try:
            row |= self.engine.evaluate_split("test")
        finally:
            model.load_state_dict(weights)
        selected["history"][-1] = row
        self.world.broadcast_from_rank0(lambda: atomic_write(self.output / BEST, pack_checkpoint(selected)))
        self._save(keep=False)
        if self._board is not None:
            self._board.add(row)

    def _save(self, best: bool = False, resume_state: dict[str, Any] | None = None, keep: bool = True) -> None:
        """Write the checkpoint and ``metrics.jsonl``; ``keep`` keeps the last checkpoint as the previous one."""
        with self.world.sync_errors():
            if not self.world.is_main:
                return
            content = pack_checkpoint(self._checkpoint(resume_state))
            try:
                if best:
                    atomic_write(self.output / BEST, content)
                atomic_write(self.output / LAST, content, self.output / PREVIOUS if keep else None)
                # after the checkpoint, which is the truth: a resumed run rewrites them
                lines = "".join(json.dumps(row) + "\n" for row in self.history)
                atomic_write(self.output / METRICS, lines.encode())
                atomic_write(self.output / TABLE, to_csv(self.history))
            except InputError as error:
                hint = f"; what {self.output / LAST} has is kept, and `resume` goes on from it"
                raise InputError(f"{error}{hint if self.history else ''}") from error

    def _checkpoint(self, resume_state: dict[str, Any] | None) -> dict[str, Any]:
        state = dict(resume_state or {})
        sampler, scheduler = state.pop("sampler", None), self.engine.scheduler
        return {
            **weights_state(self.model, self.average),
            "model_name": self.config.model,
            "model_kwargs": self.model_kwargs,
            "classes": self.data.classes,
            **self.data.preprocessing.to_dict(),
            "data_fingerprint": self.fingerprint,
            "optimizer": self.opt.state_dict(),
            "post_training": self.post_training,
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "scaler": self.engine.scaler.state_dict(),
            "sampler": self.engine.sampler.get_state() if sampler is None else sampler,
            "resume_state": state or None,
            "rng": rng_state(self.device),
            "epoch": self.opt.epoch,
            "history": self.history,
            "args": to_dict(self.config),
        }

    @contextmanager
    def _explained_errors(self) -> Iterator[None]:
        """In the block, save the run if it is interrupted, and convert some errors to ``InputError``.

        These are the errors if memory is exhausted, or if another process has ended.
        """
        resume = f"go on with  cxv train --resume {self.output}"
        try:
            yield
        except (KeyboardInterrupt, OutOfTimeError) as error:
            if isinstance(error, Interrupted | OutOfTimeError) and (state := self.engine.resume_state) is not None:
                self._save(resume_state=state)
            if self.world.is_main:
                saved, _ = read_last(self.output)
                done = _progress(saved["epoch"], saved["resume_state"])
                out_of_time = isinstance(error, OutOfTimeError)
                reason = f"stopped by `max_time` {self.config.max_time}" if out_of_time else "interrupted"
                self.log(f"{reason}; epoch {done} is saved: {resume}")
            raise
        except RuntimeError as error:
            if out_of_memory(error):
                raise InputError(
                    f"`batch_size` {self.config.batch_size}: out of memory on {self.device} "
                    f"({str(error).split('.')[0]}); use a smaller one (`accumulate` keeps the step the same), `fused`, "
                    f"or `precision` fp16. The last good checkpoint is {self.output / LAST}"
                ) from error
            if not self.world.lost_process(error):
                raise
            raise InputError(
                f"process {self.world.rank} of {self.world.size}: another one has ended, and says why if it could; "
                f"{resume}"
            ) from error

    def _finish(self) -> TrainResult:
        opt, output = self.opt, self.output
        self.log(f"finished: {stop_reason(opt.phase, opt.stop_reason, self.config)}")
        summary = summarize(self.history)
        result = TrainResult(opt.best_top1, opt.best_epoch, opt.epoch, output, summary)
        if not self.world.is_main:
            return result
        if self._board is not None:
            self._board.close()
        atomic_write(output / CURVES, plot_curves(self.history, f"{self.config.model} on {self.config.data}"))
        write_json(output / SUMMARY, summary)
        split = "" if self.data.validation is None else "validation "
        self.log(f"best {split}top-1 {opt.best_top1:.2f} % at epoch {opt.best_epoch} of {opt.epoch}")
        self.log(summary_line(summary))
        files = [BEST, LAST, METRICS, TABLE, ARGS, SUMMARY, CURVES] + [TENSORBOARD] * (self._board is not None)
        self.log(f"in {output}: {', '.join(files)}")
        return result


def _create(
    config: TrainConfig, kwargs: dict[str, Any], saved: dict[str, Any] | None
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model, with the weights of ``config.init`` if a run starts from them, and all of its arguments."""
    if saved is None and config.init is not None:
        try:
            model = create_model(config.model, checkpoint=config.init, **kwargs)
        except REFUSALS as error:
            raise InputError(f"`init`: {first_line(error)}") from error
        return model, model.model_kwargs | kwargs
    kwargs = kwargs if saved is None else saved["model_kwargs"] | kwargs
    return build_model(config.model, kwargs), kwargs


def _lock(output: Path, locks: ExitStack) -> None:
    """Keep other processes out of the directory, if it exists. This process can lock it twice."""
    if not output.is_dir():
        return
    try:
        locks.enter_context(FileLock(output / _LOCK, timeout=0, is_singleton=True))
    except Timeout as error:
        raise InputError(f"`output`: another process is training in {output}; give another directory") from error
    except (OSError, NotImplementedError):  # a read-only directory, which is reported later, or no locks on this disk
        return


def _make_output(output: Path, overwrite: bool, locks: ExitStack) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"`output`: cannot create {output} ({error.strerror})") from error
    _lock(output, locks)
    check_output(output, overwrite)  # again: another process can have trained here while this one read its data
    if overwrite:
        for name in (LAST, PREVIOUS, BEST, METRICS, TABLE, CURVES, ARGS, SUMMARY):
            (output / name).unlink(missing_ok=True)
        shutil.rmtree(output / TENSORBOARD, ignore_errors=True)


def _make_augmentation(config: TrainConfig, mean: float | list[float]) -> Augmentation | None:
    steps: list[Augmentation] = []
    if config.hflip or config.random_crop:
        steps.append(FlipCrop(config.hflip, config.random_crop or 0, seed=config.seed))
    if config.rand_augment is not None:
        steps.append(RandAugment(*config.rand_augment, seed=config.seed))
    if config.color_jitter or config.random_erasing:
        from torchvision.transforms import v2

        jitter = config.color_jitter or 0.0
        gray = [255 * value for value in ([mean] if isinstance(mean, float) else mean)]  # 0 when it is normalized
        erasing = v2.RandomErasing(config.random_erasing or 0.0, value=gray)
        steps.append(PerImage(v2.Compose([v2.ColorJitter(jitter, jitter, jitter), erasing]), seed=config.seed))
    return Chain(tuple(steps)) if len(steps) > 1 else next(iter(steps), None)


def _make_mixing(config: TrainConfig, num_classes: int) -> BatchMix | None:
    if not (config.mixup or config.cutmix):
        return None
    from torchvision.transforms import v2

    kinds = ((v2.MixUp, config.mixup), (v2.CutMix, config.cutmix))
    return BatchMix(v2.RandomChoice([kind(alpha=a, num_classes=num_classes) for kind, a in kinds if a]), config.seed)


def _progress(epoch: int, state: dict[str, Any] | None) -> str:
    return f"{epoch} and {state['step']} batches of the next" if state and state["step"] else str(epoch)
