"""Report registers, spills, shared memory and instructions of every compiled GPU kernel, without a GPU.

Each Triton kernel has a roofline bound ("floor"): the time to move the bytes of its tensors once and to compute the
exponentials of its features, at the datasheet rates of a card. The report also predicts the time to issue the
instructions of the compiled loop over tokens. Both are predictions and not measurements.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import cuda_report
import torch
from _harness import DTYPES, positive
from _report import Table

from cxv_kernels import _triton

# sm_75: Triton has no tensor cores there, so only the ops that multiply no matrices are supported.
ARCHITECTURES = (75, 80, 90)
SIZES: tuple[dict[str, Any], ...] = ({}, {"batch": 2, "heads": 2, "tokens": 200, "ragged": True})


def compile_kernels(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of every Triton kernel: dtype after dtype, architecture after architecture."""
    from triton_compile import compile_all, distinct, launches

    def recorded(arch: int) -> list[tuple[int, Any]]:
        return [
            (arch, launch)
            for dtype in arguments.dtype
            for dim in arguments.dims
            for size in SIZES[: 1 + arguments.ragged]
            for launch in launches(
                DTYPES[dtype], arch, dim=dim, features=arguments.features, only=arguments.cases, **size
            )
        ]

    rows = compile_all([pair for arch in arguments.arch for pair in recorded(arch)], arguments.jobs)
    return [asdict(row) | {"fault": row.fault} for row in distinct(rows)]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line per kernel variant."""
    header = ["kernel", "launched by", "dtype", "sm", "warps", "stages", "regs", "spills", "shared", "cubin", "occup."]
    header += ["HMMA", "WGMMA", "FFMA", "MUFU", "LDG", "STG", "all", "B/unit", "exp/unit", "floor, ns", "issue, ns"]
    cells = []
    for row in rows:
        head = [row["kernel"], row["case"], row["dtype"], str(row["arch"])]
        if row["error"]:
            cells.append([*head, row["error"]])
            continue
        count, floor = row["instructions"], row["floor"]
        numbers = [row["options"]["num_warps"], row["options"]["num_stages"], row["registers"], row["spills"]]
        line = [*head, *map(str, numbers), f"{row['shared'] / 1024:.0f} K", f"{row['cubin'] / 1024:.0f} K"]
        line += [f"{row['occupancy']:.0%}", *(str(count[name]) for name in ("HMMA", "WGMMA", "FFMA", "MUFU"))]
        line[-3] += "*" * row["serialized"]
        line += [str(count["LDG"]), str(count["STG"]), str(count["all"])]
        line += [f"{floor['bytes_per_unit']:.0f}", f"{floor['exps_per_unit']:.0f}", f"{floor['ns_per_unit']:.3f}"]
        line.append(f"{floor['issue_ns_per_unit']:.3f}" if row["issued"] else "—")
        cells.append(line)
    return Table(header, cells, left=3)


def cuda_kernels(architectures: Sequence[int]) -> tuple[list[dict[str, Any]], list[str]]:
    """What nvcc made of the CUDA library, if it was built: a row per kernel, and the report in words."""
    rows, words = [], []
    for arch in architectures:
        try:
            kernels = cuda_report.kernels(arch)
        except (RuntimeError, subprocess.CalledProcessError) as error:
            return rows, [f"No CUDA kernels for sm_{arch}: {error}"]
        for kernel in kernels:
            row = {"kernel": kernel.name, "step": kernel.step, "map": kernel.map, "size": kernel.size, "arch": arch}
            row |= {"dtype": kernel.dtype, "registers": kernel.registers, "spills": kernel.spills}
            rows.append(row | {"tensor_core_share": kernel.tensor_core_share})
        if kernels:
            words.append(cuda_report.report(arch))
    return rows, words


NOTES = """\
Spills are loads and stores of local memory. A unit is a token of a head, a pixel or an element. "floor" and "issue" are
predictions from the datasheet of a card: the time of the bytes and exponentials, and of the instructions in the loop
over tokens. * ptxas serializes these products."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a mistake exits with status 2."""
    parser = argparse.ArgumentParser("compile_report", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE, too")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    dtypes = tuple(DTYPES)[1:]
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=dtypes, help="one or more")
    parser.add_argument("--dims", type=positive, nargs="+", default=[32, 64], help="channels of a head")
    parser.add_argument("--features", type=positive, help="random features of the Performer; default: ⌊D ln D⌋")
    parser.add_argument("--cases", nargs="+", metavar="LABEL", help="only these ops or cases")
    parser.add_argument("--ragged", action="store_true", help="also sizes that are no powers of two")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count(), help="processes")
    arguments = parser.parse_args(argv)
    if _triton.TRITON_MISSING:
        parser.error(f"{_triton.TRITON_MISSING}")
    if _triton.interpreting():
        parser.error("TRITON_INTERPRET=1 is set: there is nothing to compile")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print, write the JSON; 1 if a kernel does not compile."""
    arguments = parse(argv)
    start = time.perf_counter()
    rows, (cuda, words) = compile_kernels(arguments), cuda_kernels(() if arguments.cases else arguments.arch)
    seconds = time.perf_counter() - start
    if arguments.json:
        results = {"torch": torch.__version__, "rows": rows, "cuda_rows": cuda}
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    print("\n\n".join([table(rows).text(), NOTES, *words]))
    failed = [row for row in rows if row["error"]]
    faulty = [row for row in rows if row["fault"] and not row["error"]]
    for row in faulty:
        print(f"{row['kernel']} of {row['case']}, {row['dtype']}, sm_{row['arch']}: {row['fault']}")
    counts = f"{len(failed)} do not compile, {len(faulty)} with a fault"
    print(f"{len(rows)} Triton kernels, {counts}, {seconds:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
