"""The arguments of a training run: defaults, the paper's recipes, and what is wrong with them."""

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import Field, asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cxv_kernels.validation import to_numbers

from ..checkpoint import BEST, LAST, PREVIOUS, read_last
from ..data.augment import NUM_BINS, default_stages
from ..data.cache import NONE as NO_CACHE
from ..data.decode import RESIZE
from ..data.loader import DATASETS, is_validation, locate
from ..errors import InputError
from ..models.arguments import image_size
from ..models.registry import has_fused_ops

METRICS, TABLE, ARGS, CURVES = "metrics.jsonl", "metrics.csv", "args.json", "curves.png"
SUMMARY = "summary.json"
TENSORBOARD = "tensorboard"
GROUPS = ("model", "data", "recipe", "precision and speed", "output")
"""The headings of the arguments in ``cxv train --help``."""
OPTIMIZERS = ("dualopt", "adamw", "muon", "sgd")
SCHEDULES = ("constant", "cosine", "onecycle")
NAMES = {"adamw": "AdamW", "muon": "Muon", "sgd": "SGD"}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

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
    "optimizer": "muon",
    "epochs": 30,
    "batch_size": 64,
    "lr": 4e-3,
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
    "depth": "it comes from the model's name",
    "num_heads": "it comes from the model's name",
    "checkpoint": "give `init`",
    "pretrained": "give `init` the name of the model",
    **{name: f"give `{name}`" for name in ("img_size", "in_chans", "embed_dim", "drop_rate", "drop_path_rate")},
    "use_fused": "give `fused`",
    "recompute": "give `recompute`",
}
"""Arguments of a model that ``model_args`` may not set, and why."""

_NUMBERS = {
    int | None: (int, "a whole number"),
    float | None: (int | float, "a number"),
    int | float | None: (int | float, "a number"),
}
"""For the type of an argument that is a number, the types that are allowed, in words too."""
_PATHS = ("init", "data_dir", "labels", "cache_dir", "output")
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}

Check = tuple[Callable[[Any], bool], str]
"""Whether a value is allowed, and the allowed values in words."""
_POSITIVE: Check = (lambda value: 0 < value < math.inf, "a finite number above 0")
_NOT_NEGATIVE: Check = (lambda value: 0 <= value < math.inf, "a finite number, at least 0")
_FRACTION: Check = (lambda value: 0 <= value < 1, "at least 0 and less than 1")
_DECAY: Check = (lambda value: 0 < value < 1, "more than 0 and less than 1")


def _is_size(value: Any) -> bool:
    with suppress(ValueError):
        return image_size(value) is not None
    return False


def _option(group: str, help: str, shown: str | None = None, *, unset: bool | None = None, **details: Any) -> Any:
    """Declare a field of :class:`TrainConfig`: all that the command line and the checks of its value need.

    Args:
        group: The heading of the flag in ``cxv train --help``.
        help: One phrase; names of other arguments are in backticks.
        shown: The default in words, where ``default`` does not say it.
        unset: The field's value where none is given.
        **details: ``default``, the value in place of None; ``metavar``; ``choices`` or a ``check``; ``changeable``, if
            a run can be resumed with another value.
    """
    absent = dict.fromkeys(("default", "metavar", "choices", "check", "changeable"))
    return field(default=unset, metadata=absent | {"group": group, "help": help, "shown": shown} | details)


def seconds(duration: str | float) -> float | None:
    """Return the seconds of a duration, such as 3600, "3600", "90m" or "1.5h". None for anything else."""
    match = re.fullmatch(r"(\d+\.?\d*)([smhd]?)", str(duration))
    return float(match[1]) * _UNITS[match[2]] if match else None


_model, _data, _recipe, _speed, _output = (partial(_option, group) for group in GROUPS)
_COUNT: dict[str, Any] = {"metavar": "N", "check": (lambda value: value >= 1, "at least 1")}
_FROM_ZERO: dict[str, Any] = {"metavar": "N", "check": (lambda value: value >= 0, "at least 0")}
_RATE: dict[str, Any] = {"metavar": "LR", "check": _POSITIVE}
_ALPHA: dict[str, Any] = {"metavar": "ALPHA", "check": _POSITIVE}
_SHARE: dict[str, Any] = {"metavar": "P", "check": _FRACTION}
_MODEL = "cpv-5/4; digits: cpv-2/4 with `embed_dim` 64"


@dataclass
class TrainConfig:
    """The arguments of a training run, which are the flags of ``cxv train`` too.

    ``None`` takes the default in parentheses, or, when a run is resumed, the run's own value. Paths, a ``torch.device``
    and the numbers of NumPy or of a tensor are stored as ``str`` and Python numbers.

    Raises:
        InputError: an argument that a run's files cannot hold; something else where a number belongs.
    """

    model: str | None = _model("name of the model, see `cxv models`", _MODEL, metavar="NAME", default="cpv-5/4")
    init: str | None = _model(
        "start with the weights of this run, .pt or .safetensors file, or pretrained model; another number of classes "
        "gets a new classifier",
        metavar="PATH",
    )
    freeze: int | None = _model("with `init`: train neither the stem nor the first N layers", **_FROM_ZERO)
    embed_dim: int | None = _model("number of channels", "the model's own, 128", **_COUNT)
    drop_rate: float | None = _model("dropout probability", "the model's own; the paper's is 0.5", **_SHARE)
    drop_path_rate: float | None = _model(
        "stochastic depth: the probability that an image skips a branch of the last layer; it is 0 in the first layer "
        "and rises linearly",
        **_SHARE,
    )
    stem_stride: int | None = _model(
        "stride of the first convolution, or the side of a patch", "the model's own, 1; tiny-imagenet: 2", **_COUNT
    )
    model_args: dict[str, Any] | None = _model(  # noqa: RUF009
        "any other argument of the model, see help(cxv.models.CXV)", metavar="NAME=VALUE"
    )

    data: str | None = _data(
        f"one of {', '.join(DATASETS)}, or the path of a directory or of a CSV file as in `labels`",
        metavar="NAME",
        shown="digits; folder with `data_dir` or `labels`",
    )
    data_dir: str | None = _data(
        "directory of the archive, which is downloaded if it is missing; for folder: of train/CLASS/…, val/CLASS/… and "
        "test/CLASS/…, or of CLASS/…, which is divided into 80, 10 and 10 %",
        shown="data; with `labels` the directory of the file",
        changeable=True,
        metavar="DIR",
    )
    labels: str | None = _data(
        "CSV file with the columns path (relative to `data_dir`), label and, if you choose the splits, split",
        shown="folders are classes",
        changeable=True,
        metavar="FILE",
    )
    cache_dir: str | None = _data(
        "directory of the decoded images, which are mapped into memory; none: no cache",
        shown="$CXV_CACHE, else cxv in $XDG_CACHE_HOME or ~/.cache",
        changeable=True,
        metavar="DIR",
    )
    img_size: int | tuple[int, int] | None = _data(
        "side of the images in pixels, or HEIGHTxWIDTH; other images are resized",
        shown="the dataset's own; folder: the median of the shorter sides, at most 64",
        metavar="N",
        check=(_is_size, "a whole number of at least 1, or two (height, width)"),
    )
    in_chans: int | None = _data(
        "channels of the images: 3 for RGB, 1 for gray",
        metavar="N",
        check=(lambda value: value in (1, 3), "1 or 3"),
        shown="3; digits: 1",
    )
    resize: str | None = _data(
        "how images get another aspect ratio: crop about the center, pad with `background`, or squash",
        choices=RESIZE,
        default="crop",
    )
    background: str | None = _data(
        "color behind transparent pixels, a name or #rrggbb", metavar="COLOR", default="white"
    )
    white_level: float | None = _data(
        "value of white in gray images of more than 8 bits",
        metavar="VALUE",
        check=_POSITIVE,
        shown="65535 for 16-bit images, 1 for float images; others, and 16-bit images that use 12 bits, are refused",
    )
    max_pixels: int | None = _data(
        "largest image that is read, in pixels", shown="178956970, the limit of PIL", changeable=True, **_COUNT
    )
    limit_train: int | None = _data("train on N images, balanced over the classes", shown="all", **_COUNT)
    limit_test: int | None = _data("test on N images, balanced over the classes", shown="all", **_COUNT)
    validation: int | float | None = _data(
        "hold out N training images, or this share of them, each class by its share, to select the best epoch; the "
        "test set is then evaluated once, after the last epoch",
        shown="the validation images of a folder; otherwise the test set is evaluated after every epoch and selects",
        metavar="N",
        check=(is_validation, is_validation.__doc__),
    )
    on_corrupt: str | None = _data(
        "stop at an unreadable image, or skip it", choices=("error", "skip"), default="error", changeable=True
    )

    recipe: str | None = _recipe(
        "preset, which other arguments change. paper: DualOpT, at most 300 and 100 epochs, patience 20, batches of "
        "128, both rates 0.001, fp32; paper-augmented: the same with RandAugment (cnv, cpv: 1,1; cltv: 3,3) and "
        "`post_train`; modern: few epochs (30) of Muon with a one-cycle rate, flips and crops, label smoothing, EMA, "
        "no dropout, bf16, and images that grow from half their size",
        choices=RECIPES,
    )
    optimizer: str | None = _recipe(
        "DualOpT, or AdamW, Muon (for matrices, with AdamW) or SGD alone", choices=OPTIMIZERS, default="dualopt"
    )
    epochs: int | None = _recipe(
        "most epochs of AdamW, or of the only optimizer", "300; digits: 60", default=300, changeable=True, **_FROM_ZERO
    )
    sgd_epochs: int | None = _recipe(
        "most epochs of DualOpT's SGD", "a third of `epochs`, rounded up", changeable=True, **_FROM_ZERO
    )
    patience: int | None = _recipe(
        "epochs without an improvement of top-1 that end an optimizer's phase; an equal top-1 is one",
        default=20,
        **_COUNT,
    )
    batch_size: int | None = _recipe("images in a batch, over all processes of torchrun", default=128, **_COUNT)
    accumulate: int | None = _recipe("batches whose gradients make one step", default=1, **_COUNT)
    clip_grad: float | None = _recipe("largest norm of a gradient", "no limit", metavar="NORM", check=_POSITIVE)
    lr: float | None = _recipe("learning rate of AdamW, or of the only optimizer", default=1e-3, **_RATE)
    sgd_lr: float | None = _recipe("learning rate of DualOpT's SGD", "0.001", **_RATE)
    schedule: str | None = _recipe(
        "constant rate, a cosine from `lr` to 0 over all `epochs`, or PyTorch's OneCycleLR with the peak `lr`; cosine "
        "and onecycle need a single optimizer",
        choices=SCHEDULES,
        default="constant",
    )
    warmup_epochs: float | None = _recipe(
        "epochs until the schedule's peak, also fractions", "0 for cosine, 30 % of all for onecycle", metavar="N"
    )
    weight_decay: float | None = _recipe(
        "weight decay of AdamW and Muon for matrices and convolutions; norms, biases and positions then have none",
        "0.01, with AdamW for all parameters",
        metavar="DECAY",
        check=_NOT_NEGATIVE,
    )
    label_smoothing: float | None = _recipe("label smoothing of the training loss", default=0.0, **_SHARE)
    class_weights: str | None = _recipe(
        "weigh the training loss by class, inversely to the number of its images", choices=("balanced",)
    )
    balanced_sampling: bool | None = _recipe(
        "draw the training images of an epoch with replacement, each class with the same probability", default=False
    )
    ema_decay: float | None = _recipe(
        "average the weights over the steps with this decay, for example 0.999; the average is evaluated and saved",
        metavar="DECAY",
        check=_DECAY,
    )
    hflip: bool | None = _recipe("flip half of the training images, at random", default=False)
    random_crop: int | None = _recipe(
        "pad training images with N black pixels a side and crop them at random to their size", **_COUNT
    )
    rand_augment: tuple[int, int] | None = _recipe(
        "RandAugment: operations per image, and their magnitude from 0 to 30", metavar="OPS,MAGNITUDE"
    )
    color_jitter: float | None = _recipe(
        "change brightness, contrast and saturation at random, by up to this share", metavar="SHARE", check=_POSITIVE
    )
    random_erasing: float | None = _recipe(
        "erase a random rectangle of an image with this probability",
        metavar="P",
        check=(lambda value: 0 < value <= 1, "more than 0 and at most 1"),
    )
    mixup: float | None = _recipe("MixUp: mix pairs of images and labels, by shares from Beta(ALPHA, ALPHA)", **_ALPHA)
    cutmix: float | None = _recipe("CutMix, likewise; with `mixup`, each batch gets one of the two", **_ALPHA)
    post_train: bool | None = _recipe(
        "after augmented images, train on the original ones from the best weights", default=False, changeable=True
    )
    progressive: tuple[tuple[int, int], ...] | None = _recipe(
        "train at growing image sizes (the shorter side), for example 16:10,24:4,32:6, with a model that takes any "
        "size",
        metavar="SIZE:EPOCHS,…",
    )
    seed: int | None = _recipe("seed of weights, order, dropout and subsets", default=0, **_FROM_ZERO)
    seeds: tuple[int, ...] | None = _recipe(
        "train once for each seed, in OUTPUT/seed-N; best, mean and standard deviation go into OUTPUT/summary.json",
        metavar="N,N,…",
    )
    max_time: str | None = _recipe(
        "stop after the batch in which this time is over, and save the run, which `resume` continues: 3600, 90m or 8h",
        metavar="TIME",
        check=(lambda value: (seconds(value) or 0) > 0, "seconds, or a number with s, m, h or d, as 90m or 8h"),
        changeable=True,
    )

    precision: str | None = _speed("fp32, or autocast to bf16 or (CUDA only) fp16", choices=PRECISIONS, default="fp32")
    fused: bool | None = _speed("use the fused kernels, not plain PyTorch", default=True)
    recompute: bool | None = _speed(
        "with `fused`: recompute activations in the backward pass to save memory; storing them is faster", default=True
    )
    compile: bool | None = _speed(
        "torch.compile the model; it takes more memory, and a resumed run is not bit-exact", default=False
    )
    data_on_device: bool | None = _speed(
        "keep all images in the GPU's memory", "if they take at most a quarter of what is free", changeable=True
    )
    device: str | None = _speed("auto, cpu or cuda", default="auto", changeable=True)
    threads: int | None = _speed("number of CPU threads", "torch's choice", changeable=True, **_COUNT)

    output: str | None = _output("directory of the run's files", "runs/DATA-MODEL", changeable=True, metavar="DIR")
    tensorboard: bool | None = _output(
        "write metrics.jsonl for TensorBoard too, into OUTPUT/tensorboard", default=False, changeable=True
    )
    resume: bool = _output("continue the run in `output`, with its arguments where none are given", unset=False)
    overwrite: bool = _output("delete the run in `output` first", unset=False)

    def __post_init__(self) -> None:
        for f in fields(self):
            value = to_numbers(getattr(self, f.name))
            value = str(value) if isinstance(value, os.PathLike | torch.device) else value
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                raise InputError(f"`{f.name}`: expected numbers and strings, got {value!r} ({error})") from error
            allowed, words = _NUMBERS.get(f.type, (object, ""))
            if value is not None and (not isinstance(value, allowed) or (words and isinstance(value, bool))):
                raise InputError(f"`{f.name}`: expected {words}, got {value!r}")
            setattr(self, f.name, value)


def described(option: Field, default: str | None = None) -> str:
    """The help text of a field of :class:`TrainConfig`, with its default, or with ``default`` in its place."""
    shown = default or option.metadata["shown"] or option.metadata["default"]
    if option.type is bool:
        return option.metadata["help"]
    if shown is None or isinstance(shown, bool):
        shown = {None: "none", True: "yes", False: "no"}[shown]
    return f"{option.metadata['help']} (default: {shown})"


OPTIONS = {option.name: option for option in fields(TrainConfig)}
DATA_ARGUMENTS = tuple(n for n, o in OPTIONS.items() if n == "seed" or (n != "data" and o.metadata["group"] == "data"))
"""The arguments that :func:`cxv.data.load_data` takes, besides ``data``."""
TrainConfig.__doc__ += "\n    Args:\n" + "".join(f"        {name}: {described(o)}.\n" for name, o in OPTIONS.items())
DEFAULTS = {name: o.metadata["default"] for name, o in OPTIONS.items() if o.metadata["default"] is not None}
"""The paper's recipe (section 4) without augmentation; its batch size is not given. With ``dualopt``, ``sgd_epochs`` is
a third of ``epochs``, rounded up, and ``sgd_lr`` 0.001."""
_CHANGEABLE = {name for name, o in OPTIONS.items() if o.metadata["changeable"]} | {"resume", "overwrite"}


def resolve(config: TrainConfig) -> tuple[TrainConfig, dict[str, Any] | None, str | None]:
    """Fill in the defaults, or when resuming what the run has, and check what can be checked at once.

    Returns:
        The configuration and, when resuming, the checkpoint to go on from, and why that is not ``last.pt``.

    Raises:
        InputError: an argument is out of its range, contradicts another one or the run in ``output``.
    """
    if config.resume and config.overwrite:
        raise InputError("`resume` and `overwrite` exclude each other")
    arguments = {k: v for k, v in asdict(config).items() if v is not None}
    if not config.resume or not arguments.keys().isdisjoint(("data", "labels")):
        arguments |= _located(arguments)
    full, saved, fallback = _with_defaults(arguments), None, None
    output = Path(full["output"])
    if config.resume:
        if not any((output / name).is_file() for name in (LAST, PREVIOUS)):
            raise InputError(f"`resume`: {output} holds no run to go on with ({LAST} is not there)")
        saved, fallback = read_last(output)
        run = DEFAULTS | saved["args"]  # an older run lacks the newer arguments
        full = run | arguments | {"output": full["output"]}
        fixed = arguments.keys() - _CHANGEABLE
        if run["schedule"] != "constant" or run.get("progressive"):
            fixed |= arguments.keys() & {"epochs"}
        changed = [k for k in arguments if k in fixed and run.get(k) != _stored(k, arguments[k])]
        if changed:
            texts = ", ".join(f"`{k}` ({run.get(k)} in the run, {arguments[k]} now)" for k in changed)
            raise InputError(f"`resume`: the run in {output} has other arguments: {texts}")
    else:
        check_output(output, config.overwrite)
    config = replace(config, **{name: full[name] for name in OPTIONS if name in full})
    _check(config)
    if saved is not None:
        _check_progress(config, saved)
    return config, saved, fallback


def check_output(output: Path, overwrite: bool) -> None:
    """Raise ``InputError`` if the directory has a run already, and ``overwrite`` is False."""
    present = [name for name in (LAST, PREVIOUS, BEST, METRICS) if (output / name).exists()]
    if present and not overwrite:
        raise InputError(
            f"`output`: {output} holds another run ({', '.join(present)}); give `resume` to go on with "
            "it, `overwrite` to delete it, or another directory"
        )
    if output.exists() and not output.is_dir():
        raise InputError(f"`output`: {output} is not a directory")


def fit_to_data(config: TrainConfig, img_size: int | tuple[int, int], num_images: int) -> None:
    """Set what depends on the data: the image size, and what the recipe ``"modern"`` makes of it and of the images.

    Raises:
        InputError: If a stage of ``progressive`` has larger images than the data.
    """
    config.img_size, side = img_size, min(image_size(img_size))
    if config.recipe == "modern":
        steps = config.epochs * math.ceil(num_images / (config.batch_size * config.accumulate))
        derived = {
            "progressive": default_stages(side, config.epochs),
            "random_crop": max(1, side // 8),
            "ema_decay": min(0.999, max(0.5, 1 - 20 / steps)),
        }
        for name, value in derived.items():
            if getattr(config, name) is None:
                setattr(config, name, value)
    too_large = [size for size, _ in config.progressive or () if size > side]
    if too_large:
        raise InputError(f"`progressive`: {too_large[0]} pixels, and the images have {side} (`img_size`)")


def default_output(config: TrainConfig) -> str:
    """Where a run goes without ``output``."""
    return _with_defaults({k: v for k, v in asdict(config).items() if v is not None})["output"]


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """What a run remembers of its configuration. Paths are absolute, so that they are valid in every directory."""
    return {k: _stored(k, v) for k, v in asdict(config).items() if k not in ("resume", "overwrite")}


def _stored(name: str, value: Any) -> Any:
    return str(Path(value).absolute()) if name in _PATHS and value not in (None, NO_CACHE) else value


def _located(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return ``data``, ``data_dir`` and ``labels`` where the arguments give or imply them."""
    names = ("data", "data_dir", "labels")
    values = locate(*(arguments.get(name) for name in names))
    return {name: value for name, value in zip(names, values, strict=True) if value is not None}


def _with_defaults(arguments: dict[str, Any]) -> dict[str, Any]:
    arguments = arguments | _located(arguments)
    defaults = dict(DEFAULTS)
    if arguments["data"] == "digits":
        defaults |= DIGITS_DEFAULTS | ({} if "model" in arguments else DIGITS_MODEL)
    if arguments["data"] == "tiny-imagenet":
        defaults |= TINY_IMAGENET_DEFAULTS
    recipe = arguments.get("recipe")
    if recipe is not None:
        if recipe not in RECIPES:
            raise InputError(f"`recipe`: expected one of {', '.join(RECIPES)}, got {recipe!r}")
        defaults |= RECIPES[recipe]
    if "progressive" in arguments:
        defaults["epochs"] = sum(epochs for _, epochs in arguments["progressive"])
    full = defaults | arguments
    if recipe == "modern":
        full |= _modern_defaults(full, arguments)
    if full["schedule"] != "constant" and "patience" not in arguments:
        full["patience"] = max(1, full["epochs"])  # the schedule ends the run
    if full["optimizer"] == "dualopt":
        full.setdefault("sgd_epochs", -(-full["epochs"] // 3))
        full.setdefault("sgd_lr", 1e-3)
    else:  # of a recipe
        full = {k: v for k, v in full.items() if k not in ("sgd_epochs", "sgd_lr") or k in arguments}
    if recipe == "paper-augmented" and "rand_augment" not in arguments:
        full["rand_augment"] = RAND_AUGMENT.get(str(full["model"]).lower().split("-")[0])
        if full["rand_augment"] is None:
            raise InputError(
                f"`recipe` paper-augmented: the paper has its RandAugment for {', '.join(RAND_AUGMENT)} alone, and the "
                f"model is {full['model']}: give `rand_augment` OPS,MAGNITUDE too"
            )
    full.setdefault("output", f"runs/{full['data']}-{str(full['model']).replace('/', '-')}")
    return full


def _check(config: TrainConfig) -> None:
    """Check each argument alone, then those that depend on one another."""
    for name, option in OPTIONS.items():
        value, choices, check = getattr(config, name), option.metadata["choices"], option.metadata["check"]
        if choices is not None and value not in (None, *choices):
            raise InputError(f"`{name}`: expected one of {', '.join(choices)}, got {value!r}")
        if check is not None and value is not None and not check[0](value):
            raise InputError(f"`{name}`: expected {check[1]}, got {value}")
    for problem in _problems(config):
        raise InputError(problem)


def _problems(config: TrainConfig) -> Iterator[str]:
    """Yield what is wrong with arguments that depend on one another, the first one first."""
    one_phase, epochs, stages = config.optimizer != "dualopt", config.epochs, config.progressive
    for name in ("sgd_epochs", "sgd_lr"):
        if one_phase and getattr(config, name) is not None:
            instead = f"`optimizer` is {config.optimizer}, with one phase: give `{name.removeprefix('sgd_')}`"
            yield f"`{name}`: of DualOpT's second phase, and {instead}"
    if config.weight_decay is not None and config.optimizer == "sgd":
        yield "`weight_decay`: AdamW's and Muon's, and `optimizer` is sgd"
    if not epochs and not config.sgd_epochs:
        yield f"`epochs`{' is' if config.sgd_epochs is None else ' and `sgd_epochs` are both'} 0: nothing to train"
    for name in ("schedule", "warmup_epochs", "ema_decay", "progressive"):  # they need a known number of epochs
        if getattr(config, name) not in (None, "constant"):
            if not one_phase:
                yield f"`{name}`: needs a single phase, and `optimizer` is dualopt: give adamw, muon or sgd"
            if config.post_train:
                yield f"`{name}`: needs a single phase, and `post_train` adds one: leave one of them out"
    if config.warmup_epochs is not None and config.schedule == "constant":
        yield "`warmup_epochs`: part of a schedule: give `schedule` cosine or onecycle too"
    if not 0 <= (config.warmup_epochs or 0) < max(epochs, 1):
        yield f"`warmup_epochs`: expected at least 0 and less than `epochs` {epochs}, got {config.warmup_epochs}"
    if stages is not None:
        if not stages or not all(len(stage) == 2 and min(stage) >= 1 for stage in stages):
            yield f"`progressive`: expected pairs of a size and epochs, at least 1 each, got {stages}"
        total = sum(count for _, count in stages)
        if total != epochs:
            yield f"`progressive`: its {total} epochs are not `epochs` {epochs}: leave that out"
    names = (config.model_args or {}).keys()
    for name in sorted(RESERVED.keys() & names):
        yield f"`model_args` {name}: {RESERVED[name]}"
    for name in sorted({"stem_stride", "patch_size"} & names):
        if config.stem_stride is not None:
            yield f"`model_args` {name}: `stem_stride` is {config.stem_stride} already: give it there alone"
    if config.freeze is not None and config.init is None:
        yield "`freeze`: the frozen layers would keep random weights: give `init` too"
    pair = config.rand_augment
    if pair is not None and (len(pair) != 2 or pair[0] < 1 or not 0 <= pair[1] < NUM_BINS):
        allowed = f"OPS of at least 1 and MAGNITUDE from 0 to {NUM_BINS - 1}"
        yield f"`rand_augment`: expected {allowed}, got {','.join(map(str, pair))}"
    if pair is None and config.post_train:
        yield "`post_train`: it follows training on augmented images: give `rand_augment` too"


def _modern_defaults(full: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The recipe's defaults that depend on the model and the dataset."""
    defaults: dict[str, Any] = {"hflip": False} if full["data"] == "digits" else {}  # a digit has no mirror image
    with suppress(ValueError):  # an unknown name is reported when the model is built
        defaults |= {"drop_rate": 0.0} if has_fused_ops(full["model"]) else {}
    if arguments.get("optimizer") == "adamw":
        defaults["lr"] = 2e-3
    return {name: value for name, value in defaults.items() if name not in arguments}


def _check_progress(config: TrainConfig, saved: dict[str, Any]) -> None:
    if saved.get("post_training") and not config.post_train:
        raise InputError("`post_train`: the run is post-training already: it cannot be left out now")
    stages = {row.get("augmented", False) for row in saved["history"]}
    first, second = ("adamw", "sgd") if config.optimizer == "dualopt" else (config.optimizer, "")
    for name, given, phase in (("epochs", config.epochs, first), ("sgd_epochs", config.sgd_epochs, second)):
        rows = [row.get("augmented", False) for row in saved["history"] if row["phase"] == phase]
        done = max((rows.count(stage) for stage in stages), default=0)
        if (given or 0) < done:
            raise InputError(f"`{name}`: {given}, but the run has done {done} epochs of {NAMES[phase]} already")
