"""A subject: its references' embeddings, its threshold, and where that comes from."""

import json
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import get_args

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nearid_personalize.errors import InputError
from nearid_personalize.files import parse_json, write_atomically
from nearid_personalize.scorer.calibration import (
    FALSE_ACCEPT_RATES,
    Aggregation,
    CalibrationBank,
    KnownScores,
    ThresholdOrigin,
    aggregate,
    leave_one_out_scores,
)

BANK_FILE = "calibration.safetensors"
"""The `CalibrationBank` beside an encoder's weights."""


UNCALIBRATED_MARGIN = 0.1
"""How far below the references' own likeness a picture may score when nothing was calibrated. A guess, not measured."""


SINGLE_REFERENCE_THRESHOLD = 0.7
"""The uncalibrated threshold for a lone reference, whose own likeness cannot be told. A guess, not measured."""


@dataclass(frozen=True, eq=False)
class Subject:
    """One enrolled subject."""

    embeddings: Tensor
    """Float32 [R,D], unit rows, one per reference."""
    threshold: float
    """The smallest accepted score."""
    aggregation: Aggregation = "mean"
    """How cosines with several references become one score, see `aggregate`."""
    origin: ThresholdOrigin = field(default_factory=ThresholdOrigin)
    """How the threshold was set, and the error rates to expect."""
    known: tuple[KnownScores, ...] = ()
    """Scores that `at` sets thresholds from; the first must state the rate."""

    def __post_init__(self) -> None:
        if self.embeddings.ndim != 2 or len(self.embeddings) == 0:
            raise ValueError(f"embeddings must be [R,D] with at least one row, got {list(self.embeddings.shape)}")
        if self.aggregation not in get_args(Aggregation):
            raise ValueError(f"aggregation {self.aggregation!r}; one of {', '.join(get_args(Aggregation))} works")

    def at(self, false_accept_rate: float) -> "Subject":
        """The same subject with the threshold for another false-accept rate in (0, 1); nothing is embedded again.

        Raises InputError when what was known at enrolment cannot state so small a rate, or nothing was.
        """
        if not self.known:
            raise InputError(
                f"false_accept_rate {false_accept_rate}: nothing is known to set it by; enroll the photos with "
                f"negatives (pictures of similar subjects), or with an encoder that carries a {BANK_FILE}"
            )
        first, *others = self.known
        return self._at_highest(
            first.threshold_at(false_accept_rate), *(o.threshold_near(false_accept_rate) for o in others)
        )

    def at_strictness(self, strictness: str) -> "Subject":
        """`at` for a rate in words, a key of `FALSE_ACCEPT_RATES`; where nothing is known to set it by, as enrolled."""
        if strictness not in FALSE_ACCEPT_RATES:
            raise InputError(f"strictness {strictness!r}: give {', '.join(FALSE_ACCEPT_RATES)}")
        return self.at(FALSE_ACCEPT_RATES[strictness]) if self.known else self

    def _at_highest(self, *found: tuple[float, ThresholdOrigin]) -> "Subject":
        threshold, origin = max(found, key=lambda pair: pair[0])
        return replace(self, threshold=threshold, origin=origin)

    @property
    def reference_scores(self) -> Tensor:
        """[R]: each reference's score against the others (NaN for a lone one), to be held against the threshold."""
        return leave_one_out_scores(self.embeddings, self.aggregation)

    def describe(self) -> str:
        """One line: the threshold, the error rates to expect, and which references would not reach it themselves."""
        below = int((self.reference_scores < self.threshold).sum())
        doubt = f"; {below} of {len(self.embeddings)} references score less against the others" if below else ""
        return f"threshold {self.threshold:.3f}: {self.origin}{doubt}"

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that differ when the references, their order or the aggregation do."""
        content = self.embeddings.contiguous().cpu().numpy().tobytes()
        return sha256(content + self.aggregation.encode()).hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        metadata = {"threshold": repr(float(self.threshold)), "aggregation": self.aggregation}
        metadata["origin"] = json.dumps(asdict(self.origin))
        tensors = {"embeddings": self.embeddings}
        metadata["known"] = json.dumps([{"source": k.source, "guaranteed": k.guaranteed} for k in self.known])
        for i, known in enumerate(self.known):
            tensors |= {f"impostor.{i}": known.impostor, f"genuine.{i}": known.genuine}
        write_atomically(path, save({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, metadata))

    @classmethod
    def load(cls, path: str | Path) -> "Subject":
        """Read what `save` wrote. Raises InputError when the file is missing or is no subject."""
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file; give a subject saved with Subject.save")
        try:
            tensors, metadata = _read_safetensors(path)
            known = tuple(
                KnownScores(impostor=tensors[f"impostor.{i}"], genuine=tensors[f"genuine.{i}"], **facts)
                for i, facts in enumerate(parse_json(metadata["known"]))
            )
            origin = ThresholdOrigin(**parse_json(metadata["origin"]))
            threshold, aggregation = float(metadata["threshold"]), metadata["aggregation"]
            return cls(tensors["embeddings"], threshold, aggregation, origin, known)  # type: ignore[arg-type]
        except (SafetensorError, KeyError, TypeError, ValueError):
            raise InputError(f"{path}: not a saved subject; give a file written by Subject.save") from None


def identity_scores(embeddings: Tensor, references: Tensor, aggregation: Aggregation = "mean") -> Tensor:
    """Unit rows [N,D], [R,D] -> score [N] in [-1, 1]; `aggregate` says what the aggregations are."""
    return aggregate(embeddings @ references.T, references @ references.T, aggregation)


def uncalibrated_threshold(references: Tensor, aggregation: Aggregation = "mean") -> float:
    """References [R,D] -> their mean score, each against the others, less `UNCALIBRATED_MARGIN`; error rates
    unknown.
    """
    if len(references) == 1:
        return SINGLE_REFERENCE_THRESHOLD
    return float(leave_one_out_scores(references, aggregation).mean()) - UNCALIBRATED_MARGIN


def save_calibration(bank: CalibrationBank, folder: str | Path) -> None:
    """Write a bank beside an encoder's weights, where `IdentityScorer.from_pretrained` finds it."""
    metadata = {"false_accept_rate": repr(bank.false_accept_rate), "aggregation": bank.aggregation}
    tensors = {name: tensor.contiguous().cpu() for name, tensor in bank.tensors().items()}
    write_atomically(Path(folder) / BANK_FILE, save(tensors, metadata))


def read_calibration(folder: str | Path) -> CalibrationBank | None:
    """The bank beside an encoder's weights, or None. Raises InputError when the file is damaged."""
    path = Path(folder) / BANK_FILE
    if not path.is_file():
        return None
    try:
        tensors, metadata = _read_safetensors(path)
        rate, aggregation = float(metadata["false_accept_rate"]), metadata["aggregation"]
        return CalibrationBank(**tensors, false_accept_rate=rate, aggregation=aggregation)  # type: ignore[arg-type]
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:  # not these fields, or damaged
        raise InputError(f"{path}: {error}; make it again, or remove it to go without a calibrated threshold") from None


def _read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
