"""Measure memory and time of linear attention against softmax attention, and the memory of a training step.

    python benchmarks/attn_mem.py

Writes results/attn_mem-<device>.csv and .png.
"""

import sys
from collections.abc import Iterator, Sequence

from _harness import (  # imported before torch: it sets log levels
    HEAD_DIM,
    HEADS,
    IMAGE_SIZE,
    TABLE1_GB,
    TOLERANCE,
    Parser,
    Results,
    Row,
    Run,
    attention,
    check_model,
    fused_row,
    in_float64,
    marking_out_of_memory,
    measure,
    peak_of_training,
    positive,
    positives,
    progress,
    projection_on,
    random_qkv,
    some_of,
)
from _report import attention_memory, machine_line, noise_line, training_memory
from plots import draw_memory

# isort: split
import torch
import torch.nn.functional as F

LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
MECHANISMS = ("performer", "linear", "nystrom", "sdpa")


def runs_of(mechanism: str, batch: int, tokens: int, device: torch.device, dtype: torch.dtype) -> Iterator[Run]:
    """The reference and the fused op, or softmax attention, on the same random q, k and v."""
    inputs, grad_out = random_qkv(batch, tokens, device, dtype)
    values = {"name": mechanism, "dtype": str(dtype).removeprefix("torch."), "batch": batch, "size": tokens}
    if mechanism == "sdpa":
        row = Row("attention", implementation="torch", **values)
        yield Run(row, F.scaled_dot_product_attention, inputs, grad_out)
        return
    projection = projection_on(device)
    exact = in_float64(attention(mechanism, "reference", projection.double()), inputs, grad_out)
    reference = Row("attention", implementation="reference", **values)
    fused = fused_row("attention", f"{mechanism}_attention", grad_out, **values)
    for row, backend in ((reference, "reference"), (fused, None)):
        yield Run(row, attention(mechanism, backend, projection), inputs, grad_out, (projection,), exact)


def model_rows(name: str, batch: int, device: torch.device, dtype: torch.dtype) -> list[Row]:
    """The peak of a training step of a model, by the reference and fused."""
    rows = []
    for mode in ("reference", "fused"):
        row = Row("model", name, mode, str(dtype).removeprefix("torch."), batch=batch, size=IMAGE_SIZE)
        rows.append(row)
        with marking_out_of_memory(row):
            if mode == "fused":
                check_model(row, device, dtype)
            if row.status == "ok":
                row.peak_bytes = peak_of_training(name, mode, batch, IMAGE_SIZE, device, dtype)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write CSV and picture; 1 if a fused result is wrong."""
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=positive, help="of the attention; default: 1 on cpu, 8 on cuda")
    parser.add_argument("--lengths", type=positives, help="numbers of tokens; default: 256 to 16384")
    parser.add_argument("--mechanisms", type=some_of(MECHANISMS), default=",".join(MECHANISMS), help="comma-separated")
    parser.add_argument("--no-models", action="store_true", help="skip the training steps")
    arguments = parser.parse(argv)
    device, quick = torch.device(arguments.device), arguments.quick
    batch = arguments.batch or (1 if quick or device.type == "cpu" else 8)
    rounds = {"budget": 0.01, "max_repeats": 5} if quick else {"budget": 0.25}
    results = Results("attn_mem", arguments)

    for dtype in arguments.dtype:
        for tokens in progress(arguments.lengths or ((128, 256) if quick else LENGTHS)):
            runs = [run for name in arguments.mechanisms for run in runs_of(name, batch, tokens, device, dtype)]
            measure(runs, TOLERANCE[dtype], **rounds)
            results.add(*(run.row for run in runs))
        for name in () if arguments.no_models else progress(TABLE1_GB):
            results.add(*model_rows(name, 2 if quick else 32, device, dtype))

    rows = results.rows
    print(machine_line(rows))
    print(f"\nAttention, batch {batch}, {HEADS} heads of {HEAD_DIM}. Peak: forward + backward beyond the inputs.")
    print(f"Saved: for backward, beyond the inputs. Ratio: to the reference.\n\n{attention_memory(rows).text()}")
    if not arguments.no_models:
        print("\nTraining step with AdamW. Peak: everything that the step holds. Table 1: GPU GB in the paper.")
        print(f"\n{training_memory(rows).text()}")
    print(noise_line(rows))
    draw_memory(rows, results.path.with_suffix(".png"))
    print(f"Wrote {results.path} and {results.path.with_suffix('.png').name}")
    return int(results.failed())


if __name__ == "__main__":
    sys.exit(main())
