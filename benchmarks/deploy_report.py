"""The table of deploy.py, from its JSON alone, for the terminal and as Markdown."""

from typing import Any

from attn_speed_report import Table


def report(results: dict[str, Any] | None) -> Table | str:
    """Top-1, size and times; a time's spread is its interquartile range, its ratio is to the first row."""
    if results is None:
        return "Not yet measured."
    rows, first = results["rows"], results["rows"][0]
    where = results["environment"]
    title = [
        f"{results['model']}, images of {results['img_size']}×{results['img_size']}; top-1 of {results['images']:,} "
        f"test images of {results['data']}; threads: {where['threads']}, of {where['cpu_name']}, torch {where['torch']}"
    ]

    def cell(row: dict[str, Any], batch: str) -> str:
        time, base = row["times"][batch], first["times"][batch]
        spread = time["q3_s"] - time["q1_s"]
        return f"{1e3 * time['median_s']:.2f} ± {1e3 * spread:.2f}, {time['median_s'] / base['median_s']:.2f}×"

    cells = [
        [row["name"], f"{row['top1']:.2f} %", "" if row["bytes"] is None else f"{row['bytes'] / 1e6:.2f}"]
        + [cell(row, batch) for batch in first["times"]]
        for row in rows
    ]
    return Table(title, ["", "top-1", "MB", *(f"batch {batch}, ms" for batch in first["times"])], cells)
