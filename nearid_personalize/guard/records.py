"""Recorded races of a base model and the plan made from them: what `race_plan.json` holds."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import BoolTensor, FloatTensor

from nearid_personalize.errors import InputError
from nearid_personalize.files import parse_json, write_atomically
from nearid_personalize.guard.plan import RacePlan, plan_race
from nearid_personalize.guard.policy import StoppingPolicy
from nearid_personalize.guard.result import Candidate

FILE_NAME = "race_plan.json"
"""Beside a base model, in its folder."""
RECORDED_AT = tuple(tenth / 10 for tenth in range(1, 10))
RECORDED_SHARE = 1.25
"""Candidates to record, in units of the baseline's: with more than it has, fewer prompts make a plan."""


@dataclass(frozen=True)
class RecordingPolicy(StoppingPolicy):
    """Looks after every tenth of the steps and stops nobody: a plan needs complete races."""

    step_fractions: tuple[float, ...] = RECORDED_AT

    def decide(self, step_fraction: float, preview_scores: FloatTensor, num_images: int) -> BoolTensor:
        """See `StoppingPolicy`."""
        return ~preview_scores.isnan()  # type: ignore[return-value]


@dataclass(frozen=True)
class RecordedRace:
    """One prompt's candidates; NaN where there is no score."""

    previews: tuple[tuple[float, ...], ...]
    """For each candidate its preview scores, at the records' step fractions."""
    finals: tuple[float, ...]


@dataclass(frozen=True)
class RaceRecords:
    """Races of one base model under one encoder."""

    encoder: str
    """Name of the encoder that scored them: another one's previews foretell other scores."""
    step_fractions: tuple[float, ...] = ()
    races: tuple[RecordedRace, ...] = ()
    plan: RacePlan | None = None

    def added(self, candidates: Sequence[Candidate]) -> "RaceRecords":
        """With one more race. Raises InputError when its previews are of other fractions of the steps."""
        fractions = tuple(sorted({fraction for candidate in candidates for fraction in candidate.previews}))
        if self.races and fractions != self.step_fractions:
            raise InputError(
                f"recorded races have previews at {_shown(self.step_fractions)} of the steps, this one at "
                f"{_shown(fractions)}; take as many steps, or begin another file"
            )
        previews, finals = [], []
        for candidate in candidates:
            previews.append(tuple(candidate.previews.get(fraction, math.nan) for fraction in fractions))
            finals.append(math.nan if candidate.status == "stopped" else candidate.score)
        race = RecordedRace(previews=tuple(previews), finals=tuple(finals))
        return replace(self, step_fractions=fractions, races=(*self.races, race))

    def planned(self, num_images: int = 1, baseline_candidates: int = 16, max_loss: float = 0.02) -> "RaceRecords":
        """With the plan that `plan_race` makes of all races."""
        groups = [number for number, race in enumerate(self.races) for _ in race.finals]
        previews = torch.tensor([row for race in self.races for row in race.previews], dtype=torch.float64)
        finals = torch.tensor([score for race in self.races for score in race.finals], dtype=torch.float64)
        plan = plan_race(
            previews,
            finals,
            self.step_fractions,
            groups,
            num_images=num_images,
            baseline_candidates=baseline_candidates,
            max_loss=max_loss,
        )
        return replace(self, plan=plan)

    def save(self, path: Path) -> None:
        """Write the file, whole."""
        races = []
        for race in self.races:
            previews = [_without_nan(row) for row in race.previews]
            races.append({"previews": previews, "finals": _without_nan(race.finals)})
        values = {
            "encoder": self.encoder,
            "plan": self.plan.to_dict() if self.plan else None,
            "step_fractions": list(self.step_fractions),
            "races": races,
        }
        write_atomically(path, json.dumps(values) + "\n")

    @classmethod
    def load(cls, path: Path) -> "RaceRecords":
        """Read the file; raises InputError, naming it, when it is damaged."""
        try:
            values = parse_json(path.read_text(encoding="utf-8"))
            races = []
            for race in values["races"]:
                previews = tuple(_with_nan(row) for row in race["previews"])
                races.append(RecordedRace(previews=previews, finals=_with_nan(race["finals"])))
            return cls(
                encoder=str(values["encoder"]),
                step_fractions=_with_nan(values["step_fractions"]),
                races=tuple(races),
                plan=None if values["plan"] is None else RacePlan.from_dict(values["plan"]),
            )
        except (InputError, ValueError, OSError, KeyError, TypeError) as error:
            raise InputError(f"{path}: no race plan ({error}); give another file name") from None


def _without_nan(scores: Sequence[float]) -> list[float | None]:
    """For JSON, which has no NaN; a score's sixth digit tells nothing."""
    return [None if math.isnan(score) else round(score, 6) for score in scores]


def _with_nan(scores: Sequence[Any]) -> tuple[float, ...]:
    return tuple(math.nan if score is None else float(score) for score in scores)


def _shown(fractions: Sequence[float]) -> str:
    return ", ".join(f"{fraction:.3g}" for fraction in fractions)
