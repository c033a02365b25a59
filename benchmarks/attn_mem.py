"""Measure memory and time of linear attention against softmax attention, and the memory of a training step.

    python benchmarks/attn_mem.py

Writes results/attn_mem-<device>.csv and .png.
"""

import sys
from collections.abc import Iterator, Sequence

import _harness as bench  # imported before torch: it sets log levels
from _report import attention_memory, show, training_memory
from plots import draw_memory

# isort: split
import torch
import torch.nn.functional as F

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
MECHANISMS = ("performer", "linear", "nystrom", "sdpa")


def runs_of(mechanism: str, batch: int, tokens: int, device: torch.device, dtype: torch.dtype) -> Iterator[bench.Run]:
    """The reference and the fused op, or softmax attention, on the same random q, k and v."""
    inputs, grad_out = bench.random_qkv(batch, tokens, device, dtype)
    values = {"name": mechanism, "dtype": bench.name_of(dtype), "batch": batch, "size": tokens}
    if mechanism == "sdpa":
        row = bench.Row("attention", implementation="torch", **values)
        yield bench.Run(row, F.scaled_dot_product_attention, inputs, grad_out)
        return
    projection = bench.projection_on(device)
    exact = bench.in_float64(bench.attention(mechanism, "reference", projection.double()), inputs, grad_out)
    reference = bench.Row("attention", implementation="reference", **values)
    fused = bench.fused_row("attention", f"{mechanism}_attention", grad_out, **values)
    for row, backend in ((reference, "reference"), (fused, None)):
        yield bench.Run(row, bench.attention(mechanism, backend, projection), inputs, grad_out, (projection,), exact)


def model_rows(name: str, batch: int, side: int, device: torch.device, dtype: torch.dtype) -> list[bench.Row]:
    """The peak of a training step of a model, by the reference and fused."""
    rows = []
    for mode in ("reference", "fused"):
        row = bench.Row("model", name, mode, bench.name_of(dtype), batch=batch, size=side)
        rows.append(row)
        with bench.marking_out_of_memory(row):
            if mode == "fused":
                bench.check_model(row, device, dtype, side)
            if row.status == "ok":
                row.peak_bytes = bench.peak_of_training(name, mode, batch, side, device, dtype)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write CSV and picture; 1 if a fused result is wrong."""
    parser = bench.Parser(__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=bench.positive, help="of the attention; default: 1 on cpu, 8 on cuda")
    parser.add_argument("--lengths", type=bench.positives, help="numbers of tokens; default: 256 to 16384")
    parser.add_names("--mechanisms", MECHANISMS)
    parser.add_argument("--no-models", action="store_true", help="skip the training steps")
    arguments = parser.parse(argv)
    device, quick = torch.device(arguments.device), arguments.quick
    batch = arguments.batch or (1 if quick or device.type == "cpu" else 8)
    rounds = {"budget": 0.01, "max_repeats": 5} if quick else {"budget": 0.25}
    results = bench.Results("attn_mem", arguments)

    for dtype in arguments.dtype:
        for tokens in bench.progress(arguments.lengths or ((128, 256) if quick else LENGTHS)):
            runs = [run for name in arguments.mechanisms for run in runs_of(name, batch, tokens, device, dtype)]
            bench.measure(runs, bench.TOLERANCE[dtype], **rounds)
            results.add(*(run.row for run in runs))
        for name in () if arguments.no_models else bench.progress(bench.TABLE1_GB):
            results.add(*model_rows(name, *((2, 16) if quick else (32, bench.IMAGE_SIZE)), device, dtype))

    draw_memory(results.rows, results.path.with_suffix(".png"))
    attention = (
        f"Attention, batch {batch}, {bench.HEADS} heads of {bench.HEAD_DIM}. Ratio: to the reference.\n"
        "Peak: forward + backward beyond the inputs. Saved: for backward, beyond the inputs."
    )
    models = "Training step with AdamW. Peak: everything that the step holds. Table 1: GPU GB in the paper."
    parts = [attention, attention_memory(results.rows).text()]
    return show(results, *parts, *([] if arguments.no_models else [models, training_memory(results.rows).text()]))


if __name__ == "__main__":
    sys.exit(main())
