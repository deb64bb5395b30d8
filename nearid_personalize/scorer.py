"""IdentityScorer: how much pictures look like one subject, told by its reference photos.

Scores are cosines in [-1, 1], larger = more alike. Shape letters: N pictures, R references, D width.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nearid_personalize.calibration import Calibration
from nearid_personalize.encoder import NearIDModel, Preprocessing, load_encoder
from nearid_personalize.errors import InputError
from nearid_personalize.images import ImageSource, list_images, load_images, preprocess, write_atomically
from nearid_personalize.selection import Verdict, rank_candidates

Aggregation = Literal["mean", "max", "centroid"]
Images = ImageSource | Sequence[ImageSource]
"""A folder, a picture, a sequence of pictures, or a tensor [N,3,H,W]: uint8, or float in [0, 1]."""

UNCALIBRATED_MARGIN = 0.1
"""How far below the references' own likeness a picture may score when nothing was calibrated. A guess, not measured."""
SINGLE_REFERENCE_THRESHOLD = 0.7
"""The uncalibrated threshold for a lone reference, whose own likeness cannot be told. A guess, not measured."""


@dataclass(frozen=True, eq=False)
class Subject:
    """One enrolled subject.

    embeddings: float32 [R,D], unit rows, one per reference. threshold: the smallest accepted score. aggregation: how
    cosines with several references become one score, see `identity_scores`.
    """

    embeddings: Tensor
    threshold: float
    aggregation: Aggregation = "mean"

    def __post_init__(self) -> None:
        if self.embeddings.ndim != 2 or len(self.embeddings) == 0:
            raise ValueError(f"embeddings must be [R,D] with at least one row, got {list(self.embeddings.shape)}")
        if self.aggregation not in get_args(Aggregation):
            raise ValueError(f"aggregation {self.aggregation!r}; one of {', '.join(get_args(Aggregation))} works")

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        metadata = {"threshold": repr(float(self.threshold)), "aggregation": self.aggregation}
        write_atomically(path, save({"embeddings": self.embeddings.contiguous().cpu()}, metadata))

    @classmethod
    def load(cls, path: str | Path) -> "Subject":
        """Read what `save` wrote. Raises InputError when the file is missing or is no subject."""
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file; give a subject saved with Subject.save")
        try:
            with safe_open(path, framework="pt") as file:
                metadata: dict[str, Any] = file.metadata() or {}
                return cls(file.get_tensor("embeddings"), float(metadata["threshold"]), metadata["aggregation"])
        except (SafetensorError, KeyError, ValueError):
            raise InputError(f"{path}: not a saved subject; give a file written by Subject.save") from None


@dataclass(frozen=True)
class Ranking:
    """Verdicts on pictures, best first: each has `index` (place in the input), `score`, `accepted`, `reason`."""

    entries: tuple[Verdict, ...]

    @property
    def accepted(self) -> tuple[Verdict, ...]:
        """Those that reach the subject's threshold, best first."""
        return tuple(entry for entry in self.entries if entry.accepted)

    @property
    def rejected(self) -> tuple[Verdict, ...]:
        """The others, best first; `reason` says why."""
        return tuple(entry for entry in self.entries if not entry.accepted)

    def __iter__(self) -> Iterator[Verdict]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def identity_scores(embeddings: Tensor, references: Tensor, aggregation: Aggregation = "mean") -> Tensor:
    """Unit rows [N,D], [R,D] -> score [N] in [-1, 1].

    mean: the mean cosine over references; max: the cosine with the nearest; centroid: the cosine with their mean.
    """
    if aggregation == "centroid":
        return (embeddings @ F.normalize(references.mean(dim=0), dim=0)).clamp(-1, 1)
    cosines = embeddings @ references.T  # [N,R]
    scores = cosines.amax(dim=1) if aggregation == "max" else cosines.mean(dim=1)
    return scores.clamp(-1, 1)  # rounding can carry a cosine of equal vectors past 1


def uncalibrated_threshold(references: Tensor, aggregation: Aggregation = "mean") -> float:
    """References [R,D] -> their mean score, each against the others, less `UNCALIBRATED_MARGIN`.

    Nothing is known of its error rates: it says "almost as alike as the references are among themselves", and so
    depends on how varied the photos are. Calibrate the scorer where accepting wrongly costs something.
    """
    if len(references) == 1:
        return SINGLE_REFERENCE_THRESHOLD
    own = []
    for i in range(len(references)):
        others = torch.cat([references[:i], references[i + 1 :]])
        own.append(identity_scores(references[i : i + 1], others, aggregation))
    return float(torch.cat(own).mean()) - UNCALIBRATED_MARGIN


class IdentityScorer:
    """Embeds pictures, enrols a subject, scores and ranks pictures against it.

    Args:
        model: any `NearIDModel`; moved to `device`, its trunk cast to `dtype` (the head stays float32).
        image_size, image_mean, image_std: how its pictures are prepared: side in pixels, and per-channel values for
            pixels in [0, 1].
        calibration: the accept threshold of enrolled subjects; without one `uncalibrated_threshold` is used.
        batch_size: pictures embedded at once.
    """

    def __init__(
        self,
        model: NearIDModel,
        image_size: int,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        calibration: Calibration | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_size: int = 64,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model = model.to(device=device, dtype=dtype).eval()
        self.model.head.float()
        self.image_size, self.image_mean, self.image_std = image_size, tuple(image_mean), tuple(image_std)
        self.calibration, self.batch_size = calibration, batch_size

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "IdentityScorer":
        """Load a checkpoint: a folder, a Hub id, or "miniworld", the built-in one for the toy world.

        A SigLIP checkpoint works too and gives the frozen backbone's own likeness, not identity. A `calibration.json`
        beside the weights sets the accept threshold.

        Raises InputError when the checkpoint cannot be found or read.
        """
        if str(name_or_folder) == "miniworld":
            from nearid_personalize.miniworld import weights_dir  # the toy world's code is not needed otherwise

            name_or_folder = weights_dir("nearid")
        model, preprocessing, folder = load_encoder(name_or_folder, dtype)
        return cls(
            model,
            preprocessing.size,
            preprocessing.mean,
            preprocessing.std,
            _read_calibration(folder / "calibration.json"),
            device,
            dtype,
        )

    @property
    def preprocessing(self) -> Preprocessing:
        """How pictures become pixel values."""
        return Preprocessing(self.image_size, self.image_mean, self.image_std)

    @torch.no_grad()
    def embed(self, images: Images) -> Tensor:
        """Pictures -> float32 [N,D] of unit length, on the CPU, whatever the batch size."""
        embeddings = []
        for batch in _batches(images, self.batch_size):
            pixels = preprocess(batch, self.image_size, self.image_mean, self.image_std, self.model.device)
            embeddings.append(F.normalize(self.model.get_image_features(pixels), dim=-1).cpu())
        return torch.cat(embeddings)

    def enroll(self, photos: Images, aggregation: Aggregation | None = None) -> Subject:
        """Reference photos -> Subject. `aggregation` is the calibration's unless given, and "mean" without one.

        The calibration's threshold holds for its own aggregation only; under another the uncalibrated one is used.
        """
        references = self.embed(photos)
        chosen = aggregation or (self.calibration.aggregation if self.calibration else "mean")
        if self.calibration and self.calibration.aggregation == chosen:
            return Subject(references, self.calibration.threshold, chosen)  # type: ignore[arg-type]
        return Subject(references, uncalibrated_threshold(references, chosen), chosen)  # type: ignore[arg-type]

    def score(self, images: Images, subject: Subject) -> Tensor:
        """Pictures -> float32 [N] in [-1, 1]. Raises InputError when the subject was enrolled with another model."""
        embeddings = self.embed(images)
        if embeddings.shape[1] != subject.embeddings.shape[1]:
            raise InputError(
                f"subject: embeddings of width {subject.embeddings.shape[1]}, this model makes {embeddings.shape[1]}; "
                "enroll the photos again with this scorer"
            )
        return identity_scores(embeddings, subject.embeddings, subject.aggregation)

    def rank(self, images: Images, subject: Subject) -> Ranking:
        """Score pictures and put them best first; those below the subject's threshold are rejected."""
        return Ranking(rank_candidates(self.score(images, subject), subject.threshold))


def _batches(images: Images, size: int) -> Iterator[Any]:
    """Pictures a batch at a time, so that a folder of large photos is never decoded all at once."""
    if isinstance(images, Tensor) and images.ndim == 4:
        if len(images) == 0:
            raise InputError("images: an empty tensor; give at least one picture")
        yield from images.split(size)
        return
    if isinstance(images, str | Path) and Path(images).is_dir():
        images = list_images(images)
    if isinstance(images, Sequence) and not isinstance(images, str | bytes) and len(images) > 0:
        for start in range(0, len(images), size):
            yield load_images(images[start : start + size])
    else:
        loaded = load_images(images)
        yield from (loaded[start : start + size] for start in range(0, len(loaded), size))


def _read_calibration(path: Path) -> Calibration | None:
    if not path.is_file():
        return None
    try:
        calibration = Calibration.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, AttributeError) as error:  # not JSON, not an object, or not these fields
        raise InputError(f"{path}: {error}; write it from Calibration.to_dict, or remove it") from None
    if calibration.aggregation not in get_args(Aggregation):
        known = ", ".join(get_args(Aggregation))
        raise InputError(f"{path}: aggregation {calibration.aggregation!r}; one of {known} works")
    return calibration
