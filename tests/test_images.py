"""Every kind of picture a user may hand over: the right pixels, or one line that names the file."""

import os
import struct
import sys
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import checkered
from PIL import Image

from nearid_personalize import images
from nearid_personalize.errors import InputError

OPTIONAL = [format for format in ("AVIF", "HEIF") if format in images._readable_formats()]
"""Formats that not every installation reads."""


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def png(width: int, height: int, bit_depth: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG written by hand: rows already carry their filter bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    return message


# --- valid pictures of unusual kinds ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "format"), [(".png", "PNG"), (".bmp", "BMP"), (".tif", "TIFF"), (".webp", "WEBP"), (".PNG", "PNG")]
)
def test_a_lossless_file_gives_its_own_pixels(tmp_path: Path, suffix: str, format: str):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(encoded(checkered(0), format, **({"lossless": True} if format == "WEBP" else {})))
    loaded = images.load_image(path)
    assert loaded.mode == "RGB"
    np.testing.assert_array_equal(pixels(loaded), pixels(checkered(0)))


def test_path_string_bytes_picture_array_and_tensor_agree(tmp_path: Path):
    image = checkered(1)
    path = tmp_path / "a.png"
    image.save(path)
    array = np.array(image)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    sources = [
        path,
        str(path),
        path.read_bytes(),
        image,
        Image.open(path),
        array,
        array / 255,
        array.astype("u2") * 257,
    ]
    sources += [tensor, tensor / 255, (tensor / 255).requires_grad_()]
    for source in sources:
        np.testing.assert_array_equal(pixels(images.load_image(source)), array)


def test_bfloat16_tensors_are_read():
    half = torch.full((3, 4, 5), 0.5, dtype=torch.bfloat16)
    assert set(pixels(images.load_image(half)).ravel()) == {128}


def test_grey_arrays_and_bits():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    for source in (grey, grey[:, :, None], torch.from_numpy(grey), torch.from_numpy(grey)[None]):
        np.testing.assert_array_equal(pixels(images.load_image(source)), np.repeat(grey[:, :, None], 3, axis=2))
    bits = np.array([[True, False]])
    np.testing.assert_array_equal(pixels(images.load_image(bits))[0, :, 0], [255, 0])


def test_cmyk_is_converted():
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    for source in (cyan, encoded(cyan, "TIFF"), encoded(cyan, "JPEG", quality=100)):
        np.testing.assert_allclose(pixels(images.load_image(source))[4, 4], [0, 255, 255], atol=2)


def test_sixteen_bit_grey_is_scaled_not_clipped():
    values = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    picture = Image.fromarray(values)
    assert picture.mode == "I;16"
    for source in (picture, encoded(picture, "PNG"), encoded(picture, "TIFF"), values):
        np.testing.assert_array_equal(pixels(images.load_image(source))[0, :, 0], [0, 1, 128, 255])


def test_sixteen_bit_colour_png():
    row = b"\0" + struct.pack(">6H", 65535, 0, 128 * 257, 257, 65535, 0)
    loaded = images.load_image(png(2, 1, bit_depth=16, colour_type=2, rows=row))
    np.testing.assert_array_equal(pixels(loaded)[0], [[255, 0, 128], [1, 255, 0]])


@pytest.mark.parametrize("mode", ["1", "L", "YCbCr", "LAB", "HSV", "RGBX", "RGBa", "LA", "PA", "I", "F"])
def test_every_mode_pillow_knows_becomes_rgb(mode: str):
    assert images.load_image(Image.new(mode, (5, 4))).mode == "RGB"


def test_palette_keeps_its_colours():
    red_and_blue = Image.new("P", (2, 1))
    red_and_blue.putpalette([255, 0, 0, 0, 0, 255])
    red_and_blue.putpixel((1, 0), 1)
    for source in (red_and_blue, encoded(red_and_blue, "PNG"), encoded(red_and_blue, "GIF")):
        np.testing.assert_array_equal(pixels(images.load_image(source))[0], [[255, 0, 0], [0, 0, 255]])


def test_transparency_is_laid_over_white():
    half_red = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    half_red.putpixel((1, 0), (200, 0, 0, 255))
    expected = [[255, 255, 255], [200, 0, 0]]
    for source in (half_red, encoded(half_red, "PNG"), np.array(half_red)):
        np.testing.assert_array_equal(pixels(images.load_image(source))[0], expected)


def test_transparency_of_palette_and_of_a_key_colour_is_laid_over_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 9, 9, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    loaded = images.load_image(encoded(palette, "PNG", transparency=0))
    np.testing.assert_array_equal(pixels(loaded)[0], [[255, 255, 255], [0, 0, 255]])
    keyed = Image.new("RGB", (2, 1), (1, 2, 3))
    keyed.putpixel((1, 0), (7, 8, 9))
    loaded = images.load_image(encoded(keyed, "PNG", transparency=(1, 2, 3)))
    np.testing.assert_array_equal(pixels(loaded)[0], [[255, 255, 255], [7, 8, 9]])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int):
    """The eight orientations of the EXIF standard, each stored turned so that upright is the same picture."""
    upright = np.array(checkered(2).crop((0, 0, 48, 30)))
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    np.testing.assert_array_equal(pixels(images.load_image(source)), upright)


def test_of_an_animation_the_first_frame_is_taken():
    animation = encoded(checkered(0), "PNG", save_all=True, append_images=[checkered(1)])
    np.testing.assert_array_equal(pixels(images.load_image(animation)), pixels(checkered(0)))


def test_the_given_picture_is_neither_changed_nor_shared():
    image = checkered(0)
    images.load_image(image).paste((0, 0, 0), (0, 0, 48, 48))
    np.testing.assert_array_equal(pixels(image), pixels(checkered(0)))


@pytest.mark.parametrize("format", ["JPEG", "MPO", *(f for f in OPTIONAL if f == "AVIF")])
def test_what_phones_and_browsers_save_is_read(format: str):
    """MPO is what many phones call .jpg: a JPEG with a second picture behind it."""
    upright = checkered(2, 64).crop((0, 0, 64, 40))
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    behind = {"save_all": True, "append_images": [stored.transpose(Image.Transpose.ROTATE_180)]}
    source = encoded(stored, format, exif=exif, quality=95, **(behind if format == "MPO" else {}))
    loaded = images.load_image(source)
    assert loaded.size == upright.size
    assert np.abs(pixels(loaded) - pixels(upright)).mean() < 12  # as lossy as at this quality


@pytest.mark.skipif("HEIF" not in OPTIONAL, reason="pillow-heif is not installed")
def test_heic_is_read_upright_where_its_reader_is_installed(tmp_path: Path):
    upright = checkered(2, 64)
    exif = Image.Exif()
    exif[0x0112] = 6
    images._readable_formats()
    (tmp_path / "IMG_1.HEIC").write_bytes(
        encoded(upright.transpose(Image.Transpose.ROTATE_90), "HEIF", exif=exif.tobytes(), quality=95)
    )
    (loaded,) = images.load_images(tmp_path)
    assert np.abs(pixels(loaded) - pixels(upright)).mean() < 12


@pytest.fixture
def without_optional_readers(monkeypatch: pytest.MonkeyPatch):
    """As if pillow-heif were not installed, and Pillow older than 11.3."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    Image.init()
    for format in ("HEIF", "AVIF"):
        monkeypatch.delitem(Image.OPEN, format, raising=False)
    images._readable_formats.cache_clear()
    yield
    images._readable_formats.cache_clear()


@pytest.mark.parametrize(
    ("suffix", "brand", "told"),
    [
        (".heic", b"heic", "pillow-heif"),
        (".HEIC", b"mif1", "pillow-heif"),
        (".jpg", b"heix", "pillow-heif"),
        (".avif", b"avif", "Pillow 11.3"),
    ],
)
def test_photos_without_a_reader_are_named_not_skipped(
    tmp_path: Path, suffix: str, brand: bytes, told: str, without_optional_readers: None
):
    path = tmp_path / f"IMG_1{suffix}"
    content = b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0mif1heic" + bytes(40)
    path.write_bytes(content)
    checkered(0).save(tmp_path / "other.png")
    with pytest.raises(InputError) as error:
        images.load_images(tmp_path)
    assert one_line(error).startswith(f"{path}: ") and told in str(error.value) and "JPEG" in str(error.value)
    with pytest.raises(InputError, match=told):
        images.load_image(content)


# --- pictures that cannot be read ------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_a_file_cut_short_is_named(tmp_path: Path, format: str, share: float):
    whole = encoded(checkered(0, 64), format)
    path = tmp_path / "cut.png"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError) as error:
        images.load_image(path)
    assert one_line(error).startswith(f"{path}: ")


def test_a_corrupt_file_is_named(tmp_path: Path):
    content = bytearray(encoded(checkered(0), "PNG"))
    content[60:90] = bytes(30)
    path = tmp_path / "corrupt.png"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        images.load_image(path)
    assert str(path) in one_line(error) and "damaged" in one_line(error)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow on damaged metadata
def test_damaged_bytes_never_raise_anything_else():
    """Flipped and cut bytes of every format: a picture, or an InputError of one line."""
    random = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    with_exif = ("AVIF", "PNG", "JPEG", "WEBP")
    for format in ("BMP", "GIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP", *OPTIONAL):
        whole = encoded(checkered(0, 24), format, **({"exif": exif} if format in with_exif else {}))
        for number in range(300):
            # Every third file is cut short: of a whole one, flipped bytes reach further into the decoder.
            content = bytearray(whole[: random.integers(1, len(whole) + 1)] if number % 3 == 0 else whole)
            for _ in range(random.integers(1, 4)):
                content[random.integers(len(content))] = random.integers(256)
            try:
                assert images.load_image(bytes(content), max_pixels=1_000_000).mode == "RGB"
            except InputError as error:
                assert "\n" not in str(error)


def test_a_number_of_a_tiff_that_became_text():
    """Pillow raises a TypeError on it."""
    content = encoded(checkered(0, 24), "TIFF")
    strip_offsets = struct.pack("<HHI", 273, 4, 1)
    assert strip_offsets in content
    with pytest.raises(InputError, match="damaged or cut short"):
        images.load_image(content.replace(strip_offsets, struct.pack("<HHI", 273, 2, 1)))


def test_a_text_file_named_jpg(tmp_path: Path):
    path = tmp_path / "notes.jpg"
    path.write_text("this is no picture")
    with pytest.raises(InputError) as error:
        images.load_image(path)
    assert str(path) in one_line(error) and "not a picture" in one_line(error)


def test_a_missing_file_and_a_folder_in_place_of_a_file(tmp_path: Path):
    with pytest.raises(InputError, match="no such file"):
        images.load_image(tmp_path / "nowhere.png")
    with pytest.raises(InputError, match="a folder"):
        images.load_image(tmp_path)


def test_twenty_thousand_pixels_square_is_refused_from_the_header(tmp_path: Path):
    path = tmp_path / "huge.png"
    path.write_bytes(png(20_000, 20_000, bit_depth=1, colour_type=0, rows=b"no pixel is ever decoded"))
    with pytest.raises(InputError) as error:
        images.load_image(path)
    assert str(path) in one_line(error) and "at most 100,000,000" in one_line(error)


@pytest.mark.filterwarnings("error")  # Pillow warns from 89 MP on: our own limit replaces that warning
def test_the_limit_is_exact_and_counts_pixels():
    refused = png(10_001, 10_000, bit_depth=1, colour_type=0, rows=b"")
    with pytest.raises(InputError, match="10001 x 10000 = 100,010,000 pixels; at most 100,000,000"):
        images.load_image(refused)
    assert images.load_image(checkered(0, 40), max_pixels=1600).size == (40, 40)
    with pytest.raises(InputError, match="40 x 40"):
        images.load_image(np.zeros((40, 40), np.uint8), max_pixels=1599)


@pytest.mark.parametrize(
    "source",
    [
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((4, 4), np.int64),
        np.zeros((0, 4, 3), np.uint8),
        np.full((4, 4, 3), 1.5),
        np.full((4, 4, 3), -0.1),
        np.full((4, 4, 3), np.nan),
        torch.zeros(2, 3, 4, 4),
        torch.zeros(5, 4, 3),
        Image.fromarray(np.full((2, 2), 70000, np.int32)),
        17,
    ],
)
def test_what_is_no_picture_is_refused_in_one_line(source: object):
    with pytest.raises(InputError) as error:
        images.load_image(source)  # type: ignore[arg-type]
    assert "image" in one_line(error)


# --- several pictures ------------------------------------------------------------------------------------------------


def test_a_folder_is_listed_sorted_and_without_other_files(photo_dir: Path):
    (photo_dir / "notes.txt").write_text("x")
    (photo_dir / "._photo-0.png").write_bytes(b"\0")
    (photo_dir / "sub.png").mkdir()
    checkered(4).save(photo_dir / "A.JPEG")
    names = [path.name for path in images.list_images(photo_dir)]
    assert names == ["A.JPEG", "photo-0.png", "photo-1.png", "photo-2.png", "photo-3.png"]


def test_missing_empty_and_wrong_folders(tmp_path: Path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        images.list_images(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no pictures in this folder.*\.png"):
        images.list_images(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match="not a folder"):
        images.list_images(tmp_path / "a.txt")


def test_every_way_to_give_several_pictures_agrees(photo_dir: Path):
    expected = [pixels(checkered(seed)) for seed in range(4)]
    paths = images.list_images(photo_dir)
    arrays = np.stack(expected).astype(np.uint8)
    batches = [photo_dir, str(photo_dir), paths, tuple(map(str, paths)), [checkered(seed) for seed in range(4)]]
    batches += [arrays, torch.from_numpy(arrays).permute(0, 3, 1, 2), iter(paths)]
    for batch in batches:
        np.testing.assert_array_equal([pixels(image) for image in images.load_images(batch)], expected)


def test_one_picture_is_a_list_of_one(photo_dir: Path):
    path = photo_dir / "photo-1.png"
    for source in (path, str(path), path.read_bytes(), checkered(1), np.array(checkered(1))):
        (image,) = images.load_images(source)
        np.testing.assert_array_equal(pixels(image), pixels(checkered(1)))


def test_no_pictures_at_all():
    with pytest.raises(InputError, match="empty sequence"):
        images.load_images([])
    with pytest.raises(InputError, match="int"):
        images.load_images(3)  # type: ignore[arg-type]


# --- tensors ---------------------------------------------------------------------------------------------------------


def test_to_tensor_has_the_picture_in_rows():
    tensor = images.to_tensor([checkered(0), checkered(1)])
    assert tensor.shape == (2, 3, 48, 48) and tensor.dtype == torch.float32
    np.testing.assert_array_equal(tensor[1, :, 5, 7] * 255, pixels(checkered(1))[5, 7])


def test_to_tensor_names_the_sizes_that_differ():
    with pytest.raises(InputError, match="48 x 48, 50 x 50"):
        images.to_tensor([checkered(0), checkered(0, 50)])
    with pytest.raises(InputError, match="empty"):
        images.to_tensor([])


@pytest.mark.parametrize("size", [16, 48, 100])
def test_preprocess_agrees_with_pillow_and_with_itself(size: int):
    """Pictures, bytes and floats take three code paths; Pillow's own antialiased bicubic is the reference."""
    batch = [checkered(seed) for seed in range(3)]
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    resized = np.stack([pixels(image.resize((size, size), Image.Resampling.BICUBIC)) for image in batch])
    reference = (resized.transpose(0, 3, 1, 2) / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    floats = images.to_tensor(batch)
    for source in (batch, (floats * 255).round().byte(), floats):
        result = images.preprocess(source, size, mean, std)
        assert result.shape == (3, 3, size, size) and result.dtype == torch.float32
        difference = np.abs(result.numpy() - reference) * np.reshape(std, (3, 1, 1)) * 255
        if source is floats:  # Pillow rounds and clips between its two passes, floats do not
            assert difference.mean() < 0.5
        else:
            assert difference.max() < (0.01 if size <= 48 else 2.01)


def test_preprocess_squashes_pictures_of_any_sizes():
    wide = checkered(0).resize((90, 30))
    result = images.preprocess([wide, checkered(1, 20)], 24, (0.5,) * 3, (0.5,) * 3)
    assert result.shape == (2, 3, 24, 24) and result.abs().max() <= 1


def test_preprocess_passes_gradients_to_float_pixels():
    batch = torch.rand(2, 3, 40, 40, requires_grad=True)
    images.preprocess(batch, 16, (0.5,) * 3, (0.5,) * 3).sum().backward()
    assert batch.grad is not None and (batch.grad != 0).float().mean() > 0.9


def test_preprocess_refuses_what_it_cannot_read():
    for wrong in (torch.zeros(3, 8, 8), torch.zeros(1, 4, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.int64), []):
        with pytest.raises(InputError):
            images.preprocess(wrong, 8, (0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize("low_high", [(-1.0, 1.0), (0.0, 255.0), (0.0, 1.001), (-0.001, 1.0)])
def test_float_pixels_outside_their_range_are_refused(low_high: tuple[float, float]):
    pixels = torch.rand(2, 3, 8, 8)
    pixels[1, 0, 0, :2] = torch.tensor(low_high)
    with pytest.raises(InputError, match=r"batch: float pixels from .* give floats in \[0, 1\]"):
        images.check_pixel_range(pixels, "batch")


def test_pixels_in_range_pass():
    for kept in (torch.rand(2, 3, 4, 4), torch.tensor([0.0, 1.0]).half(), torch.full((2,), 200, dtype=torch.uint8)):
        images.check_pixel_range(kept)
    images.check_pixel_range(torch.tensor([0.5, float("nan")]))
    with torch._subclasses.FakeTensorMode():
        images.check_pixel_range(torch.empty(2))


# --- writing ---------------------------------------------------------------------------------------------------------


def test_write_atomically_replaces_whole_files_and_leaves_nothing_else(tmp_path: Path):
    path = tmp_path / "a.txt"
    images.write_atomically(path, "first, longer")
    images.write_atomically(path, b"zweite \xc3\xbc")
    assert path.read_text(encoding="utf-8") == "zweite ü"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_failed_write_leaves_the_old_file_and_no_half_one(tmp_path: Path):
    path = tmp_path / "taken"
    path.mkdir()
    with pytest.raises(OSError):
        images.write_atomically(path, "x")
    assert os.listdir(tmp_path) == ["taken"]


def test_written_files_have_ordinary_permissions(tmp_path: Path):
    (tmp_path / "plain").touch()
    images.write_atomically(tmp_path / "ours", "x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tiff", ".PNG"])
def test_saved_pictures_load_unchanged(tmp_path: Path, suffix: str):
    images.save_image(checkered(3), tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(pixels(images.load_image(tmp_path / f"a{suffix}")), pixels(checkered(3)))


def test_save_image_refuses_an_unknown_suffix(tmp_path: Path):
    with pytest.raises(InputError, match=r"'\.xyz'.*\.png"):
        images.save_image(checkered(0), tmp_path / "a.xyz")
    assert not os.listdir(tmp_path)
