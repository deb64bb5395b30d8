"""One race: candidates begun, looked at, stopped, finished."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nearid_personalize.floors.base import Floor
from nearid_personalize.floors.copies import near_duplicates
from nearid_personalize.guard.hooks import Denoised, Moment, can_batch, denoise, steps_at
from nearid_personalize.guard.policy import StoppingPolicy, needs_previews, next_wave
from nearid_personalize.guard.previews import as_pixels
from nearid_personalize.guard.profile import PreviewProfile
from nearid_personalize.scorer.ranking import verdict_on

if TYPE_CHECKING:
    from PIL import Image

    from nearid_personalize.guard.guard import IdentityGuard
    from nearid_personalize.scorer.scorer import IdentityScorer
    from nearid_personalize.scorer.subject import Subject
from nearid_personalize.guard.policy import STEP_FRACTIONS
from nearid_personalize.guard.result import BLACKENED, Candidate, Cost, GuardResult, RaceProgress, Watch, _joined


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
            self.watch(RaceProgress(looks.num_steps, looks.num_steps, {}, self.judged()))

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

    def _glimpse(self, moment: Moment) -> RaceProgress:
        going = [self.seeds[row] for row in moment.rows if self.seeds[row] not in self.stopped]
        last = {seed: [math.nan, *self.previews[seed].values()][-1] for seed in going}
        looks = {seed: (self.pictures.get(seed), last[seed]) for seed in going}
        return RaceProgress(moment.step, moment.num_steps, looks, tuple((self.race.candidates | self.stopped).values()))


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
