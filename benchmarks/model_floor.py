"""How fast a fused training step could be at most: its convolutions and linear maps alone. See README.md."""

import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import torch
from common import DTYPES, Parser, positive
from memory import interleaved
from model_mem_report import SHORT
from torch import nn
from training import IMAGE_SIZE, build

BATCH, CHUNK = 32, 8192  # images; tokens that the models map at a time

Call = Callable[[], object]


def fastest(*forms: Call) -> float:
    """Seconds of the fastest run of several forms of one product."""
    for form in forms:
        form()
    return min(min(timing.samples) for timing in interleaved(list(forms), budget=0.5))


def backward_of(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, padding: int) -> tuple[Call, Call]:
    """The convolution's gradients of x and of the weight."""
    arguments = (grad, x, weight, [0], [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1)
    masks = ([True, False, False], [False, True, False])
    return tuple(partial(torch.ops.aten.convolution_backward, *arguments, mask) for mask in masks)


@cache
def conv_seconds(channels_in: int, channels_out: int, dtype: torch.dtype) -> tuple[float, float]:
    """(forward, backward) of a 3×3 convolution of the whole batch."""
    x, grad = (
        torch.randn(BATCH, channels, IMAGE_SIZE, IMAGE_SIZE).to(dtype, memory_format=torch.channels_last)
        for channels in (channels_in, channels_out)
    )
    weight = torch.randn(channels_out, channels_in, 3, 3).to(dtype)
    of_x, of_weight = backward_of(x, weight, grad, 1)
    forward = fastest(lambda: nn.functional.conv2d(x, weight, padding=1))
    return forward, (fastest(of_x) if channels_in > 3 else 0) + fastest(of_weight)


@cache
def map_seconds(channels_in: int, channels_out: int, dtype: torch.dtype) -> tuple[float, float]:
    """(forward, backward) of a linear map of the batch's tokens, chunk by chunk, by oneDNN or by BLAS."""
    x, grad = torch.randn(CHUNK, channels_in).to(dtype), torch.randn(CHUNK, channels_out).to(dtype)
    weight = torch.randn(channels_out, channels_in).to(dtype)
    x_row, grad_row = (t[None, None].movedim(-1, 1) for t in (x, grad))
    of_x, of_weight = backward_of(x_row, weight[:, :, None, None], grad_row, 0)
    forward = fastest(lambda: nn.functional.conv2d(x_row, weight[:, :, None, None]), lambda: x @ weight.t())
    backward = fastest(of_x, lambda: grad @ weight) + fastest(of_weight, lambda: grad.t() @ x)
    chunks = BATCH * IMAGE_SIZE**2 / CHUNK
    return chunks * forward, chunks * backward


def shapes(module: nn.Module) -> list[tuple[int, int]]:
    """(channels in, channels out) of a residual branch's linear maps."""
    return [tuple(m.weight.shape[1::-1]) for m in module.modules() if isinstance(m, nn.Linear) or _pointwise(m)]


def _pointwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)


def floor(name: str, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds of the products of a fused and of a checkpointed step.

    Forward and backward once; again forward, what backward needs of them: with ``use_fused`` each branch but its last
    map, checkpointed the 3×3 convolutions and the attention's last map as well.
    """
    model = build(name, "fused")
    fused = again = 0.0
    for conv in model.stem:
        fused += sum(conv_seconds(conv.in_channels, conv.out_channels, dtype))
    for layer in model.layers:
        conv = layer.conv_norm.conv
        forward, backward = conv_seconds(conv.in_channels, conv.out_channels, dtype)
        fused, again = fused + forward + backward, again + forward
        for branch in (layer.attn, layer.mlp):
            *inner, last = shapes(branch)
            fused += sum(sum(map_seconds(*s, dtype)) + map_seconds(*s, dtype)[0] for s in inner)
            fused += sum(map_seconds(*last, dtype))
        again += sum(map_seconds(*s, dtype)[0] for s in shapes(layer.attn))
    return fused, fused + again


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print one line per model and dtype."""
    parser = Parser("model_floor", description=__doc__)
    parser.add_argument("--threads", type=positive, default=2, help="of the CPU")
    parser.add_argument("results", type=Path, help="model_mem.py's JSON, which has the eager steps")
    arguments = parser.parse_args(argv)
    rows = parser.results("results", arguments.results, "model_mem")["speed"]
    torch.set_num_threads(arguments.threads)
    print("| model |  | eager, s | products, s | at most | products, checkpointed, s | at most |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        if row["mode"] == "eager" and row["step"]:
            eager, name, dtype = row["step"]["median_s"], row["name"], row["dtype"]
            cells = " | ".join(f"{s:.2f} | {eager / s:.2f}×" for s in floor(name, DTYPES[dtype]))
            print(f"| {name} | {SHORT[dtype]} | {eager:.2f} | {cells} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
