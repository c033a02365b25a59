"""Redraw the tables of README.md and docs from the CSV files in benchmarks/results.

    python tools/docs_tables.py

A table stands between ``<!-- name -->`` and ``<!-- /name -->``, where name is one of ``TABLES``.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "paper")]

import _report  # noqa: E402
import ablations  # noqa: E402
import table1  # noqa: E402
from _harness import RESULTS, Row, read_csv, read_rows  # noqa: E402

from cxv.checkpoint import find_pretrained, pretrained_models, read_checkpoint  # noqa: E402

PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))


def from_rows(name: str, *draw: Callable[[Sequence[Row]], _report.Table | str], newest: bool = True) -> str:
    """Tables of the newest run, or of all runs, below a line that names the machines."""
    rows = read_rows(RESULTS / f"{name}.csv")
    runs = _report.by_host(rows)
    machines = _report.machine_line(runs[-1]) if newest else "  \n".join(map(_report.machine_line, runs))
    drawn = [table(_report.latest(rows) if newest else rows) for table in draw]
    return "\n\n".join([machines, *(part if isinstance(part, str) else part.markdown() for part in drawn)])


def deploy() -> str:
    """Exported models next to the eager model."""
    rows = read_csv(RESULTS / "deploy-cpu.csv")
    batches = [key[6:-3] for key in rows[0] if key.endswith("_ms") and not key.endswith("_iqr_ms")]
    table = _report.Table(["", "top-1", "MB", *(f"batch {batch}, ms" for batch in batches)])
    for row in rows:
        cells = [row["name"], f"{float(row['top1']):.2f} %", f"{int(row['bytes']) / 1e6:.2f}" if row["bytes"] else ""]
        for batch in batches:
            value, first = float(row[f"batch_{batch}_ms"]), float(rows[0][f"batch_{batch}_ms"])
            cells.append(f"{value:.2f} ± {float(row[f'batch_{batch}_iqr_ms']):.2f}, {value / first:.2f}×")
        table.rows.append(cells)
    return table.markdown()


def pretrained() -> str:
    """The weights in the package, as their files describe them."""
    lines = ["| model | top-1, % | evaluated on | training |", "| --- | ---: | --- | --- |"]
    for name in pretrained_models():
        found = read_checkpoint(find_pretrained(name))
        (top1,), notes = found["metrics"].values(), found["notes"]
        lines.append(f"| {name} | {top1:.2f} | {notes['evaluation']} | {notes['training']} |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {
    "attn_speed headline": partial(from_rows, "attn_speed-cpu", _report.op_headline, newest=False),
    "attn_speed ops": partial(from_rows, "attn_speed-cpu", _report.op_times),
    "attn_speed lengths": partial(from_rows, "attn_speed-cpu", _report.length_times),
    "attn_speed crossover": partial(from_rows, "attn_speed-cpu", _report.crossovers),
    "attn_mem": partial(from_rows, "attn_mem-cpu", _report.attention_memory, _report.training_memory),
    "integrations": partial(
        from_rows, "integrations-cpu", _report.integration_attention, _report.integration_models, newest=False
    ),
    "model_step headline": partial(from_rows, "model_step-cpu", _report.step_headline, newest=False),
    "model_step": partial(from_rows, "model_step-cpu", _report.step_memory, _report.step_times),
    "deploy": deploy,
    "pretrained": pretrained,
    "table1": lambda: table1.table(read_csv(RESULTS / "table1-cpu.csv")).markdown(),
    "ablations": lambda: ablations.report(ablations.read(RESULTS / "ablations-cpu.jsonl"), dataset="cifar10"),
}


def redrawn(text: str) -> str:
    """The text with its tables as the CSV files have them.

    Raises:
        ValueError: a table without its end mark.
    """
    for name, draw in TABLES.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, begun, rest = text.partition(begin)
        if not begun:
            continue
        _, closed, after = rest.partition(end)
        if not closed:
            raise ValueError(f"table {name!r} has no end: {end}")
        text = f"{before}{begin}{draw().strip()}\n{end}{after}"
    return text


def main() -> int:
    """Rewrite the pages whose tables have changed."""
    for path in PAGES:
        text = path.read_text()
        if (new := redrawn(text)) != text:
            path.write_text(new)
            print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
