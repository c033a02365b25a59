"""Report registers, spills, shared memory and instructions of every compiled GPU kernel, without a GPU.

"Issued" is the number of instructions of a warp that a token of a head costs in the loop over tokens.
"""

import argparse
import itertools
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
from triton_compile import CARDS, Compiled, check_triton, compile_all, launches

SIZES: tuple[dict[str, Any], ...] = ({}, {"batch": 2, "heads": 2, "tokens": 200, "ragged": True})


def compile_kernels(arguments: argparse.Namespace) -> list[Compiled]:
    """The rows of every Triton kernel: architecture after architecture, dtype after dtype."""
    found = []
    for arch, dtype, dim in itertools.product(arguments.arch, arguments.dtype, arguments.dims):
        options = {"dim": dim, "features": arguments.features, "only": arguments.cases}
        for size in SIZES[: 1 + arguments.ragged]:
            found += [(arch, launch) for launch in launches(DTYPES[dtype], arch, **options, **size)]
    return list({id(row): row for row in compile_all(found, arguments.jobs)}.values())


def table(rows: Sequence[Compiled]) -> Table:
    """One line per kernel variant."""
    families = ["HMMA", "WGMMA", "FFMA", "MUFU", "LDG", "STG", "all"]
    header = ["kernel", "launched by", "dtype", "sm", "warps", "stages", "regs", "spills", "shared", "cubin", "occup."]
    cells = []
    for row in rows:
        head = [row.kernel, row.case, row.dtype, str(row.arch)]
        if row.error:
            cells.append([*head, row.error])
            continue
        numbers = [row.options["num_warps"], row.options["num_stages"], row.registers, row.spills]
        sizes = [f"{row.shared / 1024:.0f} K", f"{row.cubin / 1024:.0f} K", f"{row.occupancy:.0%}"]
        counts = [f"{row.instructions[name]}{'*' * (row.serialized and name == 'WGMMA')}" for name in families]
        cells.append([*head, *map(str, numbers), *sizes, *counts, f"{row.issued:.1f}" if row.issued else "—"])
    return Table([*header, *families, "issued"], cells, left=3)


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


NOTES = "Spills are loads and stores of local memory. * ptxas serializes these products."


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; a mistake exits with status 2."""
    parser = argparse.ArgumentParser("compile_report", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE, too")
    parser.add_argument("--arch", type=int, nargs="+", choices=tuple(CARDS), default=list(CARDS))
    dtypes = tuple(DTYPES)[1:]
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=dtypes, help="one or more")
    parser.add_argument("--dims", type=positive, nargs="+", default=[32, 64], help="channels of a head")
    parser.add_argument("--features", type=positive, help="random features of the Performer; default: ⌊D ln D⌋")
    parser.add_argument("--cases", nargs="+", metavar="LABEL", help="only these ops or cases")
    parser.add_argument("--ragged", action="store_true", help="also sizes that are no powers of two")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count(), help="processes")
    arguments = parser.parse_args(argv)
    check_triton(parser)
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print, write the JSON; 1 if a kernel does not compile."""
    arguments = parse(argv)
    start = time.perf_counter()
    rows, (cuda, words) = compile_kernels(arguments), cuda_kernels(() if arguments.cases else arguments.arch)
    seconds = time.perf_counter() - start
    if arguments.json:
        found = [asdict(row) | {"fault": row.fault} for row in rows]
        results = {"torch": torch.__version__, "rows": found, "cuda_rows": cuda}
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    print("\n\n".join([table(rows).text(), NOTES, *words]))
    failed = sum(row.error is not None for row in rows)
    faulty = [row for row in rows if row.fault and not row.error]
    for row in faulty:
        print(f"{row.kernel} of {row.case}, {row.dtype}, sm_{row.arch}: {row.fault}")
    counts = f"{failed} do not compile, {len(faulty)} with a fault"
    print(f"{len(rows)} Triton kernels, {counts}, {seconds:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
