"""Make the calibration bank of the shipped scorer, from validation subjects.

`python trainers/miniworld/calibrate.py --scorer FOLDER --pipeline FOLDER` compares the three ways to aggregate over
references, by number of references, and writes `calibration.safetensors` beside the scorer's weights, with the best as
its default. Pictures to be scored pass through the text-to-image model's autoencoder first, because that is how
generated pictures look; references do not.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch
import tyro
from diffusers import AutoencoderTiny
from tqdm import tqdm

from nearid_personalize.miniworld.pairs import embed_pairs, known_pairs
from nearid_personalize.scorer.calibration import Aggregation, CalibrationBank
from nearid_personalize.scorer.scorer import IdentityScorer
from nearid_personalize.scorer.subject import save_calibration


@dataclass(frozen=True)
class CalibrateOptions:
    """What is measured, and on what."""

    scorer: Path
    """Folder of the NearID model; receives calibration.safetensors."""
    pipeline: Path
    """Folder of the text-to-image model, for its autoencoder."""
    num_subjects: int = 400
    """Validation subjects: n can state false-accept rates of 1 / (n + 1) or more."""
    num_references: int = 8
    """References of each: the bank serves this number and every smaller one."""
    num_pictures: int = 2
    """Genuine pictures of each subject, and near-identities (2 to 4 attributes differ)."""
    false_accept_rate: float = 0.01
    """Share of near-identities that may be accepted when a user names none."""


def win_rate(genuine: torch.Tensor, impostor: torch.Tensor) -> float:
    """Share of (genuine, impostor) pairs in the right order: the area under the ROC curve."""
    return float((genuine.flatten()[:, None] > impostor.flatten()).double().mean())


def compare(bank: CalibrationBank) -> Aggregation:
    """Print the aggregations by number of references; return the one with the largest mean area."""
    counts = [2**i for i in range(bank.num_references.bit_length())]
    areas: dict[Aggregation, float] = {}
    for how in get_args(Aggregation):
        found = []
        for count in counts:
            genuine, impostor = bank.scores(count, how)
            found.append(win_rate(genuine, impostor))
            threshold, origin = bank.known_scores(count, how).threshold_at(bank.false_accept_rate)
            print(
                f"{how:9} {count:2} references  AUC {found[-1]:.5f}  genuine {genuine.mean():.3f}  "
                f"impostor {impostor.mean():.3f}  threshold {threshold:.4f} {origin}"
            )
        areas[how] = sum(found) / len(found)
    return max(areas, key=lambda how: areas[how])


def main(options: CalibrateOptions) -> None:
    """Print the comparison and write the bank."""
    scorer = IdentityScorer.from_pretrained(options.scorer)
    vae = AutoencoderTiny.from_pretrained(options.pipeline / "vae", use_safetensors=True).eval()
    counts = (options.num_references, options.num_pictures, options.num_pictures)
    embedded = [
        embed_pairs(scorer, vae, known_pairs("val", i, *counts)) for i in tqdm(range(options.num_subjects), leave=False)
    ]
    references, genuine, impostor = (torch.stack(parts) for parts in zip(*embedded, strict=True))
    bank = CalibrationBank.from_embeddings(references, genuine, impostor, options.false_accept_rate)
    bank = replace(bank, aggregation=compare(bank))
    save_calibration(bank, options.scorer)
    print(f"{options.num_subjects} subjects, default aggregation {bank.aggregation}")


if __name__ == "__main__":
    main(tyro.cli(CalibrateOptions))
