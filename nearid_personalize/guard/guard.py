"""Generate candidates with a diffusers pipeline, keep those that show the subject, stop hopeless ones early.

`guard(prompt, ...)` stands where `pipe(prompt, ...)` stood: `result.images` holds the accepted images, best first.
Candidate `k` under `seed=s` is the image the plain pipeline makes from generator seed `s + k`, up to floating-point
rounding and whatever the batch size or whoever was stopped beside it, because every candidate owns its generator.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import torch

from nearid_personalize.errors import InputError
from nearid_personalize.floors.base import Floor
from nearid_personalize.guard.acceptance import Acceptance
from nearid_personalize.guard.generation import Generation
from nearid_personalize.guard.hooks import can_race, find_denoiser
from nearid_personalize.guard.policy import DEFAULT_POLICY, StoppingPolicy, check_policy
from nearid_personalize.guard.profile import PreviewProfile
from nearid_personalize.guard.race import Race
from nearid_personalize.guard.result import GuardResult, GuardResults, NothingAcceptedWarning, Watch

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from nearid_personalize.scorer.scorer import IdentityScorer
    from nearid_personalize.scorer.subject import Subject

# Pipeline arguments that would break "one seed, one candidate", with what to do instead.
RESERVED_ARGUMENTS = {
    "generator": "pass seed=, each candidate gets its own generator",
    "latents": "pass seed=, each candidate draws its own latents",
    "num_images_per_prompt": "pass num_images= and num_candidates=",
    "denoising_end": "identity is told from finished pictures; refine result.images in a second call instead",
}


HARMLESS_VALUES = {"num_images_per_prompt": (None, 1)}
"""What a reserved argument may be all the same; None where nothing stands here: it means the pipeline's default."""


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
            policy starts from a weak prior. Either way it learns from the candidates that finish: every prompt and
            every call of one guard adds to it.
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
        check_policy(policy)
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

    # The type of the result follows from that of the prompt; the other arguments stand below
    @overload
    def __call__(self, prompt: str | None = ..., *arguments: Any, **more: Any) -> GuardResult: ...

    @overload
    def __call__(self, prompt: list[str] | tuple[str, ...], *arguments: Any, **more: Any) -> GuardResults: ...

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
        if until_accepted and budget is None:
            budget = float(num_candidates)
        check_call(self.pipe, prompt, num_images, num_candidates, seed, budget, pipeline_kwargs)
        self._warn_if_nobody_races(stacklevel=2)
        arguments = {name: value for name, value in pipeline_kwargs.items() if name not in RESERVED_ARGUMENTS}

        def generate(of_one_prompt: dict[str, Any]) -> GuardResult:
            race = Race(
                policy=self.policy,
                num_images=num_images,
                num_candidates=num_candidates,
                budget=budget,
                threshold=self.subject.threshold if until_accepted else None,
                profile=self.profile,
            )
            return self._generate(race, of_one_prompt, seed, watch)

        if not isinstance(prompt, (list, tuple)):
            result = generate({"prompt": prompt, **arguments})
            _warn_if_nothing_accepted([result])
            return result
        by_prompt = _arguments_by_prompt(arguments, len(prompt))
        results = GuardResults(generate({"prompt": one, **own}) for one, own in zip(prompt, by_prompt, strict=True))
        _warn_if_nothing_accepted(results)
        return results

    def _generate(self, race: Race, arguments: dict[str, Any], seed: int, watch: Watch | None) -> GuardResult:
        """The result of one prompt."""
        generation = Generation(
            pipe=self.pipe,
            arguments=arguments,
            race=race,
            acceptance=Acceptance(self.scorer, self.subject, tuple(self.floors), self.duplicate_limit),
            first_seed=seed,
            max_batch_size=self.max_batch_size,
            preview_vae=self.preview_vae,
            watch=watch,
        )
        try:
            result = generation.run()
            self.profile = race.learnt()
            return result
        finally:
            # What fitted into memory is where the next call begins
            self.max_batch_size = generation.max_batch_size


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
