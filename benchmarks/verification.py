"""Counterfeits in the studio where the original was photographed: `python benchmarks/verification.py`.

Mini-world goods (robots and teapots) of the test split, which neither the encoder nor a calibration bank has seen. The
photos, the genuine query and the counterfeit stand in one scene, the studio; the counterfeit has exactly the genuine
query's view, and differs in one to three of eight attributes, so that every pixel outside the two items is equal.

Thresholds come from the packaged bank (other subjects, other scenes, two to four attributes differ), or from a bank of
validation goods in the studio. Measured: the share of counterfeits called the same at each rate asked, of genuine items
called different and unsure, and the equal error rate; beside it the frozen backbone and a perceptual hash. Intervals
are 95 % bootstrap over items.
"""

import io
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image, ImageOps
from scipy.fft import dctn
from torch import Tensor
from tqdm import tqdm

from nearid_personalize.metrics import bootstrap_interval
from nearid_personalize.miniworld import render, sample_pet, sample_view, similar_pet, weights_dir
from nearid_personalize.scorer.calibration import CalibrationBank
from nearid_personalize.scorer.scorer import IdentityScorer
from nearid_personalize.scorer.subject import Subject, identity_scores
from nearid_personalize.verification import error_rates, judge

GOODS = ("robot", "teapot")
STUDIO = "kitchen"
CHANGES = (1, 2, 3)


@dataclass(frozen=True)
class Options:
    """What is measured."""

    num_items: int = 400
    """Test items."""
    num_calibration: int = 1200
    """Validation items of the studio bank; n can state rates of 1 / (n + 1) or more."""
    max_references: int = 8
    """Most photos of an item."""
    rates: tuple[float, ...] = (0.001, 0.01, 0.05)
    """False-accept rates asked for, in (0, 1)."""
    false_reject_rate: float = 0.05
    """False-reject rate asked for, in (0, 1)."""
    first_item: int = 9000
    """Index of the first test item."""


@dataclass(frozen=True)
class Studio:
    """Pictures of one item: photos [R], a genuine query, and counterfeits in its view by the number of changes."""

    photos: list[Image.Image]
    genuine: Image.Image
    counterfeits: dict[int, Image.Image]


def photograph(split: str, index: int, num_photos: int) -> Studio:
    """The photographs of item number `index`."""
    rng = random.Random(f"studio/{split}/{index}")
    pet = sample_pet(split, index, GOODS[index % len(GOODS)], seed="studio")
    views = [sample_view(rng, wide=True) for _ in range(num_photos + 1)]

    def shoot(shown, view):
        return Image.fromarray(render(shown, STUDIO, view).image)

    counterfeits = {}
    for count in CHANGES:
        counterfeits[count] = shoot(counterfeit_of(pet, rng, count), views[-1])
    return Studio(
        photos=[shoot(pet, view) for view in views[:-1]], genuine=shoot(pet, views[-1]), counterfeits=counterfeits
    )


def counterfeit_of(pet, rng: random.Random, count: int):
    """Another subject of the split that differs in `count` attributes, or in two where no other differs in one."""
    try:
        return similar_pet(pet, rng, count)
    except ValueError:
        return similar_pet(pet, rng, count + 1)


# --- what happens to a query between the studio and the check --------------------------------------------------------


def wrong_white_balance(image: Image.Image) -> Image.Image:
    """Red up and blue down by 15 %."""
    gains = np.array([1.15, 1.0, 0.85], np.float32)
    return Image.fromarray((np.asarray(image, np.float32) * gains).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image) -> Image.Image:
    """JPEG of quality 50."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=50)
    return Image.open(buffer).convert("RGB")


def smaller(image: Image.Image) -> Image.Image:
    """Half as wide and high."""
    return ImageOps.scale(image, 0.5, Image.Resampling.BICUBIC)


DAMAGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "as taken": lambda image: image,
    "wrong white balance": wrong_white_balance,
    "JPEG 50": jpeg,
    "half the size": smaller,
}


# --- scoring ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Embedded:
    """Unit embeddings of all items: photos [B,R,D]; genuine and counterfeit queries [B,D] by damage and change."""

    photos: Tensor
    genuine: dict[str, Tensor]
    counterfeits: dict[tuple[str, int], Tensor]


Embed = Callable[[list[Image.Image]], Tensor]


def embed_all(studios: list[Studio], embed: Embed, damages: dict) -> Embedded:
    """Embed every picture of every item."""
    photos = embed([photo for studio in studios for photo in studio.photos])
    genuine, counterfeits = {}, {}
    for damage, apply in damages.items():
        genuine[damage] = embed([apply(studio.genuine) for studio in studios])
        for count in CHANGES:
            counterfeits[damage, count] = embed([apply(studio.counterfeits[count]) for studio in studios])
    return Embedded(photos.unflatten(0, (len(studios), -1)), genuine, counterfeits)


def perceptual_hashes(images: list[Image.Image]) -> Tensor:
    """The 63 lowest DCT coefficients of a 32 x 32 grey picture against their median: unit rows of signs [N,63]."""
    rows = []
    for image in images:
        grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX), np.float64)
        low = dctn(grey)[:8, :8].flatten()[1:]
        rows.append(np.where(low > np.median(low), 1.0, -1.0))
    return torch.nn.functional.normalize(torch.from_numpy(np.stack(rows)).float(), dim=-1)


def scores_of(queries: Tensor, photos: Tensor, aggregation: str) -> Tensor:
    """Queries [B,D], each against its own item's photos [B,R,D] -> [B]."""
    rows = [identity_scores(query[None], own, aggregation) for query, own in zip(queries, photos)]
    return torch.cat(rows)


def equal_error_rate(genuine: np.ndarray, impostor: np.ndarray) -> float:
    """The error where as many genuine items score below a threshold as counterfeits above it."""
    thresholds = np.unique(np.concatenate([genuine, impostor]))
    rejects = np.searchsorted(np.sort(genuine), thresholds, side="left") / len(genuine)
    accepts = 1 - np.searchsorted(np.sort(impostor), thresholds, side="left") / len(impostor)
    best = np.abs(rejects - accepts).argmin()
    return float((rejects[best] + accepts[best]) / 2)


def with_interval(values: list[float] | np.ndarray) -> str:
    """A mean over items and its interval."""
    values = np.asarray(values, np.float64)
    low, high = bootstrap_interval(torch.from_numpy(values))
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def eer_with_interval(genuine: np.ndarray, impostor: np.ndarray, rounds: int = 300) -> str:
    """The equal error rate of [B] genuine and [B,K] counterfeit scores, items resampled."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(rounds):
        chosen = rng.integers(0, len(genuine), len(genuine))
        found.append(equal_error_rate(genuine[chosen], impostor[chosen].flatten()))
    low, high = np.quantile(found, [0.025, 0.975])
    return f"{equal_error_rate(genuine, impostor.flatten()):.3f} [{low:.3f}, {high:.3f}]"


def subject_of(photos: Tensor, bank: CalibrationBank) -> Subject:
    """What `enroll` makes of photos [R,D] with this bank."""
    known = bank.known_scores(len(photos), bank.aggregation)
    threshold, origin = known.threshold_near(0.01)
    return Subject(photos, threshold, bank.aggregation, origin, (known,))


def verdicts(queries: Tensor, photos: Tensor, bank: CalibrationBank, accept: float, reject: float) -> list[str]:
    """The verdict on each query [B,D] against its item's photos [B,R,D], as `verify` gives it."""
    subjects = [subject_of(own, bank) for own in photos]
    found = []
    for query, subject in zip(queries, subjects):
        rates = error_rates(identity_scores(query[None], subject.embeddings, subject.aggregation), subject)
        found.append(judge(*rates, accept, reject))
    return found


def shares(found: list[str], verdict: str) -> list[float]:
    """1 where the verdict is this one, else 0."""
    return [float(one == verdict) for one in found]


# --- the tables ------------------------------------------------------------------------------------------------------


def studio_bank(studios: list[Studio], embed: Embed, aggregation: str) -> CalibrationBank:
    """A bank of validation items in the studio: one counterfeit of each number of changes."""
    embedded = embed_all(studios, embed, {"as taken": DAMAGES["as taken"]})
    impostor = torch.stack([embedded.counterfeits["as taken", count] for count in CHANGES], dim=1)
    bank = CalibrationBank.from_embeddings(embedded.photos, embedded.genuine["as taken"][:, None], impostor)
    return replace(bank, aggregation=aggregation)


def print_rates(name: str, embedded: Embedded, bank: CalibrationBank, options: Options, num_photos: int = 4) -> None:
    """Asked against measured, with `num_photos` photos."""
    photos = embedded.photos[:, :num_photos]
    for rate in options.rates:
        if rate < 1 / (len(bank.likeness) + 1):
            print(f"{name:16} asked {rate:.3f}: cannot be stated by {len(bank.likeness)} subjects")
            continue
        accepted, by_count = [], []
        for count in CHANGES:
            found = verdicts(embedded.counterfeits["as taken", count], photos, bank, rate, options.false_reject_rate)
            accepted.append(shares(found, "same"))
            by_count.append(f"{count}: {np.mean(accepted[-1]):.3f}")
        genuine = verdicts(embedded.genuine["as taken"], photos, bank, rate, options.false_reject_rate)
        print(
            f"{name:16} asked {rate:.3f}  false accepts {with_interval(np.mean(accepted, axis=0))} "
            f"(by attributes changed {', '.join(by_count)})  genuine: same {with_interval(shares(genuine, 'same'))}, "
            f"different {with_interval(shares(genuine, 'different'))}, unsure {np.mean(shares(genuine, 'unsure')):.3f}"
        )


def print_errors(name: str, embedded: Embedded, aggregation: str, counts: tuple[int, ...]) -> None:
    """Equal error rates by number of photos, and by damage with four."""
    for count in counts:
        photos = embedded.photos[:, :count]
        print(f"{name:16} {count} photos  EER {eer(embedded, 'as taken', photos, aggregation)}")
    for damage in embedded.genuine:
        print(f"{name:16} {damage}: EER {eer(embedded, damage, embedded.photos[:, :4], aggregation)}")


def eer(embedded: Embedded, damage: str, photos: Tensor, aggregation: str) -> str:
    """The equal error rate of one damage over all counterfeits."""
    genuine = scores_of(embedded.genuine[damage], photos, aggregation).numpy()
    impostor = [scores_of(embedded.counterfeits[damage, count], photos, aggregation).numpy() for count in CHANGES]
    return eer_with_interval(genuine, np.stack(impostor, axis=1))


def print_damage(embedded: Embedded, bank: CalibrationBank, options: Options) -> None:
    """What damage to the query costs at 1 % and four photos."""
    photos = embedded.photos[:, :4]
    for damage in DAMAGES:
        genuine = verdicts(embedded.genuine[damage], photos, bank, 0.01, options.false_reject_rate)
        accepted = []
        for count in CHANGES:
            found = verdicts(embedded.counterfeits[damage, count], photos, bank, 0.01, options.false_reject_rate)
            accepted.append(shares(found, "same"))
        print(
            f"{damage:20} genuine: same {with_interval(shares(genuine, 'same'))}, "
            f"different {with_interval(shares(genuine, 'different'))}; "
            f"counterfeits called the same {with_interval(np.mean(accepted, axis=0))}"
        )


def main(options: Options) -> None:
    """Photograph, embed and print."""
    scorer = IdentityScorer.from_pretrained("miniworld")
    frozen = IdentityScorer.from_pretrained(weights_dir("siglip"))
    first, count = options.first_item, options.num_items
    items = [
        photograph("test", i, options.max_references) for i in tqdm(range(first, first + count), desc="test items")
    ]
    known = [photograph("val", i, options.max_references) for i in tqdm(range(options.num_calibration), desc="bank")]
    packaged = scorer.calibration
    assert isinstance(packaged, CalibrationBank)
    embedded = embed_all(items, scorer.embed, DAMAGES)
    studio = studio_bank(known, scorer.embed, packaged.aggregation)
    counts = tuple(n for n in (1, 2, 4, 8) if n <= options.max_references)
    print(f"{count} test items, {len(known)} validation items in the studio bank, four photos unless said otherwise")
    print_rates("packaged bank", embedded, packaged, options)
    print_rates("studio bank", embedded, studio, options)
    for number in counts:
        print_rates(f"studio, {number} photos", embedded, studio, replace(options, rates=(0.01,)), number)
    print_damage(embedded, studio, options)
    print_errors("NearID", embedded, packaged.aggregation, counts)
    print_errors("frozen backbone", embed_all(items, frozen.embed, DAMAGES), "mean", counts)
    print_errors("perceptual hash", embed_all(items, perceptual_hashes, DAMAGES), "max", counts)


if __name__ == "__main__":
    main(tyro.cli(Options, description=f"{Path(__file__).name}: see its docstring"))
