"""A finished LoRA's report card: how often it draws its subject, by prompt, scale and checkpoint.

Every checkpoint is drawn at every scale from the same prompts and seeds, and once without a LoRA. Pictures are
judged as the guard judges candidates: identity at the subject's threshold, then floors.
"""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from PIL import Image
from tqdm import tqdm

from nearid_personalize.errors import InputError
from nearid_personalize.floors.base import first_failures
from nearid_personalize.lora.samples import SampleScores, default_prompts, draw_samples, measure_samples
from nearid_personalize.metrics import wilson_interval
from nearid_personalize.report import finite_or_none

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from nearid_personalize.floors.adherence import TextImageEncoder
    from nearid_personalize.floors.base import Floor
    from nearid_personalize.scorer.scorer import IdentityScorer
    from nearid_personalize.scorer.subject import Subject


WITHOUT = "without a LoRA"


THUMBNAIL = 288
"""Longest side of a picture in the report, pixels."""


Interval: TypeAlias = tuple[float, float]


# --- what is measured ------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Shot:
    """One picture."""

    prompt: str
    seed: int
    score: float
    """Cosine in [-1, 1]."""
    reason: str
    """Why it was not accepted, "" when it was."""
    copied: bool
    jpeg: bytes = field(repr=False)
    """Its thumbnail."""

    @property
    def accepted(self) -> bool:
        """Whether the guard would hand it out."""
        return not self.reason

    @property
    def image(self) -> Image.Image:
        """The thumbnail, decoded."""
        return Image.open(BytesIO(self.jpeg)).convert("RGB")

    @property
    def source(self) -> str:
        """The thumbnail as a data URI."""
        return data_uri(self.jpeg)


@dataclass(frozen=True, eq=False)
class Cell:
    """One checkpoint at one scale."""

    checkpoint: str
    scale: float
    shots: tuple[Shot, ...]
    """In the order of prompts, then seeds."""
    adherence: float | None
    """Mean cosine of pictures and prompts, None where not measured."""
    diversity: float
    """As `SampleScores.diversity`."""

    @cached_property
    def identity(self) -> float:
        """Mean score, in [-1, 1]."""
        return sum(shot.score for shot in self.shots) / len(self.shots)

    @property
    def num_accepted(self) -> int:
        """How many of the pictures were accepted."""
        return sum(shot.accepted for shot in self.shots)

    @property
    def rate(self) -> float:
        """Share of pictures that were accepted, in [0, 1]."""
        return self.num_accepted / len(self.shots)

    @property
    def copy_rate(self) -> float:
        """Share of pictures that repeat a reference photo, in [0, 1]."""
        return sum(shot.copied for shot in self.shots) / len(self.shots)

    @property
    def rate_interval(self) -> Interval:
        """95 % interval of `rate`."""
        return wilson_interval(self.num_accepted, len(self.shots))

    @property
    def candidates(self) -> float:
        """Pictures to draw for each accepted one, >= 1; infinite when none was accepted."""
        return 1 / self.rate if self.num_accepted else math.inf

    @property
    def candidates_interval(self) -> Interval:
        """95 % interval of `candidates`."""
        low, high = self.rate_interval
        return 1 / high, 1 / low if low > 0 else math.inf

    def of_prompt(self, prompt: str) -> "Cell":
        """The cell of one prompt's pictures alone."""
        shots = tuple(shot for shot in self.shots if shot.prompt == prompt)
        return Cell(self.checkpoint, self.scale, shots, None, math.nan)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN and infinity are None."""
        values: dict[str, Any] = {"checkpoint": self.checkpoint, "scale": self.scale, "num_images": len(self.shots)}
        for name in ("identity", "rate", "candidates", "copy_rate", "diversity"):
            values[name] = finite_or_none(getattr(self, name))
        for name in ("rate_interval", "candidates_interval"):
            values[name] = [finite_or_none(end) for end in getattr(self, name)]
        shots = [{k: v for k, v in asdict(shot).items() if k != "jpeg"} for shot in self.shots]
        return values | {"accepted": self.num_accepted, "adherence": self.adherence, "images": shots}


@dataclass(frozen=True, eq=False)
class ReportCard:
    """What a subject's LoRA draws."""

    subject_name: str
    cells: tuple[Cell, ...]
    """Of all checkpoints and scales."""
    base: Cell
    """The same pictures without a LoRA."""
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    threshold: float
    threshold_note: str
    """How the threshold was set."""
    references: tuple[bytes, ...] = field(repr=False)
    reference_scores: tuple[float | None, ...]
    """Each reference against the others, None for a lone one."""

    @cached_property
    def best(self) -> Cell:
        """The cell with the most accepted pictures, of equals the one with the highest identity, then scale near 1."""
        return max(self.cells, key=lambda cell: (cell.num_accepted, round(cell.identity, 3), -abs(cell.scale - 1)))

    @cached_property
    def rivals(self) -> tuple[Cell, ...]:
        """Other cells whose accepted share lies within the best one's interval."""
        others = (cell for cell in self.cells if cell is not self.best)
        return tuple(cell for cell in others if cell.num_accepted and cell.rate >= self.best.rate_interval[0])

    @cached_property
    def checkpoints(self) -> tuple[str, ...]:
        """Names of the checkpoints, in the order drawn."""
        return tuple(dict.fromkeys(cell.checkpoint for cell in self.cells))

    @cached_property
    def scales(self) -> tuple[float, ...]:
        """The scales, in the order drawn."""
        return tuple(dict.fromkeys(cell.scale for cell in self.cells))

    def cell(self, checkpoint: str, scale: float) -> Cell:
        """The cell of a checkpoint at a scale."""
        return next(cell for cell in self.cells if (cell.checkpoint, cell.scale) == (checkpoint, scale))

    def summary(self) -> str:
        """A line for each checkpoint and scale, then the verdict."""
        width = max(len(cell.checkpoint) for cell in (self.base, *self.cells))
        lines = [f"{'checkpoint':{width}}  scale  accepted  identity  to draw for each kept"]
        for cell in (self.base, *self.cells):
            accepted, mark = f"{cell.num_accepted}/{len(cell.shots)}", " *" if cell is self.best else ""
            start = f"{cell.checkpoint:{width}}  {cell.scale:>5g}  {accepted:>8}  {cell.identity:>8.3f}"
            lines.append(f"{start}  {cost_in_words(cell)}{mark}")
        return "\n".join([*lines, verdict(self)])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        best = self.best.to_dict()
        del best["images"]
        return {
            "subject": self.subject_name,
            "threshold": self.threshold,
            "threshold_origin": self.threshold_note,
            "reference_scores": list(self.reference_scores),
            "prompts": list(self.prompts),
            "seeds": list(self.seeds),
            "best": best,
            "without_lora": self.base.to_dict(),
            "cells": [cell.to_dict() for cell in self.cells],
        }


# --- drawing ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class SampleJudge:
    """All that judges pictures. token: the LoRA's rare word, which a text-image model does not know."""

    scorer: "IdentityScorer"
    subject: "Subject"
    references: Sequence[Image.Image]
    floors: "Sequence[Floor]" = ()
    text_image: "TextImageEncoder | None" = None
    token: str = ""

    def judge(
        self, images: Sequence[Sequence[Image.Image]], prompts: Sequence[str]
    ) -> tuple[SampleScores, list[list[str]]]:
        """Pictures [P][S] -> their measures and reasons [P][S], "" for those accepted."""
        plain = [" ".join(word for word in prompt.split() if word != self.token) for prompt in prompts]
        scores = measure_samples(images, plain, self.scorer, self.subject, self.references, self.text_image)
        reasons = [self._reasons(row, prompt, found) for row, prompt, found in zip(images, plain, scores.identity)]
        return scores, reasons

    def _reasons(self, images: Sequence[Image.Image], prompt: str, scores: torch.Tensor) -> list[str]:
        threshold = self.subject.threshold
        reasons = first_failures(self.floors, images, prompt)
        for place, score in enumerate(scores.tolist()):
            if score < threshold:  # comes before what a floor says
                reasons[place] = f"identity {score:.3f} < {threshold:.3f}"
        return reasons


def report_card(
    pipe: "DiffusionPipeline",
    loras: Mapping[str, Path],
    sample_judge: SampleJudge,
    subject_name: str,
    scales: Sequence[float] = (0.6, 0.8, 1.0, 1.2),
    prompts: Sequence[str] = (),
    num_seeds: int = 4,
    max_batch_size: int = 8,
    progress: bool = True,
    **pipeline_kwargs: Any,
) -> ReportCard:
    """Draw and judge every LoRA at every scale; `pipe` is as before afterwards.

    loras: files by name, see `find_loras`. prompts: `default_prompts` of `subject_name` unless given. num_seeds:
    pictures for each prompt, from seeds 0, 1, ...

    Raises InputError for a LoRA that does not fit `pipe`, and without LoRAs or scales.
    """
    from nearid_personalize.lora.files import check_lora_file

    if not loras or not scales:
        raise InputError(f"{len(loras)} LoRAs at {len(scales)} scales; give at least one of each")
    for file in loras.values():
        check_lora_file(file, pipe)
    prompts = tuple(prompts) or default_prompts(subject_name, living=True)
    seeds = tuple(range(num_seeds))
    grid = _Grid(pipe, sample_judge, prompts, seeds, max_batch_size, pipeline_kwargs)
    with tqdm(total=(1 + len(loras) * len(scales)), desc="draw", unit="sheet", disable=not progress) as bar:
        base = grid.cell(WITHOUT, 0.0, bar)
        cells = [cell for name, file in loras.items() for cell in grid.cells(name, file, scales, bar)]
    own = sample_judge.subject.reference_scores.tolist()
    return ReportCard(
        subject_name=subject_name,
        cells=tuple(cells),
        base=base,
        prompts=prompts,
        seeds=seeds,
        threshold=sample_judge.subject.threshold,
        threshold_note=str(sample_judge.subject.origin),
        references=tuple(thumbnail(image) for image in sample_judge.references),
        reference_scores=tuple(finite_or_none(score) for score in own),
    )


@dataclass(frozen=True, eq=False)
class _Grid:
    """What is drawn alike for every checkpoint and scale."""

    pipe: "DiffusionPipeline"
    sample_judge: SampleJudge
    prompts: Sequence[str]
    seeds: Sequence[int]
    max_batch_size: int
    pipeline_kwargs: Mapping[str, Any]

    def cells(self, name: str, file: Path, scales: Sequence[float], bar: Any) -> list[Cell]:
        """One LoRA at every scale; it is unloaded again."""
        from nearid_personalize.lora.files import load_lora

        adapter = "report_card"
        load_lora(self.pipe, file, adapter)
        drawn = []
        try:
            for scale in scales:
                self.pipe.set_adapters([adapter], [scale])
                drawn.append(self.cell(name, scale, bar))
        finally:
            self.pipe.delete_adapters(adapter)
        return drawn

    def cell(self, checkpoint: str, scale: float, bar: Any) -> Cell:
        """Draw and judge one grid with the pipeline as it is."""
        bar.set_postfix_str(f"{checkpoint} at {scale:g}" if scale else checkpoint)
        images = draw_samples(self.pipe, self.prompts, self.seeds, self.max_batch_size, **self.pipeline_kwargs)
        scores, reasons = self.sample_judge.judge(images, self.prompts)
        shots = tuple(
            Shot(
                prompt,
                seed,
                float(scores.identity[row, column]),
                reasons[row][column],
                bool(scores.copied[row, column]),
                thumbnail(images[row][column]),
            )
            for row, prompt in enumerate(self.prompts)
            for column, seed in enumerate(self.seeds)
        )
        bar.update()
        return Cell(checkpoint, scale, shots, scores.adherence_mean, scores.diversity)


def thumbnail(image: Image.Image) -> bytes:
    """A small JPEG; pictures that are small already keep their size."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = BytesIO()
    small.save(buffer, format="JPEG", quality=88, optimize=True)
    return buffer.getvalue()


def data_uri(jpeg: bytes) -> str:
    """A JPEG as it stands in an HTML file."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def times(count: float) -> str:
    """How many candidates: "1.3", "12", "∞"."""
    return "∞" if math.isinf(count) else f"{count:.1f}" if count < 9.95 else f"{count:.0f}"


def cost_in_words(cell: Cell) -> str:
    """Candidates for each accepted picture, with their 95 % interval."""
    low, high = cell.candidates_interval
    if not cell.num_accepted:
        return f"more than {times(low)}"
    return f"{times(cell.candidates)} ({times(low)} to {times(high)})"


def verdict(card: ReportCard) -> str:
    """The best cell in one plain sentence."""
    best = card.best
    if not best.num_accepted:
        return f"None of the {len(best.shots)} pictures at any setting shows the subject of the photos."
    needed = f"draw about {times(best.candidates)} for each picture you keep" if best.rate < 1 else "keep them all"
    where = f" of {best.checkpoint}" if len(card.checkpoints) > 1 else ""
    return f"{best.num_accepted} of {len(best.shots)} pictures{where} at scale {best.scale:g} are accepted: {needed}."
