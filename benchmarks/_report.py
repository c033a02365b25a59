"""Tables of the benchmarks, drawn from the CSV rows alone: for the terminal (100 columns) and as Markdown."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from _harness import TABLE1_GB, Results, Row

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


def spread(row: Row, column: str) -> str:
    """The median of a time with its interquartile range, which a single measurement does not have."""
    median, iqr = getattr(row, f"{column}_ms"), getattr(row, f"{column}_iqr_ms")
    return ms(median) if median is None or row.repeats == 1 else f"{ms(median)} ±{ms(iqr)}"


def ratio(row: Row, baseline: Row | None, column: str) -> str:
    """The time as a multiple of the baseline's; "noisy" if the machine was busy."""
    value, of = getattr(row, column), baseline and getattr(baseline, column)
    if value is None or not of:
        return ""
    return "noisy" if row.noisy() or baseline.noisy() else f"{value / of:.2f}×"


def relative(row: Row, baseline: Row | None, column: str, digits: int = 3) -> str:
    """The memory as a multiple of the baseline's."""
    of = baseline and getattr(baseline, column)
    return f"{getattr(row, column) / of:.{digits}f}×" if of else ""


def error(row: Row) -> str:
    """The largest error against float64."""
    return "" if row.error is None else f"{row.error:.0e}"


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


# The implementation that the others of a section are compared with.
BASELINES = {
    "attention": ("reference",),
    "model": ("reference",),
    "op": ("reference", "conv2d, layer_norm"),
    "memory": ("eager",),
    "time": ("eager",),
}


def find(rows: Sequence[Row], **values: object) -> Row | None:
    """The first row with these values and numbers."""
    return next((r for r in rows if r.status == "ok" and all(getattr(r, k) == v for k, v in values.items())), None)


def baseline_of(rows: Sequence[Row], row: Row) -> Row | None:
    """The row with numbers that ``row`` is compared with."""
    same = {name: getattr(row, name) for name in ("section", "name", "dtype", "variant", "batch", "size")}
    found = (find(rows, implementation=implementation, **same) for implementation in BASELINES[row.section])
    return next(filter(None, found), None)


def section_table(
    rows: Sequence[Row], header: list[str], head: Callable[[Row], list[str]], cells: Callable[[Row], list[str]]
) -> Table:
    """A line per row: ``head``, the columns of text, then ``cells``, or why there are no numbers."""
    lines = [[*head(row), *(cells(row) if row.status == "ok" else [reason(row)])] for row in rows]
    return Table(header, lines, left=len(head(rows[0])) if rows else 1)


def by_host(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each run, which is one machine on one day."""
    runs: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        runs.setdefault((row.environment["date"], row.environment["device_name"]), []).append(row)
    return [runs[key] for key in sorted(runs)]


def latest(rows: Sequence[Row]) -> list[Row]:
    """The rows of the newest run."""
    return by_host(rows)[-1]


def worst(rows: Sequence[Row], section: str, *columns: str) -> dict[tuple[str, ...], list[float]]:
    """Per (name, variant, dtype): the time of the fused op over that of the baseline, the largest over all runs."""
    found: dict[tuple[str, ...], list[float]] = {}
    for run in by_host(rows):
        for row in run:
            baseline = row.section == section and row.status == "ok" and baseline_of(run, row)
            if baseline and row.implementation == "fused":
                key = (row.name, row.variant, row.dtype)
                ratios = [getattr(row, column) / getattr(baseline, column) for column in columns]
                found[key] = [max(pair) for pair in zip(ratios, found.get(key, ratios), strict=True)]
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


def show(results: Results, *parts: str) -> int:
    """Print the machine, the parts and the path of the CSV; returns the exit status, 1 if a fused result is wrong."""
    print("\n\n".join([machine_line(results.rows), *parts]))
    print(noise_line(results.rows))
    print(f"Wrote {results.path}")
    return int(results.failed())


# --- attn_mem ----------------------------------------------------------------------------------------------------


def attention_memory(rows: Sequence[Row]) -> Table:
    """Peak and saved memory, time and error at each number of tokens."""
    header = ["N", "mechanism", "implementation", "peak, MB", "saved, MB", "forward, ms", "ratio", "fwd+bwd, ms"]

    def cells(row: Row) -> list[str]:
        baseline = baseline_of(rows, row) if row.implementation == "fused" else None
        times = [ms(row.forward_ms), ratio(row, baseline, "forward_ms"), ms(row.training_ms)]
        return [mb(row.peak_bytes), mb(row.saved_bytes), *times, ratio(row, baseline, "training_ms"), error(row)]

    mine = [row for row in rows if row.section == "attention"]
    return section_table(
        mine, [*header, "ratio", "error"], lambda r: [f"{r.size:,}", NAMES[r.name], implementation(r)], cells
    )


def training_memory(rows: Sequence[Row]) -> Table:
    """The peak of a training step of each model."""
    header = ["model", "dtype", "implementation", "peak, GB", "ratio", "Table 1, GB", "error"]

    def cells(row: Row) -> list[str]:
        if row.implementation != "fused":
            return [gb(row.peak_bytes), "", str(TABLE1_GB[row.name]), error(row)]
        return [gb(row.peak_bytes), relative(row, baseline_of(rows, row), "peak_bytes"), "", error(row)]

    mine = [row for row in rows if row.section == "model"]
    return section_table(mine, header, lambda row: [row.name, SHORT[row.dtype], implementation(row)], cells)


# --- attn_speed --------------------------------------------------------------------------------------------------


def op_times(rows: Sequence[Row]) -> Table:
    """Every implementation of each op: time, ratio to the baseline, memory, error."""
    header = ["op", "implementation", "forward, ms", "ratio", "fwd+bwd, ms", "ratio", "saved, MB", "peak, MB", "error"]

    def head(row: Row) -> list[str]:
        return [" ".join(filter(None, (NAMES[row.name], row.variant, SHORT[row.dtype]))), implementation(row)]

    def cells(row: Row) -> list[str]:
        baseline = baseline_of(rows, row)
        times = [spread(row, "forward"), ratio(row, baseline, "forward_ms")]
        times += [spread(row, "training"), ratio(row, baseline, "training_ms")]
        return [*times, mb(row.saved_bytes), mb(row.peak_bytes), error(row)]

    return section_table([row for row in rows if row.section == "op"], header, head, cells)


def op_headline(rows: Sequence[Row]) -> Table:
    """Each fused op against plain PyTorch: the least favorable ratio over all runs, and bytes saved for backward."""
    header = ["op", "compared with", "forward", "forward + backward", "saved for backward, MB", "fused, MB"]
    table, run = Table(header, left=2), latest(rows)
    for (name, variant, dtype), ratios in worst(rows, "op", "forward_ms", "training_ms").items():
        fused = find(run, section="op", name=name, variant=variant, dtype=dtype, implementation="fused")
        if fused is not None and (baseline := baseline_of(run, fused)) is not None:
            cells = [" ".join(filter(None, (NAMES[name], variant))), baseline.implementation]
            cells += [f"{value:.2f}×" for value in ratios]
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

    def cells(row: Row) -> list[str]:
        eager, same = baseline_of(rows, row), {"name": row.name, "dtype": row.dtype}
        inference = find(rows, section="inference", implementation=row.implementation, **same)
        memory = [gb(row.peak_bytes), relative(row, eager, "peak_bytes")]
        memory += [mb(row.saved_bytes), relative(row, eager, "saved_bytes")]
        return [*memory, largest_batch(rows, row), mb(inference.peak_bytes) if inference else ""]

    batch = max(row.batch for row in rows if row.section == "memory")
    mine = [row for row in rows if row.section == "memory" and row.batch == batch]
    return section_table(mine, header, _step, cells)


def _step(row: Row) -> list[str]:
    return [row.name, SHORT[row.dtype], row.implementation]


def largest_batch(rows: Sequence[Row], row: Row) -> str:
    """The largest batch within 16 GB: measured on a GPU, else predicted by the line through two peaks."""
    same = {"name": row.name, "dtype": row.dtype, "implementation": row.implementation}
    measured = find(rows, section="largest batch", **same)
    if measured:
        return f"{measured.batch:,} (measured)"
    batches = sorted({r.batch for r in rows if r.section == "memory"})
    found = (find(rows, section="memory", batch=batch, **same) for batch in batches)
    peaks = {r.batch: r.peak_bytes for r in found if r}
    if len(peaks) < 2:
        return ""
    low, high = min(peaks), max(peaks)
    slope = (peaks[high] - peaks[low]) / (high - low)
    return f"{int((BUDGET_BYTES - peaks[high] + slope * high) / slope):,} (predicted)" if slope > 0 else ""


def step_times(rows: Sequence[Row]) -> Table:
    """The time of a training step in each mode."""

    def cells(row: Row) -> list[str]:
        step = [spread(row, "training"), ratio(row, baseline_of(rows, row), "training_ms")]
        return [*step, f"{1e3 * row.batch / row.training_ms:,.1f}"]

    header = ["model", "dtype", "mode", "step, ms", "ratio", "images/s"]
    return section_table([row for row in rows if row.section == "time"], header, _step, cells)


def step_headline(rows: Sequence[Row]) -> Table:
    """Peak and largest batch, eager and fused, and the least favorable time ratio over all runs."""
    run = latest(rows)
    header = ["model", "dtype", "peak, GB: eager", "fused", "checkpointed", "fused step, × eager", "batch in 16 GB"]
    table = Table(header, left=2)
    batch = max(row.batch for row in run if row.section == "memory")
    for (name, _, dtype), (value,) in worst(rows, "time", "training_ms").items():
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
    header = [name, "mode", size, "batch", "eager, ms", *others.values(), "peak, MB: eager", *others.values()]
    table = Table(header, left=2)
    by_model = sorted(rows, key=lambda row: row.name.partition("/")[0])  # runs of parts add rows in any order
    for eager in [row for row in by_model if (row.section, row.implementation) == (section, "eager")]:
        same = {key: getattr(eager, key) for key in ("section", "name", "dtype", "variant", "batch", "size")}
        found = [find(rows, implementation=implementation, **same) for implementation in others]
        head = [eager.name, eager.variant, f"{eager.size:,}", str(eager.batch)]
        table.rows.append([*head, *_compared(eager, found, "training" if eager.variant == "training" else "forward")])
    return table


def _compared(eager: Row, others: Sequence[Row | None], mode: str) -> list[str]:
    """Times and peaks as multiples of the eager code's; as numbers with units if that has none."""
    time, peak = f"{mode}_ms", "peak_bytes"
    if eager.status != "ok":
        times = [f"{ms(getattr(row, time))} ms" if row else "" for row in others]
        return [reason(eager), *times, "", *(f"{mb(row.peak_bytes)} MB" if row else "" for row in others)]
    times = [ratio(row, eager, time) if row else "" for row in others]
    peaks = [relative(row, eager, peak, 2) if row else "" for row in others]
    return [spread(eager, mode), *times, mb(eager.peak_bytes), *peaks]
