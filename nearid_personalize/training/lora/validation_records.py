"""What a run's validations found: the journal of them, and which checkpoint is the best of those measured."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearid_personalize.files import write_atomically

if TYPE_CHECKING:
    from nearid_personalize.training.lora.validation import ValidationOptions


Record = dict[str, Any]
"""One line of the journal: of the base model as step 0, or of a checkpoint."""


# --- decisions -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Limits:
    """What a checkpoint's pictures must keep: least adherence (None: not measured) and diversity, most copies."""

    adherence: float | None
    diversity: float | None
    copy_rate: float

    @classmethod
    def from_base(cls, base: Record, options: "ValidationOptions") -> "Limits":
        """The limits that the record of step 0 sets. No floor on adherence where the base model does no better than
        the photos.
        """
        own, photos, diversity = base["adherence"], base["adherence_of_references"], base["diversity"]
        leads = own is not None and own > photos
        return cls(
            adherence=photos + options.adherence_floor * (own - photos) if leads else None,
            diversity=None if diversity is None else options.diversity_floor * diversity,
            copy_rate=min(1.0, base["copy_rate"] + options.copy_ceiling),
        )

    @property
    def floors(self) -> tuple[str, ...]:
        """The names of the limits that can refuse something."""
        on = {
            "adherence": self.adherence is not None,
            "diversity": self.diversity is not None,
            "copies": self.copy_rate < 1,
        }
        return tuple(name for name, is_on in on.items() if is_on)

    def refusal(self, record: Record) -> str:
        """Why a checkpoint may not be kept; "" when it may."""
        if self.adherence is not None and record["adherence"] < self.adherence:
            return f"adherence {record['adherence']:.3f} below {self.adherence:.3f}"
        if self.diversity is not None and record["diversity"] < self.diversity:
            return f"diversity {record['diversity']:.3f} below {self.diversity:.3f}"
        if record["copy_rate"] > self.copy_rate:
            return f"{record['copy_rate']:.0%} copies, above {self.copy_rate:.0%}"
        return ""


def best_of(records: Sequence[Record]) -> Record | None:
    """The checkpoint with the highest identity of those that pass the floors, the earliest of equals."""
    kept = [record for record in records if record["step"] and not record["refused"]]
    return max(kept, key=lambda record: record["identity"], default=None)


def improvements(records: Sequence[Record], gain: float = 0.0) -> list[bool]:
    """Whether each checkpoint passed the floors and raised identity by more than `gain` above the last that did."""
    best, improved = float("-inf"), []
    for record in records:
        if not record["step"]:  # the base model
            continue
        better = not record["refused"] and record["identity"] > best + gain
        improved.append(better)
        best = record["identity"] if better else best
    return improved


def headline(record: Record) -> str:
    """One line: the figures of a validation."""
    photos = record["leave_one_out"]
    parts = [f"identity {record['identity']:.3f}" + ("" if photos is None else f" (photos {photos:.3f})")]
    parts += [f"accepted {record['accept_rate']:.0%}", f"copies {record['copy_rate']:.0%}"]
    parts += [f"{name} {record[name]:.3f}" for name in ("adherence", "diversity") if record[name] is not None]
    return f"{'step ' + str(record['step']) if record['step'] else 'base model'}: {', '.join(parts)}"


def verdict(record: Record, records: Sequence[Record]) -> str:
    """Why a checkpoint is refused, or where it stands; "" for nothing. records: all so far, the base model's first."""
    if record["refused"] or not record["step"]:
        return record["refused"]
    base = records[0]["identity"]
    if record["identity"] < base:
        return f"below the base model's {base:.3f}"
    return "best so far" if best_of(records) is record else ""


# --- the journal -----------------------------------------------------------------------------------------------------
class Journal:
    """JSON lines, appended whole and at once on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[Record] = []

    @classmethod
    def read(cls, path: Path) -> "Journal":
        """The journal of a file, empty where there is none. A last line cut short by a kill is dropped from the file
        too.
        """
        journal = cls(path)
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            journal.records = [json.loads(line) for line in whole]
            if len(whole) < len(lines):
                write_atomically(path, "".join(whole))
        return journal

    def append(self, record: Record) -> None:
        """Add one line."""
        self.records.append(record)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def until(self, step: int) -> list[Record]:
        """The records of steps up to `step`."""
        return [record for record in self.records if record["step"] <= step]
