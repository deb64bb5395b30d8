"""What a run remembers between its tries, so that it can be killed at any time and goes on where it was.

Everything is a file of its own, written whole, in `OUT/.distractors`:

    settings.json                  what a run may not change on the way
    limits.json                    once every view has had its first try
    tries/<subject>/<view>.N.json  try number N: prompt, seed, scores; its picture beside it until it is judged
    views/<subject>/<view>.json    what became of the view in the end
    skipped/<subject>/<view>.json  why a view was left out; written anew by every run
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from nearid_personalize.distractors.nearness import Limits, Scores, scores_from, to_fields
from nearid_personalize.distractors.places import Place
from nearid_personalize.errors import InputError
from nearid_personalize.files import write_atomically
from nearid_personalize.report import to_json

FOLDER = ".distractors"
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Try:
    """One distractor that was drawn for a view."""

    number: int
    prompt: str
    seed: int
    scores: Scores
    seconds: float
    """Of drawing, a batch's time shared out evenly."""


@dataclass(frozen=True)
class Outcome:
    """What became of a view."""

    kept: int | None
    """The number of the try that is kept; None: all were refused."""
    refusals: tuple[str, ...]
    """Why each try before it was refused."""
    background_pixels: int = 0
    """Pixels outside the painted region that were compared, and are equal, in the file that is kept."""
    subject_pixels: int = 0
    oracle: float | None = None
    """1 - |part| / |subject|, where a part was repainted."""


@dataclass(frozen=True)
class Records:
    """The files of one run's folder."""

    out: Path

    @property
    def home(self) -> Path:
        """The folder of all of them."""
        return self.out / FOLDER

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Remember the settings, or refuse to go on with others; raises InputError naming the first that differs."""
        path = self.home / "settings.json"
        known = _read(path)
        if known is None or not (self.home / "tries").is_dir():  # nothing was drawn with the others
            self._write(path, settings)
            return
        now = json.loads(json.dumps(settings))
        for name in sorted({*known, *now}):
            if known.get(name) != now.get(name):
                raise InputError(
                    f"--{name.replace('_', '-')} {now.get(name)}: {self.out} was begun with {known.get(name)}; "
                    "go on with that, or give another --out"
                )

    # --- limits ------------------------------------------------------------------------------------------------------
    def limits(self) -> Limits | None:
        """The limits, once they are set."""
        found = _read(self.home / "limits.json")
        return None if found is None else Limits(**found)

    def set_limits(self, limits: Limits) -> None:
        """Fix the limits for all tries that follow."""
        self._write(self.home / "limits.json", to_fields(limits))

    # --- tries -------------------------------------------------------------------------------------------------------
    def picture_file(self, place: Place, number: int) -> Path:
        """A try's picture, until it is judged; of a refused one a small copy stays."""
        return self.home / "tries" / f"{place.key}.{number}.png"

    def read_try(self, place: Place, number: int) -> Try | None:
        """A try that was finished, None where there is none."""
        found = _read(self._try_file(place, number))
        return None if found is None else Try(**{**found, "scores": scores_from(found["scores"])})

    def tries(self, place: Place) -> list[Try]:
        """All finished tries of a view, in order."""
        found: list[Try] = []
        while (known := self.read_try(place, len(found))) is not None:
            found.append(known)
        return found

    def add_try(self, place: Place, found: Try) -> None:
        """Remember a try; its picture is written already."""
        self._write(self._try_file(place, found.number), {**asdict(found), "scores": to_fields(found.scores)})

    def _try_file(self, place: Place, number: int) -> Path:
        return self.home / "tries" / f"{place.key}.{number}.json"

    # --- views -------------------------------------------------------------------------------------------------------
    def outcome(self, place: Place) -> Outcome | None:
        """What became of a view, None while it is open."""
        found = _read(self.home / "views" / f"{place.key}.json")
        return None if found is None else Outcome(**{**found, "refusals": tuple(found["refusals"])})

    def settle(self, place: Place, outcome: Outcome) -> None:
        """Remember what became of a view."""
        self._write(self.home / "views" / f"{place.key}.json", asdict(outcome))

    def skipped(self, place: Place) -> str | None:
        """Why a view was left out, None where it was not."""
        found = _read(self._skip_file(place))
        return None if found is None else found["reason"]

    def skip(self, place: Place, reason: str) -> None:
        """Leave a view out."""
        self._write(self._skip_file(place), {"reason": reason})

    def unskip(self, place: Place) -> None:
        """Forget what an earlier run left out."""
        self._skip_file(place).unlink(missing_ok=True)

    def _skip_file(self, place: Place) -> Path:
        return self.home / "skipped" / f"{place.key}.json"

    # --- embeddings --------------------------------------------------------------------------------------------------
    def add_embedding(self, place: Place, embedding: Tensor) -> None:
        """Keep the identity embedding [D] of a view's masked subject."""
        path = self._embedding_file(place)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save({"embedding": embedding.contiguous()}))

    def embeddings(self, places: Iterable[Place]) -> list[Tensor]:
        """Per subject its views' embeddings [V,D]."""
        subjects: dict[int, list[Tensor]] = {}
        for place in places:
            path = self._embedding_file(place)
            if path.is_file():
                subjects.setdefault(place.row, []).append(load_file(path)["embedding"])
        return [torch.stack(views) for views in subjects.values()]

    def _embedding_file(self, place: Place) -> Path:
        return self.home / "tries" / f"{place.key}.safetensors"

    def _write(self, path: Path, content: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, to_json(content))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for the other processes of a run, which tell what they have done by files."""
    while not condition():
        time.sleep(POLL_SECONDS)
