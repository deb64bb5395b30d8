"""Pictures that a LoRA draws of its subject, and their identity, copies, adherence and diversity.

Letters: P prompts, S seeds, R references.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from nearid_personalize.batches import in_halves
from nearid_personalize.errors import InputError
from nearid_personalize.floors.adherence import TextImageEncoder
from nearid_personalize.floors.copies import CopyFloor, diversity
from nearid_personalize.guard.hooks import denoise

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from nearid_personalize.scorer.scorer import IdentityScorer
    from nearid_personalize.scorer.subject import Subject


_LIVING = (
    "a photo of {}",
    "a photo of {} on a sandy beach",
    "a photo of {} in deep snow",
    "a photo of {} in a busy street at night",
    "{} asleep on a red armchair",
    "{} wearing a yellow raincoat",
    "a close portrait of {} in front of a mountain lake",
    "an oil painting of {}",
)


_INANIMATE = (
    "a photo of {}",
    "a photo of {} on a sandy beach",
    "a photo of {} in deep snow",
    "a photo of {} on a wooden kitchen table",
    "{} floating in a swimming pool",
    "{} on a cobbled street with a bicycle behind it",
    "a close photo of {} on green moss",
    "an oil painting of {}",
)


_RESERVED = ("prompt", "generator", "latents", "num_images_per_prompt", "output_type", "return_dict")


def default_prompts(name: str, living: bool) -> tuple[str, ...]:
    """Validation prompts: the subject as it is, in new places, with something added, in another medium.

    name: what the LoRA calls the subject, e.g. "sks dog". living: an animal or a person, not a thing.
    """
    return tuple(prompt.format(name) for prompt in (_LIVING if living else _INANIMATE))


# --- drawing ---------------------------------------------------------------------------------------------------------
def draw_samples(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    max_batch_size: int = 8,
    **pipeline_kwargs: Any,
) -> list[list[Image.Image]]:
    """Draw every prompt from every seed -> pictures [P][S], each as the plain pipeline draws it with a CPU generator.

    max_batch_size: pictures denoised together, >= 1; halved for a batch that does not fit into memory. pipeline_kwargs:
    of the pipeline's call; a `negative_prompt` holds for all prompts.

    Raises InputError without prompts or seeds, and for arguments that are the grid's own.
    """
    for name in _RESERVED:
        if name in pipeline_kwargs:
            raise InputError(f"{name} cannot be passed on to the pipeline; give prompts and seeds")
    if not prompts or not seeds or max_batch_size < 1:
        raise InputError(
            f"got {len(prompts)} prompts, {len(seeds)} seeds, max_batch_size {max_batch_size}; give at least one each"
        )
    cells = [(prompt, seed) for prompt in prompts for seed in seeds]
    batches = (cells[start : start + max_batch_size] for start in range(0, len(cells), max_batch_size))
    flat: list[Image.Image] = []
    for batch in batches:
        for images in in_halves(partial(_draw, pipe, pipeline_kwargs), batch):
            flat += images
    return [flat[row * len(seeds) : (row + 1) * len(seeds)] for row in range(len(prompts))]


def _draw(pipe: DiffusionPipeline, arguments: Mapping[str, Any], cells: Sequence[tuple[str, int]]) -> list[Image.Image]:
    """Draw (prompt, seed) cells in one batch."""
    prompts = [prompt for prompt, _ in cells]
    # Pipelines want other prompts, the negative one say, as many as there are prompts
    others = {k: [v] * len(cells) if "prompt" in k and isinstance(v, str) else v for k, v in arguments.items()}
    generators = [torch.Generator("cpu").manual_seed(seed) for _, seed in cells]
    return list(denoise(pipe, {**others, "prompt": prompts}, generators).images)


# --- measuring -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class SampleScores:
    """Measures of a grid of pictures."""

    identity: Tensor
    """Float [P,S], cosines in [-1, 1]."""
    accepted: Tensor
    """Bool [P,S], identity reaches the subject's threshold."""
    copied: Tensor
    """Bool [P,S], repeats a reference photo."""
    adherence: Tensor | None
    """Float [P,S], cosine of picture and prompt; None without a text-image model."""
    diversity: float
    """Mean of `floors.diversity` over prompts, in [0, 2]; NaN for a single seed."""

    @property
    def identity_mean(self) -> float:
        """Mean identity over the grid, in [-1, 1]."""
        return float(self.identity.mean())

    @property
    def accept_rate(self) -> float:
        """Share of pictures that reach the threshold, in [0, 1]."""
        return float(self.accepted.double().mean())

    @property
    def copy_rate(self) -> float:
        """Share of pictures that repeat a reference photo, in [0, 1]."""
        return float(self.copied.double().mean())

    @property
    def adherence_mean(self) -> float | None:
        """Mean adherence over the grid, in [-1, 1]; None where it was not measured."""
        return None if self.adherence is None else float(self.adherence.mean())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the means, and under "samples" the grids as lists [P][S]; NaN becomes None."""
        grids = {name: getattr(self, name) for name in ("identity", "accepted", "copied", "adherence")}
        return {
            "identity": self.identity_mean,
            "accept_rate": self.accept_rate,
            "copy_rate": self.copy_rate,
            "adherence": self.adherence_mean,
            "diversity": None if self.diversity != self.diversity else self.diversity,
            "samples": {name: None if grid is None else grid.tolist() for name, grid in grids.items()},
        }


def measure_samples(
    images: Sequence[Sequence[Image.Image]],
    prompts: Sequence[str],
    scorer: IdentityScorer,
    subject: Subject,
    references: Sequence[Image.Image],
    text_image: TextImageEncoder | None = None,
) -> SampleScores:
    """Measure pictures [P][S] drawn for `prompts` against a subject and its reference photos.

    prompts: for the text-image model, best without the rare token. references: photos, for telling copies.

    Raises InputError without pictures, for rows of different lengths, or one prompt too many or few.
    """
    widths = {len(row) for row in images}
    if len(images) != len(prompts) or len(widths) != 1 or 0 in widths:
        raise InputError(
            f"images: rows of {sorted(widths)} pictures for {len(prompts)} prompts; give one full row each"
        )
    flat = [image for row in images for image in row]
    shape = (len(images), len(images[0]))
    identity = scorer.score(flat, subject).view(shape)
    copies = CopyFloor.from_references(references)
    nearest = copies.similarities(flat).amax(dim=1).view(shape)
    spread = torch.tensor([diversity(row) for row in images])
    return SampleScores(
        identity=identity,
        accepted=identity >= subject.threshold,
        copied=nearest >= copies.limit,
        adherence=None if text_image is None else adherence(images, prompts, text_image),
        diversity=float(spread.mean()),
    )


def adherence(images: Sequence[Sequence[Image.Image]], prompts: Sequence[str], text_image: TextImageEncoder) -> Tensor:
    """Pictures [P][S] -> cosine of each with its row's prompt, float [P,S]."""
    pictures = text_image.embed_images([image for row in images for image in row])  # [P*S,D]
    texts = text_image.embed_texts(prompts)  # [P,D]
    return torch.einsum("psd,pd->ps", pictures.view(len(prompts), -1, texts.shape[1]), texts)
