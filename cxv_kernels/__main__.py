"""``python -m cxv_kernels``: list the backends that this machine supports and check every op against float64."""

import argparse
import platform
import sys
from collections.abc import Sequence

import torch

from . import OPS, __version__, self_check, testing
from .dispatch import BACKENDS, dtype_name, explain_backend
from .library import CPP_MISSING, build_info
from .validation import FLOAT_DTYPES

DTYPES = {dtype: dtype_name(dtype) for dtype in FLOAT_DTYPES}


def _describe() -> None:
    print(f"cxv_kernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    info = build_info()
    if info:
        cuda = f"CUDA {info['cuda']} ({info['cuda_arch_list']})" if info["cuda"] else "no CUDA"
        print(
            f"built with {info['compiler']}, torch {info['torch_built_with']}, {cuda}; CPU kernels: {info['cpu_isa']}"
        )
    else:
        print(f"no C++ kernels: the library {CPP_MISSING}")
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        print(f"GPU: {torch.cuda.get_device_name()}, sm_{major}{minor}")
        print(f"verdicts of the self-check on first use: {self_check.cache_file() or 'in memory only'}")
    else:
        print("GPU: none that PyTorch can use")


def _report(device: str) -> int:
    """Print the errors of all ops on a device, each op when it is done, and the ops that are not supported.

    Return the number of failures.
    """
    print(f"\n{device}: largest error of outputs and gradients against float64")
    print(f"  {'op':20} {'backend':10}" + "".join(f"{name:>16}" for name in DTYPES.values()))
    failed: list[testing.Result] = []
    unsupported: dict[str, list[str]] = {}
    for op in OPS:
        results = list(testing.run_all(device, [op]))
        failed += [r for r in results if not r.passed]
        for backend in BACKENDS[1:]:
            cells = []
            for dtype in FLOAT_DTYPES:
                mine = [r for r in results if (r.backend, r.dtype) == (backend, dtype)]
                if mine:
                    worst = max(mine, key=lambda r: r.ratio)
                    cells.append(f"{'ok' if worst.passed else 'FAILED'} {max(r.error for r in mine):.1e}")
                else:
                    cells.append("-")
            if any(cell != "-" for cell in cells):
                print(f"  {op:20} {backend:10}" + "".join(f"{cell:>16}" for cell in cells), flush=True)
            else:
                unsupported.setdefault(
                    f"{backend}: {explain_backend(op, device)[backend].replace(op, 'these ops')}", []
                ).append(op)
    for reason, ops in unsupported.items():
        print(f"  not supported by {reason} — {', '.join(ops)}")
    for r in failed:
        reason = r.exception or f"error {r.error:.1e}, tolerance {r.tolerance:.1e}"
        print(f"  FAILED: {r.case.op} ({r.case.label}), {r.backend}, {dtype_name(r.dtype)}: {reason}")
    return len(failed)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report. Return 1 if a check has failed, else 0."""
    argparse.ArgumentParser(prog="python -m cxv_kernels", description=__doc__.partition(": ")[2]).parse_args(argv)
    _describe()
    failed = sum(_report(device) for device in ("cpu", "cuda") if device == "cpu" or torch.cuda.is_available())
    print(f"\n{failed} checks failed" if failed else "\nall checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
