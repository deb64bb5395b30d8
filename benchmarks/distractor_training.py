"""Is a head trained on built distractors better? `python benchmarks/distractor_training.py --out runs/distractors`.

Heads of equal budget on the packaged frozen trunk, each from random weights, on the mini-world:

    none       plain InfoNCE, no distractors
    jitter     plain InfoNCE on views that are cropped, moved and changed in colour: the older remedy
    pasted     distractors are another subject's cut-out pasted on the view
    built      distractors drawn by the packaged text-to-image model inside the subject's mask, every first try
    filtered   those that pass the nearness filter, refused ones tried again
    true       the renderer's own near-identities: the ceiling

All are measured on the renderer's rows of held-out subjects: SSR and PA, and on part edits M-O. The filter uses the
frozen trunk, the text-image model and the quality floor, and no identity head: the packaged head has learnt from the
renderer's distractors. Finished pictures and heads are not made again.
"""

import copy
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor

from nearid_personalize import metrics
from nearid_personalize.data import Augmentation, IdentityDataset, Row, Rows
from nearid_personalize.data.cache import CacheKey, CachePart, TokenCache, Trunk, cache_on_disk, plan_cache
from nearid_personalize.distractors.build import build_distractors
from nearid_personalize.distractors.inpaint import inpainter_for
from nearid_personalize.distractors.nearness import Measuring
from nearid_personalize.distractors.options import BuildOptions
from nearid_personalize.distractors.places import Place, list_places
from nearid_personalize.distractors.prompts import Kind, Prompts, Vocabulary
from nearid_personalize.distractors.records import Records
from nearid_personalize.distractors.regions import bounding_box
from nearid_personalize.encoder.checkpoints import load_encoder, trunk_fingerprint
from nearid_personalize.encoder.model import NearIDModel
from nearid_personalize.encoder.preprocessing import Preprocessing
from nearid_personalize.evaluation import evaluate_tokens, identity_similarities
from nearid_personalize.files import write_atomically
from nearid_personalize.floors.adherence import TextImageEncoder
from nearid_personalize.floors.quality import QualityFloor
from nearid_personalize.images import load_image
from nearid_personalize.loading import load_pipeline
from nearid_personalize.miniworld import CATEGORIES, caption, identity_row, part_edits, rows, weights_dir
from nearid_personalize.miniworld.judge import judge
from nearid_personalize.miniworld.subjects import ACCESSORIES, COLORS, EARS, PATTERNS, TAILS
from nearid_personalize.scorer.scorer import IdentityScorer
from nearid_personalize.training.head import HeadOptions, train_head

ARMS = ("none", "jitter", "pasted", "built", "filtered", "true")
PET = Kind(
    template="a photo of a {colour} {category}",
    groups={"colour": COLORS, "pattern": PATTERNS[1:], "ears": EARS, "tail": TAILS, "accessory": ACCESSORIES},
)
JITTER = Augmentation(anchor_blackout=0, positive_blackout=0, distractor_blackout=0, jitter=0.4, shift=0.2, scale=0.3)
JITTER_VARIANTS = 4


@dataclass(frozen=True)
class Options:
    """What is built, trained and measured."""

    out: Path = Path("runs/distractors")
    num_identities: int = 600
    """Training identities, each with `num_views` views and as many distractors."""
    num_views: int = 2
    num_test: int = 500
    draw_steps: int = 10
    """Denoising steps of a distractor."""
    tries: int = 2
    steps: int = 300
    """Of each head."""
    batch_size: int = 64
    learning_rate: float = 3e-3
    seeds: tuple[int, ...] = (0, 1, 2)
    num_judged: int = 200
    """Kept distractors that the judge looks at."""
    build_only: bool = False


def build(options: Options, data: Rows) -> dict:
    """Draw what is missing of the built set; returns its report."""
    pipe = load_pipeline("miniworld", "cpu", torch.float32)
    pipe.set_progress_bar_config(disable=True)
    captions = {}
    for number in range(options.num_identities):
        row = identity_row("train", number, options.num_views)
        captions |= {(number, slot): caption(row.pet, context) for slot, context in enumerate(row.contexts)}
    scorer = IdentityScorer.from_pretrained(weights_dir("siglip"))
    return build_distractors(
        data,
        options.out / "built",
        inpainter_for(pipe, steps=options.draw_steps, guidance_scale=3.0),
        options=BuildOptions(tries=options.tries, batch_size=16),
        prompts=Prompts(vocabulary=Vocabulary(kinds={}, default=PET)),
        measure=Measuring(
            scorer=scorer,
            has_identity=False,
            text_image=TextImageEncoder.from_pretrained("miniworld"),
            categories=CATEGORIES,
            quality=QualityFloor.from_pretrained("miniworld"),
        ),
        captions=captions,
        show=True,
    )


# --- training sets ---------------------------------------------------------------------------------------------------
def training_rows(options: Options, arm: str, data: Rows) -> Rows:
    """The rows of one arm: the same views in all of them."""
    if arm in ("none", "jitter", "true"):
        return data
    if arm == "pasted":
        same = _same_category(data)
        return replace(
            data, read=partial(_with_pasted, data, same), version=f"{data.version} pasted", sources=("pasted",)
        )
    places, records = list_places(data, options.out / "built"), Records(options.out / "built")
    files = _distractor_files(places, records, first_tries=arm == "built")
    return replace(
        data, read=partial(_with_files, data, files, arm), version=f"{data.version} {arm} {files}", sources=(arm,)
    )


def _distractor_files(places: Sequence[Place], records: Records, first_tries: bool) -> dict[tuple[int, int], Path]:
    """(Row, slot) -> the distractor: the one that is kept, or the first try whatever became of it."""
    files = {}
    for place in places:
        outcome = records.outcome(place)
        if outcome is None:
            continue
        if outcome.kept is not None and (outcome.kept == 0 or not first_tries):
            files[place.row, place.slot] = place.distractor_file
        elif first_tries:
            # Pictures of 64 pixels are smaller than the small copies that are kept of refused ones
            files[place.row, place.slot] = records.picture_file(place, 0)
    return files


def _with_files(data: Rows, files: dict[tuple[int, int], Path], name: str, index: int) -> Row:
    row = data[index]
    slots = tuple(files.get((index, slot)) for slot in range(len(row.views)))
    return replace(row, distractors={name: slots}, distractor_masks={})


def _same_category(data: Rows) -> dict[int, int]:
    """Each row -> the next row of its category."""
    by_category: dict[str | None, list[int]] = {}
    for number, row in enumerate(data):
        by_category.setdefault(row.category, []).append(number)
    return {own: found[(place + 1) % len(found)] for found in by_category.values() for place, own in enumerate(found)}


def _with_pasted(data: Rows, other_of: dict[int, int], index: int) -> Row:
    row, other = data[index], data[other_of[index]]
    slots = tuple(partial(_pasted, row, other, slot) for slot in range(len(row.views)))
    return replace(row, distractors={"pasted": slots}, distractor_masks={})


def _pasted(row: Row, other: Row, slot: int) -> Image.Image:
    """The other subject's cut-out, scaled to where this view's subject is."""
    view, source, own, mask = row.view(slot), other.view(slot), row.mask(slot), other.mask(slot)
    assert view is not None and source is not None and own is not None and mask is not None
    target, box = bounding_box(own.numpy()), bounding_box(mask.numpy())
    size = (target[2] - target[0], target[3] - target[1])
    cut = source.crop(box).resize(size, Image.Resampling.LANCZOS)
    shape = Image.fromarray(mask.numpy().astype(np.uint8) * 255).crop(box).resize(size, Image.Resampling.LANCZOS)
    view.paste(cut, target[:2], shape)
    return view


# --- heads -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Bench:
    """Trunk, preprocessing, and where token caches lie."""

    model: NearIDModel
    preprocessing: Preprocessing
    folder: Path

    def tokens(self, dataset: IdentityDataset, variants: int = 1) -> TokenCache:
        """The trunk's tokens of a data set."""
        parts = []
        for number in range(variants):
            version = replace(dataset, variant=number)
            key = CacheKey(trunk_fingerprint(self.model), self.preprocessing, version.fingerprint)
            parts.append(CachePart(key, version, number))
        trunk = Trunk(self.model, self.preprocessing)
        return cache_on_disk(plan_cache(self.folder, trunk, parts), trunk)


def train(options: Options, bench: Bench, arm: str, seed: int, data: Rows) -> NearIDModel:
    """A head of one arm."""
    model = copy.deepcopy(bench.model)
    torch.manual_seed(seed)
    model.reset_head()
    dataset = IdentityDataset(training_rows(options, arm, data), bench.preprocessing.size, options.num_views)
    if arm == "jitter":
        dataset = replace(dataset, augmentation=JITTER)
    head = HeadOptions(
        options.out / "unused",
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        objective="info-nce" if arm in ("none", "jitter") else "two-tier",
        seed=seed,
        evaluate_every=0,
    )
    train_head(head, model, bench.tokens(dataset, JITTER_VARIANTS if arm == "jitter" else 1))
    return model


def measured(model: NearIDModel, test: TokenCache, edits: TokenCache, oracle: Tensor) -> dict:
    """Per test identity its won and valid terms, and M-O."""
    counts = metrics.won_and_valid(metrics.identity_margins(*identity_similarities(model, test)))
    found = evaluate_tokens(model, edits, oracle)
    return {"won": counts.tolist(), "m_o": found.m_o, "m_o_interval": found.m_o_interval}


# --- the table -------------------------------------------------------------------------------------------------------
def resampled(values: Sequence[np.ndarray], statistic, num_resamples: int = 2000) -> tuple[float, float, float]:
    """A statistic of the arms' per-identity values [n], and its 95 % bootstrap interval over identities."""
    rng = np.random.default_rng(0)
    stacked = np.stack(values)  # [arms, n]
    draws = [
        statistic(stacked[:, rng.integers(0, stacked.shape[1], stacked.shape[1])].mean(axis=1))
        for _ in range(num_resamples)
    ]
    return statistic(stacked.mean(axis=1)), *np.nanquantile(draws, (0.025, 0.975)).tolist()


def difference(means: np.ndarray) -> float:
    """First arm - second arm."""
    return float(means[0] - means[1])


def captured(means: np.ndarray) -> float:
    """The share of what the third arm gains over the first that the second arm gains; NaN where it gains nothing."""
    gain = means[2] - means[0]
    return float((means[1] - means[0]) / gain) if gain else float("nan")


def told(values: tuple[float, float, float]) -> str:
    """A figure and its interval."""
    return f"{values[0]:.3f} [{values[1]:.3f}, {values[2]:.3f}]"


def judged(options: Options, data: Rows, files: dict[tuple[int, int], Path]) -> dict[str, float]:
    """What the judge sees in some distractors, as shares."""
    chosen = sorted(files, key=lambda place: random.Random(f"judged/{place}").random())[: options.num_judged]
    other = same_category = 0
    for number, slot in chosen:
        row = identity_row("train", number, options.num_views)
        seen = judge(load_image(files[number, slot]), row.pet, row.contexts[slot])
        same_category += "category" not in seen.wrong
        other += bool(seen.wrong) and "category" not in seen.wrong
    return {
        "n": len(chosen),
        "of the category": same_category / len(chosen),
        "another of the category": other / len(chosen),
    }


def main(options: Options) -> None:
    """Build, train what is missing, print the tables."""
    options.out.mkdir(parents=True, exist_ok=True)
    data = rows("train", options.num_identities, options.num_views)
    report = build(options, data)
    print(json.dumps({name: report[name] for name in ("counts", "background", "limits", "seconds_drawing")}, indent=1))
    if options.build_only:
        return
    model, preprocessing, _ = load_encoder(weights_dir("siglip"))
    bench = Bench(model, preprocessing, options.out / "tokens")
    edits = part_edits("test", options.num_test)
    oracle = torch.tensor([list(row.oracle or ()) for row in edits])
    test_tokens = bench.tokens(IdentityDataset(rows("test", options.num_test), preprocessing.size, 3))
    edit_tokens = bench.tokens(IdentityDataset(edits, preprocessing.size, 2))
    results: dict[str, list[dict]] = {}
    for seed in options.seeds:
        for arm in ARMS:
            path = options.out / f"{arm}-{options.num_identities}-{options.steps}-{seed}.json"
            if not path.exists():
                found = measured(train(options, bench, arm, seed, data), test_tokens, edit_tokens, oracle)
                write_atomically(path, json.dumps(found))
            results.setdefault(arm, []).append(json.loads(path.read_text()))
            won = np.array(results[arm][-1]["won"])
            print(
                f"{arm} seed {seed}: SSR {(won[:, 0] == won[:, 1]).mean():.3f}, M-O {results[arm][-1]['m_o']:.3f}",
                flush=True,
            )
    show(options, data, results)


def show(options: Options, data: Rows, results: dict[str, list[dict]]) -> None:
    """Print the table, what is captured, and what the judge says."""
    won = {arm: np.array([found["won"] for found in seeds]) for arm, seeds in results.items()}  # [seeds, n, 2]
    perfect = {arm: (counts[..., 0] == counts[..., 1]).mean(axis=0) for arm, counts in won.items()}  # [n]
    accuracy = {arm: (counts[..., 0] / counts[..., 1]).mean(axis=0) for arm, counts in won.items()}
    print(f"\n{options.num_identities} training identities, {options.num_test} test, {len(options.seeds)} seeds")
    print("| distractors | SSR | PA | M-O by seed |\n|---|---|---|---|")
    for arm in ARMS:
        figures = (told(resampled([values[arm]], lambda mean: mean[0])) for values in (perfect, accuracy))
        correlations = ", ".join(f"{found['m_o']:.3f}" for found in results[arm])
        print(f"| {arm} | {' | '.join(figures)} | {correlations} |")
    for name, values in (("SSR", perfect), ("PA", accuracy)):
        print(f"{name}: true - none {told(resampled([values['true'], values['none']], difference))}")
        print(f"{name}: filtered - built {told(resampled([values['filtered'], values['built']], difference))}")
        for arm in ("built", "filtered", "pasted", "jitter"):
            gain = resampled([values["none"], values[arm], values["true"]], captured)
            print(f"{name}: {arm} captures {told(gain)} of what true gains over none")
    places, records = list_places(data, options.out / "built"), Records(options.out / "built")
    for name, first in (("first tries", True), ("kept", False)):
        print(name, judged(options, data, _distractor_files(places, records, first_tries=first)))


if __name__ == "__main__":
    main(tyro.cli(Options))
