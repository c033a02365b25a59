"""Tables of the benchmarks, drawn from the CSV rows alone: for the terminal (100 columns) and as Markdown."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from _harness import TABLE1_GB, Row

NAMES = {
    "performer": "Performer",
    "linear": "linear",
    "nystrom": "Nyström",
    "conv_norm": "conv_norm",
    "sdpa": "softmax",
}
SHORT = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16", "float64": "fp64"}
BUDGET_BYTES = 16 * 10**9  # a T4


@dataclass
class Table:
    """Cells of text. A row shorter than the header ends in a text that spans the remaining columns."""

    header: list[str]
    rows: list[list[str]] = field(default_factory=list)
    left: int = 1  # number of columns with text; the others hold numbers

    def text(self) -> str:
        """For the terminal, with aligned columns."""
        complete = [row for row in [self.header, *self.rows] if len(row) == len(self.header)]
        partial = [row[: self.left] for row in self.rows if len(row) != len(self.header)]
        widths = [
            max(len(row[i]) for row in complete + (partial if i < self.left else [])) for i in range(len(self.header))
        ]
        return "\n".join(self._line(row, widths) for row in [self.header, *self.rows])

    def _line(self, row: list[str], widths: list[int]) -> str:
        cells = [
            cell.ljust(width) if i < self.left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        if len(row) != len(self.header):
            cells[-1] = row[-1]
        return "  ".join(cells).rstrip()

    def markdown(self) -> str:
        """A Markdown table."""
        width = len(self.header)
        rule = ["---"] * self.left + ["---:"] * (width - self.left)
        rows = [row + [""] * (width - len(row)) for row in self.rows]
        return "\n".join("| " + " | ".join(row) + " |" for row in [self.header, rule, *rows])


# --- cells -------------------------------------------------------------------------------------------------------


def ms(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def mb(nbytes: int | None) -> str:
    """Megabytes (10⁶)."""
    return "" if nbytes is None else f"{nbytes / 1e6:,.0f}" if nbytes >= 99.95e6 else f"{nbytes / 1e6:.2f}"


def gb(nbytes: int | None) -> str:
    """Gigabytes (10⁹)."""
    return "" if nbytes is None else f"{nbytes / 1e9:.3f}" if nbytes < 1e9 else f"{nbytes / 1e9:.2f}"


def spread(median: float | None, iqr: float | None) -> str:
    """The median with its interquartile range."""
    return "" if median is None else f"{ms(median)} ±{ms(iqr)}"


def ratio(row: Row, baseline: Row | None, column: str) -> str:
    """The time as a multiple of the baseline's; "noisy" if the machine was busy."""
    value, of = getattr(row, column), baseline and getattr(baseline, column)
    if value is None or not of:
        return ""
    return "noisy" if row.noisy() or baseline.noisy() else f"{value / of:.2f}×"


def reason(row: Row) -> str:
    """Why a row has no numbers."""
    if row.status == "failed":
        return f"FAILED: error {row.error:.1e} against float64, {row.tolerance:.0e} allowed"
    if row.status == "= reference":
        return "= reference (no fused kernel for this device)"
    return f"{row.status} ({row.note})" if row.note else row.status


def implementation(row: Row) -> str:
    """The implementation, with the backend of a fused op."""
    return f"{row.implementation} ({row.backend})" if row.backend and row.status == "ok" else row.implementation


def find(rows: Sequence[Row], **values: object) -> Row | None:
    """The first row with these values and numbers."""
    return next((r for r in rows if r.status == "ok" and all(getattr(r, k) == v for k, v in values.items())), None)


def by_host(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each run, which is one machine on one day."""
    runs: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        runs.setdefault((row.environment["date"], row.environment["device_name"]), []).append(row)
    return [runs[key] for key in sorted(runs)]


def latest(rows: Sequence[Row]) -> list[Row]:
    """The rows of the newest run."""
    return by_host(rows)[-1]


def worst(rows: Sequence[Row], table: Callable[[Sequence[Row]], list[tuple[tuple[str, ...], float]]]) -> dict:
    """For each key the largest ratio over all runs: the least favorable measurement."""
    found: dict[tuple[str, ...], float] = {}
    for run in by_host(rows):
        for key, value in table(run):
            found[key] = max(found.get(key, 0.0), value)
    return found


def machine_line(rows: Sequence[Row]) -> str:
    """The machine, the versions and its measured rooflines in one sentence."""
    env = rows[0].environment
    threads = f", {env['threads']} threads" if env["device"] == "cpu" else ""
    rates = [f"{r.note} {r.variant}" for r in rows if r.section == "roofline"]
    measured = f"; measured rooflines: {', '.join(rates)}" if rates else ""
    return f"{env['device_name']}{threads}, torch {env['torch'].partition('+')[0]}, {env['date']}{measured}."


def noise_line(rows: Sequence[Row]) -> str:
    """A warning if the machine was busy, else an empty string."""
    noisy = [row for row in rows if row.noisy()]
    if not noisy:
        return ""
    return (
        f"{len(noisy)} of {len(rows)} rows are noisy: an interquartile range exceeds half of its median.\n"
        "The machine was busy. Run again before you use these times. Memory figures are not affected."
    )


# --- attn_mem ----------------------------------------------------------------------------------------------------


def attention_memory(rows: Sequence[Row]) -> Table:
    """Peak and saved memory, time and error at each number of tokens."""
    header = ["N", "mechanism", "implementation", "peak, MB", "saved, MB", "forward, ms", "ratio", "fwd+bwd, ms"]
    table = Table([*header, "ratio", "error"], left=3)
    for row in rows:
        if row.section != "attention":
            continue
        head = [f"{row.size:,}", NAMES[row.name], implementation(row)]
        if row.status != "ok":
            table.rows.append([*head, reason(row)])
            continue
        same = {"section": "attention", "dtype": row.dtype, "size": row.size, "name": row.name}
        baseline = None if row.implementation != "fused" else find(rows, implementation="reference", **same)
        times = [ms(row.forward_ms), ratio(row, baseline, "forward_ms"), ms(row.training_ms)]
        error = "" if row.error is None else f"{row.error:.0e}"
        memory = [mb(row.peak_bytes), mb(row.saved_bytes)]
        table.rows.append([*head, *memory, *times, ratio(row, baseline, "training_ms"), error])
    return table


def training_memory(rows: Sequence[Row]) -> Table:
    """The peak of a training step of each model."""
    table = Table(["model", "dtype", "implementation", "peak, GB", "ratio", "Table 1, GB", "error"], left=3)
    for row in rows:
        if row.section != "model":
            continue
        head = [row.name, SHORT[row.dtype], implementation(row)]
        if row.status != "ok":
            table.rows.append([*head, reason(row)])
            continue
        reference = find(rows, section="model", name=row.name, dtype=row.dtype, implementation="reference")
        fused = row.implementation == "fused"
        relative = f"{row.peak_bytes / reference.peak_bytes:.3f}×" if fused and reference else ""
        table1 = "" if fused else str(TABLE1_GB[row.name])
        table.rows.append([*head, gb(row.peak_bytes), relative, table1, f"{row.error:.0e}" if row.error else ""])
    return table


# --- attn_speed --------------------------------------------------------------------------------------------------


def op_times(rows: Sequence[Row]) -> Table:
    """Every implementation of each op: time, ratio to the first row of the op, memory, error."""
    header = ["op", "implementation", "forward, ms", "ratio", "fwd+bwd, ms", "ratio", "saved, MB", "peak, MB", "error"]
    table, baseline, previous = Table(header, left=2), None, None
    for row in rows:
        if row.section != "op":
            continue
        op = (row.name, row.variant, row.dtype)
        if op != previous:
            baseline, previous = row if row.status == "ok" else None, op
        head = [" ".join(filter(None, (NAMES[row.name], row.variant, SHORT[row.dtype]))), implementation(row)]
        if row.status != "ok":
            table.rows.append([*head, reason(row)])
            continue
        times = [spread(row.forward_ms, row.forward_iqr_ms), ratio(row, baseline, "forward_ms")]
        times += [spread(row.training_ms, row.training_iqr_ms), ratio(row, baseline, "training_ms")]
        error = "" if row.error is None else f"{row.error:.0e}"
        table.rows.append([*head, *times, mb(row.saved_bytes), mb(row.peak_bytes), error])
    return table


def _fused_op_ratios(rows: Sequence[Row]) -> list[tuple[tuple[str, ...], float]]:
    ratios = []
    for row in rows:
        if row.section != "op" or row.implementation != "fused" or row.status != "ok":
            continue
        same = [r for r in rows if (r.section, r.name, r.variant, r.dtype) == ("op", row.name, row.variant, row.dtype)]
        baseline = same[0]
        for column in ("forward_ms", "training_ms"):
            if baseline.status == "ok":
                key = (row.name, row.variant, row.dtype, column)
                ratios.append((key, getattr(row, column) / getattr(baseline, column)))
    return ratios


def op_headline(rows: Sequence[Row]) -> Table:
    """Each fused op against plain PyTorch: the least favorable ratio over all runs, and bytes saved for backward."""
    ratios = worst(rows, _fused_op_ratios)
    header = ["op", "compared with", "forward", "forward + backward", "saved for backward, MB", "fused, MB"]
    table, run = Table(header, left=2), latest(rows)
    for name, variant, dtype in dict.fromkeys(key[:3] for key in ratios):
        same = {"section": "op", "name": name, "variant": variant, "dtype": dtype}
        baseline, fused = find(run, **same), find(run, implementation="fused", **same)
        if baseline is None or fused is None:
            continue
        times = [f"{ratios[name, variant, dtype, column]:.2f}×" for column in ("forward_ms", "training_ms")]
        cells = [" ".join(filter(None, (NAMES[name], variant))), baseline.implementation, *times]
        table.rows.append([*cells, mb(baseline.saved_bytes), mb(fused.saved_bytes)])
    return table


def length_times(rows: Sequence[Row]) -> Table:
    """Time against the number of tokens, and the number from which each mechanism beats softmax attention."""
    rows = [row for row in rows if row.section == "length"]
    lengths = sorted({row.size for row in rows})
    header = ["mechanism", "batch", "pass", *(f"{n:,}" for n in lengths), "beats softmax from N ="]
    table = Table(header, left=3)
    for name, batch in dict.fromkeys((row.name, row.batch) for row in rows):
        mine = {row.size: row for row in rows if (row.name, row.batch) == (name, batch)}
        softmax = {row.size: row for row in rows if (row.name, row.batch) == ("sdpa", batch)}
        for column, words in (("forward_ms", "forward"), ("training_ms", "fwd+bwd")):
            cells = [ms(getattr(mine[n], column)) if n in mine else "" for n in lengths]
            last = "" if name == "sdpa" else crossover(mine, softmax, column)
            table.rows.append([f"{NAMES[name]}, ms", str(batch), words, *cells, last])
    return table


def crossover(rows: dict[int, Row], softmax: dict[int, Row], column: str) -> str:
    """The least N from which on the mechanism is faster at every measured N."""
    least = None
    for n in sorted(rows.keys() & softmax.keys(), reverse=True):
        mine, other = getattr(rows[n], column), getattr(softmax[n], column)
        if mine is None or (other is not None and mine >= other):
            break
        least = n
    return f"{least:,}" if least else f"not up to {max(rows.keys() & softmax.keys(), default=0):,}"


def crossovers(rows: Sequence[Row]) -> Table:
    """Only the crossover column of :func:`length_times`."""
    full = length_times(rows)
    rows = [[*row[:3], row[-1]] for row in full.rows if not row[0].startswith(NAMES["sdpa"])]
    return Table([*full.header[:3], full.header[-1]], [[row[0].removesuffix(", ms"), *row[1:]] for row in rows], left=3)


# --- model_step --------------------------------------------------------------------------------------------------


def step_memory(rows: Sequence[Row]) -> Table:
    """Peak, saved bytes and the largest batch within 16 GB."""
    header = ["model", "dtype", "mode", "peak, GB", "ratio", "saved, MB", "ratio", "batch in 16 GB", "inference, MB"]
    table, batch = Table(header, left=3), max(row.batch for row in rows if row.section == "memory")
    for row in rows:
        if row.section != "memory" or row.batch != batch:
            continue
        head = [row.name, SHORT[row.dtype], row.implementation]
        if row.status != "ok":
            table.rows.append([*head, reason(row)])
            continue
        same = {"name": row.name, "dtype": row.dtype}
        eager = find(rows, section="memory", batch=batch, implementation="eager", **same)
        cells = [gb(row.peak_bytes), f"{row.peak_bytes / eager.peak_bytes:.3f}×" if eager else ""]
        cells += [mb(row.saved_bytes), f"{row.saved_bytes / eager.saved_bytes:.3f}×" if eager else ""]
        inference = find(rows, section="inference", implementation=row.implementation, **same)
        largest = largest_batch(rows, row)
        table.rows.append([*head, *cells, largest, mb(inference.peak_bytes) if inference else ""])
    return table


def largest_batch(rows: Sequence[Row], row: Row) -> str:
    """The largest batch within 16 GB: measured on a GPU, else predicted by the line through two peaks."""
    same = {"name": row.name, "dtype": row.dtype, "implementation": row.implementation}
    measured = find(rows, section="largest batch", **same)
    if measured:
        return f"{measured.batch:,} (measured)"
    peaks = {r.batch: r.peak_bytes for r in rows if r.section == "memory" and _has(r, same) and r.status == "ok"}
    if len(peaks) < 2:
        return ""
    low, high = min(peaks), max(peaks)
    slope = (peaks[high] - peaks[low]) / (high - low)
    return f"{int((BUDGET_BYTES - peaks[high] + slope * high) / slope):,} (predicted)" if slope > 0 else ""


def _has(row: Row, values: dict[str, object]) -> bool:
    return all(getattr(row, name) == value for name, value in values.items())


def step_times(rows: Sequence[Row]) -> Table:
    """The time of a training step in each mode."""
    table = Table(["model", "dtype", "mode", "step, ms", "ratio", "images/s"], left=3)
    for row in rows:
        if row.section != "time":
            continue
        head = [row.name, SHORT[row.dtype], row.implementation]
        if row.status != "ok":
            table.rows.append([*head, reason(row)])
            continue
        eager = find(rows, section="time", name=row.name, dtype=row.dtype, implementation="eager")
        rate = f"{1e3 * row.batch / row.training_ms:,.1f}"
        step = spread(row.training_ms, row.training_iqr_ms)
        table.rows.append([*head, step, ratio(row, eager, "training_ms"), rate])
    return table


def _fused_step_ratios(rows: Sequence[Row]) -> list[tuple[tuple[str, ...], float]]:
    ratios = []
    for row in rows:
        if row.section == "time" and row.implementation == "fused" and row.status == "ok":
            eager = find(rows, section="time", name=row.name, dtype=row.dtype, implementation="eager")
            if eager:
                ratios.append(((row.name, row.dtype), row.training_ms / eager.training_ms))
    return ratios


def step_headline(rows: Sequence[Row]) -> Table:
    """Peak and largest batch, eager and fused, and the least favorable time ratio over all runs."""
    ratios, run = worst(rows, _fused_step_ratios), latest(rows)
    header = ["model", "dtype", "peak, GB: eager", "fused", "checkpointed", "fused step, × eager", "batch in 16 GB"]
    table = Table(header, left=2)
    batch = max(row.batch for row in run if row.section == "memory")
    for (name, dtype), value in ratios.items():
        same = {"section": "memory", "name": name, "dtype": dtype, "batch": batch}
        rows_of = [find(run, implementation=mode, **same) for mode in ("eager", "fused", "checkpointed")]
        if None in rows_of:
            continue
        largest = " → ".join(largest_batch(run, row).removesuffix(" (predicted)") for row in rows_of[:2])
        peaks = [gb(row.peak_bytes) for row in rows_of]
        table.rows.append([name, SHORT[dtype], *peaks, f"{value:.2f}×", largest])
    return table


# --- integrations ------------------------------------------------------------------------------------------------


def integration_attention(rows: Sequence[Row]) -> Table:
    """The attention of other packages' models alone: the library's code, that compiled, and accelerated."""
    return _integrations(rows, "attention", "tokens")


def integration_models(rows: Sequence[Row]) -> Table:
    """The whole models."""
    return _integrations(rows, "model", "size")


def _integrations(rows: Sequence[Row], section: str, size: str) -> Table:
    others = {"torch.compile": "torch.compile", "fused": "accelerated"}
    name = "model/channels" if section == "attention" else "model"
    table = Table(
        [name, "mode", size, "batch", "eager, ms", *others.values(), "peak, MB: eager", *others.values()], left=2
    )
    for eager in [row for row in rows if (row.section, row.implementation) == (section, "eager")]:
        head = [eager.name, eager.variant, f"{eager.size:,}", str(eager.batch)]
        if eager.status != "ok":
            table.rows.append([*head, reason(eager)])
            continue
        mode = "training_ms" if eager.variant == "training" else "forward_ms"
        same = {key: getattr(eager, key) for key in ("section", "name", "dtype", "variant", "batch", "size")}
        times = [spread(getattr(eager, mode), getattr(eager, mode.replace("_ms", "_iqr_ms")))]
        peaks = [mb(eager.peak_bytes)]
        for implementation in others:
            row = find(rows, implementation=implementation, **same)
            times.append(ratio(row, eager, mode) if row else "")
            peaks.append(f"{row.peak_bytes / eager.peak_bytes:.2f}×" if row and eager.peak_bytes else "")
        table.rows.append([*head, *times, *peaks])
    return table
