"""Any picture a user may have -> RGB pixels, or one clear line that says why not.

Conventions: a PIL picture is 8-bit RGB; a tensor is RGB float `[N,3,H,W]` in [0, 1]; an array is `[H,W]` or `[H,W,C]`.
"""

import os
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch._subclasses.fake_tensor import FakeTensor

from nearid_personalize.errors import InputError
from nearid_personalize.files import safe_name, write_atomically

ImageSource: TypeAlias = str | Path | bytes | Image.Image | np.ndarray | torch.Tensor


Resample: TypeAlias = Literal["bicubic", "bilinear"]


MAX_PIXELS = 100_000_000
"""Largest picture read, in pixels: 100 MP is 300 MB once decoded."""


IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".hif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo"),
    *(".png", ".tif", ".tiff", ".webp"),
)
"""How the names of pictures end. What a file holds is told from its first bytes, whatever its name."""


MASK_SUFFIX = ".mask"  # photo.mask.png beside photo.jpg


# Pillow's other readers are left out whatever a file is called: the EPS one runs Ghostscript on it.
_FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "PNG", "TIFF", "WEBP")


# The two formats that not every installation reads: how their files begin, and what reads them.
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")


_OPTIONAL = {
    "AVIF": ((b"avif", b"avis"), "Pillow 11.3 or newer reads it (pip install -U pillow)"),
    "HEIF": (_HEIF_BRANDS, "pillow-heif reads it (pip install 'nearid-personalize[heic]')"),
}


# What Pillow raises on damaged data. Flipping and cutting bytes in 400,000 files met the first six of these: its AVIF
# decoder raises RuntimeError, its TIFF reader TypeError.
_DECODE_ERRORS = (
    *(OSError, SyntaxError, ValueError, OverflowError, RuntimeError, TypeError),
    *(EOFError, struct.error, zlib.error),
)


# --- reading ---------------------------------------------------------------------------------------------------------
def load_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """One picture as 8-bit RGB, upright.

    Args:
        source: a path; the bytes of a file; a PIL picture; an array `[H,W]` or `[H,W,C]`, C in {1,3,4}; or a tensor
            `[C,H,W]`. Arrays and tensors hold bool, uint8, uint16, or float in [0, 1].
        max_pixels: larger pictures are refused from their header, before any pixel is decoded.

    EXIF orientation is applied, transparency is laid over white, 16-bit grey is scaled to 8 bits, palette, grey and
    CMYK are converted; of an animation the first frame is taken.

    Raises:
        InputError: the file is missing, damaged, cut short, no picture, or too large, or the array has no such shape.
    """
    if isinstance(source, Image.Image):
        return _decode(source, _name_of(source), max_pixels)
    if isinstance(source, bytes):
        return _open(BytesIO(source), f"image of {len(source)} bytes", max_pixels)
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    if isinstance(source, torch.Tensor):
        return _from_array(_channels_last(source), max_pixels)
    if isinstance(source, str | Path):
        return _open_file(Path(source), max_pixels)
    raise InputError(f"image: got {type(source).__name__}; give a path, bytes, PIL picture, array or tensor")


def load_upload(source: Path | bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A stranger's file as RGB picture, see `load_image`; an error calls it by the name that its owner gave it."""
    file = BytesIO(source) if isinstance(source, bytes) else source
    return _open(file, safe_name(name), max_pixels)


def list_images(folder: str | Path) -> list[Path]:
    """The picture files directly in `folder`, sorted by name; subject masks (`photo.mask.png`) are none.

    Raises:
        InputError: `folder` is missing, is not a folder, or holds no file with one of `IMAGE_SUFFIXES`.
    """
    folder = Path(folder)
    if not folder.exists():
        raise InputError(f"{folder}: no such folder; give a folder of pictures ({', '.join(IMAGE_SUFFIXES)})")
    if not folder.is_dir():
        raise InputError(f"{folder}: not a folder; give a folder of pictures ({', '.join(IMAGE_SUFFIXES)})")
    # A leading dot marks what some systems leave beside pictures ("._photo.jpg"): those are no pictures.
    paths = (path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    pictures = sorted(path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and not is_mask(path))
    if not pictures:
        raise InputError(f"{folder}: no pictures in this folder; it needs files ending in {', '.join(IMAGE_SUFFIXES)}")
    return pictures


def is_mask(path: Path) -> bool:
    """Whether a file is, by its name, the subject mask of a picture beside it."""
    return path.stem.lower().endswith(MASK_SUFFIX)


def load_images(source: ImageSource | Iterable[ImageSource]) -> list[Image.Image]:
    """One or more pictures, see `iterate_sources`.

    Raises:
        InputError: as `load_image` and `list_images`; also for an empty sequence.
    """
    images = [load_image(item) for item in iterate_sources(source)]
    if not images:
        raise InputError("images: an empty sequence; give at least one picture")
    return images


def iterate_sources(source: ImageSource | Iterable[ImageSource]) -> Iterator[ImageSource]:
    """A folder, one picture, a batch `[N,H,W,C]` / `[N,C,H,W]`, or any iterable of pictures, one by one, undecoded.

    Raises:
        InputError: as `list_images`.
    """
    if isinstance(source, str | Path) and Path(source).is_dir():
        return iter(list_images(source))
    if isinstance(source, np.ndarray | torch.Tensor):
        return iter(source if source.ndim == 4 else [source])
    if isinstance(source, str | Path | bytes | Image.Image) or not isinstance(source, Iterable):
        return iter([source])
    return iter(source)


def _open_file(path: Path, max_pixels: int) -> Image.Image:
    if not os.path.exists(path):  # False for impossible names too, where `path.exists` raises
        raise InputError(f"{str(path)[:200]!r}: no such file; give the path of a picture")
    if path.is_dir():
        raise InputError(f"{path}: a folder, where one picture is needed; give the path of a picture")
    if not path.is_file():
        raise InputError(f"{path}: a device or pipe; give the path of a picture")
    return _open(path, str(path), max_pixels)


def _open(file: Path | BytesIO, name: str, max_pixels: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `max_pixels` decides instead
            image = Image.open(file, formats=_readable_formats())
    except Image.DecompressionBombError:  # Pillow's own ceiling: twice MAX_IMAGE_PIXELS
        raise InputError(_too_large(name, f"over {2 * (Image.MAX_IMAGE_PIXELS or 0):,}", max_pixels)) from None
    except PermissionError:
        raise InputError(f"{name}: may not be read; check the file's permissions") from None
    except _DECODE_ERRORS:
        reason = _missing_reader(file) or "not a picture that can be read; give a valid PNG, JPEG or WebP file"
        raise InputError(f"{name}: {reason}") from None
    with image:
        return _decode(image, name, max_pixels)


@cache
def _readable_formats() -> tuple[str, ...]:
    """Those of `_FORMATS` that this build of Pillow has, and HEIF where the optional pillow-heif is installed."""
    Image.init()
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    return tuple(format for format in _FORMATS if format in Image.OPEN)


def _missing_reader(file: Path | BytesIO) -> str:
    """Of a picture in a format that has no reader here: what reads it. "" for anything else."""
    if isinstance(file, BytesIO):
        head = file.getvalue()[:12]
    else:
        with open(file, "rb") as opened:
            head = opened.read(12)
    for format, (brands, reader) in _OPTIONAL.items():
        if head[4:8] == b"ftyp" and head[8:12] in brands and format not in _readable_formats():
            return f"a picture in {format} format; {reader}, or save it as JPEG or PNG"
    return ""


def _decode(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """Pixels of an opened picture: size check on the header first, then decoding, then the conversions."""
    width, height = image.size
    if width * height > max_pixels:
        raise InputError(_too_large(name, f"{width} x {height} = {width * height:,}", max_pixels))
    try:
        image.load()
    except _DECODE_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{name}: damaged or cut short ({reason}); save or copy the picture again") from None
    return _to_rgb(_upright(image), name)


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation says; metadata that cannot be read turns nothing."""
    try:
        return ImageOps.exif_transpose(image)
    except _DECODE_ERRORS:
        return image


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """Any Pillow mode -> RGB."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode == "F" or image.mode.startswith("I"):
        pixels = np.asarray(image)
        top = 1.0 if image.mode == "F" else 65535
        if not (pixels.min() >= 0 and pixels.max() <= top):
            raise InputError(f"{name}: {image.mode} pixels outside 0 … {top:g}; save it with 8 bits per channel")
        return Image.fromarray(np.rint(pixels * (255 / top)).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image.convert("RGB")


def _channels_last(tensor: torch.Tensor) -> np.ndarray:
    """Tensor `[C,H,W]` or `[H,W]` -> array `[H,W,C]` or `[H,W]`."""
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.float()  # NumPy has no bfloat16
    return (tensor.permute(1, 2, 0) if tensor.ndim == 3 else tensor).numpy()


def _from_array(array: np.ndarray, max_pixels: int) -> Image.Image:
    """Array `[H,W]` or `[H,W,C]` -> RGB picture; C = 4 is RGB and alpha."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))) or array.size == 0:
        raise InputError(
            f"image: array of shape {list(array.shape)} once channels are last; give [H,W], [H,W,3] or [H,W,4] "
            "(tensors: channels first)"
        )
    if array.shape[0] * array.shape[1] > max_pixels:
        height, width = array.shape[:2]
        raise InputError(_too_large("image", f"{width} x {height} = {width * height:,}", max_pixels))
    return _to_rgb(Image.fromarray(_to_uint8(array)), "image")


def _to_uint8(array: np.ndarray) -> np.ndarray:
    """Pixels of a bool, uint8, uint16 or float ([0, 1]) array, scaled to 0 … 255."""
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        return np.rint(array / 257).astype(np.uint8)
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"image: pixels of type {array.dtype}; give uint8, uint16, bool, or float in [0, 1]")
    if not (array.min() >= 0 and array.max() <= 1):  # written so that NaN is refused as well
        raise InputError(f"image: float pixels from {array.min():g} to {array.max():g}; give floats in [0, 1]")
    return np.rint(array * 255).astype(np.uint8)


def _name_of(image: Image.Image) -> str:
    return str(getattr(image, "filename", "") or "image")


def _too_large(name: str, pixels: str, max_pixels: int) -> str:
    return f"{name}: {pixels} pixels; at most {max_pixels:,} are read; make the picture smaller first"


# --- to tensors ------------------------------------------------------------------------------------------------------
def to_tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    """RGB pictures, all of one size, as float `[N,3,H,W]` in [0, 1].

    Raises:
        InputError: no picture, or pictures of different sizes.
    """
    if not images:
        raise InputError("images: an empty sequence; give at least one picture")
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        raise InputError(f"images: sizes differ ({', '.join(f'{w} x {h}' for w, h in sorted(sizes))}); give one size")
    return torch.cat([_to_bytes(image) for image in images]).float() / 255


def preprocess(
    images: Sequence[Image.Image] | torch.Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str | None = None,
    resample: Resample = "bicubic",
) -> torch.Tensor:
    """Pictures as an encoder wants them: squashed to `size` x `size`, channels normalised.

    Args:
        images: PIL pictures of any sizes, or a tensor `[N,3,H,W]`: uint8, or float in [0, 1]. The float path is
            differentiable, the others round as Pillow's resize does, bit for bit when shrinking.
        size: side of the result, pixels.
        mean, std: per channel, for pixels in [0, 1].
        device: where the result is; by default the tensor's own, or the CPU for PIL pictures.
        resample: the filter, antialiased as Pillow's.

    Returns:
        float32 `[N,3,size,size]`.
    """
    if not isinstance(images, torch.Tensor):
        if not images:
            raise InputError("images: an empty sequence; give at least one picture")
        # Resized one by one on the CPU as bytes: sizes may differ, and large photos never become floats.
        images = torch.stack([to_square(image, size, resample) for image in images])
    if images.ndim != 4 or images.shape[1] != 3 or not (images.dtype == torch.uint8 or images.is_floating_point()):
        raise InputError(f"images: {images.dtype} tensor of shape {list(images.shape)}; give uint8 or float [N,3,H,W]")
    pixels = _resize(images.to(device), size, resample)
    shift = torch.tensor(mean, device=pixels.device).view(1, 3, 1, 1)
    scale = torch.tensor(std, device=pixels.device).view(1, 3, 1, 1)
    return (pixels - shift) / scale


def check_pixel_range(pixels: torch.Tensor, name: str = "images") -> None:
    """Raise InputError for float pixels outside [0, 1], as pictures in [-1, 1] or 0 … 255 have.

    NaN passes: a picture of NaN gets NaN scores, and does not spoil its neighbours in the batch.
    """
    # Tensors by which memory is estimated have no values.
    if not pixels.is_floating_point() or pixels.is_meta or isinstance(pixels, FakeTensor):
        return
    outside = (pixels < 0) | (pixels > 1)
    if outside.any():
        known = pixels.detach()[~pixels.isnan()]
        raise InputError(
            f"{name}: float pixels from {known.min():g} to {known.max():g}; give floats in [0, 1] "
            "(a pipeline's [-1, 1] is x / 2 + 0.5, clamped)"
        )


def to_square(image: Image.Image, size: int, resample: Resample = "bicubic") -> torch.Tensor:
    """RGB picture -> uint8 `[3,size,size]`, squashed as `preprocess` does; nothing is left for it to resize."""
    return _resize_as_is(_to_bytes(image), size, resample)[0]


def _to_bytes(image: Image.Image) -> torch.Tensor:
    """RGB picture -> uint8 `[1,3,H,W]`."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]


def _resize(pixels: torch.Tensor, size: int, resample: Resample) -> torch.Tensor:
    """uint8 or float `[N,3,H,W]` -> float32 `[N,3,size,size]` in [0, 1]."""
    if pixels.dtype == torch.uint8 and pixels.device.type != "cpu":
        pixels = pixels / 255  # byte interpolation exists on the CPU only
    elif pixels.is_floating_point():
        pixels = pixels.float()
    pixels = _resize_as_is(pixels, size, resample)
    if pixels.dtype == torch.uint8:
        return pixels.float() / 255
    return pixels.clamp(0, 1)  # bicubic overshoots at edges


def _resize_as_is(pixels: torch.Tensor, size: int, resample: Resample) -> torch.Tensor:
    """`[N,3,H,W]` -> `[N,3,size,size]` of the same type, antialiased as Pillow's."""
    if pixels.shape[-2:] == (size, size):
        return pixels
    return torch.nn.functional.interpolate(pixels, size=(size, size), mode=resample, antialias=True)


def save_image(image: Image.Image, path: str | Path) -> None:
    """Write a picture atomically, in the format of the path's suffix (JPEG at quality 95).

    Raises:
        InputError: the suffix is not one of `IMAGE_SUFFIXES`, or of a format that this build of Pillow cannot write.
    """
    path = Path(path)
    formats = _written_formats()
    if path.suffix.lower() not in formats:
        raise InputError(f"{path}: unknown picture suffix {path.suffix!r}; use one of {', '.join(formats)}")
    buffer = BytesIO()
    image.save(buffer, format=formats[path.suffix.lower()], quality=95)
    write_atomically(path, buffer.getvalue())


@cache
def _written_formats() -> dict[str, str]:
    """Pillow's format for each of `IMAGE_SUFFIXES` that it can write here."""
    _readable_formats()  # makes pillow-heif known to Pillow
    known = Image.registered_extensions()
    return {suffix: known[suffix] for suffix in IMAGE_SUFFIXES if known.get(suffix) in Image.SAVE}
