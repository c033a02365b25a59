"""Flags of the command line, generated from the fields of :class:`TrainConfig`, and parsers of their values."""

import argparse
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from ..training.config import OPTIONS, Check, described

_OTHER_ARGUMENTS = ("format", "report", "which")  # others that errors of the library name


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
    """Add the flag of the field ``name`` of :class:`TrainConfig`.

    ``default`` is the value without the flag, ``shown`` its description (by default that of the field), and ``note``
    follows the help of the field.
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
        keywords |= {"type": parser_of(*_TYPES[option.type], option.metadata["check"]), "metavar": metavar}
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


def parser_of(parse: Callable[[str], Any], expected: str, check: Check | None = None) -> Callable[[str], Any]:
    """Return an argparse type: ``parse``, with errors that say what is ``expected``, and then the ``check``."""

    def value(text: str) -> Any:
        try:
            result = parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from error
        if check is not None and not check[0](result):
            raise argparse.ArgumentTypeError(f"expected {check[1]}, got {text!r}")
        return result

    return value


def _name_value(text: str) -> tuple[str, int | float | bool | str | None]:
    """``"stem_convs=3"`` → ("stem_convs", 3): a number, true, false, none, or else a word."""
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals and value):
        raise ValueError
    words = {"true": True, "false": False, "none": None}
    if value.lower() in words:
        return name, words[value.lower()]
    for number in (int, float):
        with suppress(ValueError):
            return name, number(value)
    return name, value


def _numbers(text: str, separator: str = ",", counts: Sequence[int] = ()) -> tuple[int, ...]:
    values = tuple(map(int, text.split(separator)))
    if counts and len(values) not in counts:
        raise ValueError
    return values


def _size(text: str) -> int | tuple[int, ...]:
    sides = _numbers(text.replace("×", "x").lower(), "x", (1, 2))
    return sides[0] if len(sides) == 1 else sides


WHOLE_NUMBER = (int, "a whole number")
_TYPES: dict[Any, tuple[Callable[[str], Any], str]] = {
    str | None: (str, "text"),
    int | None: WHOLE_NUMBER,
    float | None: (float, "a number"),
    int | float | None: (lambda text: int(text) if text.lstrip("+-").isdecimal() else float(text), "a number"),
    int | tuple[int, int] | None: (_size, "a whole number, or HEIGHTxWIDTH"),
    tuple[int, int] | None: (lambda text: _numbers(text, counts=(2,)), "whole numbers like OPS,MAGNITUDE"),
    tuple[int, ...] | None: (_numbers, "whole numbers like 0,1,2"),
    tuple[tuple[int, int], ...] | None: (
        lambda text: tuple(_numbers(stage, ":", (2,)) for stage in text.split(",")),
        "SIZE:EPOCHS,… like 16:10,24:4,32:6",
    ),
    dict[str, Any] | None: (_name_value, "NAME=VALUE"),
}
