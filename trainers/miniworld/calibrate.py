"""Measure the shipped scorer on validation subjects and set its accept threshold.

`python trainers/miniworld/calibrate.py --scorer FOLDER --pipeline FOLDER` compares the three ways to aggregate over
references and writes `calibration.json` for the best. Pictures to be scored pass through the text-to-image model's
autoencoder first, because that is how generated pictures look; references do not.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from diffusers import AutoencoderTiny
from tqdm import tqdm

from nearid_personalize.calibration import calibrate
from nearid_personalize.images import write_atomically
from nearid_personalize.miniworld import MiniWorldDataset
from nearid_personalize.miniworld.dataset import IdentityRow
from nearid_personalize.scorer import Aggregation, IdentityScorer, identity_scores


@dataclass(frozen=True)
class CalibrateOptions:
    """What is measured, and on what."""

    scorer: Path
    """Folder of the NearID model; receives calibration.json."""
    pipeline: Path
    """Folder of the text-to-image model, for its autoencoder."""
    num_subjects: int = 400
    """Validation subjects."""
    num_references: int = 4
    false_accept_rate: float = 0.01
    """Share of near-identity distractors (2 to 4 attributes differ) that may be accepted."""


def pair_scores(
    scorer: IdentityScorer, vae: AutoencoderTiny, row: IdentityRow, num_references: int
) -> dict[Aggregation, tuple[torch.Tensor, torch.Tensor]]:
    """Scores of the row's further views and of their distractors against its first views, per aggregation."""
    pixels = torch.from_numpy(np.stack([r.image for r in (*row.views, *row.distractors)]))
    pixels = pixels.permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        drawn = vae.decode(vae.encode(pixels * 2 - 1).latents).sample.clamp(-1, 1) / 2 + 0.5
    references = scorer.embed(pixels[:num_references])
    count = len(row.views)
    views, distractors = scorer.embed(drawn).split(count)
    return {
        how: (
            identity_scores(views[num_references:], references, how),
            identity_scores(distractors[num_references:], references, how),
        )
        for how in ("mean", "max", "centroid")
    }


def win_rate(genuine: torch.Tensor, impostor: torch.Tensor) -> float:
    """Share of (genuine, impostor) pairs in the right order: the area under the ROC curve."""
    return float((genuine[:, None] > impostor[None]).float().mean())


def main(options: CalibrateOptions) -> None:
    """Print the comparison and write the calibration of the best aggregation."""
    scorer = IdentityScorer.from_pretrained(options.scorer)
    vae = AutoencoderTiny.from_pretrained(options.pipeline / "vae", use_safetensors=True).eval()
    dataset = MiniWorldDataset("val", options.num_subjects, num_views=options.num_references + 2, wide=False)
    scores = [
        pair_scores(scorer, vae, dataset.row(i), options.num_references) for i in tqdm(range(options.num_subjects))
    ]
    areas: dict[Aggregation, float] = {}
    for how in scores[0]:
        genuine, impostor = (torch.cat([s[how][kind] for s in scores]) for kind in (0, 1))
        areas[how] = win_rate(genuine, impostor)
        print(f"{how:9} AUC {areas[how]:.4f}  genuine {genuine.mean():.3f}  impostor {impostor.mean():.3f}")
    best = max(areas, key=lambda how: areas[how])
    genuine, impostor = (torch.cat([s[best][kind] for s in scores]) for kind in (0, 1))
    calibration = calibrate(genuine, impostor, options.false_accept_rate, best)
    print(calibration)
    write_atomically(options.scorer / "calibration.json", json.dumps(calibration.to_dict(), indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(CalibrateOptions))
