"""Generate candidates with a diffusers pipeline, keep those that show the subject.

`guard(prompt, ...)` stands where `pipe(prompt, ...)` stood: `result.images` holds the accepted images, best first.
Candidate `k` under `seed=s` is the image the plain pipeline makes from generator seed `s + k`, up to floating-point
rounding and whatever the batch size, because every candidate owns its generator.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from nearid_personalize.errors import InputError
from nearid_personalize.selection import Verdict, best_accepted, rank_candidates

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image

    from nearid_personalize.scorer import IdentityScorer, Subject

Status = Literal["accepted", "rejected", "stopped", "duplicate"]

# Pipeline arguments that would break "one seed, one candidate", with what to do instead.
RESERVED_ARGUMENTS = {
    "generator": "pass seed=, each candidate gets its own generator",
    "latents": "pass seed=, each candidate draws its own latents",
    "num_images_per_prompt": "pass num_images= and num_candidates=",
    "prompt_embeds": "pass the prompt as a string",
}


@dataclass(frozen=True)
class Candidate:
    """One generated image and what became of it.

    `score` is a cosine in [-1, 1]; `stopped_at_step` and a missing `image` belong to status "stopped" alone.
    """

    seed: int
    score: float
    status: Status
    stopped_at_step: int | None
    image: Image.Image | None
    reason: str


@dataclass(frozen=True)
class Cost:
    """Compute spent: rows (samples) that went through the denoiser, with CFG two per candidate and step.

    `denoiser_rows_best_of_n` is what running every candidate to the end takes; `seconds` is wall time by stage.
    """

    denoiser_rows: int
    denoiser_rows_best_of_n: int
    seconds: dict[str, float]


@dataclass(frozen=True)
class GuardResult:
    """`images`: accepted, best first, at most `num_images`; `candidates`: all of them, in seed order."""

    images: list[Image.Image]
    candidates: tuple[Candidate, ...]
    cost: Cost
    threshold: float
    prompt: str
    seed: int

    @property
    def ranked(self) -> tuple[Candidate, ...]:
        """Every candidate, best score first."""
        ranking = rank_candidates([candidate.score for candidate in self.candidates], self.threshold)
        return tuple(self.candidates[verdict.index] for verdict in ranking)

    @property
    def accepted(self) -> tuple[Candidate, ...]:
        """Accepted candidates, best first, also those beyond `num_images`."""
        return tuple(candidate for candidate in self.ranked if candidate.status == "accepted")

    @property
    def rejected(self) -> tuple[Candidate, ...]:
        """Rejected candidates, best first."""
        return tuple(candidate for candidate in self.ranked if candidate.status == "rejected")

    @property
    def best(self) -> Candidate:
        """The highest score, accepted or not."""
        return self.ranked[0]


class RowCounter:
    """Counts the rows that a denoiser has been called with."""

    def __init__(self) -> None:
        self.rows = 0

    def hook(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: the noisy sample is the first argument, or goes by its diffusers name."""
        sample = args[0] if args else kwargs["hidden_states" if "hidden_states" in kwargs else "sample"]
        self.rows += len(sample)


@contextmanager
def counted_rows(denoiser: torch.nn.Module) -> Iterator[RowCounter]:
    """Count denoiser rows inside the block; the hook comes off again, also on an exception."""
    counter = RowCounter()
    handle = denoiser.register_forward_pre_hook(counter.hook, with_kwargs=True)
    try:
        yield counter
    finally:
        handle.remove()


def find_denoiser(pipe: DiffusionPipeline) -> torch.nn.Module:
    """Return the pipeline's `unet` or `transformer`; InputError when it has neither."""
    for name in ("unet", "transformer"):
        if isinstance(module := getattr(pipe, name, None), torch.nn.Module):
            return module
    raise InputError(f"pipe {type(pipe).__name__} has neither a unet nor a transformer; use a text-to-image pipeline")


def generate_candidates(
    pipe: DiffusionPipeline,
    prompt: str,
    seeds: Sequence[int],
    max_batch_size: int,
    pipeline_kwargs: dict[str, Any],
) -> list[Image.Image]:
    """Run one image per seed to the end, in batches of at most `max_batch_size`."""
    images: list[Image.Image] = []
    for start in range(0, len(seeds), max_batch_size):
        # CPU generators: the same seed is the same noise on every device
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds[start : start + max_batch_size]]
        output = pipe(prompt, num_images_per_prompt=len(generators), generator=generators, **pipeline_kwargs)
        images.extend(output.images)
    return images


class IdentityGuard:
    """An ordinary text-to-image pipeline with an eye for one subject.

    Args:
        pipe: diffusers pipeline, LoRA loaded or not; it is left as it was found.
        scorer: compares images with `subject`.
        subject: from `scorer.enroll(photos)`; its threshold decides who is accepted.
        max_batch_size: candidates denoised together, >= 1: memory against speed, the images stay the same.
    """

    def __init__(
        self, pipe: DiffusionPipeline, scorer: IdentityScorer, subject: Subject, max_batch_size: int = 8
    ) -> None:
        if max_batch_size < 1:
            raise InputError(f"max_batch_size must be at least 1, got {max_batch_size}")
        self.pipe = pipe
        self.scorer = scorer
        self.subject = subject
        self.max_batch_size = max_batch_size
        self.denoiser = find_denoiser(pipe)

    def __call__(
        self,
        prompt: str,
        num_images: int = 4,
        num_candidates: int | None = None,
        seed: int = 0,
        **pipeline_kwargs: Any,
    ) -> GuardResult:
        """Draw `num_candidates` (default `4 * num_images`), return the accepted ones, at most `num_images`.

        Other keyword arguments go to the pipeline untouched. Raises InputError for arguments that cannot work.
        """
        num_candidates = 4 * num_images if num_candidates is None else num_candidates
        check_call(prompt, num_images, num_candidates, seed, pipeline_kwargs)
        seeds = range(seed, seed + num_candidates)

        started = time.perf_counter()
        with counted_rows(self.denoiser) as counter:
            images = generate_candidates(self.pipe, prompt, seeds, self.max_batch_size, pipeline_kwargs)
        generated = time.perf_counter()
        scores = self.scorer.score(images, self.subject)
        seconds = {"generate": generated - started, "score": time.perf_counter() - generated}

        ranking = rank_candidates(scores, self.subject.threshold)
        by_seed = sorted(ranking, key=lambda verdict: verdict.index)
        return GuardResult(
            images=[images[verdict.index] for verdict in best_accepted(ranking, num_images)],
            candidates=tuple(to_candidate(verdict, seeds[verdict.index], images[verdict.index]) for verdict in by_seed),
            cost=Cost(counter.rows, counter.rows, seconds),
            threshold=self.subject.threshold,
            prompt=prompt,
            seed=seed,
        )


def to_candidate(verdict: Verdict, seed: int, image: Image.Image) -> Candidate:
    """Join a verdict with the candidate it is about."""
    status: Status = "accepted" if verdict.accepted else "rejected"
    return Candidate(seed, verdict.score, status, None, image, verdict.reason)


def check_call(prompt: str, num_images: int, num_candidates: int, seed: int, pipeline_kwargs: dict[str, Any]) -> None:
    """Raise InputError, naming the argument, for a call that cannot keep the guard's promises."""
    if not isinstance(prompt, str):
        raise InputError(f"prompt must be one string, got {type(prompt).__name__}; call the guard once per prompt")
    if num_images < 1:
        raise InputError(f"num_images must be at least 1, got {num_images}")
    if num_candidates < num_images:
        raise InputError(f"num_candidates must be at least num_images ({num_images}), got {num_candidates}")
    if seed < 0:
        raise InputError(f"seed must be 0 or more, got {seed}")
    for name, advice in RESERVED_ARGUMENTS.items():
        if name in pipeline_kwargs:
            raise InputError(f"{name} cannot be passed through the guard; {advice}")
    if pipeline_kwargs.get("output_type", "pil") != "pil":
        raise InputError(f"output_type must be 'pil', got {pipeline_kwargs['output_type']!r}")
    if not pipeline_kwargs.get("return_dict", True):
        raise InputError("return_dict must be True; the guard returns a GuardResult")
