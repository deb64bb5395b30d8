"""What racing saves on synthetic tables of scores: `python benchmarks/racing_tables.py`.

Final scores are drawn, previews made from them with the correlation curves that were measured on SDXL, FLUX.1 and the
mini-world, and two made-up ones (identity that shows early or late). Noise is either that of a path that ends in the
final score ("path": the newest preview says all there is) or fresh at every step.

A line per family and state of knowledge: tables, N, wanted images, profile or not, cost as a share of best-of-N's, loss
(best-of-N's mean winner less racing's, in percent of best-of-N's gain over a random candidate), and how much more
halving, repeated halving, random stopping and best of fewer lose at the same cost (what previews cost counts for racing
alone). Then a line at equal compute, N/2: gain over best-of-(N/2) of halving, repeated halving, random stopping, racing
without and with a profile, racing at the risk `--daring`, and racing under a budget. Defaults were tuned on seeds 0 to
31; figures in docs/racing.md are from seed 1000.
"""

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from torch import Tensor

from nearid_personalize.files import write_atomically
from nearid_personalize.guard.policy import FixedSchedule, RacingPolicy, StoppingPolicy
from nearid_personalize.guard.profile import PreviewProfile
from nearid_personalize.guard.replays import replay

FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.7, 0.8, 0.9)
# Correlation of preview with final score at FRACTIONS; flux, sdxl: published at .2, .3 and .5, the rest by hand.
CURVES = {
    "flux": (0.13, 0.27, 0.51, 0.65, 0.79, 0.82, 0.86, 0.92, 0.96, 0.99),
    "sdxl": (0.08, 0.17, 0.32, 0.41, 0.49, 0.55, 0.62, 0.74, 0.86, 0.95),
    "mini-world": (0.07, 0.15, 0.30, 0.51, 0.61, 0.68, 0.75, 0.85, 0.92, 0.97),
    "early": (0.25, 0.50, 0.70, 0.80, 0.88, 0.90, 0.92, 0.96, 0.98, 0.99),
    "late": (0.03, 0.07, 0.10, 0.20, 0.30, 0.37, 0.45, 0.60, 0.75, 0.90),
}


@dataclass(frozen=True)
class Options:
    """What is measured."""

    num_tables: int = 400
    """Tables (runs) per family."""
    num_profile_groups: int = 20
    """Further tables that the profile is learnt from."""
    seed: int = 1000
    families: tuple[str, ...] = tuple(CURVES)
    num_candidates: tuple[int, ...] = (8, 16, 32)
    num_images: tuple[int, ...] = (1, 4)
    shapes: tuple[str, ...] = ("normal", "heavy", "skewed")
    noises: tuple[str, ...] = ("path", "fresh")
    preview_cost: float = 0.0
    """Of one preview, in full candidates."""
    margin: float = RacingPolicy.margin
    daring: float = 1.0
    """Another margin, shown at equal compute."""
    equal_compute: bool = True
    """Measure also what everybody makes of half of best-of-N's compute."""
    out: Path | None = None
    """JSON file for the figures."""


@dataclass(frozen=True)
class RandomSchedule(StoppingPolicy):
    """Keeps a random share: what stopping saves when nothing is known."""

    share_kept: float
    step_fractions: tuple[float, ...] = (0.5,)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def decide(self, step_fraction: float, preview_scores: Tensor, num_images: int) -> Tensor:
        """See `StoppingPolicy`."""
        draws = torch.rand(len(preview_scores), generator=self.generator)
        kept = max(num_images, math.ceil(self.share_kept * len(draws)))
        return (draws.argsort().argsort() < kept) & ~preview_scores.isnan()


KEEP_ALL = FixedSchedule({0.5: 1.0})
# What stands against racing, and the share of a full candidate that one of theirs costs.
RIVALS: dict[str, tuple[StoppingPolicy, float]] = {
    "halving": (FixedSchedule({0.5: 0.5}), 0.75),
    "successive": (FixedSchedule({0.25: 0.5, 0.5: 0.5, 0.75: 0.5}), 0.5),
    "random": (RandomSchedule(0.5), 0.75),
    "best of fewer": (KEEP_ALL, 1.0),
}


class Size(NamedTuple):
    """How many start and how many are wanted."""

    num_candidates: int
    num_images: int


def draw_finals(shape: str, size: Sequence[int], generator: torch.Generator) -> Tensor:
    """Final scores of unit variance: normal, heavy-tailed (Student, 4 degrees), or skewed as cosines near their top."""
    normal = torch.randn(*size, generator=generator, dtype=torch.float64)
    if shape == "heavy":
        squares = torch.randn(4, *size, generator=generator, dtype=torch.float64).square().mean(0)
        return normal / squares.sqrt() / math.sqrt(2)
    if shape == "skewed":
        saturated = -torch.log1p(torch.exp(-1.5 * normal - 0.5))
        return (saturated - saturated.mean()) / saturated.std()
    return normal


def draw_tables(
    family: str, shape: str, noise: str, num_tables: int, num_rows: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Previews `[T, R, S]` and finals `[T, R]`: each table at a level and of a spread of its own."""
    correlations = torch.tensor(CURVES[family], dtype=torch.float64)
    finals = draw_finals(shape, (num_tables, num_rows), generator)
    noises = torch.randn(num_tables, num_rows, len(correlations), generator=generator, dtype=torch.float64)
    variances = 1 / correlations**2 - 1  # of the noise in final + noise
    if noise == "path":
        steps = variances - torch.cat([variances[1:], torch.zeros(1, dtype=torch.float64)])
        noises = (noises * steps.sqrt()).flip(-1).cumsum(-1).flip(-1)
    else:
        noises = noises * variances.sqrt()
    previews = correlations * (finals[..., None] + noises)
    spread = torch.exp(0.3 * torch.randn(num_tables, 1, generator=generator, dtype=torch.float64))
    level = torch.randn(num_tables, 1, generator=generator, dtype=torch.float64)
    # previews lie a little lower and closer together than finals, as blurred pictures do
    return 0.8 * spread[..., None] * previews + level[..., None] - 0.3, spread * finals + level


def learn_profile(previews: Tensor, finals: Tensor) -> PreviewProfile:
    """The profile of finished tables `[T, R, S]`, `[T, R]`, one group each."""
    num_tables, num_rows = finals.shape
    groups = [row // num_rows for row in range(num_tables * num_rows)]
    return PreviewProfile.fit(previews.flatten(0, 1), finals.flatten(), FRACTIONS, groups)


@dataclass(frozen=True)
class Race:
    """Per table: the winners' mean in standard deviations of the table, `[T]`, and the cost in candidates, `[T]`."""

    score: Tensor
    cost: Tensor


def race(
    tables: tuple[Tensor, Tensor], num_candidates: int, num_images: int, policy: StoppingPolicy, **options
) -> Race:
    """Replay every table."""
    scores, costs = [], []
    for previews, finals in zip(*tables):
        result = replay(previews, finals, FRACTIONS, num_candidates, num_images, policy, **options)
        standard = (finals - finals.mean()) / finals.std()
        scores.append(standard[list(result.winners)].mean())
        costs.append(result.cost)
    return Race(torch.stack(scores), torch.tensor(costs, dtype=torch.float64))


def at_cost(
    tables: tuple[Tensor, Tensor], cost: float, num_images: int, policy: StoppingPolicy, share: float, **options
) -> Tensor:
    """Winners' mean `[T]` of a policy that starts as many candidates as cost `cost` on average.

    Between the two whole numbers of candidates around it, linear in what they cost. `share`: the most that one of its
    candidates costs on average, where the search begins.
    """
    number = max(num_images, math.floor(cost / share))
    below, above = (race(tables, n, num_images, policy, **options) for n in (number, number + 1))
    while float(above.cost.mean()) < cost:
        number += 1
        below, above = above, race(tables, number + 1, num_images, policy, **options)
    weight = (cost - float(below.cost.mean())) / float(above.cost.mean() - below.cost.mean())
    return below.score + weight * (above.score - below.score)


def percent(values: Tensor, gain: float) -> tuple[float, float]:
    """Mean in percent of `gain`, and half the width of its 95 % interval."""
    return 100 * float(values.mean()) / gain, 196 * float(values.std()) / math.sqrt(len(values)) / gain


def measure(options: Options, tables: tuple[Tensor, Tensor], profile: PreviewProfile | None, size: Size) -> dict:
    """Cost as a share of best-of-N's, loss, and by how much more each rival loses at the same cost."""
    full = race(tables, *size, KEEP_ALL).score
    gain = float(full.mean())  # a random candidate's mean is 0
    policy = RacingPolicy(margin=options.margin)
    racing = race(tables, *size, policy, profile=profile, preview_cost=options.preview_cost)
    cost = float(racing.cost.mean())
    rivals = {
        name: percent(racing.score - at_cost(tables, cost, size.num_images, schedule, share), gain)
        for name, (schedule, share) in RIVALS.items()
    }
    return {"cost": cost / size.num_candidates, "loss": percent(full - racing.score, gain)} | rivals


def equal_compute(options: Options, tables: tuple[Tensor, Tensor], profile: PreviewProfile, size: Size) -> dict:
    """Gain over best-of-(N/2) when everybody may spend N/2 candidates' compute on average, or never more ("budget")."""
    num_images, cost = size.num_images, max(size.num_images, size.num_candidates // 2)
    full = race(tables, cost, num_images, KEEP_ALL).score
    policy, daring = RacingPolicy(margin=options.margin), RacingPolicy(margin=options.daring)
    gain = float(full.mean())
    scores = {name: at_cost(tables, cost, num_images, *rival) for name, rival in RIVALS.items() if rival[1] < 1}
    scores["racing, no profile"] = at_cost(tables, cost, num_images, policy, 0.9)
    scores["racing, profile"] = at_cost(tables, cost, num_images, policy, 0.9, profile=profile)
    scores["daring, profile"] = at_cost(tables, cost, num_images, daring, 0.8, profile=profile)
    scores["budget, profile"] = race(tables, cost, num_images, policy, profile=profile, budget=cost).score
    return {"compute": cost} | {name: percent(score - full, gain) for name, score in scores.items()}


def show(cells: Sequence) -> None:
    """Print one line of a Markdown table; pairs are a mean and half its interval."""
    print(
        "| " + " | ".join(f"{c[0]:.1f} ± {c[1]:.1f}" if isinstance(c, tuple) else str(c) for c in cells) + " |",
        flush=True,
    )


def main(options: Options) -> None:
    """Measure every family; print one Markdown line per table and state of knowledge, then one for equal compute."""
    rows: list[dict] = []
    for *draw, num_candidates, num_images in itertools.product(
        options.families, options.shapes, options.noises, options.num_candidates, options.num_images
    ):
        size = Size(num_candidates, num_images)
        generator = torch.Generator().manual_seed(options.seed)
        profile = learn_profile(*draw_tables(*draw, options.num_profile_groups, num_candidates, generator))
        tables = draw_tables(*draw, options.num_tables, 2 * num_candidates, generator)
        for knows, known in (("no profile", None), ("profile", profile)):
            rows.append({"tables": draw, **size._asdict(), "knows": knows} | measure(options, tables, known, size))
            show([*draw, *size, knows, *(f"{k} {v:.3f}" if k == "cost" else v for k, v in list(rows[-1].items())[4:])])
        if options.equal_compute:
            rows.append({"tables": draw, **size._asdict()} | equal_compute(options, tables, profile, size))
            show([*draw, *size, *(f"compute {v}" if k == "compute" else v for k, v in list(rows[-1].items())[3:])])
    if options.out:
        write_atomically(options.out, json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
