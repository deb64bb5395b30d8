"""Damaged files, and the readers that they are given to: each must read the file, or refuse it in one line.

python benchmarks/mutations.py --count 2000
"""

import argparse
import json
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from nearid_personalize import IdentityScorer, InputError
from nearid_personalize.encoder.checkpoints import load_encoder
from nearid_personalize.floors.quality import QualityFloor
from nearid_personalize.guard.records import RaceRecords
from nearid_personalize.images import load_image
from nearid_personalize.lora.check import check_lora_file
from nearid_personalize.lora.files import subject_of, told_metadata
from nearid_personalize.lora.trainers import notes_beside
from nearid_personalize.miniworld import example_references, weights_dir
from nearid_personalize.preferences import pairs_of, read_run
from nearid_personalize.scorer.subject import Subject, read_calibration

PICTURES = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
WEIGHTS = ("subject", "calibration", "quality", "lora", "head")
TEXTS = ("report", "plan", "config", "preprocessor", "trainer")
Reader = Callable[[Path], object]


def picture_bytes(kind: str) -> bytes:
    """A small picture of a format, with metadata where the format takes some."""
    buffer = BytesIO()
    picture = Image.linear_gradient("L").resize((40, 30)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    more = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") else {}
    picture.save(buffer, kind, **more)
    return buffer.getvalue()


def lora_bytes() -> bytes:
    """A LoRA with all that its header can carry."""
    tensors = {"unet.a.lora_A.weight": torch.randn(2, 8), "unet.a.lora_B.weight": torch.randn(8, 2)}
    told = {"token": "sks", "prompt": "a photo of sks dog"}
    settings = {"unet.r": 2, "unet.lora_alpha": 2, "unet.target_modules": ["a"]}
    metadata = {
        "nearid_personalize": json.dumps(told),
        "lora_adapter_metadata": json.dumps(settings),
        "ss_dataset_dirs": json.dumps({"10_sks dog": {"n_repeats": 10}}),
        "modelspec.trigger_phrase": "sks dog",
    }
    return save(tensors, metadata)


class Samples:
    """Whole files of each kind, inside folders where their readers expect them. root: an empty folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.scorer = IdentityScorer.from_pretrained("miniworld")
        self.encoder = shutil.copytree(weights_dir("nearid"), root / "nearid")
        self.reward = shutil.copytree(weights_dir("nearid-reward"), root / "reward")
        self.run = root / "run"
        self.run.mkdir()
        for name in ("a.png", "b.png"):
            Image.new("RGB", (8, 8)).save(self.run / name)
        self.readers = self._readers()

    def _readers(self) -> dict[str, tuple[Path, bytes, Reader]]:
        """kind -> the file that is damaged, its whole content, and what reads it."""
        readers: dict[str, tuple[Path, bytes, Reader]] = {}
        for kind in PICTURES:
            readers[kind] = (self.root / f"picture.{kind.lower()}", picture_bytes(kind), load_image)
        subject = self.root / "subject.safetensors"
        self.scorer.enroll(example_references(0)[0]).save(subject)
        readers["subject"] = (subject, subject.read_bytes(), self.read_subject)
        for kind, name, reader in (
            ("calibration", "calibration.safetensors", lambda path: read_calibration(path.parent)),
            ("quality", "quality.safetensors", lambda path: QualityFloor.from_pretrained(path.parent, self.scorer)),
            ("config", "config.json", lambda path: load_encoder(path.parent, torch.float32)),
            ("preprocessor", "preprocessor_config.json", lambda path: load_encoder(path.parent, torch.float32)),
        ):
            path = self.encoder / name
            readers[kind] = (path, path.read_bytes(), reader)
        head = self.reward / "head.safetensors"
        readers["head"] = (head, head.read_bytes(), self.read_head)
        readers["lora"] = (self.root / "lora.safetensors", lora_bytes(), self.read_lora)
        readers["report"] = (self.run / "report.json", report_bytes(), self.read_report)
        plan = weights_dir("pipeline") / "race_plan.json"
        readers["plan"] = (self.root / "plan.json", plan.read_bytes(), RaceRecords.load)
        process = {"trigger_word": "sks", "sample": {"prompts": ["[trigger] in space"]}}
        config = json.dumps({"config": {"process": [process]}}).encode()
        readers["trainer"] = (self.root / "config.yaml", config, lambda path: notes_beside(path, {}))
        return readers

    def read_subject(self, path: Path) -> None:
        """Load it, and use it."""
        subject = Subject.load(path)
        subject.describe()
        self.scorer.score([Image.new("RGB", (8, 8))], subject)
        subject.at(0.05)

    def read_lora(self, path: Path) -> None:
        """All that is read of a LoRA before its tensors are."""
        info = check_lora_file(path)
        told_metadata(info)
        subject_of([info])
        notes_beside(path, info.metadata)

    def read_head(self, path: Path) -> None:
        """A head alone, onto its trunk."""
        load_encoder(path.parent, torch.float32, self.encoder)

    def read_report(self, path: Path) -> None:
        """A run's report, and the pairs of it."""
        pairs_of(read_run(path.parent), 0.05, 0, accepted_only=False)


def report_bytes() -> bytes:
    """What `nearid generate` leaves, shortened."""
    candidates = [
        {"image": "a.png", "score": 0.9, "status": "accepted", "seed": 0},
        {"image": "b.png", "score": 0.2, "status": "rejected", "seed": 1},
        {"image": None, "score": None, "status": "stopped", "seed": 2},
    ]
    return json.dumps({"prompt": "sks dog", "models": {"base": "x"}, "candidates": candidates}).encode()


Damage = tuple[str, int, int]
"""What is done, where, and a number that it is done with."""

DAMAGES = ("flip", "set", "cut", "delete", "repeat", "insert", "nest")


def damaged(content: bytes, damages: list[Damage]) -> bytes:
    """The content after each damage in turn; places are taken modulo its length."""
    for kind, where, number in damages:
        place = where % max(len(content), 1)
        head, tail = content[:place], content[place:]
        if kind == "flip":
            content = head + bytes([tail[0] ^ (1 << number % 8)]) + tail[1:] if tail else head
        elif kind == "set":
            content = head + bytes([number % 256]) + tail[1:]
        elif kind == "cut":
            content = head
        elif kind == "delete":
            content = head + tail[number % 64 :]
        elif kind == "repeat":
            content = head + tail[: number % 64] + tail
        elif kind == "insert":
            content = head + number.to_bytes(8, "little", signed=False) + tail
        else:
            content = head + b"[" * (number % 100_000) + tail
    return content


WRONG = (
    None,
    True,
    -1,
    0,
    10**30,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\0",
    "../..",
    [],
    {},
    [None],
    {"a": []},
    [[1]],
)
"""Values that take the place of another."""


def wrong_value(value: Any, random: np.random.Generator) -> Any:
    """The value with one of its parts, at any depth, of another type, gone, or under another name."""
    if isinstance(value, str):
        try:
            inside = json.loads(value)
        except ValueError:
            inside = None
        if isinstance(inside, dict | list):
            return json.dumps(wrong_value(inside, random))
    if isinstance(value, dict | list) and value and random.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = keys[random.integers(len(keys))]
        chance = random.random()
        if chance < 0.1:
            del value[key]
        elif chance < 0.2 and isinstance(value, dict):
            value["other"] = value.pop(key)
        else:
            value[key] = wrong_value(value[key], random)
        return value
    return WRONG[random.integers(len(WRONG))]


def with_wrong_value(kind: str, content: bytes, random: np.random.Generator) -> bytes:
    """A JSON file, or safetensors with a header, that is whole and says something else."""
    if kind in TEXTS:
        return json.dumps(wrong_value(json.loads(content), random)).encode()
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(wrong_value(json.loads(content[8 : 8 + length]), random)).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def outcome(path: Path, content: bytes, reader: Reader) -> str:
    """ "read" or "refused"; anything else is a fault: an error that is no InputError, or of several lines."""
    path.write_bytes(content)
    try:
        reader(path)
    except InputError as error:
        return "refused" if "\n" not in str(error) else f"several lines: {error}"
    except Exception:  # noqa: BLE001 - that is what is looked for
        return traceback.format_exc()
    return "read"


def random_damages(random: np.random.Generator) -> list[Damage]:
    """One to four; half of them near the start, where headers are."""
    damages = []
    for _ in range(random.integers(1, 5)):
        reach = 200 if random.random() < 0.5 else 2**31
        damages.append((str(random.choice(DAMAGES)), int(random.integers(reach)), int(random.integers(2**31))))
    return damages


def soak(kinds: tuple[str, ...], count: int, seed: int, samples: Samples) -> list[str]:
    """Damage `count` files, the kinds in turn; prints how many were read and refused, and returns the faults."""
    random, faults, seen, started = np.random.default_rng(seed), [], Counter(), time.perf_counter()
    for number in range(count):
        kind = kinds[number % len(kinds)]
        path, content, reader = samples.readers[kind]
        if kind not in PICTURES and random.random() < 0.5:
            changed = with_wrong_value(kind, content, random)
        else:
            changed = damaged(content, random_damages(random))
        found = outcome(path, changed, reader)
        path.write_bytes(content)
        seen["faults" if found not in ("read", "refused") else found] += 1
        if found not in ("read", "refused"):
            faults.append(f"{kind}: {found}")
    print(f"{', '.join(kinds)}: {count} files, {dict(seen)}, {time.perf_counter() - started:.0f} s", flush=True)
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="pictures, and as many of all other files")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        samples = Samples(Path(folder))
        faults = soak(PICTURES, options.count, options.seed, samples)
        faults += soak((*WEIGHTS, *TEXTS), options.count, options.seed, samples)
    for fault, times in Counter(faults).most_common(20):
        print(f"{times} x {fault}")


if __name__ == "__main__":
    main()
