"""The ``cxv`` command: train, evaluate, use and export the models. One module per command."""

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch

from cxv_kernels import __version__

from ..errors import InputError
from ..training.distributed import RemoteError, World
from . import cache, eval, export, models, predict, train
from .flags import with_flags


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0, or 2 after an error that the user can put right (one line on stderr), or 130 when interrupted by Ctrl-C and
        143 by SIGTERM (128 + the signal), after what was done is saved.
    """
    try:
        args = _parser().parse_args(argv)
        args.run(args)
    except RemoteError:
        return 2
    except InputError as error:
        print(f"cxv: error: {with_flags(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        if World.current().is_main:
            print("cxv: interrupted", file=sys.stderr)
        return 128 + getattr(error, "signal", signal.SIGINT)
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="cxv", description="Convolutional X-formers for vision (arXiv 2201.10271).")
    parser.add_argument("--version", action="version", version=f"cxv {__version__}, torch {torch.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (train, eval, predict, export, models, cache):
        command.add_parser(commands)
    return parser
