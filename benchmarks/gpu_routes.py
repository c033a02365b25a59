"""Decides what serves each op on a GPU by default, from gpu_suite.py's JSONs; see cxv_kernels/backends.py.

    python benchmarks/gpu_routes.py benchmarks/results/gpu_suite-tesla-t4.json …

Rewrites cxv_kernels/gpu_routes.json from these files alone, so name all of them. A backend is in for an op and a dtype
if a check against float64 was run there and passed, and nothing has failed: not the op, not a CUDA graph of it, not a
model's gradients, nor what died with it alone. What the budget did not reach says nothing. Where it was timed, forward
+ backward, it must beat plain PyTorch, and the faster comes first: by the geometric mean of its ratios.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common import DTYPES, Parser, write_json
from gpu_report import WRONG, measured, rows_of, seconds

from cxv_kernels import backends

TABLE = Path(backends.__file__).with_name("gpu_routes.json")
ONE_OP, MODELS = ("attention", "sweep", "conv_norm"), ("gradients", "models")  # sections
PLAIN = ("reference", "conv2d, layer_norm")


def slowness(results: Sequence[dict[str, Any]], op: str, dtype: str, backend: str) -> float | None:
    """Its time of forward + backward over plain PyTorch's, with which it took turns in a task: the geometric mean of
    all cases; None: never timed."""
    logs = []
    for task in (task for one in results for task in one["tasks"] if task["section"] in ("attention", "conv_norm")):
        rows = [r for r in task["rows"] if (r["op"], r["dtype"]) == (op, dtype)]
        plain = {(r["variant"], *r["shape"]): r for r in rows if r["implementation"] in PLAIN}
        for row in (r for r in rows if r["implementation"] == backend):
            ours = seconds(row, "forward_backward")
            theirs = seconds(plain.get((row["variant"], *row["shape"])), "forward_backward")
            if ours and theirs:
                logs.append(math.log(ours / theirs))
    return math.exp(sum(logs) / len(logs)) if logs else None


def wrong(results: dict[str, Any]) -> set[tuple[str, str, str]]:
    """(op, backend, dtype) of whatever has failed, or was alone in a task that did not live to tell."""
    found = {tuple(failed) for failed in results["settings"]["barred"]}
    for task in results["tasks"]:
        if task["section"] in ONE_OP + MODELS and task["status"] in WRONG:
            asked = task["arguments"]
            names = measured(asked, task["backends"] or results["settings"]["backends"])
            # torch.compile's slowness is no kernel's
            slow = task["status"] == "out of time" and any("compile" in mode for mode in asked.get("modes", ()))
            if len(names) == 1 and not slow:
                found |= {(op, *names, asked["dtype"]) for op in _ops(results, task)}
    for row in rows_of(results, *ONE_OP):
        if row["status"] == "failed":
            found.add((row["op"], row["implementation"], row["dtype"]))
    for row in rows_of(results, "gradients"):
        if row["status"] == "failed":
            served = row.get("served") or dict.fromkeys(backends.OPS, row["backend"])
            found |= {(op, backend, row["dtype"]) for op, backend in served.items()}
    return found


def _ops(results: dict[str, Any], task: dict[str, Any]) -> Iterable[str]:
    """What the task calls: of a model what any of its rows says that it does, else everything."""
    asked = task["arguments"]
    if task["section"] not in MODELS:
        return [asked.get("op", "conv_norm")]
    rows = rows_of(results, *MODELS)
    return next((r["served"] for r in rows if r["model"] == asked["model"] and r.get("served")), backends.OPS)


def route(results: Sequence[dict[str, Any]], arch: int) -> dict[str, dict[str, list[str]]]:
    """Op → dtype → backends, the fastest first, by the results of one architecture; without what nobody checked."""
    failed = set().union(*map(wrong, results))
    checked = {
        (row["op"], row["backend"], row["dtype"])
        for one in results
        for row in rows_of(one, "checks")
        if row["status"] == "ok"
    }
    table: dict[str, dict[str, list[str]]] = {}
    for op in backends.OPS:
        for dtype in DTYPES:
            known = [name for name in backends.gpu_order(arch) if (op, name, dtype) in checked | failed]
            if not known:
                continue
            times = {name: slowness(results, op, dtype, name) for name in known}
            # unmeasured ones keep their order, after the others
            good = [n for n in known if (op, n, dtype) not in failed and (times[n] is None or times[n] < 1)]
            table.setdefault(op, {})[dtype] = sorted(good, key=lambda n: math.inf if times[n] is None else times[n])
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Write the table and print it; exits with status 2 and one line on a file that does not say what it must."""
    parser = Parser("gpu_routes", description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path, nargs="+", metavar="FILE.json", help="of gpu_suite.py, on any cards")
    parser.add_argument("--out", type=Path, default=TABLE, help="the package's own table unless told otherwise")
    arguments = parser.parse_args(argv)
    cards: dict[int, dict[str, Any]] = {}
    for path in arguments.results:
        results = parser.results("FILE.json", path, "gpu_suite")
        capability = results["environment"].get("capability")
        if capability is None:
            parser.error(f"argument FILE.json: {path} is not of a GPU")
        cards.setdefault(10 * capability[0] + capability[1], {})[path.name] = results
    table = {str(a): {"evidence": sorted(found), **route(list(found.values()), a)} for a, found in cards.items()}
    write_json(arguments.out, dict(sorted(table.items())))
    for arch, entry in table.items():
        for op in backends.OPS:
            for dtype, names in entry.get(op, {}).items():
                print(f"sm_{arch} {op} {dtype}: {', '.join(names) or 'reference'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
