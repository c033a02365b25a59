"""What the compiler makes of every GPU kernel, without a GPU: registers, spills, shared memory, instructions, occupancy.

Beside each Triton kernel stands its floor: the bytes of the tensors that it was given, each moved once, and the
exponentials of its features, on a card's datasheet rates. A floor is a prediction of the best, not a measurement.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from attn_speed_report import Table
from common import DTYPES, Parser, environment, positive, some_of, write_json

from cxv_kernels import _triton

# sm_75: Triton has no tensor cores there, so its kernels that multiply matrices serve from sm_80 on.
ARCHITECTURES = (75, 80, 90)
LOW = ("float16", "bfloat16")


def compile_kernels(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of every Triton kernel: dtype after dtype, architecture after architecture."""
    from triton_compile import compile_all, launches

    def recorded(arch: int) -> list[tuple[int, Any]]:
        wanted = [(dtype, dim) for dtype in arguments.dtype for dim in arguments.dims]
        if arch < 80:
            wanted = [(dtype, dim) for dtype, dim in wanted if dtype != "bfloat16"]
        found = [
            launch
            for dtype, dim in wanted
            for launch in launches(DTYPES[dtype], arch, dim=dim, models=dim == 32 and dtype in LOW)
            if arguments.kernels is None or any(part in launch.name for part in arguments.kernels)
        ]
        return [(arch, launch) for launch in found]

    newer = compile_all([pair for arch in arguments.arch if arch >= 80 for pair in recorded(arch)], arguments.jobs)
    multiply = {row.kernel for row in newer if row.dot}
    older = [pair for arch in arguments.arch if arch < 80 for pair in recorded(arch) if pair[1].name not in multiply]
    return [asdict(row) for row in [*newer, *compile_all(older, arguments.jobs)]]


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """One line per kernel variant."""
    header = ["kernel", "launched by", "dtype", "sm", "warps", "stages", "regs", "spills", "shared", "cubin", "occup."]
    header += ["HMMA", "WGMMA", "FFMA", "MUFU", "LDG", "STG", "all", "B/unit", "exp/unit", "floor, ns"]
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
        line += [str(count["LDG"]), str(count["STG"]), str(count["all"])]
        line += [f"{floor['bytes_per_unit']:.0f}", f"{floor['exps_per_unit']:.0f}", f"{floor['ns_per_unit']:.3f}"]
        cells.append(line)
    title = [
        "Triton kernels as the compiler leaves them; spills are the loads and stores of local memory. A unit is a token",
        "and head, a pixel or an element of the case; its floor, on the card's datasheet rates, is a prediction.",
    ]
    return Table(title, header, cells, left=3)


def cuda_rows() -> list[dict[str, Any]]:
    """Those of the nvcc-built kernels, where their report is there."""
    try:
        import cuda_report
    except ImportError:
        return []
    return cuda_report.rows()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 and one line on a bad value."""
    parser = Parser("compile_report", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument(
        "--dtype",
        type=some_of(tuple(DTYPES)[1:]),
        default=("float32", "float16", "bfloat16"),
        help="comma-separated",
    )
    parser.add_argument("--dims", type=positive, nargs="+", default=[32, 64], help="channels of a head")
    parser.add_argument("--kernels", nargs="+", metavar="PART", help="only kernels with such a part in their names")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count(), help="processes")
    arguments = parser.parse_args(argv)
    if _triton.TRITON_MISSING:
        parser.error(f"{_triton.TRITON_MISSING}")
    if _triton.interpreting():
        parser.error("TRITON_INTERPRET=1 is set: there is nothing to compile")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print, write the JSON; 0, or 1 if a kernel does not compile."""
    arguments = parse(argv)
    start = time.perf_counter()
    rows = compile_kernels(arguments)
    results = {
        "benchmark": "compile_report",
        "environment": environment(torch.device("cpu"), torch.float16) | {"dtype": ", ".join(arguments.dtype)},
        "rows": rows,
        "cuda_rows": cuda_rows(),
        "wall_s": round(time.perf_counter() - start, 1),
    }
    if arguments.json:
        write_json(arguments.json, results)
    print(table(rows).text())
    failed = [row for row in rows if row["error"]]
    print(f"{len(rows)} kernels, {len(failed)} do not compile, {results['wall_s']:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
