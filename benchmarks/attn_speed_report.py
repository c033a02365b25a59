"""The tables of attn_speed.py, from its JSON alone, for the terminal and as Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PASSES = {"forward": "forward", "forward_backward": "forward + backward"}
NAMES = {
    "performer_attention": "Performer",
    "linear_attention": "linear",
    "nystrom_attention": "Nyström",
    "conv_norm": "conv_norm",
    "performer": "Performer",
    "linear": "linear",
    "nystrom": "Nyström",
}
LABELS = {"sdpa": "`F.scaled_dot_product_attention`"}
EXPONENT_TARGET = 1.05


@dataclass
class Table:
    """Cells of text; a row shorter than the header ends in words that span the rest."""

    title: list[str]
    header: list[str]
    rows: list[list[str]]
    left: int = 1  # columns that are words, not numbers

    def text(self) -> str:
        """For the terminal, the columns aligned."""
        whole = [row for row in [self.header, *self.rows] if len(row) == len(self.header)]
        parts = [row[: self.left] for row in self.rows if len(row) != len(self.header)]
        widths = [max(len(row[i]) for row in whole + (parts if i < self.left else [])) for i in range(len(self.header))]

        def line(row: list[str]) -> str:
            cells = [
                cell.ljust(width) if i < self.left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=False))
            ]
            if len(row) != len(self.header):
                cells[-1] = row[-1]
            return "  ".join(cells).rstrip()

        return "\n".join([*self.title, *map(line, [self.header, *self.rows])]) + "\n"

    def markdown(self) -> str:
        """A Markdown table, without the title."""
        width = len(self.header)
        rule = ["---"] * self.left + ["---:"] * (width - self.left)
        rows = [row + [""] * (width - len(row)) for row in self.rows]
        return "\n".join("| " + " | ".join(row) + " |" for row in [self.header, rule, *rows])


def _ms(seconds: float) -> str:
    """Three digits."""
    ms = seconds * 1e3
    return f"{ms:,.0f}" if ms >= 99.95 else f"{ms:.1f}" if ms >= 9.995 else f"{ms:.2f}" if ms >= 0.1 else f"{ms:.3f}"


def _mb(nbytes: float) -> str:
    return f"{nbytes / 1e6:,.0f}" if nbytes >= 99.95e6 else f"{nbytes / 1e6:.2f}"


def _noisy(timing: dict[str, Any]) -> bool:
    return timing["q3_s"] - timing["q1_s"] > timing["median_s"] / 2


def _times(row: dict[str, Any], baseline: dict[str, Any] | None, part: str) -> list[str]:
    """The median, its spread and the ratio to the baseline."""
    timing, of = row[part], baseline and baseline[part]
    ratio = f"{timing['median_s'] / of['median_s']:.2f}×" if of else ""
    if _noisy(timing) or (of and _noisy(of)):
        ratio = "noisy"
    spread = f"({_ms(timing['q3_s'] - timing['q1_s'])})" if len(timing["samples_s"]) > 1 else "(once)"
    return [_ms(timing["median_s"]), spread, ratio]


def _status(row: dict[str, Any]) -> str:
    """Why there is no number."""
    if row["status"] == "= reference":
        return f"= reference (no fused kernel serves {', '.join(row['backends'])} here)"
    if row["status"] == "failed":
        return f"FAILED: error {row['max_relative_error']:.1e} against float64, {row['tolerance']:.0e} allowed"
    if row["status"] == "differs":
        return f"computes something else: error {row['max_relative_error']:.1e} on one head"
    note = row.get("note")
    return f"{row['status']} ({note})" if note else row["status"]


def _name(case: dict[str, Any]) -> str:
    return " ".join(filter(None, (NAMES[case["op"]], case["variant"])))


def _served(row: dict[str, Any], brief: bool) -> str:
    if row["implementation"] == "fused" and row["status"] != "= reference":
        return f"fused ({', '.join(row['backends'].values())})"
    return LABELS.get(row["implementation"], row["implementation"]) if brief else row["implementation"]


def op_table(cases: Sequence[dict[str, Any]], brief: bool = False) -> Table:
    """Every implementation of the ops: times, ratios to the op's baseline, bytes."""
    header = ["op", "implementation", "forward, ms", "(iqr)", "ratio", "fwd + bwd, ms", "(iqr)", "ratio"]
    header += ["saved, MB", "× input", "peak, MB", *([] if brief else ["error"])]
    rows = []
    for case in cases:
        found = {row["implementation"]: row for row in case["rows"]}
        baseline = found[case["baseline"]] if found[case["baseline"]]["status"] == "ok" else None
        for i, row in enumerate(case["rows"]):
            cells = [_name(case) if i == 0 or not brief else "", _served(row, brief)]
            if row["status"] != "ok":
                rows.append([*cells, _status(row)])
                continue
            for part in PASSES:
                cells += _times(row, baseline, part)
            saved = row["saved_bytes"]
            cells += [_mb(saved), f"{saved / case['input_bytes']:.2f}", _mb(row["peak_bytes"])]
            error = row["max_relative_error"]
            rows.append(cells if brief else [*cells, "" if error is None else f"{error:.0e}"])
    title = [case["shape"] for case in cases]
    return Table(title, header, rows, left=2)


def headline_table(results: dict[str, Any]) -> Table:
    """Each fused op against the first row of its kind: time as a ratio, bytes saved for backward."""
    rows = []
    for case in results["ops"]:
        found = {row["implementation"]: row for row in case["rows"] if row["status"] == "ok"}
        fused, baseline = found.get("fused"), found.get(case["baseline"])
        if fused is None or baseline is None:
            continue
        cells = [_times(fused, baseline, part)[2] for part in PASSES]
        rows.append([_name(case), case["baseline"], *cells, _mb(baseline["saved_bytes"]), _mb(fused["saved_bytes"])])
    header = ["op", "against", "forward", "forward + backward", "saved for backward, MB", "fused, MB"]
    return Table(["The fused ops' time as a ratio, and what they save for backward."], header, rows, left=2)


def scaling_table(results: dict[str, Any], brief: bool = False) -> Table:
    """Forward + backward and workspace at each length, and the exponent."""
    lengths = results["settings"]["scaling_lengths"]
    rows = []
    for case in results["scaling"]:
        name, found = NAMES[case["op"]], {row["tokens"]: row for row in case["rows"]}
        missing = next((row for row in case["rows"] if row["status"] not in ("ok", "out of memory")), None)
        if missing:
            rows.append([name, _status(missing)])
            continue
        timed = {n: row["forward_backward"] for n, row in found.items()}
        rows.append([f"{name}, ms", *(_ms(timed[n]["median_s"]) if timed[n] else "—" for n in lengths)])
        rows[-1].append("—" if case["exponent"] is None else f"{case['exponent']:.3f}")
        per_token = [f"{timed[n]['median_s'] / n * 1e9:,.0f}" if timed[n] else "—" for n in lengths]
        rows.append([f"{name}, ns per token", *per_token, ""])
        sizes = [found[n]["workspace_bytes"] for n in lengths]
        rows.append([f"{name}, workspace MB", *("—" if size is None else _mb(size) for size in sizes), ""])
    settings = results["settings"]
    title = [
        f"Forward + backward of the fused ops, batch 1, {settings['heads']} heads of {settings['head_dim']}:",
        f"time ∝ Nᵖ, p ≤ {EXPONENT_TARGET} wanted; workspace (peak beyond inputs, output, gradients) wanted flat in N.",
    ]
    return Table(title, ["N", *(f"{n:,}" for n in lengths), "p"], rows)


def crossover_table(results: dict[str, Any], brief: bool = False) -> Table:
    """The least N from which on each mechanism is faster than SDPA; in full with the ratio at each N."""
    lengths = sorted({row["tokens"] for case in results["crossover"] for row in case["rows"]})
    rows = []
    for case in results["crossover"]:
        times = {(row["name"], row["tokens"]): row for row in case["rows"]}
        longest = max(row["tokens"] for row in case["rows"])
        for found in case["faster_from"]:
            part, name = found["pass"], found["name"]
            mine = [row for row in case["rows"] if row["name"] == name]
            cells = [f"{NAMES[name]} ({found['implementation']})", str(case["batch"]), PASSES[part]]
            for n in lengths if not brief else ():
                a, b = (times.get((who, n), {}).get(part) for who in (name, "sdpa"))
                ratio = f"{a['median_s'] / b['median_s']:.2f}×" if a and b else ""
                cells.append("noisy" if ratio and (_noisy(a) or _noisy(b)) else ratio)
            words = f"{found['tokens']:,}" if found["tokens"] else f"never up to {longest:,}"
            if any(row["status"] == "failed" for row in mine):
                words = "FAILED its check"
            elif any(_noisy(row[part]) for row in case["rows"] if row["name"] in (name, "sdpa") and row[part]):
                words += " (noisy)"
            rows.append([*cells, words])
    header = ["op", "batch", "pass", *(() if brief else [f"{n:,}" for n in lengths]), "faster from N ="]
    title = [
        "Time as the ratio to F.scaled_dot_product_attention at each N, and the least N from which on it is below 1."
    ]
    return Table(title, header, rows, left=3)


def floor_table(results: dict[str, Any], brief: bool = False) -> Table:
    """What each op must do, in the least time at this machine's measured rates, against the time it takes."""
    rows = []
    for line in results["floors"]:
        cells = [_name(line), line["implementation"], PASSES[line["pass"]], f"{line['flop'] / 1e9:.2f}"]
        cells += [f"{line['bytes'] / 1e6:.0f}", _ms(line["floor_s"]), line["bound_by"]]
        rows.append([*cells, _ms(line["measured_s"]), f"{line['times_floor']:.1f}"])
    header = ["op", "implementation", "pass", "GFLOP", "MB", "floor, ms", "bound by", "measured, ms", "× floor"]
    return Table([rates_line(results)], header, rows, left=3)


def noise_lines(results: dict[str, Any]) -> list[str]:
    """A warning where the machine was busy; nothing where it was not."""
    rows = [row for part in ("ops", "scaling", "crossover") for case in results[part] for row in case["rows"]]
    noisy = [row for row in rows if any(row[part] and _noisy(row[part]) for part in PASSES)]
    if not noisy:
        return []
    words = (
        f"Noisy: in {len(noisy)} of {len(rows)} rows an interquartile range is over half its median: the machine was"
    )
    return [
        f"{words} busy.",
        "Do not trust those times, nor what is drawn from them: run again. Memory is not affected.",
    ]


def rates_line(results: dict[str, Any]) -> str:
    """The machine's measured rates in words."""
    found = results["rates"]
    return (
        f"Floors at the best measured here: {found['flops'] / 1e9:,.0f} GFLOP/s ({found['flops_by']}), "
        f"{found['bandwidth'] / 1e9:.1f} GB/s ({found['bandwidth_by']})."
    )


def report(results: dict[str, Any]) -> str:
    """All tables as Markdown."""
    env, settings = results["environment"], results["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in env["peers"].items() if version)
    threads = f", {env['threads']} threads" if env["device"] == "cpu" else ""
    parts = [
        f"{env['device_name']}{threads}, torch {env['torch'].partition('+')[0]}, {env['dtype']}"
        + (f"; {versions}" if versions else "")
        + "".join(f"; {name}={value}" for name, value in env["malloc"].items())
        + ".",
        f"Batch {settings['batch']}, {settings['heads']} heads of {settings['head_dim']}, N = {settings['tokens']:,}; "
        "conv_norm: " + next((c["shape"] for c in results["ops"] if c["op"] == "conv_norm"), "not measured") + ". "
        "Ratios are to the first row of each op, in the same process.",
        op_table(results["ops"], brief=True).markdown(),
    ]
    if results["scaling"]:
        table = scaling_table(results, brief=True)
        parts += [" ".join(table.title), table.markdown()]
    if results["crossover"]:
        parts += [
            "From which N on it is faster than `F.scaled_dot_product_attention` at every N measured:",
            crossover_table(results, brief=True).markdown(),
        ]
    if results["floors"]:
        parts += [rates_line(results), floor_table(results, brief=True).markdown()]
    return "\n\n".join([*parts, *noise_lines(results)])
