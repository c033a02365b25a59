"""Measure models of other packages before and after ``cxv_kernels.accelerate``.

    pip install -e '.[integrations]'
    python benchmarks/integrations.py

Random weights. The model at inference and a training step (forward and backward), against the library's own eager code
and ``torch.compile`` of it. For EfficientViT and SANA also each attention alone; of the other packages one layer.
Writes results/integrations-<device>.csv, and keeps the rows of earlier runs with other ``--models``, ``--pixels`` or
``--tokens``.
"""

import copy
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import _harness as bench  # imported before torch: it sets log levels
from _report import integration_attention, integration_models, show

import cxv_kernels
from cxv_kernels.testing import peak_memory, saved_bytes

# isort: split
import torch
from torch import Tensor, nn

EFFICIENTVIT = ("efficientvit_b0", "efficientvit_b1", "efficientvit_l2")
LAYERS = ("dc-ae", "nystromformer", "performer-pytorch", "nystrom-attention", "linear-attention-transformer")
MODELS = (*EFFICIENTVIT, "sana", *LAYERS)
PIXELS, TOKENS = (224, 512, 1024), (1024, 4096)
BATCHES, TRAINING_BATCH = (1, 8), 8


# --- models ------------------------------------------------------------------------------------------------------


class Sana(nn.Module):
    """Two blocks of SANA 0.6B (width 1152, 36 heads of 32 channels) with the image alone as its argument."""

    def __init__(self, heads: int = 36, captions: int = 300):
        super().__init__()
        from diffusers import SanaTransformer2DModel

        self.model = SanaTransformer2DModel(
            num_layers=2,
            num_attention_heads=heads,
            attention_head_dim=32,
            num_cross_attention_heads=heads // 2,
            cross_attention_head_dim=64,
            cross_attention_dim=32 * heads,
        )
        self.captions = captions

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 32, H, W): latents → (B, 32, H, W)."""
        text = x.new_ones(x.shape[0], self.captions, self.model.config.caption_channels)
        return self.model(x, text, x.new_full(x.shape[:1], 500.0), return_dict=False)[0]


class Layer(nn.Module):
    """An attention layer with 4 heads of 32 channels: x (B, tokens, 128), or (B, 128, H, W) for DC-AE, → the same."""

    def __init__(self, name: str, tokens: int):
        super().__init__()
        landmarks = min(64, tokens // 4)
        if name == "dc-ae":
            from diffusers.models.attention_processor import SanaMultiscaleLinearAttention

            self.layer = SanaMultiscaleLinearAttention(128, 128, attention_head_dim=32)
        elif name == "nystromformer":
            from transformers.models.nystromformer import modeling_nystromformer as nystromformer

            options = {"num_landmarks": landmarks, "segment_means_seq_len": tokens, "conv_kernel_size": 33}
            config = nystromformer.NystromformerConfig(hidden_size=128, num_attention_heads=4, **options)
            self.layer = nystromformer.NystromformerSelfAttention(config)
        elif name == "performer-pytorch":
            from performer_pytorch import SelfAttention

            self.layer = SelfAttention(128, heads=4, dim_head=32)
        elif name == "nystrom-attention":
            from nystrom_attention import NystromAttention

            self.layer = NystromAttention(128, heads=4, dim_head=32, num_landmarks=landmarks)
        else:
            from linear_attention_transformer.linear_attention_transformer import SelfAttention

            self.layer = SelfAttention(128, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Drop the attention maps that Nyströmformer returns, too."""
        out = self.layer(x)
        return out[0] if isinstance(out, tuple) else out


def make_model(name: str, size: int, quick: bool) -> nn.Module:
    """A model with random weights for images of ``size`` pixels on a side, or for ``size`` tokens."""
    if name == "sana":
        return Sana(heads=2, captions=4) if quick else Sana()
    if name in LAYERS:
        return Layer(name, size)
    import timm

    return timm.create_model(name, num_classes=1000)


def shape_of(name: str, size: int) -> tuple[int, ...]:
    """The shape of an image of ``size`` pixels on a side, or of ``size`` tokens."""
    if name in EFFICIENTVIT:
        return (3, size, size)
    side = round(size**0.5)
    return {"sana": (32, side, side), "dc-ae": (128, side, side)}.get(name, (size, 128))


def attention_alone(module: nn.Module) -> nn.Module:
    """The attention module without its layers: a function of q, k and v, joined as the library joins them."""
    alone = copy.deepcopy(module)
    if hasattr(alone, "qkv"):  # timm
        alone.qkv, alone.proj = nn.Identity(), nn.Identity()
        alone.aggreg = nn.ModuleList(nn.Identity() for _ in alone.aggreg)
    else:
        alone.to_q = alone.to_k = alone.to_v = nn.Identity()
        alone.to_out = nn.ModuleList([nn.Identity(), nn.Identity()])
    return alone


def attention_inputs(
    model: nn.Module, names: Sequence[str], image: Tensor
) -> dict[tuple[int, ...], tuple[str, Tensor]]:
    """The distinct shapes of q, k and v in the model: each with the name of a module and an input of it alone."""
    found: dict[tuple[int, ...], tuple[str, Tensor]] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            found.setdefault(tuple(out.shape), (name, out.detach()))

        return hook

    modules = dict(model.named_modules())
    inner = {name: getattr(modules[name], "qkv", getattr(modules[name], "to_q", None)) for name in names}
    hooks = [layer.register_forward_hook(record(name)) for name, layer in inner.items()]
    with torch.no_grad():
        model(image)
    for hook in hooks:
        hook.remove()
    return found


# --- measurements ------------------------------------------------------------------------------------------------


def runner(model: nn.Module, x: Tensor, training: bool) -> Callable[[], Tensor]:
    """Inference, or forward and backward of a mean square."""

    def run() -> Tensor:
        if not training:
            with torch.no_grad():
                return model(x)
        model.zero_grad(set_to_none=True)
        x.grad = None
        out = model(x)
        out.square().mean().backward()
        return out.detach()

    return run


def measure(
    section: str, name: str, variants: dict[str, nn.Module], x: Tensor, size: int, training: bool, **rounds: Any
) -> list[bench.Row]:
    """A row per implementation: error of the output against the eager code in float64, memory, time in turn."""
    rows, runs = [], []
    tolerance = bench.TOLERANCE[x.dtype] * bench.MODEL_TOLERANCE
    exact = None
    for implementation, model in variants.items():
        row = bench.Row(section, name, implementation, bench.name_of(x.dtype), batch=x.shape[0], size=size)
        row.variant = "training" if training else "inference"
        rows.append(row)
        model.train(training)
        run = runner(model, x, training)
        with (bench.noting_failures if implementation == "torch.compile" else bench.marking_out_of_memory)(row):
            out = run()  # compiles
            if implementation == "eager":
                exact = out.double()
            if exact is not None:  # else the eager code ran out of memory
                row.error, row.tolerance = bench.relative_error([out], [exact]), tolerance
                if implementation == "fused" and not row.error <= tolerance:
                    row.status = "failed"
            row.peak_bytes = peak_memory(run, x.device).peak
            if training and implementation != "torch.compile":
                row.saved_bytes = saved_bytes(lambda m=model: m(x), [x, *model.parameters()]).beyond_inputs
        runs.append(run)
    timed = [(row, run) for row, run in zip(rows, runs, strict=True) if row.status == "ok"]
    timings = bench.interleaved([run for _, run in timed], x.device, **rounds)
    for (row, _), timing in zip(timed, timings, strict=True):
        row.set_times(**{"training" if training else "forward": timing})
    return rows


def implementations(model: nn.Module, compiled: bool) -> tuple[dict[str, nn.Module], list[str]]:
    """The library's code, that compiled, and ours; and the names of the accelerated modules."""
    fused = copy.deepcopy(model)
    names = cxv_kernels.accelerate(fused)
    variants = {"eager": model} | ({"torch.compile": torch.compile(copy.deepcopy(model))} if compiled else {})
    return variants | {"fused": fused}, names


def measure_model(
    model_name: str, size: int, device: torch.device, dtype: torch.dtype, quick: bool, compiled: bool
) -> Iterator[bench.Row]:
    """Attention alone and the whole model, at inference and in training."""
    rounds = {"budget": 0.01, "max_repeats": 3} if quick else {"budget": 2.0, "min_repeats": 3, "limit": 300.0}
    torch.manual_seed(0)
    model = make_model(model_name, size, quick).to(device, dtype)
    variants, names = implementations(model, compiled)
    batches, training_batch = ((1,), 2) if quick else (BATCHES, TRAINING_BATCH)
    for batch in dict.fromkeys((*batches, training_batch)):
        image = torch.randn(batch, *shape_of(model_name, size), device=device, dtype=dtype)
        modes = [*([False] if batch in batches else []), *([True] if batch == training_batch else [])]
        inputs = {} if model_name in LAYERS else attention_inputs(model.eval(), names, image)
        for shape, (name, x) in inputs.items():
            alone, _ = implementations(attention_alone(model.get_submodule(name)), compiled)
            tokens, channels = shape[1:] if len(shape) == 3 else (shape[2] * shape[3], shape[1] // 3)
            for training in modes:
                x.requires_grad_(training)
                named = f"{model_name}/{channels}"
                yield from measure("attention", named, alone, x, tokens, training, **rounds)
        for training in modes:
            image.requires_grad_(training)
            yield from measure("model", model_name, variants, image, size, training, **rounds)
        torch.compiler.reset()
        gc.collect()


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write the CSV; 1 if a fused result is wrong."""
    parser = bench.Parser(__doc__.partition("\n")[0])
    parser.add_argument(
        "--models", type=bench.some_of(MODELS), help=f"some of {','.join(MODELS)}; default: all but the first"
    )
    parser.add_argument("--pixels", type=bench.positives, help="sides of EfficientViT's images; default: 224,512,1024")
    parser.add_argument("--tokens", type=bench.positives, help="tokens of the others, squares; default: 1024,4096")
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile")
    arguments = parser.parse(argv)
    device, quick = torch.device(arguments.device), arguments.quick
    pixels = arguments.pixels or ((64,) if quick else PIXELS)
    tokens = arguments.tokens or ((64,) if quick else TOKENS)
    models = arguments.models or (("efficientvit_b0", *MODELS[3:]) if quick else MODELS[1:])
    results = bench.Results("integrations", arguments, in_parts=True)
    for dtype in arguments.dtype:
        cases = [(name, size) for name in models for size in (pixels if name in EFFICIENTVIT else tokens)]
        for name, size in bench.progress(cases):
            for row in measure_model(name, size, device, dtype, quick, not arguments.no_compile):
                results.add(row)
    alone = "Attention alone. Times: median ± interquartile range. Ratio: to the library's eager code."
    whole = "The whole model; size: pixels of a side, or tokens."
    attention, models = integration_attention(results.rows), integration_models(results.rows)
    return show(results, alone, attention.text(), whole, models.text())


if __name__ == "__main__":
    sys.exit(main())
