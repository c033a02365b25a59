"""gpu_suite.py's tables and verdicts, from its JSON alone."""

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from attn_speed_report import Table

MAIN, LONG = [32, 4, 1024, 32], [8, 4, 16384, 32]
LABELS = {"performer_attention": "Performer", "linear_attention": "linear", "conv_norm": "conv_norm"}

JUDGED = ("checks", "gradients", "graphs")  # sections
TIMED = ("attention", "sweep", "conv_norm", "models", "peers")
WRONG = ("failed", "crashed", "out of time")  # of a task: it was begun and had all the time that it should have
MEASURED = ("forward", "gpu_", "peak_", "saved_", "train", "infer")  # of a row: keys that begin so are numbers of it

Row = dict[str, Any]


def read(path: Path) -> dict[str, Any]:
    """A JSON; empty where there is none, or half of one."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def rows_of(results: dict[str, Any], *sections: str) -> list[Row]:
    """What the sections' tasks have emitted."""
    return [row for task in results["tasks"] if task["section"] in sections for row in task["rows"]]


def measured(arguments: dict[str, Any], among: Sequence[str]) -> list[str]:
    """The backends that a task with these arguments measures: those that its modes name, or all."""
    modes = arguments.get("modes")
    return [name for name in among if modes is None or name in {mode.partition(" + ")[0] for mode in modes}]


def withdraw(results: dict[str, Any], barred: Collection[tuple[str, str, str]]) -> None:
    """Take its numbers from every row of (op or model, backend, dtype) that a check found wrong, be it a later one."""
    for row in rows_of(results, *TIMED):
        if row["status"] != "ok":
            continue
        if "model" in row:
            by = row["mode"].partition(" + ")[0]
            given = [(row["model"], by), *row["served"].items()]
        else:
            given = [(row["op"], row["implementation"])]
        wrong = [what for what, by in given if (what, by, row["dtype"]) in barred]
        if wrong:
            row |= {key: None for key in row if key.startswith(MEASURED) and not key.endswith("_work")}
            row |= {"status": "failed", "note": f"a later check failed: {', '.join(wrong)}"}


def headline(results: dict[str, Any]) -> str:
    """The machine."""
    env = results["environment"]
    if "device_name" not in env:
        return f"no environment: {env.get('error')}"
    driver = f", driver {env['driver']}" if env.get("driver") else ""
    versions = ", ".join(f"{name} {env.get(name)}" for name in ("torch", "triton", "python"))
    return f"{env['device_name']}{driver}, {versions}"


# --- verdicts ----------------------------------------------------------------------------------------------------


def seconds(row: Row | None, part: str) -> float | None:
    """The median: of the GPU alone where that was measured."""
    timing = row and (row.get(f"gpu_{part}") or row.get(part))
    return timing["median_s"] if timing else None


def find(rows: Sequence[Row], status: str = "ok", **wanted: Any) -> Row | None:
    """The first row with these entries that has its numbers, or this status."""
    wanted["status"] = status
    return next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), None)


def _ratio(slow: float | None, fast: float | None) -> float | None:
    return slow / fast if slow and fast else None


def verdicts(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Each target with what was found: met, missed, not measured, or failed, with why there is no speed."""
    lines = []
    for words, wanted, found, failed in _targets(results):
        verdict = "met" if (found or 0) >= wanted else "missed" if found else "failed" if failed else "not measured"
        note = failed["note"] if failed and not found else None
        lines.append({"target": words, "wanted": wanted, "found": found, "verdict": verdict, "note": note})
    return lines


def _targets(results: dict[str, Any]) -> Iterator[tuple[str, float, float | None, Row | None]]:
    """(what, at least this, what was found, one of its rows that has failed)."""
    rows, ceilings = rows_of(results, "attention", "sweep"), rows_of(results, "ceilings")
    bandwidth = ceilings[0]["bandwidth"] if ceilings else None

    def time(op: str, shape: list[int], implementation: str, part: str = "forward_backward") -> float | None:
        case = {"op": op, "variant": "softmax", "shape": shape, "dtype": "float16"}
        return seconds(find(rows, **case, implementation=implementation), part)

    def share(op: str) -> float | None:
        row = find(rows, op=op, variant="softmax", shape=MAIN, dtype="float16", implementation="triton")
        return row["forward_bytes_per_s"] / bandwidth if row and bandwidth else None

    def failed(op: str, implementation: str) -> Row | None:
        return find(rows, "failed", op=op, dtype="float16", implementation=implementation)

    performer, linear = "performer_attention", "linear_attention"
    ours, wrong = time(performer, MAIN, "triton"), failed(performer, "triton")
    words = "triton: Performer (32, 4, 1024, 32), forward + backward"
    yield f"{words}, × torch.compile(reference)", 3, _ratio(time(performer, MAIN, "torch.compile"), ours), wrong
    yield f"{words}, × SDPA (flash)", 1.5, _ratio(time(performer, MAIN, "sdpa, flash"), ours), wrong
    ratio = _ratio(time(performer, LONG, "sdpa, flash"), time(performer, LONG, "triton"))
    yield "triton: Performer at N = 16,384, forward + backward, × SDPA (flash)", 10, ratio, wrong
    yield "triton: Performer forward, share of the measured bandwidth", 0.5, share(performer), wrong
    wrong = failed(linear, "triton")
    yield "triton: linear_attention, forward + backward, × the best installed peer", 1.3, _best_peer(results), wrong
    yield "triton: linear_attention forward, share of the measured bandwidth", 0.6, share(linear), wrong
    yield from _model_targets(results)
    cuda, wrong = time(performer, MAIN, "cuda"), failed(performer, "cuda")
    words = "cuda: Performer (32, 4, 1024, 32), forward + backward"
    yield f"{words}, × torch.compile(reference)", 1.5, _ratio(time(performer, MAIN, "torch.compile"), cuda), wrong
    yield f"{words}, × Triton (1 / 1.3 or more)", 1 / 1.3, _ratio(ours, cuda), wrong


def _best_peer(results: dict[str, Any]) -> float | None:
    """The least ratio over the variants that an installed package has, too."""
    ratios, case = [], {"op": "linear_attention", "shape": MAIN, "dtype": "float16"}
    for row in rows_of(results, "peers"):
        peer = row["implementation"] not in ("triton", "cuda", "cpp")
        if peer and all(row[key] == value for key, value in case.items()):
            ours = find(rows_of(results, "peers"), **case, variant=row["variant"], implementation="triton")
            ratios.append(_ratio(seconds(row, "forward_backward"), seconds(ours, "forward_backward")))
    known = [ratio for ratio in ratios if ratio]
    return min(known) if known else None


def _model_targets(results: dict[str, Any]) -> Iterator[tuple[str, float, float | None, Row | None]]:
    rows, case = rows_of(results, "models"), {"model": "cpv-5/4", "dtype": "float16", "batch": 256}

    def found(mode: str, key: str) -> float | None:
        row = find(rows, **case, mode=mode)
        return row and row.get(key)

    over = "train_speedup"  # over eager: both sides of a ratio took turns with it
    ours = max(filter(None, (found("triton", over), found("triton + compile", over))), default=None)
    words = "triton: CPV-5/4 training, batch 256, AMP float16"
    wrong = find(rows, "failed", **case, mode="triton")
    yield f"{words}, images/s × eager", 2, ours, wrong
    yield f"{words}, images/s × torch.compile", 1.3, _ratio(ours, found("eager + compile", over)), wrong
    peak = "train_peak_bytes"
    yield f"{words}, eager's peak ÷ ours", 8, _ratio(found("eager", peak), found("triton", peak)), wrong


def failures(results: dict[str, Any]) -> list[str]:
    """What is wrong: failed checks, fused rows that are, and checks whose process died, hung or did not start."""
    found = []
    for task in results["tasks"]:
        if task["section"] in JUDGED and task["status"] in (*WRONG, "not started"):
            last = (task["error"] or "").strip().splitlines()[-1:]
            found.append(f"{task['section']} {task['label']}: {task['status']} {' '.join(last)[:200]}")
        for row in task["rows"]:
            inner = [check for check in row.get("checks", ()) if check["status"] == "failed"]
            if row.get("status") == "failed" or inner:
                names = (
                    "op",
                    "case",
                    "model",
                    "variant",
                    "shape",
                    "backend",
                    "implementation",
                    "mode",
                    "dtype",
                    "program",
                )
                words = " ".join(str(row[name]) for name in names if row.get(name))
                note = row.get("note") or (inner and inner[0].get("note")) or ""
                found.append(f"{task['section']} {words}: failed {note[:200]}".rstrip())
    return found


def unserved(results: dict[str, Any]) -> list[str]:
    """The backends that could serve none of their checks, and why: nothing was found wrong with them, nor right."""
    checks: dict[str, list[dict[str, Any]]] = {}
    for row in rows_of(results, "checks"):
        checks.setdefault(row["backend"], []).append(row)
    idle = {name: rows[0]["note"] for name, rows in checks.items() if {r["status"] for r in rows} == {"not served"}}
    return [f"Nothing is known of {name}, which serves no op here: {note}" for name, note in idle.items()]


def unreached(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The tasks for which the budget left no time, or too little."""
    return [task for task in results["tasks"] if task["status"] == "not measured"]


def checked(results: dict[str, Any]) -> list[str]:
    """What the checks say, and what they do not."""
    wrong, idle = failures(results), unserved(results)
    judged = [task for task in results["tasks"] if task["section"] in JUDGED]
    left = len(unreached({"tasks": judged}))
    if wrong:
        lines = ["FAILED:", *wrong]
    elif not any(row["status"] == "ok" for row in rows_of(results, *JUDGED)):
        lines = ["No check was run."]
    else:
        lines = ["Every check that was run passed." if idle or left else "Every check passed."]
    if left:
        lines.append(f"Not reached, so neither right nor wrong: {left} of {len(judged)} tasks of {', '.join(JUDGED)}.")
    return lines + idle


# --- tables ------------------------------------------------------------------------------------------------------


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value * 1e3:,.3f}" if value < 0.1 else f"{value * 1e3:,.0f}"


def op_table(results: dict[str, Any], brief: bool = False) -> Table:
    """Every op at every size (brief: the sizes of the targets): time of the GPU and of the caller, rates, memory."""
    header = ["op", "(B, H, N, D) or (B, C, H, W)", "dtype", "implementation", "forward, ms", "as called"]
    header += ["GB/s", "fwd + bwd, ms", "as called", "TFLOP/s", "peak, MB", "error"]
    cells = []
    for row in rows_of(results, "attention", "sweep", "conv_norm", "peers"):
        if brief and row["shape"] not in (MAIN, LONG):
            continue
        shape = ", ".join(f"{n:,}" for n in row["shape"])
        name = f"{LABELS[row['op']]} {row['variant']}"
        head = [name, shape, row["dtype"], row["implementation"]]
        if row["status"] != "ok":
            cells.append([*head, f"{row['status']}: {row['note']}" if row["note"] else row["status"]])
            continue
        line = head
        for part in ("forward", "forward_backward"):
            line += [_ms(seconds(row, part)), _ms(row[part]["median_s"])]
            rate = row["forward_bytes_per_s"] / 1e9 if part == "forward" else row["forward_backward_flop_per_s"] / 1e12
            # an op's own work says nothing about another's time
            line.append(
                "" if row["implementation"].startswith("sdpa") else f"{rate:,.0f}" if rate >= 10 else f"{rate:.1f}"
            )
        error = row["max_relative_error"]
        cells.append([*line, f"{row['peak_bytes'] / 1e6:,.1f}", "" if error is None else f"{error:.0e}"])
    title = [
        "Times are medians of the GPU alone, inputs not in its cache; 'as called' includes launching. GB/s and TFLOP/s",
        "are the op's fewest bytes and operations over that time. Peak: forward + backward above the inputs.",
    ]
    return Table(title, header, cells, left=4)


def model_rows(results: dict[str, Any]) -> list[Row]:
    """The models', with eager once, which is timed anew beside every compiled mode."""
    once: dict[tuple[Any, ...], Row] = {}
    for row in rows_of(results, "models"):
        once.setdefault((row["model"], row["dtype"], row["batch"], row["mode"]), row)
    return list(once.values())


def model_table(results: dict[str, Any], brief: bool = False) -> Table:
    """Training and inference of the models (brief: at the targets' batch)."""
    header = [
        "model",
        "dtype",
        "batch",
        "mode",
        "train, images/s",
        "× eager",
        "peak, GB",
        "infer, images/s",
        "peak, GB",
    ]
    cells = []
    for row in model_rows(results):
        if brief and row["batch"] != 256:
            continue
        head = [row["model"], row["dtype"], f"{row['batch']:,}", row["mode"]]
        if row["status"] != "ok":
            cells.append([*head, f"{row['status']}: {row['note']}" if row["note"] else row["status"]])
            continue
        ratio = row["train_speedup"]
        line = [
            f"{row['train_images_per_s']:,.0f}",
            f"{ratio:.2f}×" if ratio else "",
            f"{row['train_peak_bytes'] / 1e9:.3f}",
        ]
        cells.append([*head, *line, f"{row['infer_images_per_s']:,.0f}", f"{row['infer_peak_bytes'] / 1e9:.3f}"])
    title = [
        "A training step with AdamW under autocast, × eager as it ran in turn with the mode; peak: all that training",
        "holds; of inference, above the model.",
    ]
    return Table(title, header, cells, left=4)


def batch_table(results: dict[str, Any], brief: bool = False) -> Table:
    """The largest batches."""
    rows = rows_of(results, "largest_batch")
    cells = [[r["model"], r["dtype"], r["mode"], f"{r['largest_batch']:,}", str(r["by"])] for r in rows]
    gigabytes = rows[0]["budget_bytes"] / 1e9 if rows else 16
    return Table(
        [f"The largest batch that trains in {gigabytes:g} GB."], ["model", "dtype", "mode", "batch", "by"], cells, 3
    )


def check_table(results: dict[str, Any], brief: bool = False) -> Table:
    """How many checks of each op and backend there were; the worst error over its tolerance."""
    rows = rows_of(results, "checks", "graphs")
    cells = []
    for op, backend in dict.fromkeys((row["op"], row["backend"]) for row in rows):
        mine = [row for row in rows if (row["op"], row["backend"]) == (op, backend) and row["status"] != "not served"]
        if not mine:
            note = next(row["note"] for row in rows if (row["op"], row["backend"]) == (op, backend))
            cells.append([op, backend, f"not served: {note}"])
            continue
        worst = max((row.get("of_tolerance") or 0 for row in mine), default=0)
        failed = sum(row["status"] == "failed" for row in mine)
        cells.append([op, backend, str(len(mine)), str(failed), f"{worst:.2f}"])
    title = ["Forward and backward against float64, and CUDA graphs' replays against direct calls."]
    return Table(title, ["op", "backend", "checks", "failed", "worst error / tolerance"], cells, left=2)


def verdict_table(results: dict[str, Any], brief: bool = False) -> Table:
    """The targets."""
    cells = []
    for line in results["verdicts"]:
        found = line["note"] or ("not measured" if line["found"] is None else f"{line['found']:.2f}")
        cells.append(
            [line["target"], f"{line['wanted']:.2f}", found, line["verdict"] if line["found"] is not None else ""]
        )
    title = [
        "Targets. In 16 bits and under AMP plain PyTorch (reference, torch.compile, eager) multiplies attention's",
        "matrices in float32, as it accumulates, with TF32 off: what is over it is judged against that.",
    ]
    return Table(title, ["target", "wanted ≥", "found", "verdict"], cells)


def ceiling_line(results: dict[str, Any]) -> str:
    """The rates measured in the same run."""
    return "; ".join(
        f"{row['bandwidth'] / 1e9:,.0f} GB/s ({row['bandwidth_by']}), "
        f"{row['flops'] / 1e12:,.1f} TFLOP/s ({row['flops_by']}, {row['dtype']})"
        for row in rows_of(results, "ceilings")
    )


TABLES: tuple[Callable[..., Table], ...] = (op_table, model_table, batch_table, check_table, verdict_table)


def summary(results: dict[str, Any]) -> str:
    """For the terminal, in brief, what matters most last."""
    tables = [make(results, brief=True) for make in TABLES]
    parts = [table.text() for table in tables if table.rows]
    unmeasured = [f"  {task['section']} {task['label']}" for task in unreached(results)]
    if unmeasured:
        parts.insert(0, "Not measured, the budget was spent:\n" + "\n".join(unmeasured) + "\n")
    broken = [t for t in results["tasks"] if t["status"] in (*WRONG, "not started")]
    for task in broken:
        parts.append(f"{task['section']} {task['label']}: {task['status']}\n{_tail(task['error'])}")
    return "\n".join([ceiling_line(results), "", *parts, *checked(results)])


def _tail(error: str | None) -> str:
    return "\n".join(f"  {line}" for line in (error or "").strip().splitlines()[-3:])


def markdown(results: dict[str, Any]) -> str:
    """For the README."""
    parts = [headline(results) + ".", ceiling_line(results) + "."]
    for make in TABLES:
        table = make(results)
        if table.rows:
            parts += [" ".join(table.title), table.markdown()]
    return "\n\n".join([*parts, *checked(results)])
