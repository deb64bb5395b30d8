"""Do accept thresholds keep the rates they state? `python benchmarks/threshold_rates.py`.

On mini-world test subjects, which neither the encoder nor the calibration bank has seen: for each false-accept rate
asked, the measured share of near-identities (two to four of eight attributes differ) that is accepted, and of genuine
pictures that is rejected, all seen through the pipeline's autoencoder. Thresholds are set on the bank; on as few
near-identities of the subject itself as can state the rate; and on as many pictures of its class, which promise the
rate for pictures of the class and not for near-identities; on either with and without the bank. Means and 95 %
bootstrap intervals over subjects.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from diffusers import AutoencoderTiny
from torch import Tensor
from tqdm import tqdm

from nearid_personalize import InputError
from nearid_personalize.evaluation import with_interval
from nearid_personalize.metrics import bootstrap_interval
from nearid_personalize.miniworld import CATEGORIES, CONTEXTS, render, sample_pet, sample_view, weights_dir
from nearid_personalize.miniworld.pairs import as_drawn, embed_pairs, known_pairs
from nearid_personalize.miniworld.subjects import pick
from nearid_personalize.scorer.calibration import CalibrationBank, KnownScores
from nearid_personalize.scorer.scorer import IdentityScorer
from nearid_personalize.scorer.subject import BANK_FILE, Subject, identity_scores

PHOTOS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Options:
    """What is measured."""

    num_subjects: int = 200
    first_subject: int = 3000
    """Index of the first test subject."""
    num_pictures: int = 10
    """Genuine pictures of each subject, and near-identities that its thresholds are tested on."""
    rates: tuple[float, ...] = (0.01, 0.05)
    """False-accept rates asked for, in (0, 1)."""
    num_negatives: int = 99
    """Near-identities given of each subject; a rate that takes more is measured on the bank alone."""
    model: str = ""
    """Folder of a NearID model with a calibration bank. Default: the packaged one."""


@dataclass(frozen=True)
class Person:
    """What is known of one test subject: unit embeddings of photos [8,D], of genuine pictures [G,D] and near-identities
    [K,D] to test on, and of those to set a threshold on: near-identities [n,D] and pictures of the class [n,D]."""

    photos: Tensor
    genuine: Tensor
    impostor: Tensor
    negatives: Tensor
    class_pictures: Tensor


def needed(rate: float) -> int:
    """How many negatives can state a false-accept rate."""
    return math.ceil(1 / rate - 1 - 1e-9)


def embed_class(scorer: IdentityScorer, vae: AutoencoderTiny, category: str, number: int) -> Tensor:
    """Embeddings [number,D] of different subjects of a category, as made for prior preservation."""
    pictures = []
    for i in range(number):
        rng = random.Random(f"class/{category}/{i}")
        pet = sample_pet("test", i, category, seed="class")
        pictures.append(render(pet, pick(rng, CONTEXTS), sample_view(rng)).image)
    return scorer.embed(as_drawn(vae, np.stack(pictures)))


def embed_people(scorer: IdentityScorer, vae: AutoencoderTiny, options: Options) -> list[Person]:
    """Everything the thresholds are set and tested on."""
    test = options.num_pictures
    classes = {category: embed_class(scorer, vae, category, options.num_negatives) for category in CATEGORIES}
    people = []
    for index in tqdm(range(options.first_subject, options.first_subject + options.num_subjects), leave=False):
        pairs = known_pairs("test", index, max(PHOTOS), test, test + options.num_negatives)
        photos, genuine, impostor = embed_pairs(scorer, vae, pairs)
        category = sample_pet("test", index).category
        people.append(Person(photos, genuine, impostor[:test], impostor[test:], classes[category]))
    return people


SOURCES = ("bank", "near-identities", "near-identities + bank", "class pictures", "class pictures + bank")


def enrolled(person: Person, source: str, bank: CalibrationBank, num_photos: int, number: int) -> Subject:
    """What `IdentityScorer.enroll` makes of the photos and of `number` negatives."""
    photos, known = person.photos[:num_photos], []
    if not source.startswith("bank"):
        negatives = person.negatives if source.startswith("near") else person.class_pictures
        impostor = identity_scores(negatives[:number], photos, bank.aggregation)
        known.append(KnownScores("negatives", impostor[:, None], bank.scores(num_photos, bank.aggregation)[0]))
    if source.endswith("bank"):
        known.append(bank.known_scores(num_photos, bank.aggregation))
    return Subject(photos, math.nan, bank.aggregation, known=tuple(known))


def measure(person: Person, subject: Subject) -> list[float]:
    """Share of near-identities accepted and of genuine pictures rejected; rejections expected; the threshold."""
    impostor, genuine = (
        identity_scores(pictures, subject.embeddings, subject.aggregation)
        for pictures in (person.impostor, person.genuine)
    )
    accepted, rejected = (impostor >= subject.threshold).double(), (genuine < subject.threshold).double()
    return [float(accepted.mean()), float(rejected.mean()), subject.origin.false_reject_rate or 0.0, subject.threshold]


def main(options: Options) -> None:
    """Print one line per rate, source of the threshold and number of photos."""
    folder = options.model or weights_dir("nearid")
    scorer = IdentityScorer.from_pretrained(folder)
    bank = scorer.calibration
    if not isinstance(bank, CalibrationBank):
        raise InputError(f"{folder}: no {BANK_FILE}; make it with trainers/miniworld/calibrate.py --scorer {folder}")
    vae = AutoencoderTiny.from_pretrained(weights_dir("pipeline") / "vae", use_safetensors=True).eval()
    people = embed_people(scorer, vae, options)
    pictures = options.num_pictures
    print(
        f"{len(people)} subjects, {pictures} genuine pictures and {pictures} near-identities each; "
        f"bank of {len(bank.impostor)} subjects; {bank.aggregation}"
    )
    print("asked  set on                      photos  false accepts         false rejects         expected  threshold")
    for rate in options.rates:
        for source in SOURCES:
            number = len(bank.impostor) if source == "bank" else needed(rate)
            if source != "bank" and number > options.num_negatives:
                continue
            for photos in PHOTOS:
                rows = [measure(p, enrolled(p, source, bank, photos, number).at(rate)) for p in people]
                table = torch.tensor(rows, dtype=torch.float64)  # [subjects, 4]
                measured = (with_interval(float(column.mean()), bootstrap_interval(column)) for column in table.T[:2])
                expected, threshold = table.mean(dim=0)[2:].tolist()
                print(
                    f"{rate:<5.3g}  {number:>3} {source:22}  {photos:>6}  {'  '.join(measured)}  "
                    f"{expected:8.3f}  {threshold:9.4f}",
                    flush=True,
                )


if __name__ == "__main__":
    main(tyro.cli(Options))
