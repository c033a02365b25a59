"""Redraws every table of README.md and docs from the JSON files in results. ``python benchmarks/tables.py``

A table stands between ``<!-- name -->`` and ``<!-- /name -->``, name one of `TABLES`; other marks are left alone.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ablations
import attn_speed_report
import deploy_report
import model_mem_report
import table1_report
import training_runs

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))


def _of(name: str, draw: Callable[[Any], attn_speed_report.Table | str]) -> Callable[[], str]:
    def table() -> str:
        path = RESULTS / f"{name}.json"
        drawn = draw(json.loads(path.read_text()) if path.is_file() else None)
        return drawn if isinstance(drawn, str) else drawn.markdown()

    return table


def _cpv(results: dict[str, Any]) -> dict[str, Any]:
    """One model's rows: CNV and CLTV keep the same, fused."""
    return results | {part: [row for row in results[part] if row["name"] == "cpv-5/4"] for part in ("memory", "sizes")}


TABLES: dict[str, Callable[[], str]] = {
    "attn_speed": _of("attn_speed-cpu", attn_speed_report.report),
    "attn_speed headline": _of("attn_speed-cpu", attn_speed_report.headline_table),
    "attn_speed crossover": _of("attn_speed-cpu", attn_speed_report.crossover_table),
    "deploy": _of("deploy-cpu", deploy_report.report),
    "model_mem": _of("model_mem-cpu", model_mem_report.report),
    "model_mem headline": _of("model_mem-cpu", model_mem_report.headline_table),
    "model_mem ledger": _of("model_mem-cpu", lambda results: model_mem_report.ledger_table(_cpv(results), brief=True)),
    "model_mem sizes": _of("model_mem-cpu", lambda results: model_mem_report.sizes_table(_cpv(results))),
    "model_mem pages kept": _of(
        "model_mem-cpu-pages-kept", lambda results: model_mem_report.speed_table(results, brief=True)
    ),
    "table1 status": _of("table1-cpu", table1_report.status),
    "ablations": lambda: ablations.report(
        training_runs.read(RESULTS / "ablations-table3-cifar10-cpu.jsonl"), dataset="cifar10"
    ),
}


def redrawn(text: str) -> str:
    """The text with its tables as the JSON files have them now.

    Raises:
        ValueError: a table without its end.
    """
    for name in TABLES:
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, begun, rest = text.partition(begin)
        if not begun:
            continue
        _, closed, after = rest.partition(end)
        if not closed:
            raise ValueError(f"table {name!r} has no end: {end}")
        text = f"{before}{begin}{TABLES[name]().strip()}\n{end}{after}"
    return text


def main() -> int:
    """Rewrite the pages whose tables have changed."""
    for path in PAGES:
        text = path.read_text()
        if (new := redrawn(text)) != text:
            path.write_text(new)
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
