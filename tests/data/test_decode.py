"""From files to pixels: modes, transparency, orientation, limits, sizes, and one preprocessing for all commands."""

import io
import json
import struct

import numpy as np
import pytest
import torch
from conftest import write_image
from PIL import Image

from cxv.data import Preprocessing, decode_image, load_data, normalize
from cxv.errors import InputError


def save(path, array, **kwargs):
    Image.fromarray(array).save(path, **kwargs)
    return path


# --- transparency


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB with a key"])
def test_transparent_pixels_have_the_background(tmp_path, mode):
    """They had whatever color was stored behind them, mostly black."""
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2] = (10, 10, 10, 255)
    image = Image.fromarray(pixels)
    if mode == "P":
        image = image.quantize(4)
    elif mode != "RGBA":
        image = image.convert(mode[:3].strip())
    options = {"transparency": (0, 0, 0)} if "key" in mode else {}
    path = tmp_path / "x.png"
    image.save(path, **options)
    for color, level in (("white", 255), ("#ff8000", None), ("black", 0)):
        decoded = Preprocessing(background=color).decode(path)
        expected = [255, 128, 0] if level is None else [level] * 3
        assert decoded[:, 3, 3].tolist() == expected
        assert decoded[:, 0, 0].tolist() == [10, 10, 10]
    assert decode_image(path, in_chans=1)[0, 3].tolist() == [255] * 4


def test_half_transparent_pixels_are_mixed(tmp_path):
    path = save(tmp_path / "x.png", np.full((2, 2, 4), (0, 0, 0, 128), np.uint8))
    assert decode_image(path).unique().tolist() == [127]


# --- more than 8 bits


def test_16_bit_images_keep_their_high_byte(tmp_path):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for name in ("x.png", "x.tif"):
        decoded = decode_image(save(tmp_path / name, values), in_chans=1)
        assert torch.equal(decoded[0], torch.from_numpy((values >> 8).astype(np.uint8)))


@pytest.mark.parametrize(
    ("values", "white", "refusal"),
    [
        (np.arange(64, dtype=np.uint16) * 64, 4095, "mode I;16 with values from 0 to 4032"),
        (np.arange(64, dtype=np.float32), 63, "mode F with values from 0 to 63"),
        (np.arange(64, dtype=np.int32) * 1000, 63000, "mode I with values from 0 to 63000"),
    ],
    ids=["12 bits in 16", "float above 1", "32 bits"],
)
def test_an_unknown_range_is_refused_or_scaled_by_the_white_level(tmp_path, values, white, refusal):
    """Such images were black, or white."""
    path = save(tmp_path / "x.tif", values.reshape(8, 8))
    with pytest.raises(InputError, match=f"x.tif: .*{refusal}: `white_level` must say which value is white"):
        decode_image(path)
    expected = (values.astype(np.float64) / white * 255).round().clip(0, 255)
    assert np.array_equal(Preprocessing(white_level=white).decode(path)[0].flatten().numpy(), expected)
    half = Preprocessing(white_level=white / 2).decode(path)
    assert half.max() == 255  # larger values are clipped


def test_float_images_between_0_and_1_are_scaled(tmp_path):
    path = save(tmp_path / "x.tif", np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8))
    assert decode_image(path)[0].flatten().tolist() == (np.linspace(0, 1, 64) * 255).round().tolist()
    for value in (np.nan, np.inf, -0.5):
        with pytest.raises(InputError, match="mode F with values from"):
            decode_image(save(tmp_path / "y.tif", np.array([[0.5, value]], np.float32)))


def test_a_black_16_bit_image_is_black(tmp_path):
    assert not decode_image(save(tmp_path / "x.png", np.zeros((4, 4), np.uint16))).any()


def rgb_16_png(path, values):
    """An RGB PNG file of 16 bits per channel, which PIL does not write."""
    import zlib

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return path


def test_color_of_16_bits_per_channel_keeps_its_high_byte_and_12_bits_are_refused(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (4, 4, 3))
    decoded = decode_image(rgb_16_png(tmp_path / "x.png", values))
    assert np.array_equal(decoded.permute(1, 2, 0).numpy(), values >> 8)
    path = rgb_16_png(tmp_path / "y.png", values >> 4)
    with pytest.raises(InputError, match=r"mode RGB with 16 bits per channel and values up to 4095.*to 8 bits"):
        decode_image(path)


# --- EXIF


def jpeg(path, exif):
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, :8] = 255
    Image.fromarray(pixels).save(path, quality=95, **({"exif": exif} if exif else {}))
    return path


def test_images_are_rotated_by_their_exif_tag(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = decode_image(jpeg(tmp_path / "x.jpg", exif.tobytes()))
    assert image.shape == (3, 16, 8)
    assert image[0, 1, 1] > 200
    assert image[0, 14, 1] < 50


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0nonsense", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0II*\0\xff\xff\xff\x7f"]
)
def test_a_damaged_exif_block_does_not_lose_the_image(tmp_path, exif):
    path = jpeg(tmp_path / "x.jpg", exif)
    assert torch.equal(decode_image(path), decode_image(jpeg(tmp_path / "y.jpg", None)))


# --- limits


def test_the_limit_of_pixels_can_be_raised(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)  # 8×8 images are below its double, 80
    write_image(folder / "train" / "ant" / "0.webp", size=(10, 10))
    with pytest.raises(InputError, match=r"0\.webp: cannot read .*100 pixels.*; give a larger `max_pixels`"):
        load_data(folder)
    data = load_data(folder, on_corrupt="skip")
    assert len(data.train) == 11
    assert len(load_data(folder, max_pixels=100).train) == 12
    with pytest.raises(InputError, match="larger `max_pixels`"):
        load_data(folder, max_pixels=99)
    assert Image.MAX_IMAGE_PIXELS == 40  # as it was


# --- size


def halves(tmp_path):
    """A picture of 20×40 pixels (H, W), black on the left and white on the right."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 20:] = 255
    return save(tmp_path / "x.png", pixels)


def test_resize_crops_pads_or_squashes(tmp_path):
    path = halves(tmp_path)
    crop, pad, squash = (
        Preprocessing(10, resize=how, background="#ff0000").decode(path) for how in ("crop", "pad", "squash")
    )
    assert crop.shape == pad.shape == squash.shape == (3, 10, 10)
    assert squash[0, 0, :4].max() < 10
    assert torch.equal(squash[:, 0], squash[:, 9])
    assert pad[:, 0, 0].tolist() == pad[:, 9, 9].tolist() == [255, 0, 0]
    assert pad[:, 5, 8].tolist() == [255, 255, 255]
    assert crop[0, 0, 0] < 10
    assert crop[0, 9, 9] > 245
    with pytest.raises(InputError, match="`resize`: expected one of crop, pad, squash, got 'stretch'"):
        Preprocessing(resize="stretch")


def test_rectangular_sizes(tmp_path, folder):
    image = Preprocessing((10, 20)).decode(halves(tmp_path))
    assert image.shape == (3, 10, 20)
    assert image[0, :, :9].max() < 10
    data = load_data(folder, img_size=(6, 12))
    assert data.train.images.shape == (12, 3, 6, 12)
    assert data.img_size == (6, 12)
    assert load_data("digits", img_size=(4, 8), limit_train=10).train.images.shape == (10, 1, 4, 8)


def test_a_dataset_in_arrays_is_resized_as_its_files_would_be(tmp_path):
    """CIFAR's and the digits' arrays took another resampling than the files of ``cxv predict``."""
    plain, large = (load_data("digits", limit_test=5, limit_train=5, img_size=size) for size in (None, 20))
    for image, expected in zip(plain.test.images, large.test.images, strict=True):
        path = save(tmp_path / "x.png", image[0].numpy())
        assert torch.equal(large.preprocessing.decode(path), expected)


def test_gray_folders_and_color_of_gray_datasets(folder):
    gray = load_data(folder, in_chans=1)
    assert gray.train.images.shape == (12, 1, 8, 8)
    assert torch.equal(gray.train.images[0], decode_image(gray.train.paths[0], in_chans=1))
    assert load_data("digits", in_chans=3, limit_train=10).train.images.shape == (10, 3, 8, 8)
    with pytest.raises(InputError, match="`in_chans`: expected 1 or 3, got 4"):
        load_data(folder, in_chans=4)


# --- one object for all


def test_preprocessing_goes_through_json(tmp_path):
    given = Preprocessing((12, 10), 1, "pad", "bilinear", "#102030", 4095, [0.4], [0.2])
    read = Preprocessing.from_dict(json.loads(json.dumps(given.to_dict())))
    path = halves(tmp_path)
    assert torch.equal(read.decode(path), given.decode(path))
    assert read.to_dict() == given.to_dict() | {"img_size": (12, 10)}
    old = {"img_size": 32, "in_chans": 3, "normalization": {"mean": 0.5, "std": 0.5}}
    assert Preprocessing.from_dict(old) == Preprocessing(32)
    with pytest.raises(InputError, match=r"preprocessing: unknown entries in {'crop': 1}"):
        Preprocessing.from_dict(old | {"preprocessing": {"crop": 1}})


def test_the_recipe_of_the_documentation_gives_the_same_pixels(tmp_path):
    """PIL and NumPy alone, as a program without cxv does it."""
    from PIL import ImageOps

    path = write_image(tmp_path / "x.png", size=(50, 30)) is not None and tmp_path / "x.png"
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    image = ImageOps.fit(image, (16, 16), Image.Resampling.BICUBIC)
    x = (np.asarray(image, np.float32) / 255 - 0.5) / 0.5
    ours = normalize(Preprocessing(16).decode(path))
    assert np.abs(x.transpose(2, 0, 1) - ours.numpy()).max() < 1e-6


def test_files_in_memory_are_decoded(tmp_path):
    write_image(tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    assert torch.equal(Preprocessing().decode(io.BytesIO(content)), decode_image(tmp_path / "x.png"))
    with pytest.raises(InputError, match=r"^standard input: cannot read the image"):
        Preprocessing().decode(io.BytesIO(content[:20]))


@pytest.mark.parametrize("color", ["transparentish", "#12", 5])
def test_an_unknown_color_is_an_error(color):
    with pytest.raises(InputError, match="`background`: expected a color such as white or #ff8000, got"):
        Preprocessing(background=color)
