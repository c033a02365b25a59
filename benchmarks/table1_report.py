"""The tables of table1.py, from its JSON alone, for the terminal, as Markdown and for a spreadsheet."""

from typing import Any

from attn_speed_report import Table
from training_runs import DATASETS, spread

# The paper's Table 1: parameters (M), multiply-adds (G), GPU memory at batch 32 (GB), and top-1 on CIFAR-10, CIFAR-100
# and Tiny ImageNet (%).
PAPER: dict[str, tuple[float, float, float, float, float, float]] = {
    "resnet-18": (11.2, 0.56, 0.6, 86.29, 59.15, 43.02),
    "resnet-34": (21.3, 1.16, 0.7, 87.97, 56.05, 42.65),
    "fnet-10": (1.3, 1.34, 2.3, 51.05, 11.97, 8.14),
    "mlp-mixer-5": (21.3, 3.02, 1.5, 60.26, 34.81, 20.26),
    "wavemix-5": (1.4, 2.59, 0.4, 83.71, 51.62, 32.70),
    "convmixer-16": (1.3, 1.37, 3.5, 88.46, 61.80, 45.39),
    "vit-10/4": (1.3, 1.34, 14.7, 57.53, 30.80, 23.18),
    "hybrid-vin-6/8": (1.3, 1.41, 5.3, 77.96, 50.06, 36.84),
    "hybrid-vip-6/8": (1.3, 1.31, 5.9, 77.54, 57.22, 38.85),
    "hybrid-vilt-6/8": (1.3, 0.33, 2.6, 78.34, 52.38, 37.17),
    "cct-6/4": (1.3, 1.32, 13.6, 82.66, 58.34, 35.21),
    "cvt-5/4": (1.3, 1.32, 9.4, 77.90, 57.82, 39.81),
    "cnv-5/4": (1.3, 1.39, 3.1, 89.56, 59.23, 49.56),
    "cltv-5/4": (1.3, 1.38, 1.8, 86.99, 60.11, 46.69),
    "cpv-5/4": (1.3, 1.37, 3.2, 91.42, 57.34, 47.29),
}
NOTES = {
    "wavemix-5": "2 × 1.293: the printed figure is of FLOPs; and counting a transposed convolution's kernel at every "
    "output, as the counters of the time did, makes 1.293 of 0.067",
    "hybrid-vilt-6/8": "0.33 is of a stem of stride 2; the printed memory and the other rows are of stride 1",
    "hybrid-vin-6/8": "A⁺(softmax(q̃kᵀ)v) is multiplied first, which the released code does last: 0.21 G fewer",
    "cnv-5/4": "A⁺(softmax(q̃kᵀ)v) is multiplied first, which the released code does last: 0.08 G fewer",
    "vit-10/4": "timm's attention is PyTorch's scaled-dot-product attention, which keeps no N × N map; the authors' "
    "kept several",
    "cvt-5/4": "the printed 1.32 leaves out biases and batch norm",
    "cct-6/4": "attention dropout and stochastic depth of 0.1, as the authors ran it",
}


def _gb(nbytes: float | None) -> str:
    return "" if nbytes is None else f"{nbytes / 1e9:.3f}" if nbytes < 1e9 else f"{nbytes / 1e9:.2f}"


def _marks(results: dict[str, Any]) -> dict[str, int]:
    names = dict.fromkeys(row["name"] for row in results["rows"])
    return {name: i for i, name in enumerate((n for n in names if n in NOTES), start=1)}


def counts_table(results: dict[str, Any]) -> Table:
    """Parameters and multiply-adds, the paper's beside ours."""
    marks = _marks(results)
    rows = []
    for row in results["rows"]:
        if row["fused"]:
            continue
        name, paper = row["name"], PAPER[row["name"]]
        cells = [f"{paper[0]:g}", f"{row['torchsummary'] / 1e6:.3f}", f"{row['parameters'] / 1e6:.3f}"]
        cells += [f"{paper[1]:g}", f"{row['macs'] / 1e9:.3f}", f"{row['true_macs'] / 1e9:.3f}"]
        rows.append([f"{name} [{marks[name]}]" if name in marks else name, *cells])
    header = ["model", "paper, M", "as it counts", "all", "paper, G", "as it counts", "all products"]
    return Table(["parameters and multiply-adds of an image"], header, rows)


def measures_table(results: dict[str, Any]) -> Table:
    """Memory and speed."""
    dtypes = [dtype.strip() for dtype in results["environment"]["dtype"].split(",")]
    short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
    rows = []
    for row in results["rows"]:
        title = [row["name"], "fused" if row["fused"] else "eager"]
        if row["status"] != "ok":
            rows.append([*title, row["status"]])
            continue
        cells = [f"{PAPER[row['name']][2]:g}"]
        for part in ("peak", "kept"):
            cells += [_gb(row[part].get(dtype)) for dtype in dtypes]
        for part in ("train", "inference"):
            cells += [f"{row['batch'] / row[part][dtype]['median_s']:,.0f}" for dtype in dtypes]
        rows.append([*title, *cells])
    header = ["model", "", "paper, GB"]
    for what in ("peak, GB", "kept, GB", "train, images/s", "inference, images/s"):
        header += [f"{what}, {short[dtype]}" for dtype in dtypes]
    return Table(["memory and speed of a training step, and of inference"], header, rows, left=2)


def accuracy_table(results: dict[str, Any]) -> Table:
    """The test top-1 of what was trained, the paper's beside; no rows where nothing was."""
    rows = []
    for name, (*_, c10, c100, tin) in PAPER.items():
        paper = dict(zip(DATASETS, (c10, c100, tin), strict=True))
        for data, found in _trained(results).items():
            if total := found["models"].get(name):
                cells = [f"{paper[data]:.2f}" if data in paper else "", f"{total['best_test']['best']:.2f}"]
                rows.append([name, data, *cells, _spread(total, "best_test"), _spread(total, "last")])
    header = ["model", "data", "paper, %", "best, %", "mean ± sd (seeds), %", "last epoch, %"]
    return Table(
        ["accuracy: test top-1 of the best epoch by test, as the paper's, and of the last"], header, rows, left=2
    )


def _trained(results: dict[str, Any]) -> dict[str, Any]:
    return results.get("trained", {})  # an older JSON has none


def _spread(total: dict[str, Any], by: str) -> str:
    return spread([run[by]["test_top1"] for run in total["runs"].values()])


def status_table(results: dict[str, Any] | None) -> Table:
    """The paper's figures with ours beside them; ``results`` is table1.py's JSON, None where it was not run in full."""
    missing = "not yet measured"
    found = {(row["name"], row["fused"]): row for row in (results["rows"] if results else ())}
    rows = []
    for name, (params, macs, gb, *top1) in PAPER.items():
        eager, fused = found.get((name, False)), found.get((name, True))
        peaks = [_gb(row["peak"].get("float32")) for row in (eager, fused) if row and row["status"] == "ok"]
        ours = [f"{eager['torchsummary'] / 1e6:.3f}", f"{eager['macs'] / 1e9:.3f}"] if eager else [missing] * 2
        ours.append(" → ".join(filter(None, peaks)) or missing)
        cells = [f"{paper:g} / {mine}" for paper, mine in zip((params, macs, gb), ours, strict=True)]
        totals = [_trained(results or {}).get(data, {"models": {}})["models"].get(name) for data in DATASETS]
        here = [f"{t['best_test']['best']:.2f}, {_spread(t, 'best_test')}" if t else missing for t in totals]
        rows.append([name, *cells, " / ".join(f"{x:.2f}" for x in top1), " / ".join(here) if any(totals) else missing])
    header = ["model", "parameters, M", "multiply-adds, G", "memory, GB", "top-1, %", "top-1 here"]
    return Table(["Table 1: paper / here."], header, rows)


def status(results: dict[str, Any] | None) -> str:
    """:func:`status_table` as Markdown, with the settings of what was trained."""
    return "\n\n".join(filter(None, [status_table(results).markdown(), trained_how(results or {})]))


def notes(results: dict[str, Any]) -> list[str]:
    """Where a figure is not the paper's, why."""
    return [f"[{mark}] {name}: {NOTES[name]}." for name, mark in _marks(results).items()]


def spreadsheet(results: dict[str, Any]) -> list[list[Any]]:
    """One line per row, with bare numbers in bytes, seconds and multiply-adds."""
    paper = ("paper_params_m", "paper_macs_g", "paper_gpu_gb", "paper_cifar10", "paper_cifar100", "paper_tiny_imagenet")
    own = ("parameters", "torchsummary", "macs", "true_macs", "batch")
    dtypes = [dtype.strip() for dtype in results["environment"]["dtype"].split(",")]
    header = ["name", "fused", "status", *paper, *own]
    header += [f"{part}_{dtype}" for part in ("peak", "kept", "train_s", "inference_s") for dtype in dtypes]
    top1 = [(data, part) for data in _trained(results) for part in ("best", "mean", "sd")]
    header += [f"{data.replace('-', '_')}_{part}" for data, part in top1]
    lines: list[list[Any]] = [header]
    for row in results["rows"]:
        line = [row["name"], row["fused"], row["status"], *PAPER[row["name"]], *(row[key] for key in own)]
        line += [row[part].get(dtype, "") for part in ("peak", "kept") for dtype in dtypes]
        line += [row[part].get(d, {}).get("median_s", "") for part in ("train", "inference") for d in dtypes]
        totals = {data: found["models"].get(row["name"]) for data, found in _trained(results).items()}
        line += [totals[data]["best_test"][part] if totals[data] else "" for data, part in top1]
        lines.append(line)
    return lines


def trained_how(results: dict[str, Any]) -> str:
    """The settings behind the accuracies, a line for each dataset."""
    return "  \n".join(f"{data}: {found['runs']}" for data, found in _trained(results).items())


def report(results: dict[str, Any]) -> str:
    """All of it as Markdown."""
    env, settings = results["environment"], results["settings"]
    threads = f", {env['threads']} threads" if env["device"] == "cpu" else ""
    where = (
        f"{env['device_name']}{threads}, torch {env['torch']}; batch {settings['batch']}, "
        f"3×{settings['image_size']}×{settings['image_size']}, {settings['classes']} classes."
    )
    parts = [counts_table(results).markdown(), "  \n".join(notes(results)), where, measures_table(results).markdown()]
    accuracy = accuracy_table(results)
    if accuracy.rows:
        parts += [f"{accuracy.title[0].capitalize()}.", accuracy.markdown(), trained_how(results)]
    return "\n\n".join(part for part in parts if part)
