"""Choose the launch options of the Triton kernels and write the table configs.json.

For each kernel, size and dtype the candidates are first compiled, without a GPU. Candidates that spill, need more
shared memory than a block can have, or make Hopper's products wait for one another are rejected. On a GPU each of the
others must then agree with the float64 reference, and the fastest one is chosen. The time is that of the whole op, and
the other kernels of the op are the same for all candidates.

``--rank-by compile`` needs no GPU. It chooses the candidate whose loop over tokens issues the fewest instructions per
token, among those that hide at least as much latency as the packaged choice, by their stages and resident warps. The
packaged choice is kept if it is within 2 %. The table is then based on the compiler's output and not on measurements.

``--rank-by time`` tunes the architecture of the GPU, sm_80 or sm_90. Other architectures are refused, because their
limits are not known here and the table has no level for them.
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import torch
from _harness import DTYPES, TOLERANCE, environment, interleaved, positive, relative_error
from triton_compile import CARDS, check_triton, compile_all, launches

from cxv_kernels import _triton, testing
from cxv_kernels.ops.linear_attention.triton import configs
from cxv_kernels.ops.linear_attention.triton.configs import Options, Table

# Tried for each option that the packaged entry of a kernel has.
SPACE = {
    "num_warps": (2, 4, 8),
    "num_stages": (1, 2, 3),
    "BLOCK_N": (32, 64, 128),
    "BLOCK_F": (16, 32, 64, 128),
    "BLOCK_E": (16, 32, 64),
    "TOKENS": (128, 256, 512, 1024),
}
TUNABLE = tuple(CARDS)[1:]  # architectures
SHAPE = (32, 4, 1024)  # batch, heads, tokens of the timing: the paper's models


@dataclass
class Entry:
    """One entry of the table, and what is known about each candidate for it."""

    kernel: str
    arch: int
    dim: int
    features: int | None  # None: without a projection
    dtype: str
    packaged: Options
    cases: list[str] = field(default_factory=list)  # that launch it; the first is timed
    candidates: list[Options] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # of each: why it is out, or how it ranks
    seconds: list[float | None] = field(default_factory=list)
    issued: list[float | None] = field(default_factory=list)  # instructions of a warp that a token costs
    chosen: Options = field(default_factory=dict)

    @property
    def size(self) -> str:
        """As the table spells it: with the next power of two."""
        dim, *features = (max(16, 1 << (n - 1).bit_length()) for n in (self.dim, self.features) if n is not None)
        return "x".join(map(str, (dim, *features)))

    @property
    def key(self) -> str:
        """As the table spells it."""
        return f"{self.size} {8 * DTYPES[self.dtype].itemsize}-bit sm_{self.arch}"

    def put(self, table: Table, options: Options) -> Table:
        """The table with these options at this entry."""
        return table | {self.kernel: table[self.kernel] | {self.key: options}}


def entries(arch: int, dim: int, dtype: str, random_features: int | None = None) -> list[Entry]:
    """Every entry that the cases look up at this size; ``random_features`` as :func:`testing.cases` has them."""
    found: dict[tuple[str, str], Entry] = {}
    lookup, now = configs.lookup, ""

    def watch(kernel: str, _: int, dim: int, features: int | None, kind: torch.dtype) -> Options:
        options = lookup(kernel, arch, dim, features, kind)
        entry = Entry(kernel, arch, dim, features, dtype, dict(options))
        entry = found.setdefault((kernel, entry.size), entry)
        if now not in entry.cases:
            entry.cases.append(now)
        return options

    with mock.patch.object(configs, "lookup", watch):
        for case in testing.cases(1, 4, 1024, dim, ragged=False, features=random_features):
            now = f"{case.op} {case.label}"
            launches(DTYPES[dtype], arch, dim=dim, features=random_features, only=(now,))
    return list(found.values())


def candidates(entry: Entry, most: int) -> list[Options]:
    """The packaged options first, then those that differ in ever more of them, at most ``most``."""
    names = [name for name in SPACE if name in entry.packaged]
    every = [dict(zip(names, values, strict=True)) for values in itertools.product(*(SPACE[name] for name in names))]

    def distance(options: Options) -> int:
        return sum(options[name] != entry.packaged[name] for name in names)

    tried = [entry.packaged | options for options in sorted(every, key=distance) if distance(options)]
    fitting = [o for o in tried if o.get("TOKENS", 1 << 30) >= o.get("BLOCK_N", 1)]
    return [entry.packaged, *fitting][:most]


def compile_candidates(found: Sequence[Entry], table: Table, jobs: int) -> None:
    """Note candidates that spill, are too large or do not compile. Choose among the others by issued instructions."""
    wanted: list[tuple[int, Any]] = []
    owners: list[tuple[Entry, int]] = []
    for entry in found:
        entry.notes = [""] * len(entry.candidates)
        entry.seconds, entry.issued = [None] * len(entry.candidates), [None] * len(entry.candidates)
        for i, options in enumerate(entry.candidates):
            with configs.override(entry.put(table, options)):
                mine = launches(
                    DTYPES[entry.dtype], entry.arch, dim=entry.dim, features=entry.features, only=entry.cases
                )
            chosen = [(entry.arch, launch) for launch in mine if launch.error or launch.name == entry.kernel]
            wanted += chosen
            owners += [(entry, i)] * len(chosen)
    occupancy: dict[tuple[int, int], float] = {}
    for (entry, i), row in zip(owners, compile_all(wanted, jobs), strict=True):
        entry.notes[i] = entry.notes[i] or row.fault
        entry.issued[i] = max(entry.issued[i] or 0.0, row.issued or 0.0) or None
        occupancy[id(entry), i] = min(occupancy.get((id(entry), i), 1.0), row.occupancy)
    for entry in found:
        left = [i for i, note in enumerate(entry.notes) if not note]
        if left and left[0] == 0:
            stages = entry.packaged["num_stages"]
            left = [
                i
                for i in left
                if entry.candidates[i]["num_stages"] >= stages and occupancy[id(entry), i] >= occupancy[id(entry), 0]
            ]
        entry.chosen = entry.candidates[_cheapest(left, entry.issued)] if left else entry.packaged


def _cheapest(left: Sequence[int], costs: Sequence[float | None]) -> int:
    """Return the candidate with the least cost, or the packaged one (the first) unless another is clearly cheaper."""
    known = [i for i in left if costs[i] is not None]
    return min(known, key=lambda i: costs[i] * (0.98 if i == 0 else 1), default=left[0] if left else 0)


def time_candidates(entry: Entry, table: Table, device: torch.device, budget: float) -> None:
    """Time the remaining candidates in their op, forward and backward, after a check against the reference."""
    kind = DTYPES[entry.dtype]
    case = next(
        case
        for case in testing.cases(*SHAPE, entry.dim, ragged=False, device=device, features=entry.features)
        if f"{case.op} {case.label}" == entry.cases[0]
    )
    inputs = [torch.randn(shape, device=device).to(kind) for shape in case.shapes]
    exact = testing.outputs_and_gradients(case, [x.double() for x in inputs], "reference", kind)

    def run(options: Options) -> list[torch.Tensor]:
        with configs.override(entry.put(table, options)):
            return testing.outputs_and_gradients(case, inputs, "triton", kind)

    ready = []
    for i, options in enumerate(entry.candidates):
        if entry.notes[i]:
            continue
        try:
            error = relative_error([t.detach() for t in run(options)], [t.detach() for t in exact])
        except Exception as failure:  # whatever it is, these options are out
            if device.type == "cuda":
                torch.cuda.synchronize()  # raises where no later kernel would run
            entry.notes[i] = f"{type(failure).__name__}: {failure}"[:200]
            continue
        if error <= TOLERANCE[kind]:
            ready.append(i)
        else:
            entry.notes[i] = f"wrong: {error:.1e}"
    runs = [partial(run, entry.candidates[i]) for i in ready]
    timings = interleaved(runs, device, budget=budget, min_repeats=7, max_repeats=50)
    for i, timing in zip(ready, timings, strict=True):
        entry.seconds[i] = timing and timing.median
    entry.chosen = entry.candidates[_cheapest([i for i in ready if entry.seconds[i] is not None], entry.seconds)]


def line(entry: Entry) -> str:
    """An entry's outcome in words."""
    changes = (f"{n} {entry.packaged[n]} → {value}" for n, value in entry.chosen.items() if value != entry.packaged[n])
    at = entry.candidates.index(entry.chosen)
    costs, unit = (entry.seconds, "s") if entry.seconds[at] else (entry.issued, "instructions a token")
    cost = f"; {costs[at]:.3g} {unit}, was {costs[0] or float('nan'):.3g}" if costs[at] else ""
    tried = f"{len(entry.candidates)} tried, {sum(map(bool, entry.notes))} out"
    return f"{entry.kernel:24} {entry.key:24} {tried}: {', '.join(changes) or 'as it was'}{cost}"


def tune(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fill in the table entry by entry, and return it with all candidates."""
    table: Table = configs.packaged()
    found = [
        entry
        for arch in arguments.arch
        for dim in arguments.dims
        for dtype in arguments.dtype
        for features in arguments.features
        for entry in entries(arch, dim, dtype, features)
        if arguments.kernels is None or entry.kernel in arguments.kernels
    ]
    found = list({(e.kernel, e.arch, e.size, e.dtype): e for e in found}.values())
    for entry in found:
        entry.candidates = candidates(entry, arguments.candidates)
    compile_candidates(found, table, arguments.jobs)
    device = torch.device("cuda")
    for entry in found:
        if arguments.rank_by == "time":
            time_candidates(entry, table, device, arguments.budget)
        table = entry.put(table, entry.chosen)
        print(line(entry), flush=True)
    return {"table": table, "tried": [asdict(entry) for entry in found]}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 and one line on a bad value."""
    parser = argparse.ArgumentParser("tune", description=__doc__.partition("\n")[0])
    parser.add_argument("--rank-by", choices=("time", "compile"), default="time", help="compile: without a GPU")
    parser.add_argument("--arch", type=int, nargs="+", choices=TUNABLE, help="unset: the GPU's, or 80 and 90")
    parser.add_argument("--dims", type=positive, nargs="+", default=[32, 64], help="channels of a head")
    parser.add_argument(
        "--features", type=positive, nargs="+", default=[None], help="the Performer's; unset: ⌊D ln D⌋ of each head"
    )
    dtypes = tuple(DTYPES)[1:]
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=("float32", "float16"), help="one or more")
    parser.add_argument("--kernels", nargs="+", help="only these functions")
    parser.add_argument("--candidates", type=positive, default=24, help="at most, for each entry")
    parser.add_argument("--budget", type=float, default=0.02, help="seconds of timing per candidate")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--table", type=Path, default=configs.PATH, help="file of the table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the candidates and their results to FILE")
    arguments = parser.parse_args(argv)
    check_triton(parser)
    if arguments.rank_by == "time":
        if not torch.cuda.is_available():
            parser.error("argument --rank-by: time needs a GPU; compile does not")
        mine = _triton.capability(torch.device("cuda"))
        if mine not in TUNABLE:
            parser.error(f"argument --rank-by: time tunes {' and '.join(f'sm_{a}' for a in TUNABLE)}, not sm_{mine}")
        if arguments.arch not in (None, [mine]):
            parser.error(f"argument --arch: time tunes this GPU's alone, {mine}")
        arguments.arch = [mine]
    arguments.arch = arguments.arch or [80, 90]
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Tune, write the table and the candidates, and return 0."""
    arguments = parse(argv)
    results = tune(arguments)
    _write(arguments.table, table_text(results["table"]))
    if arguments.json:
        facts = environment(torch.device("cuda" if arguments.rank_by == "time" else "cpu"))
        content = {"ranked_by": arguments.rank_by, "environment": facts} | results
        _write(arguments.json, json.dumps(content, indent=1) + "\n")
    return 0


def table_text(table: Table) -> str:
    """The table as JSON, an entry per line."""
    kernels = []
    for kernel, entries in table.items():
        lines = (f"  {json.dumps(key)}: {json.dumps(options)}" for key, options in entries.items())
        kernels.append(f" {json.dumps(kernel)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def _write(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)


if __name__ == "__main__":
    sys.exit(main())
