"""Generate candidates with a diffusers pipeline, keep those that show the subject, stop hopeless ones early.

`guard(prompt, ...)` stands where `pipe(prompt, ...)` stood: `result.images` holds the accepted images, best first.
Candidate `k` under `seed=s` is the image the plain pipeline makes from generator seed `s + k`, up to floating-point
rounding and whatever the batch size or whoever was stopped beside it, because every candidate owns its generator.
"""

from __future__ import annotations

import inspect
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from nearid_personalize.denoising import (
    Denoised,
    Moment,
    as_pixels,
    can_batch,
    can_race,
    denoise,
    find_denoiser,
    steps_at,
)
from nearid_personalize.errors import InputError
from nearid_personalize.floors import Floor, near_duplicates
from nearid_personalize.selection import (
    DEFAULT_POLICY,
    PreviewProfile,
    StoppingPolicy,
    needs_previews,
    next_wave,
    verdict_on,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL import Image

    from nearid_personalize.scorer import IdentityScorer, Subject

Status = Literal["accepted", "rejected", "stopped", "duplicate"]

STEP_FRACTIONS = (0.3, 0.5, 0.7)
"""When a policy that does not say is asked."""

# Pipeline arguments that would break "one seed, one candidate", with what to do instead.
RESERVED_ARGUMENTS = {
    "generator": "pass seed=, each candidate gets its own generator",
    "latents": "pass seed=, each candidate draws its own latents",
    "num_images_per_prompt": "pass num_images= and num_candidates=",
    "denoising_end": "identity is told from finished pictures; refine result.images in a second call instead",
}

HARMLESS_VALUES = {"num_images_per_prompt": (None, 1)}
"""What a reserved argument may be all the same; None where nothing stands here: it means the pipeline's default."""

BLACKENED = "blackened by the safety checker"


class NothingAcceptedWarning(UserWarning):
    """No candidate was accepted, so that the result holds no images."""


@dataclass(frozen=True)
class Candidate:
    """One generated image and what became of it.

    score: cosine in [-1, 1]: of the image, or of the last preview when it was stopped. NaN: nothing was scored, as when
    a safety checker replaced the image by a black one.
    stopped_at_step: finished denoising steps, for status "stopped" alone, which has no `image`. previews: score of the
    predicted clean picture by step fraction in (0, 1). last_preview: what a stopped candidate looked like.
    """

    seed: int
    score: float
    status: Status
    stopped_at_step: int | None
    image: Image.Image | None
    reason: str
    previews: Mapping[float, float] = field(default_factory=dict)
    last_preview: Image.Image | None = None


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
    """What came of a call: `images` are accepted, best first, at most `num_images`; `candidates` are in seed order."""

    images: Any
    candidates: tuple[Candidate, ...]
    cost: Cost
    threshold: float
    prompt: str
    seed: int

    @property
    def ranked(self) -> tuple[Candidate, ...]:
        """Every candidate, best first: accepted, duplicates, rejected (a failed floor last), stopped."""
        return tuple(sorted(self.candidates, key=lambda c: _rank(c, self.threshold)))

    @property
    def accepted(self) -> tuple[Candidate, ...]:
        """Accepted candidates, best first, also those beyond `num_images`."""
        return tuple(candidate for candidate in self.ranked if candidate.status == "accepted")

    @property
    def rejected(self) -> tuple[Candidate, ...]:
        """Rejected candidates, best first; `reason` says why."""
        return tuple(candidate for candidate in self.ranked if candidate.status == "rejected")

    @property
    def best(self) -> Candidate:
        """The best candidate, accepted or not."""
        return self.ranked[0]


@dataclass(frozen=True)
class Glimpse:
    """A race while it runs, as `watch` sees it.

    step, num_steps: finished denoising steps of the batch under way, of how many. looks: by seed, how those still in it
    looked and scored at their last preview; None, NaN before there was one. candidates: those finished or stopped.
    """

    step: int
    num_steps: int
    looks: Mapping[int, tuple[Image.Image | None, float]]
    candidates: tuple[Candidate, ...]


Watch = Callable[[Glimpse], None]
"""Told after every denoising step; what it raises breaks the call off and leaves the pipeline as it was found."""


class GuardResults(tuple[GuardResult, ...]):
    """One result per prompt of a list; `images` puts theirs one after another, as a pipeline does."""

    @property
    def images(self) -> Any:
        """The accepted images of all prompts, flat: those of the first prompt, then those of the second, and so on.

        A prompt may have fewer than `num_images`. Which images belong to which prompt is told by each result.
        """
        flat = [image for result in self for image in result.images]
        return _joined(flat) if flat else self[0].images


class IdentityGuard:
    """An ordinary text-to-image pipeline with an eye for one subject.

    Args:
        pipe: diffusers pipeline, LoRA loaded or not; it is left as it was found.
        scorer: compares images with `subject`.
        subject: from `scorer.enroll(photos)`; its threshold decides who is accepted.
        max_batch_size: the most candidates denoised together, >= 1: memory against speed, the images stay the same.
            Batches are even: 17 candidates run as 6, 6 and 5 rather than 8, 8 and 1. It is halved by itself when
            memory runs out, and no candidate is lost.
        policy: stops candidates by the scores of previews; None runs all of them to the end. Where it cannot stop
            anybody, as in a batch of one, no previews are decoded, unless somebody watches.
        floors: what else a candidate must pass, e.g. `QualityFloor`; the first one failed is the reason told.
        profile: how previews foretell final scores on this base model, from `PreviewProfile.fit`; without one the
            policy starts from a weak prior and learns from the candidates that finish.
        preview_vae: decodes previews in place of the pipeline's VAE: an `AutoencoderTiny` of the same latents.
        duplicate_limit: of accepted images this similar, see `floors.copy_similarity`, only the best stays accepted.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        scorer: IdentityScorer,
        subject: Subject,
        max_batch_size: int = 8,
        policy: StoppingPolicy | None = DEFAULT_POLICY,
        floors: Sequence[Floor] = (),
        profile: PreviewProfile | None = None,
        preview_vae: torch.nn.Module | None = None,
        duplicate_limit: float | None = None,
    ) -> None:
        if max_batch_size < 1:
            raise InputError(f"max_batch_size must be at least 1, got {max_batch_size}")
        find_denoiser(pipe)
        self.pipe = pipe
        self.scorer = scorer
        self.subject = subject
        self.max_batch_size = max_batch_size
        self.policy = policy
        self.floors = tuple(floors)
        self.profile = profile
        self.preview_vae = preview_vae
        self.duplicate_limit = duplicate_limit
        self._warned_of: str | None = None
        self._warn_if_nobody_races(stacklevel=3)

    def _warn_if_nobody_races(self, stacklevel: int) -> None:
        """Say so, once for each combination, when pipeline and scheduler as they are now run all to the end."""
        combination = f"{type(self.pipe).__name__} with {type(self.pipe.scheduler).__name__}"
        if self.policy is None or can_race(self.pipe) or combination == self._warned_of:
            return
        self._warned_of = combination
        warnings.warn(
            f"{combination} is not among the pipelines whose candidates can be stopped half-way; "
            "all of them run to the end and are scored there",
            stacklevel=stacklevel + 1,
        )

    @overload
    def __call__(
        self,
        prompt: str | None = ...,
        num_images: int = ...,
        num_candidates: int | None = ...,
        seed: int = ...,
        budget: float | None = ...,
        until_accepted: bool = ...,
        watch: Watch | None = ...,
        **pipeline_kwargs: Any,
    ) -> GuardResult: ...

    @overload
    def __call__(
        self,
        prompt: list[str] | tuple[str, ...],
        num_images: int = ...,
        num_candidates: int | None = ...,
        seed: int = ...,
        budget: float | None = ...,
        until_accepted: bool = ...,
        watch: Watch | None = ...,
        **pipeline_kwargs: Any,
    ) -> GuardResults: ...

    def __call__(
        self,
        prompt: str | list[str] | tuple[str, ...] | None = None,
        num_images: int = 4,
        num_candidates: int | None = None,
        seed: int = 0,
        budget: float | None = None,
        until_accepted: bool = False,
        watch: Watch | None = None,
        **pipeline_kwargs: Any,
    ) -> GuardResult | GuardResults:
        """Draw candidates, return the accepted ones, at most `num_images`; a list of prompts gives a result for each.

        Args:
            num_candidates: how many seeds are begun, default `4 * num_images`.
            budget: compute that may be spent, in candidates run to the end. With it, what stopped candidates leave of
                it begins new seeds; without it, that compute is saved.
            until_accepted: begin no more once `num_images` are accepted; `budget` is then `num_candidates` by default.
            watch: sees the race as it runs, and may end it by raising; of a pipeline that cannot race, ended batches.

        Other keyword arguments go to the pipeline untouched. Raises InputError for arguments that cannot work.
        """
        num_candidates = 4 * num_images if num_candidates is None else num_candidates
        check_call(self.pipe, prompt, num_images, num_candidates, seed, budget, pipeline_kwargs)
        self._warn_if_nobody_races(stacklevel=2)
        arguments = {name: value for name, value in pipeline_kwargs.items() if name not in RESERVED_ARGUMENTS}
        how: dict[str, Any] = {
            "num_images": num_images,
            "num_candidates": num_candidates,
            "seed": seed,
            "budget": float(num_candidates) if until_accepted and budget is None else budget,
            "until_accepted": until_accepted,
            "watch": watch,
        }
        if not isinstance(prompt, (list, tuple)):
            result = self._race({"prompt": prompt, **arguments}, **how)
            _warn_if_nothing_accepted([result])
            return result
        results = GuardResults(
            self._race({"prompt": one, **its_own}, **how)
            for one, its_own in zip(prompt, _arguments_by_prompt(arguments, len(prompt)), strict=True)
        )
        _warn_if_nothing_accepted(results)
        return results

    def _race(
        self,
        arguments: dict[str, Any],
        num_images: int,
        num_candidates: int,
        seed: int,
        budget: float | None,
        until_accepted: bool,
        watch: Watch | None,
    ) -> GuardResult:
        """The result of one prompt."""
        race = _Race(self, num_images, until_accepted, arguments, watch)
        while begun := race.next_batch(num_candidates, budget):
            first = seed + len(race.candidates)
            race.run(range(first, first + begun))
        return race.result(seed)


@dataclass
class _Race:
    """The candidates of one prompt, and what has become of them so far."""

    guard: IdentityGuard
    num_images: int
    until_accepted: bool
    arguments: dict[str, Any]
    watch: Watch | None = None
    candidates: dict[int, Candidate] = field(default_factory=dict)
    outputs: dict[int, Any] = field(default_factory=dict)
    """By seed: the image in the pipeline's own output type."""
    denoiser_rows: int = 0
    spent: float = 0.0
    """In candidates run to the end."""
    is_last: bool = False
    """Whether no batch comes after the one under way, whatever becomes of it."""
    seconds: dict[str, float] = field(default_factory=lambda: {"generate": 0.0, "preview": 0.0, "score": 0.0})

    def next_batch(self, num_candidates: int, budget: float | None) -> int:
        """How many candidates to begin now; 0: the race is over."""
        begun = self._next_batch(num_candidates, budget)
        self.is_last = budget is None and len(self.candidates) + begun >= num_candidates
        return begun

    def _next_batch(self, num_candidates: int, budget: float | None) -> int:
        if self.until_accepted and sum(c.status == "accepted" for c in self.judged()) >= self.num_images:
            return 0
        largest = self.guard.max_batch_size if can_batch(self.guard.pipe) else 1
        return next_wave(num_candidates, len(self.candidates), self.spent, budget, largest)

    def run(self, seeds: Sequence[int]) -> None:
        """Denoise a batch of candidates, in smaller ones when memory runs out."""
        from accelerate.utils.memory import should_reduce_batch_size

        try:
            return self._run(seeds)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            if len(seeds) == 1 or not should_reduce_batch_size(error):
                raise
        # Outside the handler: the exception's traceback keeps the failed batch in memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        half = self.guard.max_batch_size = (len(seeds) + 1) // 2
        self.run(seeds[:half])
        self.run(seeds[half:])

    def _run(self, seeds: Sequence[int]) -> None:
        guard, policy = self.guard, self._policy()
        if policy is not None and not self._shows_previews(policy, len(seeds)):
            policy = None
        asked_at = getattr(policy, "step_fractions", STEP_FRACTIONS)
        looks = _Looks(self, tuple(seeds), policy, asked_at)
        # CPU generators: the same seed is the same noise on every device
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        started = time.perf_counter()
        batch = denoise(guard.pipe, self.arguments, generators, looks, asked_at, guard.preview_vae)
        generated = time.perf_counter()
        images = self._pictures(batch)
        scores, reasons = self._judge(images, batch.nsfw_content_detected or [False] * len(images))
        self.seconds["generate"] += generated - started - looks.seconds
        self.seconds["preview"] += looks.seconds
        self.seconds["score"] += time.perf_counter() - generated

        self.candidates |= looks.stopped
        for place, row in enumerate(batch.rows):
            seed = seeds[row]
            self.candidates[seed] = Candidate(
                seed=seed,
                score=scores[place],
                status="rejected" if reasons[place] else "accepted",
                stopped_at_step=None,
                image=images[place],
                reason=reasons[place],
                previews=looks.previews[seed],
            )
            self.outputs[seed] = batch.images[place]
        self.denoiser_rows += batch.denoiser_rows
        self.spent += len(batch.rows) + sum(batch.stopped_at.values()) / looks.num_steps
        if self.watch is not None:
            self.watch(Glimpse(looks.num_steps, looks.num_steps, {}, self.judged()))

    def _shows_previews(self, policy: StoppingPolicy, num_started: int) -> bool:
        """Whether previews of a batch are worth decoding; someone who watches sees them in any case."""
        return self.watch is not None or needs_previews(policy, num_started, self.num_images, self.is_last)

    def _judge(self, images: Sequence[Image.Image], blackened: Sequence[bool]) -> tuple[list[float], list[str]]:
        """Each image's score and the reason to reject it, "" where it is accepted."""
        guard = self.guard
        seen = [image for image, black in zip(images, blackened, strict=True) if not black]
        scores = guard.scorer.score(seen, guard.subject).tolist() if seen else []
        failures = first_failures(guard.floors, seen, self.arguments["prompt"] or "") if seen else []
        verdicts = [verdict_on(place, score, guard.subject.threshold) for place, score in enumerate(scores)]
        judged = iter([(v.score, v.reason or failure) for v, failure in zip(verdicts, failures, strict=True)])
        # A black picture says nothing of the subject: it gets no score
        both = [(math.nan, BLACKENED) if black else next(judged) for black in blackened]
        return [score for score, _ in both], [reason for _, reason in both]

    def _policy(self) -> StoppingPolicy | None:
        """The policy; one that learns is told what is known by now."""
        guard, policy = self.guard, self.guard.policy
        if policy is None or not hasattr(policy, "informed"):
            return policy
        finished = [c for c in self.candidates.values() if c.status != "stopped" and not math.isnan(c.score)]
        run = preview_profile(tuple(self.candidates.values())) if finished else None
        profile = guard.profile.joined(run) if guard.profile and run else run or guard.profile
        # Those that failed a floor compete with nobody
        rivals = [c.score for c in finished if c.status == "accepted" or c.score < guard.subject.threshold]
        return policy.informed(profile, rivals, guard.subject.threshold if self.until_accepted else None)

    def _pictures(self, batch: Denoised) -> list[Image.Image]:
        """What the pipeline returned, as 8-bit pictures to score and to show."""
        output_type = self.arguments.get("output_type", "pil")
        if output_type == "pil" or len(batch.images) == 0:
            return list(batch.images)
        height, width = batch.size or (self.arguments.get("height"), self.arguments.get("width"))
        return to_pictures(as_pixels(batch.images, output_type, self.guard.pipe, height, width))

    def judged(self) -> tuple[Candidate, ...]:
        """All candidates in seed order; of accepted ones that look the same, only the best is accepted."""
        limit = self.guard.duplicate_limit
        candidates = dict(sorted(self.candidates.items()))
        accepted = sorted((c for c in candidates.values() if c.status == "accepted"), key=lambda c: -c.score)
        if limit is None or len(accepted) < 2:
            return tuple(candidates.values())
        images = [candidate.image for candidate in accepted if candidate.image is not None]
        same = near_duplicates(images, range(len(images)), limit)
        duplicates = {
            accepted[i].seed: replace(accepted[i], status="duplicate", reason=f"looks like seed {accepted[j].seed}")
            for i, j in enumerate(same)
            if j is not None
        }
        return tuple((candidates | duplicates).values())

    def result(self, seed: int) -> GuardResult:
        """What the guard returns."""
        candidates = self.judged()
        per_candidate = self.denoiser_rows / self.spent
        result = GuardResult(
            images=[],
            candidates=candidates,
            cost=Cost(self.denoiser_rows, round(per_candidate * len(candidates)), self.seconds),
            threshold=self.guard.subject.threshold,
            prompt=self.arguments["prompt"] or "",
            seed=seed,
        )
        chosen = [self.outputs[candidate.seed] for candidate in result.accepted[: self.num_images]]
        # None of them, in the output type asked for
        empty = _joined(list(self.outputs.values())[:1])[:0]
        return replace(result, images=_joined(chosen) if chosen else empty)


@dataclass
class _Looks:
    """What the previews of one batch show, and whom they stop; called after every denoising step."""

    race: _Race
    seeds: tuple[int, ...]
    policy: StoppingPolicy | None
    asked_at: Sequence[float]
    stopped: dict[int, Candidate] = field(default_factory=dict)
    pictures: dict[int, Image.Image] = field(default_factory=dict)
    """By seed, as `stopped`: the last preview; of those that go on only for someone who watches."""
    num_steps: int = 1
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.previews: dict[int, dict[float, float]] = {seed: {} for seed in self.seeds}

    def __call__(self, moment: Moment) -> list[int] | None:
        """Which rows go on; None: all of them."""
        self.num_steps = moment.num_steps
        due = [fraction for fraction in self.asked_at if moment.step in steps_at([fraction], moment.num_steps)]
        kept = None
        if self.policy is not None and due and moment.step < moment.num_steps:
            started = time.perf_counter()
            kept = self._decide(moment, due[-1], self.policy)
            self.seconds += time.perf_counter() - started
        if self.race.watch is not None:
            self.race.watch(self._glimpse(moment))
        return kept

    def _decide(self, moment: Moment, fraction: float, policy: StoppingPolicy) -> list[int]:
        guard, pixels = self.race.guard, moment.preview()
        scores = torch.full((len(self.seeds),), math.nan)
        scores[list(moment.rows)] = preview_scores(guard.scorer, guard.subject, pixels)
        kept = policy.decide(fraction, scores, self.race.num_images)  # type: ignore[arg-type]
        goes_on = kept | scores.isnan()  # to a policy NaN means stopped already
        for place, row in enumerate(moment.rows):
            seed, score = self.seeds[row], float(scores[row])
            if math.isnan(score):
                continue
            self.previews[seed][fraction] = score
            if not goes_on[row] or self.race.watch is not None:
                self.pictures[seed] = to_pictures(pixels[place : place + 1])[0]
            if not goes_on[row]:
                reason = f"stopped after step {moment.step} of {moment.num_steps}: preview {score:.3f}"
                self.stopped[seed] = Candidate(
                    seed=seed,
                    score=score,
                    status="stopped",
                    stopped_at_step=moment.step,
                    image=None,
                    reason=reason,
                    previews=self.previews[seed],
                    last_preview=self.pictures[seed],
                )
        return [row for row in moment.rows if goes_on[row]]

    def _glimpse(self, moment: Moment) -> Glimpse:
        going = [self.seeds[row] for row in moment.rows if self.seeds[row] not in self.stopped]
        last = {seed: [math.nan, *self.previews[seed].values()][-1] for seed in going}
        looks = {seed: (self.pictures.get(seed), last[seed]) for seed in going}
        return Glimpse(moment.step, moment.num_steps, looks, tuple((self.race.candidates | self.stopped).values()))


_ORDER: dict[Status, int] = {"accepted": 0, "duplicate": 1, "rejected": 2, "stopped": 3}


def _rank(candidate: Candidate, threshold: float) -> tuple[int, bool, bool, float]:
    """Sorting key, best first: by status, then, of rejected ones, those that failed a floor last, then by score.

    Candidates without a score come last of their status.
    """
    unscored = math.isnan(candidate.score)
    failed_floor = candidate.status == "rejected" and candidate.score >= threshold
    return _ORDER[candidate.status], unscored, failed_floor, 0.0 if unscored else -candidate.score


def _warn_if_nothing_accepted(results: Sequence[GuardResult]) -> None:
    """One warning for a call, however many of its prompts are left without an image."""
    empty = [result for result in results if not result.accepted]
    if not empty:
        return
    best = max(empty, key=lambda result: -math.inf if math.isnan(result.best.score) else result.best.score)
    prompts = f" for {len(empty)} of {len(results)} prompts" if len(results) > 1 else ""
    warnings.warn(
        f"none of {len(best.candidates)} candidates was accepted{prompts}, so result.images is empty there; the best "
        f"scored {best.best.score:.3f} ({best.best.reason}). Draw more candidates, lower the subject's threshold, or "
        "look at result.ranked",
        NothingAcceptedWarning,
        stacklevel=3,
    )


def preview_scores(scorer: IdentityScorer, subject: Subject, pixels: Tensor) -> Tensor:
    """Scores `[n]` of previews `[n,3,H,W]`; NaN for one that holds no picture.

    A VAE in half precision may overflow on the clean prediction of an early step, and not on the finished latents.
    """
    scores, seen = torch.full((len(pixels),), math.nan), pixels.isfinite().flatten(1).all(dim=1)
    if seen.any():
        scores[seen] = scorer.score(pixels[seen], subject)
    return scores


def preview_profile(candidates: Sequence[Candidate]) -> PreviewProfile | None:
    """How the previews of one prompt's candidates foretold their final scores; None: no previews were made."""
    fractions = sorted({fraction for candidate in candidates for fraction in candidate.previews})
    if not fractions:
        return None
    previews = [[candidate.previews.get(fraction, float("nan")) for fraction in fractions] for candidate in candidates]
    finals = [float("nan") if candidate.status == "stopped" else candidate.score for candidate in candidates]
    return PreviewProfile.fit(torch.tensor(previews), torch.tensor(finals), fractions)


def first_failures(floors: Sequence[Floor], images: Sequence[Image.Image], prompt: str) -> list[str]:
    """For each image the reason of the first floor that refuses it, "" where all let it pass."""
    reasons = [""] * len(images)
    for floor in floors:
        reasons = [reason or own for reason, own in zip(reasons, floor.judge(images, prompt), strict=True)]
    return reasons


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """Pixels `[n,3,H,W]` in [0, 1] -> 8-bit pictures, rounded as diffusers does."""
    from diffusers.image_processor import VaeImageProcessor

    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(pixels))


def _joined(images: Sequence[Any]) -> Any:
    """Images of one output type as a pipeline returns them: arrays and tensors stacked, pictures in a list."""
    if images and isinstance(images[0], np.ndarray):
        return np.stack(images)
    if images and isinstance(images[0], Tensor):
        return torch.stack(list(images))
    return list(images)


def _arguments_by_prompt(arguments: Mapping[str, Any], num_prompts: int) -> list[dict[str, Any]]:
    """Pipeline arguments of each prompt: lists of further prompts are dealt out, all else is given to every prompt."""
    by_prompt: list[dict[str, Any]] = []
    for index in range(num_prompts):
        dealt = {name: value[index] for name, value in arguments.items() if _is_list_of_prompts(name, value)}
        by_prompt.append({**arguments, **dealt})
    return by_prompt


def _is_list_of_prompts(name: str, value: Any) -> bool:
    """Whether an argument holds a text for each prompt: `negative_prompt`, `prompt_2` and their like, as a list."""
    return name.startswith(("prompt", "negative_prompt")) and isinstance(value, (list, tuple)) and _all_texts(value)


def _all_texts(values: Sequence[Any]) -> bool:
    return bool(values) and all(isinstance(value, str) for value in values)


def check_call(
    pipe: DiffusionPipeline,
    prompt: str | list[str] | tuple[str, ...] | None,
    num_images: int,
    num_candidates: int,
    seed: int,
    budget: float | None,
    pipeline_kwargs: Mapping[str, Any],
) -> None:
    """Raise InputError, naming the argument, for a call that cannot keep the guard's promises."""
    if num_images < 1:
        raise InputError(f"num_images must be at least 1, got {num_images}")
    if num_candidates < num_images:
        raise InputError(f"num_candidates must be at least num_images ({num_images}), got {num_candidates}")
    if seed < 0:
        raise InputError(f"seed must be 0 or more, got {seed}")
    if budget is not None and not 1 <= budget < math.inf:
        raise InputError(f"budget must be finite and at least 1, in candidates run to the end, got {budget}")
    for name, advice in RESERVED_ARGUMENTS.items():
        # No `in`: a list of generators, or latents, would be compared with the harmless values one by one
        value, harmless = pipeline_kwargs.get(name), HARMLESS_VALUES.get(name, (None,))
        if not any(value is each for each in harmless):
            raise InputError(f"{name} cannot be passed through the guard; {advice}")
    if (prompt is None) == (pipeline_kwargs.get("prompt_embeds") is None):
        raise InputError("prompt or prompt_embeds must be given, and not both")
    if isinstance(prompt, (list, tuple)) and not prompt:
        raise InputError("prompt is an empty list; give at least one")
    num_prompts = len(prompt) if isinstance(prompt, (list, tuple)) else 1
    for name, value in pipeline_kwargs.items():
        if _is_list_of_prompts(name, value) and (len(value) != num_prompts or isinstance(prompt, str)):
            raise InputError(
                f"{name} must be one text, or a text for each prompt of a list, got a list of {len(value)}"
            )
    for name, value in pipeline_kwargs.items():
        if "prompt_embeds" in name and value is not None and len(value) != 1:
            raise InputError(f"{name} must be of one prompt, got {len(value)}; call the guard once for each")
    # Those that start from a picture deal several out to the candidates; to the others a list is what to look at
    for name in ("image", "mask_image") if "strength" in inspect.signature(pipe.__call__).parameters else ():
        picture: Any = pipeline_kwargs.get(name)
        number = len(picture) if isinstance(picture, (list, tuple)) or getattr(picture, "ndim", 0) == 4 else 1
        if number != 1:
            raise InputError(f"{name} must be one picture, got {number}; call the guard once for each")
    if pipeline_kwargs.get("output_type", "pil") not in ("pil", "np", "pt", "latent"):
        raise InputError(f"output_type must be 'pil', 'np', 'pt' or 'latent', got {pipeline_kwargs['output_type']!r}")
    if not pipeline_kwargs.get("return_dict", True):
        raise InputError("return_dict must be True; the guard returns a GuardResult")
