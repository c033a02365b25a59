"""Flags of the command line, generated from the fields of :class:`TrainConfig`, and parsers of their values."""

import argparse
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ..training.config import OPTIONS, Check, described

_OTHER_ARGUMENTS = ("format", "report")  # arguments of the library that errors name, besides those of TrainConfig


def cli_flag(name: str) -> str:
    """Return the flag of an argument."""
    return "--model-arg" if name == "model_args" else f"--{name.replace('_', '-')}"


def with_flags(message: str) -> str:
    """Replace the arguments that a message names in backticks, like `` `batch_size` ``, by their flags."""
    known = {*OPTIONS, *_OTHER_ARGUMENTS}
    return re.sub(r"`(\w+)`", lambda name: cli_flag(name[1]) if name[1] in known else name[0], message)


def add_option(
    parser: argparse._ActionsContainer, name: str, *, shown: str | None = None, default: Any = None, note: str = ""
) -> None:
    """Add the flag of a field of :class:`TrainConfig`.

    Args:
        parser: The parser or argument group.
        name: Name of the field.
        shown: Description of the default. Default: that of the field.
        default: Value without the flag.
        note: Text after the help of the field.
    """
    option = OPTIONS[name]
    choices, metavar = option.metadata["choices"], option.metadata["metavar"]
    keywords: dict[str, Any] = {"dest": name, "default": default}
    keywords["help"] = with_flags(described(option, shown) + note).replace("%", "%%")
    if option.type is bool:
        keywords |= {"action": "store_true", "default": False}
    elif option.type == bool | None:
        keywords |= {"action": argparse.BooleanOptionalAction}
    elif choices is not None:
        keywords |= {"choices": tuple(choices)}
    else:
        keywords |= {"type": _checked(_TYPES[option.type], option.metadata["check"]), "metavar": metavar}
        if option.type == dict[str, Any] | None:
            keywords |= {"action": "append"}
    parser.add_argument(cli_flag(name), **keywords)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which model to use."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="the --output of `cxv train`, a .pt file in it, a .safetensors file of cxv.save_safetensors, or the "
        "name of a pretrained model",
    )
    parser.add_argument(
        "--which",
        choices=("best", "last"),
        default="best",
        help="weights of the best or the last epoch (default: best)",
    )
    add_option(parser, "fused", shown="as in the run")


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where to run the model."""
    add_option(parser, "device", default="auto")
    add_option(parser, "threads")


def _checked(parse: Callable[[str], Any], check: Check | None) -> Callable[[str], Any]:
    def value(text: str) -> Any:
        result = parse(text)
        if check is not None and not check[0](result):
            raise argparse.ArgumentTypeError(f"expected {check[1]}, got {text!r}")
        return result

    value.__name__ = parse.__name__  # argparse's messages have it
    return value


def name_value(text: str) -> tuple[str, int | float | bool | str | None]:
    """``"stem_convs=3"`` → ("stem_convs", 3): a number, true, false, none, or else a word."""
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals and value):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    words = {"true": True, "false": False, "none": None}
    if value.lower() in words:
        return name, words[value.lower()]
    for number in (int, float):
        with suppress(ValueError):
            return name, number(value)
    return name, value


def whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from error


def positive_number(text: str) -> int:
    value = whole_number(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text!r}")
    return value


def _numbers(count: int | None, example: str) -> Callable[[str], tuple[int, ...]]:
    def whole_numbers(text: str) -> tuple[int, ...]:
        try:
            values = tuple(int(part) for part in text.split(","))
        except ValueError:
            values = ()
        if not values or (count is not None and len(values) != count):
            raise argparse.ArgumentTypeError(f"expected whole numbers like {example}, got {text!r}")
        return values

    return whole_numbers


def _number(text: str) -> int | float:
    try:
        return int(text) if text.lstrip("+-").isdecimal() else float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}") from error


def _size(text: str) -> int | tuple[int, int]:
    try:
        sides = [int(side) for side in text.replace("×", "x").lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2):
        raise argparse.ArgumentTypeError(f"expected a whole number, or HEIGHTxWIDTH, got {text!r}")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _stages(text: str) -> tuple[tuple[int, int], ...]:
    try:
        return tuple((int(size), int(epochs)) for size, epochs in (stage.split(":") for stage in text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected SIZE:EPOCHS,… like 16:10,24:4,32:6, got {text!r}") from error


_TYPES: dict[Any, Callable[[str], Any]] = {
    str | None: str,
    int | None: whole_number,
    float | None: float,
    int | float | None: _number,
    int | tuple[int, int] | None: _size,
    tuple[int, int] | None: _numbers(2, "OPS,MAGNITUDE"),
    tuple[int, ...] | None: _numbers(None, "0,1,2"),
    tuple[tuple[int, int], ...] | None: _stages,
    dict[str, Any] | None: name_value,
}
