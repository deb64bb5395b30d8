"""What does racing save, and what does it lose? `python benchmarks/guard_cost.py`.

For held-out subjects of the mini-world: train a LoRA, run 32 candidates for each of two prompts to the end, keep the
previews of every third step, and let the judge say which attributes each finished picture really shows. On these
tables candidates 0-15 are raced, by the guard's policy and by simpler ones; later ones are the seeds that saved compute
may begin. Then the guard itself runs, for its winner, its rows and its seconds. Intervals: 95 %, bootstrap over
subjects.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from drawn import STEP_FRACTIONS, Drawing, draw, interval, personalised, read, shots_of

from nearid_personalize.files import write_atomically
from nearid_personalize.guard.guard import IdentityGuard
from nearid_personalize.guard.policy import DEFAULT_POLICY, FixedSchedule, StoppingPolicy
from nearid_personalize.guard.profile import PreviewProfile
from nearid_personalize.guard.replays import Replay, replay
from nearid_personalize.miniworld import weights_dir
from nearid_personalize.scorer.scorer import IdentityScorer


@dataclass(frozen=True)
class Options:
    """What is measured."""

    drawing: Annotated[Drawing, tyro.conf.arg(name="")]
    out: Path = Path("runs/guard_cost")
    """Folder for summary.json and profile.json."""
    scorer: str = ""
    """Folder of a NearID model. Default: the packaged one."""
    num_candidates: int = 16
    """Candidates that a race begins with."""
    num_images: int = 1
    """Winners."""
    num_guarded: int = 2
    """Subjects on which the guard itself runs as well."""
    profile: Path | None = None
    """`profile.json` that this benchmark wrote for other subjects."""
    margins: tuple[float, ...] = (1.0, 1.3)
    """Of races that begin with more candidates, with the profile: chosen on other subjects."""


@dataclass(frozen=True)
class Table:
    """One prompt of one subject: candidates that all ran to the end. previews [M,S], finals [M], agreement [M]."""

    subject: int
    previews: torch.Tensor
    finals: torch.Tensor
    agreement: torch.Tensor


def read_tables(drawing: Drawing, scorer: IdentityScorer) -> list[Table]:
    """Score what was drawn."""
    tables = []
    for index in drawing.indices:
        drawn = read(drawing, index)
        subject = scorer.enroll(drawn.references)
        for prompt in drawn.prompts:
            finals = scorer.score(as_tensor(prompt.pictures), subject)
            seen = scorer.score(as_tensor(prompt.previews.reshape(-1, *prompt.pictures.shape[1:])), subject)
            agreement = torch.from_numpy(prompt.agreement).float()
            tables.append(Table(index, seen.reshape(len(finals), -1), finals, agreement))
    return tables


def as_tensor(pictures: np.ndarray) -> torch.Tensor:
    """uint8 `[n,H,W,3]` -> uint8 `[n,3,H,W]`."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class RandomHalving(StoppingPolicy):
    """Stops a random half half-way: what stopping saves when nothing is known."""

    generator: torch.Generator
    step_fractions: tuple[float, ...] = (0.5,)

    def decide(self, step_fraction: float, preview_scores: torch.Tensor, num_images: int) -> torch.Tensor:
        """See `StoppingPolicy`."""
        kept = torch.randperm(len(preview_scores), generator=self.generator)[
            : max(num_images, len(preview_scores) // 2)
        ]
        return torch.zeros(len(preview_scores), dtype=torch.bool).scatter(0, kept, True)


def arms(options: Options, profile: PreviewProfile | None, preview_cost: float) -> dict[str, Callable[[Table], Replay]]:
    """Ways to spend compute on a table, by name."""
    n, wanted = options.num_candidates, options.num_images

    def raced(policy: StoppingPolicy, known: PreviewProfile | None = None, begun: int = n) -> Callable[[Table], Replay]:
        return lambda t: replay(
            t.previews, t.finals, STEP_FRACTIONS, begun, wanted, policy, known, preview_cost=preview_cost
        )

    def plain(count: int) -> Callable[[Table], Replay]:
        return lambda t: Replay(tuple(t.finals[:count].argsort(descending=True)[:wanted].tolist()), count, count, count)

    chosen: dict[str, Callable[[Table], Replay]] = {f"best of {count}": plain(count) for count in (n, n // 2, n // 4)}
    chosen["random half stopped half-way"] = raced(RandomHalving(torch.Generator().manual_seed(0)))
    chosen["worse half stopped half-way"] = raced(FixedSchedule({0.5: 0.5}))
    chosen["halved at .3, .5 and .7"] = raced(FixedSchedule({0.3: 0.5, 0.5: 0.5, 0.7: 0.5}))
    chosen["raced"] = raced(DEFAULT_POLICY)
    if profile is None:
        return chosen
    chosen["raced, profile"] = raced(DEFAULT_POLICY, profile)
    for more in (5 * n // 4, 3 * n // 2, 2 * n):
        for margin in options.margins:
            chosen[f"raced, profile, {more} begun, margin {margin}"] = raced(
                replace(DEFAULT_POLICY, margin=margin), profile, more
            )
    return chosen


def outcome(table: Table, race: Replay, num_candidates: int) -> list[float]:
    """Cost in runs of best of N; then this, random and best of N: the winners' mean score, and mean agreement."""
    winners = list(race.winners)
    values = [race.cost / num_candidates]
    best = table.finals[:num_candidates].argsort(descending=True)[: len(winners)]
    for truth in (table.finals, table.agreement):
        values += [truth[winners].mean().item(), truth[:num_candidates].mean().item(), truth[best].mean().item()]
    return values


def gain(rows: np.ndarray, first: int) -> float:
    """(this - random) / (best of N - random) of means over outcomes `[n,7]`, columns from `first` on."""
    this, random, best = rows[:, first : first + 3].mean(axis=0)
    return float((this - random) / (best - random))


STATISTICS: dict[str, Callable[[np.ndarray], float]] = {
    "cost": lambda rows: float(rows[:, 0].mean()),
    "score gain": lambda rows: gain(rows, 1),
    "agreement gain": lambda rows: gain(rows, 4),
    "agreement": lambda rows: float(rows[:, 4].mean()),
}


def by_subject(tables: list[Table], rows: list[list[float]]) -> np.ndarray:
    """Rows in the tables' order -> `[subjects, prompts, ...]`, what intervals are drawn over."""
    return np.array(rows).reshape(len({table.subject for table in tables}), -1, len(rows[0]))


def rank_correlation(table: Table) -> list[float]:
    """Spearman of previews with final scores, by step fraction `[S]`."""
    ranks = torch.cat([table.previews, table.finals[:, None]], dim=1).argsort(dim=0).argsort(dim=0).double()
    return torch.corrcoef(ranks.T)[-1, :-1].tolist()


def run_guard(options: Options, scorer: IdentityScorer, tables: list[Table]) -> dict:
    """The guard itself on the first prompts: rows, winners and seconds, beside what the replay said of them."""
    rows, agrees, seconds = [], 0, {"generate": 0.0, "preview": 0.0, "score": 0.0}
    drawing = options.drawing
    for index in drawing.indices[: options.num_guarded]:
        pet, contexts, pipe = personalised(drawing.split, index, drawing.lora_steps)
        _, references, _ = shots_of(drawing.split, index)
        guard = IdentityGuard(pipe, scorer, scorer.enroll(references), options.num_candidates)
        own = [table for table in tables if table.subject == index]
        for context, table in zip(contexts, own, strict=True):
            result = guard(
                f"a photo of sks {pet.category} in {context}",
                num_images=options.num_images,
                num_candidates=options.num_candidates,
                num_inference_steps=drawing.steps,
                guidance_scale=3.0,
            )
            race = replay(table.previews, table.finals, STEP_FRACTIONS, options.num_candidates, options.num_images)
            finished = [candidate for candidate in result.ranked if candidate.status != "stopped"]
            best = sorted(finished, key=lambda c: -c.score)[: options.num_images]
            agrees += [candidate.seed for candidate in best] == list(race.winners)
            rows.append(
                [result.cost.denoiser_rows / result.cost.denoiser_rows_best_of_n, race.cost / race.cost_best_of_n]
            )
            for stage, spent in result.cost.seconds.items():
                seconds[stage] += spent
    guarded, replayed = np.array(rows).mean(axis=0)
    full = seconds["generate"] / (guarded * len(rows) * options.num_candidates)
    asked = len(DEFAULT_POLICY.step_fractions)
    return {
        "prompts": len(rows),
        "same_winners": agrees,
        "rows_share": float(guarded),
        "rows_share_replayed": float(replayed),
        "seconds": seconds,
        "preview_share_of_time": seconds["preview"] / sum(seconds.values()),
        "preview_cost": seconds["preview"] / (len(rows) * options.num_candidates * asked) / full,
    }


def main(options: Options) -> None:
    """Draw what is missing, race it, print the table, write `summary.json`."""
    draw(options.drawing)
    options.out.mkdir(parents=True, exist_ok=True)
    scorer = IdentityScorer.from_pretrained(options.scorer or weights_dir("nearid"))
    tables = read_tables(options.drawing, scorer)
    profile = None
    if options.profile is not None:
        profile = PreviewProfile.from_dict(json.loads(options.profile.read_text(encoding="utf-8")))
    guarded = run_guard(options, scorer, tables) if options.num_guarded else {}
    summary: dict = {"prompts": len(tables), "guard": guarded, "spearman": {}, "arms": {}}
    spearman = by_subject(tables, [rank_correlation(table) for table in tables])
    for i, fraction in enumerate(STEP_FRACTIONS):
        summary["spearman"][fraction] = with_bounds(spearman[..., i : i + 1], lambda rows: float(rows.mean()))
        print(f"Spearman at {fraction}: {shown(summary['spearman'][fraction])}")
    for name, run in arms(options, profile, guarded.get("preview_cost", 0.0)).items():
        outcomes = by_subject(tables, [outcome(table, run(table), options.num_candidates) for table in tables])
        summary["arms"][name] = {title: with_bounds(outcomes, statistic) for title, statistic in STATISTICS.items()}
        print(f"{name:40}" + "  ".join(f"{title} {shown(value)}" for title, value in summary["arms"][name].items()))
    print(json.dumps(guarded, indent=2))
    write_atomically(options.out / "summary.json", json.dumps(summary, indent=2) + "\n")
    learnt = PreviewProfile.fit(
        torch.cat([table.previews for table in tables]),
        torch.cat([table.finals for table in tables]),
        STEP_FRACTIONS,
        [number for number, table in enumerate(tables) for _ in table.finals],
    )
    write_atomically(options.out / "profile.json", json.dumps(learnt.to_dict()) + "\n")


def with_bounds(rows: np.ndarray, statistic: Callable[[np.ndarray], float]) -> list[float]:
    """A statistic of rows `[subjects, prompts, ...]` and its 95 % bootstrap interval over subjects."""
    return [statistic(rows.reshape(-1, rows.shape[-1])), *interval(rows, statistic)]


def shown(value: list[float]) -> str:
    """ ".55 [.44, .67]"."""
    return "{:.3f} [{:.3f}, {:.3f}]".format(*value)


if __name__ == "__main__":
    main(tyro.cli(Options))
