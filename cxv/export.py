"""Export models for programs without cxv or without Python: ONNX, ``torch.export`` and AOTInductor.

Every file is read back and compared with the eager model before it gets its final name. docs/deploy.md explains how to
run the files.
"""

import copy
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import cxv_kernels
from cxv_kernels.validation import python_numbers

from .errors import InputError, first_line, need
from .models.arguments import image_size

if TYPE_CHECKING:
    from torch.export import ExportedProgram

FORMATS = {"onnx": ".onnx", "torch": ".pt2", "aoti": ".pt2"}
"""The formats and the suffixes of their files."""
OPSET = 20  # opset of ONNX; onnxruntime supports it since 1.17
TOLERANCE = 1e-4
"""The largest allowed difference from the eager model's logits, relative to the larger of 1 and the largest logit."""
BATCH_SIZES = (1, 2, 3, 8)
"""The batch sizes with which a file is checked."""
MIN_AGREEMENT = 0.9
"""The smallest share of images that must have the same class with an int8 file."""

Run = Callable[[Tensor], Tensor]  # images (B, C, H, W) float32 → logits (B, classes)


@dataclass
class Exported:
    """A file that has passed its check.

    ``size`` is in bytes. ``difference`` is the largest difference from the logits of the eager model. ``agreement`` is
    the share of ``images`` with the class of the eager model, or ``None`` without images. ``any_size`` is True if the
    file accepts images of any size.
    """

    path: Path
    size: int
    difference: float
    agreement: float | None
    any_size: bool


@python_numbers
def export_model(
    model: nn.Module,
    path: str | Path,
    format: str,
    *,
    img_size: int | Sequence[int] = 32,
    in_chans: int = 3,
    images: Tensor | None = None,
    calibration: Tensor | None = None,
    metadata: dict[str, Any] | None = None,
) -> Exported:
    """Write a model to a file and check the file on random images of several batch sizes and on ``images``.

    The batch size is dynamic in every format. Height and width are dynamic if the model accepts any size. The file has
    the model in ``eval()`` mode and float32; the mode and the dtype of ``model`` itself do not change.

    Args:
        model: A model on the CPU.
        path: File to write, ``.onnx`` for ``"onnx"``, otherwise ``.pt2``. An existing file is replaced only after the
            check.
        format: ``"onnx"`` (opset 20, plain operators, for any runtime), ``"torch"`` (for ``torch.export.load``; with
            ``use_fused`` the program must import ``cxv_kernels``) or ``"aoti"`` (compiled for this CPU; with
            ``use_fused`` the program must first load ``cxv_kernels/_cpu.abi3.so``).
            ONNX files have the input ``images`` (``batch``, channels, ``height``, ``width``) and the output ``logits``.
        img_size: Side of the images for the check in pixels, or (H, W).
        in_chans: Channels of these images.
        images: More images for the check, normalized, shape (N, in_chans, S, S), float32.
        calibration: Images like ``images``, from which an int8 model is calibrated (only for ``"onnx"``). Convolutions
            and linear maps then have 8 bits and static scales; all other operators stay in float32.
        metadata: Dict that is written into the file as JSON, under the name ``cxv``.

    Raises:
        InputError: If the format or suffix is wrong, a package or compiler is missing, the file cannot be written, or
            it does not agree with the model. Nothing is written then.
    """
    path = Path(path)
    if format not in FORMATS:
        raise InputError(f"`format`: expected one of {', '.join(FORMATS)}, got {format!r}")
    if path.suffix != FORMATS[format]:
        raise InputError(f"{path}: a file of `format` {format} must be named …{FORMATS[format]}")
    if calibration is not None and format != "onnx":
        raise InputError(f"`calibration`: for `format` onnx alone, got {format}")
    if not path.parent.is_dir():
        raise InputError(f"{path}: {path.parent} is not a directory")
    if format == "onnx":
        for module in ("onnx", "onnxscript", "onnxruntime"):
            need(module, "export")
    model = copy.deepcopy(model).float().eval()
    note = json.dumps(metadata or {})
    height, width = image_size(img_size)
    sizes = [(height, width), (height + 8, width + 5)]
    try:
        with torch.no_grad(), tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as directory:
            written = Path(directory) / path.name
            with cxv_kernels.use_backend("reference" if format == "onnx" else cxv_kernels.get_backend()):
                program, any_size = _trace(model, in_chans, sizes)
            _WRITERS[format](program, written, note)
            if calibration is not None:
                _quantize(written, calibration)
            run = load_exported(written, format)
            generator = torch.Generator().manual_seed(0)
            shapes = [(batch, in_chans, *size) for size in sizes[: 1 + any_size] for batch in BATCH_SIZES]
            tried = [torch.rand(shape, generator=generator) * 2 - 1 for shape in shapes]
            real = [] if images is None else list(images.split(100))
            difference, agreement = _compare(model, run, tried, real, calibration is not None, path)
            size = written.stat().st_size
            written.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    return Exported(path, size, difference, agreement, any_size)


@python_numbers
def load_exported(path: str | Path, format: str, threads: int = 0) -> Run:
    """Load a file of :func:`export_model` as a function of normalized images (B, C, H, W) that returns logits.

    Args:
        path: The file.
        format: Its format, see :func:`export_model`.
        threads: Threads of onnxruntime (0: one per core). The other formats use the threads of PyTorch.
    """
    if format == "torch":
        return torch.export.load(path).module()
    if format == "aoti":
        from torch._inductor import aoti_load_package

        return aoti_load_package(str(path))
    onnxruntime = need("onnxruntime", "export")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _trace(model: nn.Module, in_chans: int, sizes: Sequence[tuple[int, int]]) -> tuple["ExportedProgram", bool]:
    """Return the graph, and whether it accepts images of any size or only of the first of ``sizes``."""
    from torch.export import Dim, export

    example, other = (torch.zeros(2, in_chans, *size) for size in sizes)
    # learned positions and class tokens fix the size, and the number of landmarks limits it
    program = export(model, (example,), dynamic_shapes=({0: Dim.DYNAMIC, 2: Dim.AUTO, 3: Dim.AUTO},))
    try:
        program.module()(other)
    except (AssertionError, RuntimeError):
        return export(model, (example,), dynamic_shapes=({0: Dim.DYNAMIC},)), False
    return program, True


def _write_aoti(program: "ExportedProgram", path: Path, note: str) -> None:
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:
        raise InputError(f"`format` aoti: needs a C++ compiler (set CXX), and none was found: {error}") from error
    aoti_compile_and_package(program, package_path=str(path), inductor_configs={"aot_inductor.metadata": {"cxv": note}})


def _write_onnx(program: "ExportedProgram", path: Path, note: str) -> None:
    written = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch", 2: "height", 3: "width"},),  # names; fixed sizes get none
        verbose=False,
    )
    written.model.metadata_props["cxv"] = note
    written.save(path, external_data=False)


_WRITERS: dict[str, Callable[["ExportedProgram", Path, str], None]] = {
    "onnx": _write_onnx,
    "torch": lambda program, path, note: torch.export.save(program, path, extra_files={"cxv": note}),
    "aoti": _write_aoti,
}


def _quantize(path: Path, calibration: Tensor) -> None:
    """Replace an ONNX file by its int8 form.

    Only operators with weights are quantized, because 8 bits are not enough for the range of FAVOR+'s exponentials.
    """
    quantization = need("onnxruntime.quantization", "export")
    shape_inference = need("onnxruntime.quantization.shape_inference", "export")

    class Images(quantization.CalibrationDataReader):
        batches = ({"images": batch.numpy()} for batch in calibration.split(32))

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    prepared = path.with_suffix(".prepared.onnx")
    shape_inference.quant_pre_process(path, prepared, skip_symbolic_shape=True)
    quantization.quantize_static(
        prepared,
        path,
        Images(),
        quant_format=quantization.QuantFormat.QDQ,
        op_types_to_quantize=["Conv", "Gemm"],
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )
    prepared.unlink()


def _compare(
    model: nn.Module, run: Run, tried: Sequence[Tensor], real: Sequence[Tensor], int8: bool, path: Path
) -> tuple[float, float | None]:
    """Return the largest difference, and the agreement on the real images, or raise ``InputError`` if they are bad."""
    difference, same = 0.0, 0
    for i, images in enumerate([*tried, *real]):
        want = model(images)
        try:
            got = run(images)
        except Exception as error:
            raise InputError(
                f"{path}: not written: the exported model refuses images of shape {tuple(images.shape)} "
                f"({first_line(error)})"
            ) from error
        largest = (got - want).abs().max().item() if got.shape == want.shape else float("inf")
        if not int8 and not largest <= TOLERANCE * max(1.0, want.abs().max().item()):  # NaN is refused too
            raise InputError(
                f"{path}: not written: its logits for images of shape {tuple(images.shape)} differ from the model's by "
                f"{largest:.1e}, at most {TOLERANCE:.0e} is allowed"
            )
        difference = max(difference, largest)
        if i >= len(tried):
            same += int((got.argmax(1) == want.argmax(1)).sum())
    count = sum(map(len, real))
    agreement = same / count if count else None
    if int8 and agreement is not None and agreement < MIN_AGREEMENT:
        raise InputError(
            f"{path}: not written: in int8 {100 * agreement:.1f} % of {count} images keep their class, at least "
            f"{100 * MIN_AGREEMENT:.0f} % must"
        )
    return difference, agreement
