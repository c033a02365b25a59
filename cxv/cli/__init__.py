"""The ``cxv`` command: train, evaluate, use and export the models. One module per command."""

import argparse
import difflib
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from cxv_kernels import __version__

from ..errors import InputError, first_line, out_of_memory, printable
from ..training.distributed import RemoteError, World
from . import cache, eval, export, models, predict, train
from .flags import with_flags

_LONGEST = 1000  # characters of an error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0, or 1 if some of the images of ``cxv predict`` could not be read, or 2 after an error that the user can put
        right (one line on stderr), or 130 when interrupted by Ctrl-C and 143 by SIGTERM (128 + the signal), after the
        run is saved.
    """
    try:
        args = _parser().parse_args(argv)
        return args.run(args) or 0
    except RemoteError:
        return 2
    except InputError as error:
        return _report(with_flags(str(error)))
    except BrokenPipeError:
        raise
    except OSError as error:  # no permission, a name that is too long, a disk that is gone, …
        if error.filename is None:
            raise
        return _report(f"{error.filename}: {error.strerror}")
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return _report(f"out of memory ({first_line(error)}); use a smaller --batch-size or --device cpu")
    except KeyboardInterrupt as error:
        if World.current().is_main:
            print("cxv: interrupted", file=sys.stderr)
        return 128 + getattr(error, "signal", signal.SIGINT)


def _report(message: str) -> int:
    message = printable(message)
    if len(message) > _LONGEST:
        message = f"{message[:_LONGEST]} … and {len(message) - _LONGEST} more characters"
    print(f"cxv: error: {message}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        """Refuse unknown options here, where ``self.prog`` has the name of the command, and name the closest one."""
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            close = difflib.get_close_matches(unknown[0].partition("=")[0], self._option_string_actions, n=1)
            hint = f", did you mean {close[0]}?" if close else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return namespace, unknown


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="cxv", description="Convolutional X-formers for vision (arXiv 2201.10271).")
    parser.add_argument("--version", action="version", version=f"cxv {__version__}, torch {torch.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (train, eval, predict, export, models, cache):
        name = command.__name__.rpartition(".")[2]
        subparser = commands.add_parser(name, help=command.HELP, description=command.DESCRIPTION)
        subparser.set_defaults(run=command.run)
        command.add_arguments(subparser)
    return parser
