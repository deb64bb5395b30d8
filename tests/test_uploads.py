"""Files that strangers hand over: broken and malicious ones are refused in one sentence, and nothing of them is run."""

import json
import os
import pickle
import struct
import zipfile
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import checkered
from PIL import Image
from safetensors.torch import load_file, save_file

from nearid_personalize.errors import InputError
from nearid_personalize.files import safe_name
from nearid_personalize.images import list_images, load_image
from nearid_personalize.lora.files import check_lora_file, load_lora, read_metadata

TARGET = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
DOWN, UP = f"{TARGET}.lora_A.weight", f"{TARGET}.lora_B.weight"


class Bomb:
    """What a pickle would run on loading: it leaves a file behind."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def one_sentence(error: pytest.ExceptionInfo[InputError], file: Path) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 600 and file.name[:60] in message
    return message


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of the given chunks."""
    parts = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_header(width: int, height: int) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def zipped(name: str, content: bytes) -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


# --- pictures --------------------------------------------------------------------------------------------------------

SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>fetch("http://example.org")</script></svg>'
EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(exploded) (w) file closefile\nshowpage\n%%EOF\n"
)
XBM = b"#define a_width 8\n#define a_height 8\nstatic char a_bits[] = {\n0,0,0,0,0,0,0,0};\n"
FRAMES = [checkered(seed, 24) for seed in range(3)]

BAD_PICTURES = {
    "empty.png": b"",
    "one-byte.jpg": b"\xff",
    "signature-only.png": b"\x89PNG\r\n\x1a\n",
    "random.webp": bytes(np.random.default_rng(0).integers(0, 256, 4096, dtype=np.uint8)),
    "zeros.bmp": bytes(4096),
    "page.png": b"<!doctype html><script>alert(1)</script>",
    "drawing.svg": SVG,
    "drawing-as.png": SVG,
    "pickle.jpg": pickle.dumps(Bomb()),
    "archive.png": zipped("../../exploded.png", encoded(checkered(0), "PNG")),
    "archive.webp": zipped("a.txt", b"a"),
    "postscript.png": EPS,  # Pillow would hand it to Ghostscript
    "postscript.eps": EPS,
    "source.png": XBM,
    "document.jpg": b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\n%%EOF",
    "program.gif": b"\x7fELF" + bytes(200),
    "script.jpg": b"#!/bin/sh\ntouch exploded\n",
    "huge.png": png(png_header(60_000, 60_000), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")),
    "widest.png": png(png_header(2**31 - 1, 2**31 - 1), (b"IDAT", b""), (b"IEND", b"")),
    "no-pixels.png": png(png_header(0, 0), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")),
    "text-bomb.png": png(
        png_header(8, 8), (b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000))), (b"IDAT", b""), (b"IEND", b"")
    ),
    "huge.gif": b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\0;",
    "huge.bmp": b"BM" + struct.pack("<IHHIIiiHH", 54, 0, 0, 54, 40, 50_000, 50_000, 1, 24) + bytes(24),
    "cut.png": encoded(checkered(0), "PNG")[:-60],
    "cut.jpg": encoded(checkered(0), "JPEG")[:300],
    "cut.webp": encoded(checkered(0), "WEBP")[:120],
    "cut-animation.gif": encoded(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:])[:400],
    "swapped.png": encoded(checkered(0), "PNG").replace(b"IDAT", b"IDAX"),
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_a_bad_picture_is_refused_in_one_sentence(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    path.write_bytes(BAD_PICTURES[name])
    with pytest.raises(InputError) as error:
        load_image(path)
    one_sentence(error, path)
    with pytest.raises(InputError):
        load_image(BAD_PICTURES[name])
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "/dev/zero", "a\0b.png", "x" * 5000 + ".png"])
def test_paths_that_are_no_pictures(name):
    with pytest.raises(InputError) as error:
        load_image(name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="pipe"):
        load_image(tmp_path / "pipe.png")


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(format):
    content = encoded(FRAMES[0], format, save_all=True, append_images=FRAMES[1:] * 50)
    assert load_image(content).size == (24, 24)


@pytest.mark.parametrize("format", ["AVIF", "BMP", "GIF", "JPEG", "MPO", "PNG", "TIFF", "WEBP"])
def test_good_pictures_under_wrong_names_are_still_pictures(format, tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(checkered(0), format))
    assert load_image(path).size == (48, 48)


def test_masks_are_not_counted_as_photos(photo_dir):
    before = list_images(photo_dir)
    for name in ("photo-0.mask.png", "photo-1.Mask.PNG"):
        checkered(9).convert("L").save(photo_dir / name)
    checkered(9).save(photo_dir / "unmask.png")
    assert list_images(photo_dir) == [*before, photo_dir / "unmask.png"]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("photo.png", "photo.png"),
        ("../../etc/passwd", "passwd"),
        ("..\\..\\windows\\system.ini", "system.ini"),
        ("/abs/Mein Hund.JPG", "Mein_Hund.JPG"),
        ("..", "file"),
        ("", "file"),
        ("\0\n", "file"),
        (".bashrc", "bashrc"),
        ("a/../b.png", "b.png"),
        ("a..png", "a.png"),
        ("кот & 犬.png", "кот_犬.png"),
        ("／etc／passwd", "passwd"),  # wide slashes, which normalise to plain ones
        ("<img src=x onerror=alert(1)>.png", "img_src_x_onerror_alert_1_.png"),
        ("con.png", "_con.png"),
        ("x" * 300 + ".safetensors", "x" * 88 + ".safetensors"),
    ],
)
def test_safe_name_has_no_folder_and_no_surprise(given, kept, tmp_path):
    name = safe_name(given)
    assert name == kept and len(name) <= 100
    (tmp_path / name).write_text("x")
    assert [path.name for path in tmp_path.iterdir()] == [name]


# --- LoRA files ------------------------------------------------------------------------------------------------------


def good_tensors() -> dict[str, torch.Tensor]:
    return {DOWN: torch.ones(4, 32), UP: torch.ones(32, 4)}


def raw(header: object, data: bytes = b"") -> bytes:
    """A safetensors file written by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def deep(levels: int) -> bytes:
    return b'{"a":' * levels + b"1" + b"}" * levels


def pair(down: list[int], up: list[int], dtype: str = "F32", width: int = 4) -> bytes:
    """A file with one layer's two tensors."""
    middle, end = (width * int(np.prod(shape)) for shape in (down, up))
    return raw({DOWN: entry(down, 0, middle, dtype), UP: entry(up, middle, middle + end, dtype)}, bytes(middle + end))


def named(name: str) -> bytes:
    return raw({name: entry([4, 4], 0, 64)}, bytes(64))


def torch_pickle() -> bytes:
    buffer = BytesIO()
    torch.save({"bomb": Bomb()}, buffer)
    return buffer.getvalue()


BAD_LORAS = {
    "empty": b"",
    "short": b"\1\2\3",
    "zeros": bytes(64),
    "pickle": pickle.dumps({"unet": Bomb()}),
    "torch pickle": torch_pickle(),
    "zip": zipped("../../exploded", b"x"),
    "html": b"<!doctype html><title>404</title>",
    "picture": encoded(checkered(0), "PNG"),
    "huge header": struct.pack("<Q", 2**62) + b"{" + bytes(100),
    "header of 90 MB": struct.pack("<Q", 90_000_000) + b"{" + b" " * 90_000_000,
    "header beyond the end": struct.pack("<Q", 5000) + b'{"a":1}',
    "header no JSON": raw(b"{nonsense}"),
    "header a list": raw(b"[1, 2]"),
    "header nested": raw(deep(100_000)),
    "header not UTF-8": raw(b'{"\xff\xfe": 1}'),
    "no tensors": raw({}),
    "only metadata": raw({"__metadata__": {"a": "b"}}),
    "cut": pair([4, 32], [32, 4])[:-40],
    "bytes after the end": pair([4, 32], [32, 4]) + b"#!/bin/sh",
    "offsets overlap": raw({DOWN: entry([4, 4], 0, 64), UP: entry([4, 4], 0, 64)}, bytes(64)),
    "offsets outside": raw({DOWN: entry([4, 4], 0, 64), UP: entry([4, 4], 64, 2**40)}, bytes(64)),
    "offsets backwards": raw({DOWN: entry([4, 4], 64, 0)}, bytes(64)),
    "offsets not of the shape": raw({DOWN: entry([400, 4], 0, 64)}, bytes(64)),
    "sides overflow": raw({DOWN: entry([2**63, 2**63], 0, 64)}, bytes(64)),
    "negative side": raw({DOWN: entry([-4, -4], 0, 64)}, bytes(64)),
    "empty tensor": raw({DOWN: entry([0, 4], 0, 0), UP: entry([4, 4], 0, 64)}, bytes(64)),
    "unknown type": raw({DOWN: entry([4, 4], 0, 64, "EVIL")}, bytes(64)),
    "integers": pair([4, 32], [32, 4], "I32"),
    "bytes": pair([4, 32], [32, 4], "U8", 1),
    "six dimensions": raw({DOWN: entry([1] * 6, 0, 4)}, bytes(4)),
    "wide": raw({DOWN: entry([1, 2**19], 0, 2**21)}, bytes(2**21)),
    "rank 5000": pair([5000, 32], [32, 5000]),
    "path as name": named("../../unet.to_q.lora_A.weight"),
    "dots as name": named("unet..to_q.lora_A.weight"),
    "markup as name": named("<script>alert(1)</script>.lora_A.weight"),
    "line break in name": named("unet.to_q\n.lora_A.weight"),
    "endless name": named("x" * 100_000 + ".lora_A.weight"),
    "nameless": named(""),
    "whole weights": named("unet.conv_in.weight"),
    "not a LoRA": named("unet.to_q.lora_C.weight"),
    "DoRA that diffusers drops": named("lora_unet_down_blocks_0_to_q.dora_scale"),
    "only alphas": raw({f"{TARGET}.alpha": entry([], 0, 4)}, bytes(4)),
    "alpha of NaN": raw({f"{TARGET}.alpha": entry([], 0, 4)}, struct.pack("<f", float("nan"))),
    "30,000 tensors": raw({f"u{i}.lora_A.weight": entry([1], 4 * i, 4 * i + 4) for i in range(30_000)}, bytes(120_000)),
}


@pytest.mark.parametrize("kind", BAD_LORAS)
def test_a_bad_lora_is_refused_in_one_sentence(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "upload.safetensors"
    path.write_bytes(BAD_LORAS[kind])
    for check in (check_lora_file, read_metadata):
        with pytest.raises(InputError) as error:
            check(path)
        one_sentence(error, path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", ["pickle", "torch pickle"])
def test_a_pickle_is_called_one(kind, tmp_path):
    path = tmp_path / "upload.safetensors"
    path.write_bytes(BAD_LORAS[kind])
    with pytest.raises(InputError, match="pickle"):
        check_lora_file(path)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt", ".safetensors.exe", ""])
def test_only_safetensors_names_are_read(suffix, tmp_path):
    path = tmp_path / f"lora{suffix}"
    save_file(good_tensors(), path)
    with pytest.raises(InputError, match=r"give a \.safetensors file"):
        check_lora_file(path)


def test_size_is_limited_and_missing_files_are_named(tmp_path):
    path = tmp_path / "lora.safetensors"
    with pytest.raises(InputError, match=r"lora\.safetensors: cannot be read"):
        check_lora_file(path)
    save_file(good_tensors(), path)
    size = path.stat().st_size
    assert check_lora_file(path, max_bytes=size).size_bytes == size
    with pytest.raises(InputError, match=f"at most {size - 1:,} are taken"):
        check_lora_file(path, max_bytes=size - 1)


def test_the_header_of_a_good_file_is_told(tmp_path):
    path = tmp_path / "lora.safetensors"
    alpha = {f"{TARGET}.alpha": torch.tensor(4)}
    save_file({**good_tensors(), **alpha}, path, metadata={"nearid_personalize": '{"token": "sks"}'})
    info = check_lora_file(path)
    assert (info.rank, info.num_parameters, info.shapes[DOWN]) == (4, 257, (4, 32))
    assert read_metadata(path) == {"token": "sks"}


@pytest.mark.parametrize("text", ["nonsense", "[1]", "[" * 100_000])
def test_our_own_metadata_is_read_with_care(text, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(good_tensors(), path, metadata={"nearid_personalize": text})
    with pytest.raises(InputError) as error:
        read_metadata(path)
    one_sentence(error, path)


BAD_SETTINGS = [
    {"unet.r": 10**9},
    {"unet.r": 0},
    {"unet.r": True},
    {"unet.lora_alpha": float("nan")},
    {"unet.lora_dropout": 2.0},
    {"unet.rank_pattern": {"to_q": 10**9}},
    {"unet.rank_pattern": {"(a+)+$": 4}},
    {"unet.alpha_pattern": {"to_q": "4"}},
    {"unet.target_modules": "(a|a)*$"},
    {"unet.target_modules": ["(a|a)*$"]},
    {"unet.modules_to_save": ["conv_in"]},
    {"unet.megatron_config": {"a": 1}},
    {"unet.megatron_core": "antigravity"},
    {"unet.init_lora_weights": "pissa"},
    {"unet.auto_mapping": {"parent_library": "os"}},
    {"unet.bias": "all"},
    {"unet.layer_replication": [[0, 1000]]},
    {"unet.what_is_this": 1},
    ["r"],
]


@pytest.mark.parametrize("settings", BAD_SETTINGS, ids=[json.dumps(settings) for settings in BAD_SETTINGS])
def test_settings_that_steer_peft_are_refused(settings, tmp_path):
    path = tmp_path / "lora.safetensors"
    save_file(good_tensors(), path, metadata={"lora_adapter_metadata": json.dumps(settings)})
    with pytest.raises(InputError) as error:
        check_lora_file(path)
    one_sentence(error, path)


@pytest.fixture(scope="module")
def pipe(tiny_pipeline_dir):
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(tiny_pipeline_dir)


def kohya(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as kohya's scripts name them, with an alpha."""
    layer = "lora_unet_" + TARGET.removeprefix("unet.").replace(".", "_")
    return {
        f"{layer}.lora_down.weight": tensors[DOWN],
        f"{layer}.lora_up.weight": tensors[UP],
        f"{layer}.alpha": torch.tensor(2.0),
    }


def old_diffusers(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as diffusers named them before peft."""
    layer = TARGET.replace(".to_q", ".processor.to_q_lora")
    return {f"{layer}.down.weight": tensors[DOWN], f"{layer}.up.weight": tensors[UP]}


def fitting(pipe) -> dict[str, torch.Tensor]:
    layer = pipe.unet.get_submodule(TARGET.removeprefix("unet."))
    return {DOWN: torch.ones(4, layer.in_features), UP: torch.ones(layer.out_features, 4)}


@pytest.mark.parametrize("naming", [dict, kohya, old_diffusers])
def test_namings_that_diffusers_reads_pass_and_load(naming, tiny_pipeline_dir, pipe, tmp_path):
    from diffusers import DiffusionPipeline

    path = tmp_path / "lora.safetensors"
    save_file(naming(fitting(pipe)), path)
    assert check_lora_file(path, pipe).rank == 4
    loaded = DiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    load_lora(loaded, path)
    assert loaded.get_list_adapters() == {"unet": ["subject"]}


@pytest.mark.parametrize("naming", [dict, kohya, old_diffusers])
@pytest.mark.parametrize("change", ["down", "up", "ranks", "layer", "flat"])
def test_what_fits_no_layer_is_refused_before_loading(naming, change, pipe, tmp_path):
    tensors = fitting(pipe)
    if change == "down":
        tensors[DOWN] = torch.ones(4, tensors[DOWN].shape[1] + 1)
    if change == "up":
        tensors[UP] = torch.ones(tensors[UP].shape[0] + 1, 4)
    if change == "ranks":
        tensors[UP] = torch.ones(tensors[UP].shape[0], 5)
    if change == "flat":
        tensors[DOWN] = tensors[DOWN].flatten()
    tensors = naming(tensors)
    if change == "layer":
        tensors = {name.replace("down_blocks", "lost_blocks"): tensor for name, tensor in tensors.items()}
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    for attempt in (check_lora_file(path) and (lambda: check_lora_file(path, pipe)), lambda: load_lora(pipe, path)):
        with pytest.raises(InputError) as error:
            attempt()
        assert "does not fit" in one_sentence(error, path)
    assert not pipe.get_list_adapters()


def test_numbers_that_are_none_are_refused(pipe, tmp_path):
    tensors = fitting(pipe)
    tensors[UP][3, 2] = float("nan")
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    with pytest.raises(InputError, match="NaN or infinity"):
        load_lora(pipe, path)
    assert not pipe.get_list_adapters()


def test_the_quickstarts_own_kind_of_file_passes(tiny_pipeline_dir, photo_dir, pipe, tmp_path):
    from nearid_personalize.training.lora.loop import LoraOptions, train_lora

    options = LoraOptions.of(
        base_model=str(tiny_pipeline_dir), references=photo_dir, output=tmp_path, rank=4, steps=1, resolution=32
    )
    info = check_lora_file(train_lora(options) / "pytorch_lora_weights.safetensors", pipe)
    assert info.shapes == {name: tuple(tensor.shape) for name, tensor in load_file(info.file).items()}
    with pytest.raises(InputError, match="does not fit this StableDiffusionPipeline"):
        path = tmp_path / "transformer.safetensors"
        save_file({f"transformer.blocks.0.to_q.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}, path)
        check_lora_file(path, pipe)
