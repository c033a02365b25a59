"""From an image file to the input of a model: pixel modes, transparency, orientation, size, normalization."""

import importlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch
from PIL import Image, ImageColor, ImageOps
from torch import Tensor

from cxv_kernels.validation import python_numbers

from ..errors import InputError, listed
from ..models.arguments import image_size

MEAN = STD = 0.5
RESIZE = ("crop", "pad", "squash")
INTERPOLATION = ("nearest", "bilinear", "bicubic", "lanczos")
_NOT_IMAGES = {"BUFR", "GRIB", "HDF5", "MPEG", "PALM", "PDF"}  # formats that PIL names and cannot decode
_HEIF = (".heic", ".heif")


@dataclass(frozen=True)
class Preprocessing:
    """The way from an image file to the input of a model. Training, evaluation, prediction and exported files share it.

    1. Rotate the image by its EXIF tag. A damaged EXIF block is ignored.
    2. Scale gray images of more than 8 bits by ``white_level``.
    3. Composite transparent images on ``background``; convert to RGB, or to gray for ``in_chans=1`` (PIL's ``"L"``).
    4. Resize to ``img_size`` with PIL's filter ``interpolation``, unless the image has this size.
    5. Normalize: (pixel / 255 − mean) / std.

    Args:
        img_size: (H, W), or the side of a square. ``None``: the size of each image.
        in_chans: 3 for RGB, 1 for gray.
        resize: ``"crop"`` crops the image about its center to the aspect ratio of ``img_size`` before it is resized
            (``PIL.ImageOps.fit``), ``"pad"`` adds borders of ``background`` (``PIL.ImageOps.pad``), and ``"squash"``
            changes the aspect ratio.
        interpolation: ``"nearest"``, ``"bilinear"``, ``"bicubic"`` or ``"lanczos"``; PIL antialiases the last three.
        background: Color behind transparent pixels: a name or ``#rrggbb``.
        white_level: Value of white in gray images of more than 8 bits; larger values are clipped. ``None``: 1 for float
            images; 16-bit images keep their high byte, so that 65535 is white. An image that does not fit this rule is
            refused: a float image with values outside [0, 1], a 16-bit image whose values all fit into 12 bits, and a
            32-bit image.
        mean: Mean of pixels in [0, 1], a number or one for each channel.
        std: Standard deviation, like ``mean``.

    Raises:
        InputError: If an argument is invalid.
    """

    img_size: int | Sequence[int] | None = None
    in_chans: int = 3
    resize: str = "crop"
    interpolation: str = "bicubic"
    background: str = "white"
    white_level: float | None = None
    mean: float | Sequence[float] = MEAN
    std: float | Sequence[float] = STD

    def __post_init__(self) -> None:
        if self.img_size is not None:
            try:
                object.__setattr__(self, "img_size", image_size(self.img_size))
            except ValueError as error:
                raise InputError(
                    f"`img_size`: expected a whole number, at least 1, or (H, W), got {self.img_size}"
                ) from error
        for name, allowed in (("resize", RESIZE), ("interpolation", INTERPOLATION)):
            if getattr(self, name) not in allowed:
                raise InputError(f"`{name}`: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        try:
            ImageColor.getrgb(self.background)
        except (ValueError, AttributeError, TypeError) as error:
            raise InputError(
                f"`background`: expected a color such as white or #ff8000, got {self.background!r}"
            ) from error
        if self.white_level is not None and not self.white_level > 0:
            raise InputError(f"`white_level`: expected a number above 0, got {self.white_level}")

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> "Preprocessing":
        """Read the entries of a checkpoint, of a shared file, or of the ``cxv`` metadata of an exported file."""
        others = entries.get("preprocessing") or {}  # files from before this entry have the defaults
        try:
            return cls(entries["img_size"], entries["in_chans"], **others, **entries["normalization"])
        except TypeError as error:
            raise InputError(f"preprocessing: unknown entries in {others}, {entries['normalization']}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the entries for :meth:`from_dict`, which JSON can hold."""
        names = ("resize", "interpolation", "background", "white_level")
        return {
            "img_size": self.side,
            "in_chans": self.in_chans,
            "normalization": self.normalization,
            "preprocessing": {name: getattr(self, name) for name in names},
        }

    @property
    def side(self) -> int | tuple[int, int] | None:
        """``img_size`` as the models take it: the side of a square, or (H, W)."""
        return self.img_size[0] if self.img_size and self.img_size[0] == self.img_size[1] else self.img_size

    @property
    def normalization(self) -> dict[str, Any]:
        """The arguments of :func:`normalize`."""
        return {"mean": self.mean, "std": self.std}

    def of_pixels(self) -> dict[str, Any]:
        """Return the arguments that decoded pixels depend on: all but mean and std."""
        entries = self.to_dict()
        return {"img_size": entries["img_size"], "in_chans": self.in_chans, **entries["preprocessing"]}

    def decode(self, file: str | Path | BinaryIO, multipage: list[Any] | None = None) -> Tensor:
        """Read an image file as uint8 pixels (in_chans, H, W): all steps but the normalization.

        The first page or frame is read. A file that has more is appended to ``multipage``, for :func:`first_pages`.

        Raises:
            InputError: If the file is not an image, is damaged or has pixels of an unknown range. The message names it.
        """
        register_heif()
        try:
            with Image.open(file) as image:
                # the other frames of MPO, a camera's JPEG, are previews
                if multipage is not None and image.format != "MPO" and getattr(image, "is_animated", False):
                    multipage.append(file)
                deep = ";16" in str([tile[3] for tile in image.tile])  # PIL keeps the high byte of RGB
                image.load()
                return self.pixels(image, deep)
        except MemoryError:
            raise
        except Exception as error:  # damaged files raise nearly anything: OSError, SyntaxError, struct.error, …
            name = getattr(file, "name", "standard input") if hasattr(file, "read") else str(file)
            hint = ""
            if isinstance(error, Image.DecompressionBombError):
                hint = "; give a larger `max_pixels`"
            elif Path(str(name)).suffix.lower() in _HEIF and not register_heif():
                hint = "; pip install pillow-heif"
            raise InputError(f"{name}: cannot read the image ({one_line(error)}{hint})") from error

    def pixels(self, image: Image.Image, deep: bool = False) -> Tensor:
        """Return the uint8 pixels (in_chans, H, W) of a loaded PIL image; ``deep``: its file has 16 bits per channel.

        Raises:
            ValueError: If the range of the pixels is unknown, or ``in_chans`` is neither 1 nor 3.
        """
        if self.in_chans not in (1, 3):
            raise ValueError(f"images have 1 or 3 channels, and the model needs {self.in_chans}")
        is_png = image.format == "PNG"
        with suppress(Exception):  # EXIF is damaged more often than pixels are
            image.getexif()
            image.info.pop("exif", None)  # which exif_transpose would write anew
            image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            image = Image.fromarray(self._to_8_bits(numpy.asarray(image), image.mode, is_png))
        elif deep:
            self._check_range(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, self.background), image)
        image = image.convert("L" if self.in_chans == 1 else "RGB")
        if self.img_size is not None and image.size != (size := self.img_size[::-1]):
            method = Image.Resampling[self.interpolation.upper()]
            if self.resize == "crop":
                image = ImageOps.fit(image, size, method)
            elif self.resize == "pad":
                image = ImageOps.pad(image, size, method, ImageColor.getcolor(self.background, image.mode))
            else:
                image = image.resize(size, method)
        pixels = torch.from_numpy(numpy.array(image))
        return pixels[None] if self.in_chans == 1 else pixels.permute(2, 0, 1).contiguous()

    def convert(self, images: Tensor) -> Tensor:
        """Return uint8 images (N, C, H, W) with the size and channels of this preprocessing, by the same steps."""
        if images.shape[1:] == (self.in_chans, *self.img_size):
            return images
        arrays = (image[0] if len(image) == 1 else image.permute(1, 2, 0) for image in images)
        return torch.stack([self.pixels(Image.fromarray(array.numpy())) for array in arrays])

    def _to_8_bits(self, values: numpy.ndarray, mode: str, is_png: bool) -> numpy.ndarray:
        """Scale an array of 16-bit, 32-bit or float pixels to 8 bits."""
        low, high = values.min(), values.max()
        is_16_bit = mode.startswith("I;16") or (is_png and mode == "I")
        white = self.white_level
        if white is None and is_16_bit and (high == 0 or high >= 2**12):
            return (values >> 8).astype("uint8")
        if white is None and mode == "F" and low >= 0 and high <= 1:
            white = 1.0
        if white is None or not abs(high - low) < float("inf"):  # NaN, too
            raise ValueError(
                f"mode {mode} with values from {low:g} to {high:g}: `white_level` must say which value is white"
            )
        return ((values / white).clip(0, 1) * 255).round().astype("uint8")

    def _check_range(self, image: Image.Image) -> None:
        """Refuse an image of 16 bits per channel that would become dark, because PIL has only its high bytes."""
        high = max(high for _, high in (band.getextrema() for band in image.split()[:3]))
        if self.white_level not in (None, 65535) or 0 < high < 16:
            raise ValueError(
                f"mode {image.mode} with 16 bits per channel and values up to {256 * high + 255}: `white_level` cannot "
                "be applied; convert the file to 8 bits"
            )


def decode_image(path: str | Path, in_chans: int = 3, img_size: int | Sequence[int] | None = None) -> Tensor:
    """Read an image file as a uint8 tensor (in_chans, H, W), with the defaults of :class:`Preprocessing`.

    Args:
        path: The file.
        in_chans: 3 for RGB, 1 for gray.
        img_size: Side in pixels, or (H, W). Default: the size of the image.

    Raises:
        InputError: If the file is not an image or is damaged. The message has the file.
    """
    return Preprocessing(img_size, in_chans).decode(path)


@python_numbers
def normalize(images: Tensor, mean: float | Sequence[float] = MEAN, std: float | Sequence[float] = STD) -> Tensor:
    """Convert uint8 images (…, C, H, W) to float32 in [0, 1], subtract the mean and divide by the std.

    The paper's 0.5 and 0.5 give [-1, 1].
    """

    def of_channels(values: float | Sequence[float]) -> float | Tensor:
        if not isinstance(values, Sequence):
            return values
        return torch.tensor(values, device=images.device)[:, None, None]

    return images.float().div_(255).sub_(of_channels(mean)).div_(of_channels(std))


def stored_size(path: str | Path) -> tuple[int, int]:
    """Return (H, W) of an image file from its header, rotated by its EXIF tag. A damaged file raises any exception."""
    register_heif()
    with Image.open(path) as image:
        width, height = image.size
        with suppress(Exception):
            if image.getexif().get(0x0112, 1) >= 5:
                return width, height
        return height, width


@contextmanager
def pixel_limit(max_pixels: int | None) -> Iterator[None]:
    """In the block, PIL refuses images of more than ``max_pixels`` pixels; ``None`` keeps its own limit."""
    before = Image.MAX_IMAGE_PIXELS
    try:
        with warnings.catch_warnings():
            if max_pixels is not None:
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                Image.MAX_IMAGE_PIXELS = max_pixels / 2  # PIL warns above it, and refuses twice as many
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


@cache
def register_heif() -> bool:
    """Let PIL read HEIC files, and return True, if pillow-heif is installed."""
    with suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
        return True
    return False


def readable_extensions() -> set[str]:
    """Return the extensions of image files that PIL can read, like ``".png"``."""
    register_heif()
    return {ext for ext, name in Image.registered_extensions().items() if name not in _NOT_IMAGES}


def first_pages(names: Sequence[str]) -> str:
    """Return the notice that only the first page or frame of these files was read."""
    return f"the first page or frame is read of {len(names):,} files that have several ({listed(sorted(names), 3)})"


def one_line(error: BaseException) -> str:
    """Return the message of an exception in one line."""
    return " ".join(str(error).split()) or type(error).__name__
