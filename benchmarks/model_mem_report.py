"""The tables of model_mem.py, from its JSON alone, for the terminal and as Markdown."""

from typing import Any

from attn_speed_report import Table

SHORT = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16", "float64": "fp64"}


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.3f}" if nbytes < 1e9 else f"{nbytes / 1e9:.2f}"


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.1f}" if nbytes < 99.95e6 else f"{nbytes / 1e6:,.0f}"


def _key(row: dict[str, Any]) -> list[str]:
    return [row["name"], SHORT[row["dtype"]], row["mode"]]


def _status(row: dict[str, Any]) -> str:
    """Why there is no number."""
    if row["status"] == "failed":
        return f"FAILED: error {row['error']:.1e} against float64, {row['tolerance']:.0e} allowed"
    return f"{row['status']} ({row['note']})" if row.get("note") else row["status"]


def _ratio(value: float | None, of: float | None) -> str:
    return f"{value / of:.3f}×" if value and of else ""


def _eager(rows: list[dict[str, Any]], row: dict[str, Any]) -> dict[str, Any] | None:
    """The row that ratios are to."""
    same = [r for r in rows if (r["name"], r["dtype"], r["mode"]) == (row["name"], row["dtype"], "eager")]
    return same[0] if same and same[0]["status"] == "ok" else None


def _noisy(timing: dict[str, Any]) -> bool:
    return timing["q3_s"] - timing["q1_s"] > timing["median_s"] / 2


def memory_table(results: dict[str, Any], brief: bool = False) -> Table:
    """Peaks, bytes kept, the largest batch, inference."""
    settings = results["settings"]
    batch, side = str(settings["batch"]), settings["image_size"]
    rows = []
    for row in results["memory"]:
        if row["status"] != "ok":
            rows.append([*_key(row), _status(row)])
            continue
        eager, peak = _eager(results["memory"], row), row["peaks"][batch]
        largest = "" if row["largest_batch"] is None else f"{row['largest_batch']:,}"
        cells = [_gb(peak), _ratio(peak, eager and eager["peaks"][batch]), _mb(row["kept"])]
        cells += [_ratio(row["kept"], eager and eager["kept"]), largest]
        units = row["inference"] and f"{row['inference'] / row['largest_activation']:.2f}"
        rows.append([*_key(row), *cells, units or ""])
    how = {row["largest_batch_by"] for row in results["memory"]} - {None}
    within = f"batch in {settings['budget_bytes'] / 1e9:g} GB" + "".join(f" ({word})" for word in sorted(how))
    header = ["model", "", "mode", "peak, GB", "× eager", "kept, MB", "× eager", within, "inference"]
    table1 = ", ".join(f"{name} {gb}" for name, gb in settings["table1_gb"].items())
    title = [
        f"A training step with AdamW, batch {batch}, 3×{side}×{side}. Peak: all that it holds, where Table 1 (GPU GB,",
        f"float32, batch 32) of the paper has {table1}. Kept: after the forward pass, for",
        "backward. Inference: its peak beyond weights and images, over the bytes of one activation.",
    ]
    return Table(title, header, rows, left=3)


def headline_table(results: dict[str, Any]) -> Table:
    """A model's peak and step, eager and fused, and what they mean for a card of 16 GB."""
    times = {tuple(_key(row)): row for row in results["speed"]}
    rows = []
    for eager in results["memory"]:
        mine = {row["mode"]: row for row in results["memory"] if _key(row)[:2] == _key(eager)[:2]}
        if eager["mode"] != "eager" or any(row["status"] != "ok" for row in mine.values()):
            continue
        batch = str(results["settings"]["batch"])
        cells = [_gb(mine[mode]["peaks"][batch]) for mode in ("eager", "fused", "checkpointed")]
        step = times[(*_key(eager)[:2], "fused")]
        ratio = step["step"]["median_s"] / times[tuple(_key(eager))]["step"]["median_s"]
        largest = [f"{mine[mode]['largest_batch']:,}" for mode in ("eager", "fused")]
        rows.append([*_key(eager)[:2], *cells, f"{ratio:.2f}×", " → ".join(largest)])
    how = {row["largest_batch_by"] for row in results["memory"]} - {None}
    header = ["model", "", "peak, GB: eager", "fused", "checkpointed", "fused step, × eager"]
    header.append(f"batch in {results['settings']['budget_bytes'] / 1e9:g} GB ({', '.join(sorted(how))})")
    return Table(["A training step with AdamW, eager and fused."], header, rows, left=2)


GROUPS = {
    "conv + norm: in": ("conv + norm: input",),
    "out": ("conv + norm: outputs",),
    "rstd": ("conv + norm: rstd",),
    "attention": ("attention: input", "attention: inside"),
    "MLP": ("MLP: input", "MLP: inside"),
    "layers' inputs": ("layers: input",),
    "stem": ("stem",),
    "16-bit weights": ("16-bit weights",),
    "head, loss, seeds": ("head, loss", "seeds, other"),
}


def ledger_table(results: dict[str, Any], brief: bool = False) -> Table:
    """What is kept, by kind; the sum against the allocator's count and against the formula."""
    rows = []
    for row in results["memory"]:
        if row["status"] != "ok":
            if not brief:
                rows.append([*_key(row), _status(row)])
            continue
        found, total = row["ledger"], sum(row["ledger"].values())
        sums = [sum(found[kind] for kind in kinds) for kinds in GROUPS.values()]
        cells = ["" if nbytes == 0 else f"{nbytes / 1e6:,.1f}" for nbytes in sums]
        foretold = row["predicted"] and sum(row["predicted"].values())
        cells += [f"{total / 1e6:,.1f}", f"{row['kept'] / 1e6:,.1f}", f"{(row['kept'] - total) / row['kept']:.2%}"]
        rows.append([*_key(row), *cells, f"{foretold / 1e6:,.1f}" if foretold else ""])
    header = ["MB", "", "mode", *GROUPS, "sum", "allocator", "remainder", "predicted"]
    title = [
        "Kept for backward by kind, each storage once, with the first op that keeps it (so what attention reads is",
        "conv + norm's), their sum, the allocator's count, and the sum that the shapes foretell.",
    ]
    return Table(title, header, rows, left=3)


def speed_table(results: dict[str, Any], brief: bool = False) -> Table:
    """A step's time, images per second and the ratio to eager."""
    rows = []
    for row in results["speed"]:
        if row["step"] is None:
            rows.append([*_key(row), _status(row)])
            continue
        timing, eager = row["step"], _eager(results["speed"], row)
        ratio = f"{timing['median_s'] / eager['step']['median_s']:.2f}×" if eager and eager["step"] else ""
        if _noisy(timing) or (eager and eager["step"] and _noisy(eager["step"])):
            ratio = "noisy"
        spread = f"({timing['q3_s'] - timing['q1_s']:.3f})" if len(timing["samples_s"]) > 1 else "(once)"
        rows.append([*_key(row), f"{timing['median_s']:.3f}", spread, ratio, f"{row['images_per_s']:.1f}"])
    header = ["model", "", "mode", "step, s", "(iqr)", "× eager", "images/s"]
    batch = results["settings"]["batch"]
    title = [f"A training step, in turn with the others, batch {batch}; eager drops by F.dropout."]
    return Table(title, header, rows, left=3)


def sizes_table(results: dict[str, Any], brief: bool = False) -> Table:
    """Bytes kept per pixel of the batch at several image sizes."""
    sizes = dict.fromkeys((row["side"], row["batch"]) for row in results["sizes"])
    found: dict[tuple[str, ...], dict[tuple[int, int], float]] = {}
    for row in results["sizes"]:
        found.setdefault(tuple(_key(row)), {})[row["side"], row["batch"]] = row["per_pixel_bytes"]
    rows = [[*key, *(f"{mine[size]:,.0f}" if size in mine else "" for size in sizes)] for key, mine in found.items()]
    header = ["model", "", "mode", *(f"{batch} × {side}²" for side, batch in sizes)]
    return Table(["Bytes kept for backward per pixel of the batch, at other sizes."], header, rows, left=3)


def noise_lines(results: dict[str, Any]) -> list[str]:
    """A warning where the machine was busy; nothing where it was not."""
    noisy = [row for row in results["speed"] if row["step"] and _noisy(row["step"])]
    if not noisy:
        return []
    return [
        f"Noisy: in {len(noisy)} of {len(results['speed'])} rows an interquartile range is over half its median: the "
        "machine was busy. Do not trust those times: run again. Memory is not affected."
    ]


def report(results: dict[str, Any]) -> str:
    """The README's tables as Markdown; the ledger and the other sizes are the terminal's and the JSON's."""
    env = results["environment"]
    threads = f", {env['threads']} threads" if env["device"] == "cpu" else ""
    parts = [
        f"{env['device_name']}{threads}, torch {env['torch'].partition('+')[0]}"
        + "".join(f"; {name}={value}" for name, value in env["malloc"].items())
        + "."
    ]
    for section, make in {"memory": memory_table, "speed": speed_table}.items():
        if results[section]:
            table = make(results, brief=True)
            parts += [" ".join(table.title), table.markdown()]
    return "\n\n".join([*parts, *noise_lines(results)])
