"""The arguments of a training run: defaults, the paper's recipes, and what is wrong with them."""

import json
import math
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from cxv_kernels.validation import to_number

from ..checkpoint import BEST, LAST, PREVIOUS, read_last
from ..errors import InputError
from ..models.registry import has_fused_ops
from .augment import NUM_BINS
from .optim import SCHEDULES
from .progressive import default_stages

METRICS, ARGS, CURVES, SUMMARY = "metrics.jsonl", "args.json", "curves.png", "summary.json"
TENSORBOARD = "tensorboard"
OPTIMIZERS = ("dualopt", "adamw", "sgd")
DEFAULTS: dict[str, Any] = {
    "data": "digits",
    "optimizer": "dualopt",
    "post_train": False,
    "epochs": 300,
    "patience": 20,
    "batch_size": 128,
    "accumulate": 1,
    "lr": 1e-3,
    "schedule": "constant",
    "label_smoothing": 0.0,
    "hflip": False,
    "precision": "fp32",
    "compile": False,
    "fused": True,
    "recompute": True,
    "seed": 0,
    "device": "auto",
    "on_corrupt": "error",
    "tensorboard": False,
    "model": "cpv-5/4",
}
"""The paper's recipe (section 4) without augmentation; its batch size is not given. With ``dualopt``, ``sgd_epochs`` is
a third of ``epochs``, rounded up, and ``sgd_lr`` 0.001."""
TINY_IMAGENET_DEFAULTS: dict[str, Any] = {"stem_stride": 2}
"""The paper's, for 64×64 images: a map of 32×32."""
DIGITS_DEFAULTS: dict[str, Any] = {"epochs": 60}
DIGITS_MODEL: dict[str, Any] = {"model": "cpv-2/4", "embed_dim": 64}
"""For digits, when no model is named: enough for 8×8 images, and minutes on a laptop's CPU."""

_PAPER = {
    "optimizer": "dualopt",
    "epochs": 300,
    "sgd_epochs": 100,
    "patience": 20,
    "batch_size": 128,
    "lr": 1e-3,
    "sgd_lr": 1e-3,
    "precision": "fp32",
}
_MODERN = {
    "optimizer": "adamw",
    "epochs": 30,
    "batch_size": 64,
    "lr": 2e-3,
    "schedule": "onecycle",
    "weight_decay": 0.05,
    "label_smoothing": 0.1,
    "hflip": True,
    "precision": "bf16",
}
RECIPES: dict[str, dict[str, Any]] = {
    "paper": _PAPER,
    "paper-augmented": _PAPER | {"post_train": True},
    "modern": _MODERN,
}
"""Section 4's recipe; section 5's with RandAugment and post-training (Table 4); one for few epochs, without dropout, at
growing image sizes, the rest of which :func:`fit_to_data` sets."""
RAND_AUGMENT = {"cnv": (1, 1), "cpv": (1, 1), "cltv": (3, 3)}
"""Table 4's operations and magnitude, by the family of the model."""

RESERVED = {
    "num_classes": "it comes from the data",
    "in_chans": "it comes from the data",
    "depth": "it comes from the model's name",
    "num_heads": "it comes from the model's name",
    "checkpoint": "give `init`",
    **{name: f"give `{name}`" for name in ("img_size", "embed_dim", "drop_rate")},
    "use_fused": "give `fused`",
    "recompute": "give `recompute`",
}
"""Arguments of a model that ``model_args`` may not set, and why."""

_NUMBERS = {int | None: (int, "a whole number"), float | None: (int | float, "a number")}
"""For the type of an argument that is a number, the types that are allowed, in words too."""

NAMES = {"adamw": "AdamW", "sgd": "SGD"}
_CHANGEABLE = {"epochs", "sgd_epochs", "post_train", "device", "threads", "data_dir", "output", "on_corrupt"}
_CHANGEABLE |= {"resume", "overwrite", "cache_dir", "data_on_device", "tensorboard"}
_ONE_PHASE = ("schedule", "warmup_epochs", "ema_decay", "progressive")  # arguments that need a known number of epochs


@dataclass
class TrainConfig:
    """The arguments of ``cxv train``. ``None`` takes the default, or what the run has when it is resumed.

    ``init`` is a file or a run whose weights the model starts with, a new classifier where the classes are others in
    number. Rates are per step, sizes in pixels or images. ``epochs`` and ``lr`` are of the only phase or of DualOpT's
    first, ``sgd_epochs`` and ``sgd_lr`` of its second; ``accumulate`` batches of ``batch_size`` images, which the
    processes of a data-parallel run share among them, make one step, whose gradient has a norm of at most
    ``clip_grad``. ``schedule`` changes the rate after every step, over all epochs, with ``warmup_epochs`` (may be a
    fraction) up to the peak ``lr``. ``weight_decay`` is AdamW's of matrices and convolutions, and 0 of the rest; None
    is 0.01 of everything. ``ema_decay`` averages the weights over the steps; the average is evaluated and saved.
    ``progressive`` is (image side, epochs) by stage; ``random_crop`` the padding of random crops; ``rand_augment`` is
    (operations, magnitude); ``validation`` the number of training images held out to select by; ``model_args`` the
    model's other arguments, by name. ``seeds``: all those of the runs that this one is of, see
    :func:`cxv.training.train_seeds`. Paths, a ``torch.device`` and the numbers of NumPy or of a tensor are kept as
    ``str`` and numbers.

    Raises:
        InputError: an argument that a run's files cannot hold; something else where a number belongs.
    """

    model: str | None = None
    init: str | None = None
    data: str | None = None
    data_dir: str | None = None
    cache_dir: str | None = None
    data_on_device: bool | None = None
    recipe: str | None = None
    optimizer: str | None = None
    hflip: bool | None = None
    random_crop: int | None = None
    rand_augment: tuple[int, int] | None = None
    post_train: bool | None = None
    validation: int | None = None
    epochs: int | None = None
    sgd_epochs: int | None = None
    patience: int | None = None
    batch_size: int | None = None
    accumulate: int | None = None
    clip_grad: float | None = None
    lr: float | None = None
    sgd_lr: float | None = None
    schedule: str | None = None
    warmup_epochs: float | None = None
    weight_decay: float | None = None
    label_smoothing: float | None = None
    ema_decay: float | None = None
    progressive: tuple[tuple[int, int], ...] | None = None
    embed_dim: int | None = None
    drop_rate: float | None = None
    stem_stride: int | None = None
    model_args: dict[str, Any] | None = None
    img_size: int | None = None
    precision: str | None = None
    fused: bool | None = None
    recompute: bool | None = None
    compile: bool | None = None
    limit_train: int | None = None
    limit_test: int | None = None
    seed: int | None = None
    seeds: tuple[int, ...] | None = None
    device: str | None = None
    output: str | None = None
    on_corrupt: str | None = None
    threads: int | None = None
    tensorboard: bool | None = None
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        for f in fields(self):
            value = _plain(getattr(self, f.name))
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                raise InputError(f"`{f.name}`: expected numbers and strings, got {value!r} ({error})") from error
            allowed, words = _NUMBERS.get(f.type, (object, ""))
            if value is not None and (not isinstance(value, allowed) or (words and isinstance(value, bool))):
                raise InputError(f"`{f.name}`: expected {words}, got {value!r}")
            setattr(self, f.name, value)


def resolve(config: TrainConfig) -> tuple[TrainConfig, dict[str, Any] | None, str | None]:
    """Fill in the defaults, or when resuming what the run has, and check what can be checked at once.

    Returns:
        The configuration and, when resuming, the checkpoint to go on from, and why that is not ``last.pt``.

    Raises:
        InputError: an argument is out of its range, contradicts another one or the run in ``output``.
    """
    if config.resume and config.overwrite:
        raise InputError("`resume` and `overwrite` exclude each other")
    given = {k: v for k, v in asdict(config).items() if v is not None}
    full, saved, fallback = _with_defaults(given), None, None
    output = Path(full["output"])
    if config.resume:
        if not any((output / name).is_file() for name in (LAST, PREVIOUS)):
            raise InputError(f"`resume`: {output} holds no run to go on with ({LAST} is not there)")
        saved, fallback = read_last(output)
        run = DEFAULTS | saved["args"]  # an older run lacks the newer arguments
        full = run | given | {"output": full["output"]}
        changeable = _CHANGEABLE - ({"epochs"} if run["schedule"] != "constant" or run.get("progressive") else set())
        changed = [
            f"`{k}` ({run.get(k)} in the run, {v} now)"
            for k, v in given.items()
            if k not in changeable and run.get(k) != v
        ]
        if changed:
            raise InputError(f"`resume`: the run in {output} has other arguments: {', '.join(changed)}")
    else:
        present = [name for name in (LAST, PREVIOUS, BEST, METRICS) if (output / name).exists()]
        if present and not config.overwrite:
            raise InputError(
                f"`output`: {output} holds another run ({', '.join(present)}); give `resume` to go on with "
                "it, `overwrite` to delete it, or another directory"
            )
        if output.exists() and not output.is_dir():
            raise InputError(f"`output`: {output} is not a directory")
    config = replace(config, **{f.name: full.get(f.name) for f in fields(TrainConfig) if f.name in full})
    _check(config)
    if saved is not None:
        _check_progress(config, saved)
    return config, saved, fallback


def fit_to_data(config: TrainConfig, img_size: int, num_images: int) -> None:
    """Set what depends on the data: the image size, and what the recipe ``"modern"`` makes of it and of the images.

    Raises:
        InputError: a stage of ``progressive`` has larger images than the data.
    """
    config.img_size = img_size
    if config.recipe == "modern":
        steps = config.epochs * math.ceil(num_images / (config.batch_size * config.accumulate))
        derived = {
            "progressive": default_stages(img_size, config.epochs),
            "random_crop": max(1, img_size // 8),
            "ema_decay": min(0.999, max(0.5, 1 - 20 / steps)),
        }
        for name, value in derived.items():
            if getattr(config, name) is None:
                setattr(config, name, value)
    too_large = [size for size, _ in config.progressive or () if size > img_size]
    if too_large:
        raise InputError(f"`progressive`: {too_large[0]} pixels, and the images have {img_size} (`img_size`)")


def default_output(config: TrainConfig) -> str:
    """Where a run goes without ``output``."""
    return _with_defaults({k: v for k, v in asdict(config).items() if v is not None})["output"]


def flag(name: str) -> str:
    """The command line's name of an argument, for :mod:`cxv.cli` and the log of a run."""
    return "--model-arg" if name == "model_args" else f"--{name.replace('_', '-')}"


def arguments(config: TrainConfig) -> dict[str, Any]:
    """What a run remembers of its configuration."""
    return {k: v for k, v in asdict(config).items() if k not in ("resume", "overwrite")}


def _plain(value: Any) -> Any:
    """The value as ``args.json`` and a checkpoint, which is read without pickle, can hold it."""
    if isinstance(value, os.PathLike | torch.device):
        return str(value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return to_number(value)


def _with_defaults(given: dict[str, Any]) -> dict[str, Any]:
    defaults = dict(DEFAULTS)
    if given.get("data", "digits") == "digits":
        defaults |= DIGITS_DEFAULTS | ({} if "model" in given else DIGITS_MODEL)
    if given.get("data") == "tiny-imagenet":
        defaults |= TINY_IMAGENET_DEFAULTS
    recipe = given.get("recipe")
    if recipe is not None:
        if recipe not in RECIPES:
            raise InputError(f"`recipe`: expected one of {', '.join(RECIPES)}, got {recipe!r}")
        defaults |= RECIPES[recipe]
    if "progressive" in given:
        defaults["epochs"] = sum(epochs for _, epochs in given["progressive"])
    full = defaults | given
    if recipe == "modern":
        full |= _modern_defaults(full, given)
    if full["schedule"] != "constant" and "patience" not in given:
        full["patience"] = max(1, full["epochs"])  # the schedule ends the run
    if full["optimizer"] == "dualopt":
        full.setdefault("sgd_epochs", -(-full["epochs"] // 3))
        full.setdefault("sgd_lr", 1e-3)
    else:  # of a recipe
        full = {k: v for k, v in full.items() if k not in ("sgd_epochs", "sgd_lr") or k in given}
    if recipe == "paper-augmented" and "rand_augment" not in given:
        family = str(full["model"]).lower().split("-")[0]
        if family not in RAND_AUGMENT:
            raise InputError(
                f"`recipe` paper-augmented: the paper has its RandAugment for {', '.join(RAND_AUGMENT)} alone, and the "
                f"model is {full['model']}: give `rand_augment` OPS,MAGNITUDE too"
            )
        full["rand_augment"] = RAND_AUGMENT[family]
    full.setdefault("output", f"runs/{full['data']}-{str(full['model']).replace('/', '-')}")
    return full


def _check(config: TrainConfig) -> None:
    if config.optimizer not in OPTIMIZERS:
        raise InputError(f"`optimizer`: expected one of {', '.join(OPTIMIZERS)}, got {config.optimizer!r}")
    for name in ("sgd_epochs", "sgd_lr"):
        if config.optimizer != "dualopt" and getattr(config, name) is not None:
            raise InputError(
                f"`{name}`: of DualOpT's second phase, and `optimizer` is {config.optimizer}, which has one phase: "
                f"give `{name.removeprefix('sgd_')}`"
            )
    _check_one_phase(config)
    for name, least in (
        ("epochs", 0),
        ("sgd_epochs", 0),
        ("patience", 1),
        ("batch_size", 1),
        ("accumulate", 1),
        ("stem_stride", 1),
        ("random_crop", 1),
        ("threads", 1),
    ):
        value = getattr(config, name)
        if value is not None and value < least:
            raise InputError(f"`{name}`: expected at least {least}, got {value}")
    for name in ("lr", "sgd_lr", "clip_grad"):
        value = getattr(config, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise InputError(f"`{name}`: expected a finite number above 0, got {value}")
    for name in ("drop_rate", "label_smoothing"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < 1:
            raise InputError(f"`{name}`: expected at least 0 and less than 1, got {value}")
    if config.ema_decay is not None and not 0 < config.ema_decay < 1:
        raise InputError(f"`ema_decay`: expected more than 0 and less than 1, got {config.ema_decay}")
    if config.weight_decay is not None:
        if config.optimizer == "sgd":
            raise InputError("`weight_decay`: AdamW's, and `optimizer` is sgd")
        if not 0 <= config.weight_decay < math.inf:
            raise InputError(f"`weight_decay`: expected a finite number, at least 0, got {config.weight_decay}")
    for name in sorted(RESERVED.keys() & (config.model_args or {}).keys()):
        raise InputError(f"`model_args` {name}: {RESERVED[name]}")
    for name in sorted({"stem_stride", "patch_size"} & (config.model_args or {}).keys()):
        if config.stem_stride is not None:
            raise InputError(f"`model_args` {name}: `stem_stride` is {config.stem_stride} already: give it there alone")
    if not config.epochs and not config.sgd_epochs:
        both = "" if config.sgd_epochs is None else " and `sgd_epochs` are both"
        raise InputError(f"`epochs`{both or ' is'} 0: nothing to train")
    if config.rand_augment is not None:
        pair = tuple(config.rand_augment)
        if len(pair) != 2 or pair[0] < 1 or not 0 <= pair[1] < NUM_BINS:
            raise InputError(
                f"`rand_augment`: expected OPS of at least 1 and MAGNITUDE from 0 to {NUM_BINS - 1}, "
                f"got {','.join(map(str, pair))}"
            )
    elif config.post_train:
        raise InputError("`post_train`: it follows training on augmented images: give `rand_augment` too")


def _check_one_phase(config: TrainConfig) -> None:
    """Check what fits a single phase of training alone: the schedule, the average of weights, growing images."""
    if config.schedule not in SCHEDULES:
        raise InputError(f"`schedule`: expected one of {', '.join(SCHEDULES)}, got {config.schedule!r}")
    for name in _ONE_PHASE:
        value = getattr(config, name)
        if value in (None, "constant"):
            continue
        if config.optimizer == "dualopt":
            raise InputError(f"`{name}`: needs a single phase, and `optimizer` is dualopt: give adamw or sgd")
        if config.post_train:
            raise InputError(f"`{name}`: needs a single phase, and `post_train` adds one: leave one of them out")
    if config.warmup_epochs is not None:
        if config.schedule == "constant":
            raise InputError("`warmup_epochs`: part of a schedule: give `schedule` cosine or onecycle too")
        if not 0 <= config.warmup_epochs < config.epochs:
            raise InputError(
                f"`warmup_epochs`: expected at least 0 and less than `epochs` {config.epochs}, "
                f"got {config.warmup_epochs}"
            )
    if config.progressive is not None:
        stages = config.progressive
        if not stages or not all(len(stage) == 2 and min(stage) >= 1 for stage in stages):
            raise InputError(f"`progressive`: expected pairs of a size and epochs, at least 1 each, got {stages}")
        total = sum(epochs for _, epochs in stages)
        if total != config.epochs:
            raise InputError(f"`progressive`: its {total} epochs are not `epochs` {config.epochs}: leave that out")


def _modern_defaults(full: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The recipe's defaults that depend on the model and the dataset."""
    defaults: dict[str, Any] = {"hflip": False} if full["data"] == "digits" else {}  # a digit has no mirror image
    with suppress(ValueError):  # an unknown name is reported when the model is built
        if has_fused_ops(full["model"]):
            defaults["drop_rate"] = 0.0
    return {name: value for name, value in defaults.items() if name not in given}


def _check_progress(config: TrainConfig, saved: dict[str, Any]) -> None:
    if saved.get("post_training") and not config.post_train:
        raise InputError("`post_train`: the run is post-training already: it cannot be left out now")
    stages = {row.get("augmented", False) for row in saved["history"]}
    first, second = ("sgd", "adamw") if config.optimizer == "sgd" else ("adamw", "sgd")
    for name, phase in (("epochs", first), ("sgd_epochs", second)):
        rows = [row.get("augmented", False) for row in saved["history"] if row["phase"] == phase]
        done = max((rows.count(stage) for stage in stages), default=0)
        if (getattr(config, name) or 0) < done:
            raise InputError(
                f"`{name}`: {getattr(config, name)}, but the run has done {done} epochs of {NAMES[phase]} already"
            )
