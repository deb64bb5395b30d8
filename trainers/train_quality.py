"""Train the quality floor of a NearID checkpoint: `python trainers/train_quality.py --model FOLDER --pipeline BASE`.

Writes `quality.safetensors` beside the checkpoint's weights. The probe stands on the trunk alone: a new head needs no
new probe, a new trunk does. For other data than the toy world, give the folder or Hub id of identities that
`train_head.py` takes, and a file of prompts, one a line; a tenth of the prompts, at least eight, is held out.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from PIL import Image

from nearid_personalize.commands.flags import parse_flags, quieten_libraries, run_program
from nearid_personalize.data import load_rows
from nearid_personalize.encoder.checkpoints import load_encoder
from nearid_personalize.encoder.model import NearIDModel
from nearid_personalize.encoder.preprocessing import Preprocessing
from nearid_personalize.errors import InputError
from nearid_personalize.floors.quality import QualityRates, picture_tokens, save_quality
from nearid_personalize.loading import choose_device, choose_dtype, load_pipeline
from nearid_personalize.miniworld import Split
from nearid_personalize.names import packaged
from nearid_personalize.training.quality import (
    Pictures,
    QualityOptions,
    centre_at_half,
    fit_probe,
    for_validation,
    make_pictures,
    measure,
    miniworld_photos,
    miniworld_prompts,
)


@dataclass(frozen=True)
class Arguments:
    """Which trunk, and where the pictures come from."""

    options: Annotated[QualityOptions, tyro.conf.arg(name="")]
    model: str = "miniworld"
    """Folder of a NearID checkpoint, of a head saved alone, or of a bare trunk; receives quality.safetensors."""
    pipeline: str = "miniworld"
    """Folder or Hub id of the text-to-image pipeline that draws."""
    data: str = "miniworld"
    """Photos: a Hub id, parquet, a folder of subjects' folders, or the toy world."""
    prompts: Path | None = None
    """Prompts to draw, one a line; the toy world has its own."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where pipeline and trunk run."""


def photos_of(arguments: Arguments, split: Split, count: int) -> Iterator[Image.Image]:
    """At most `count` photos of a split."""
    if arguments.data == "miniworld":
        yield from miniworld_photos(split, count)
        return
    rows = load_rows(arguments.data, hash_splits=True).split(split)
    views = (row.view(slot) for row in rows for slot in range(len(row.views)))
    yield from islice((view for view in views if view is not None), count)


def prompts_of(arguments: Arguments, split: Split, count: int) -> Sequence[str]:
    """`count` prompts of a split, repeated where there are fewer."""
    if arguments.data == "miniworld" and arguments.prompts is None:
        return miniworld_prompts(split, count)
    if arguments.prompts is None:
        raise InputError("--prompts: needed for other data than the toy world; give a file, one prompt a line")
    lines = [line for line in arguments.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    held_out = max(8, len(lines) // 10)
    if len(lines) <= held_out:
        raise InputError(f"--prompts {arguments.prompts}: {len(lines)} prompts; more than {held_out} are needed")
    part = lines[:-held_out] if split == "train" else lines[-held_out:]
    return [part[index % len(part)] for index in range(count)]


def tokens_of(pictures: Pictures, model: NearIDModel, preprocessing: Preprocessing) -> dict[str, torch.Tensor]:
    """Kind -> tokens [N,T,D] in half precision: only the probe reads them."""
    return {kind: picture_tokens(model, preprocessing, images).half() for kind, images in pictures.items()}


def print_rates(rates: QualityRates) -> None:
    """A table of false alarms and misses."""
    for title, shares, counts in (
        ("good, refused", rates.false_alarm, rates.num_good),
        ("bad, passed", rates.miss, rates.num_bad),
    ):
        print(f"{title} (mean {np.mean(list(shares.values())):.3f})")
        for kind, share in shares.items():
            print(f"  {kind:16} {share:.3f}  n {counts[kind]}")


def run(arguments: Arguments) -> Path:
    """Draw, fit, measure on validation pictures, save."""
    started = time.perf_counter()
    device = choose_device(arguments.device)
    name = packaged(arguments.model, "nearid")
    model, preprocessing, folder = load_encoder(name)
    model = model.to(device)
    pipe = load_pipeline(arguments.pipeline, device, choose_dtype("auto", device))
    pipe.set_progress_bar_config(disable=True)

    def sides(split: Split, options: QualityOptions) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        photos = photos_of(arguments, split, options.num_photos)
        prompts = prompts_of(arguments, split, options.num_drawn)
        made = make_pictures(pipe, photos, prompts, preprocessing.size, options)
        good, bad = (tokens_of(pictures, model, preprocessing) for pictures in made)
        print(f"{split}: {time.perf_counter() - started:.0f} s", flush=True)
        return good, bad

    train = sides("train", arguments.options)
    probe = fit_probe(*train, arguments.options)
    good, bad = sides("val", for_validation(arguments.options))
    centre_at_half(probe, good, arguments.options)
    measured_on = f"validation pictures of {arguments.data}, threshold set on them, drawn by {arguments.pipeline}"
    rates = measure(probe, good, bad, 0.5, measured_on)
    print_rates(rates)
    return save_quality(folder, model, preprocessing, probe, rates)


def main() -> None:
    """Parse, show the plan, train."""
    quieten_libraries()
    arguments = parse_flags(Arguments, None, "train_quality.py", __doc__)
    for name, value in asdict(arguments).items():
        print(f"{name:>12}  {value}")
    print(f"wrote {run(arguments)}")


if __name__ == "__main__":
    sys.exit(run_program(main))
