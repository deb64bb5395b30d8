"""Identity as reward beside the denoising loss: DRaFT-K (Clark et al. 2024, arXiv:2309.17400).

After a warm-up, pictures are drawn in a few steps and scored by a frozen NearID head; gradients flow through the last
steps, and minus the score is added to the loss. Against reward hacking the denoising loss stays, validation uses
another head, and the reward ends once adherence or diversity falls too far.

Letters: B pictures, C h w latent channels and size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nearid_personalize.errors import InputError
from nearid_personalize.names import packaged
from nearid_personalize.rewards import identity_reward, require_other_head
from nearid_personalize.scorer.scorer import IdentityScorer
from nearid_personalize.scorer.subject import Subject
from nearid_personalize.training.lora.families import Family
from nearid_personalize.training.lora.noising import Noised, Trajectory, sample, trajectory_of
from nearid_personalize.training.lora.options import LoraOptions, RewardOptions
from nearid_personalize.training.lora.pictures import Batch, Picture, TrainingSet, parts, shuffled_indices

TESTED_FAMILIES = frozenset({"StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux", "QwenImage", "ZImage"})
"""Families whose sampling and decoding the tests hold to be differentiable and the pipeline's own."""


Enrolled = tuple[IdentityScorer, Subject]


def enroll_reward(
    options: LoraOptions, references: Sequence[Picture], device: torch.device, validate: Any = None
) -> Enrolled | None:
    """Load the head that rewards and enroll the references with it; None without a reward.

    Raises InputError when `validate`, which validates the run, has the same head, or first runs after the reward
    began.
    """
    if not options.reward.reward_weight:
        return None
    scorer = load_reward_model(options.reward.reward_model, device)
    other = getattr(validate, "scorer", None)
    if isinstance(other, IdentityScorer):
        require_other_head(scorer, other)
    if validate is not None and options.validate_every >= options.first_reward_step:
        raise InputError(
            f"--validate-every {options.validate_every}: the reward begins at step {options.first_reward_step} and is "
            "measured against what came before; validate sooner or give a larger --reward-warmup"
        )
    return scorer, scorer.enroll([picture.image for picture in references])


def load_reward_model(name: str, device: torch.device | str = "cpu") -> IdentityScorer:
    """The scorer that rewards; "miniworld" is the toy world's second head, which no validation there uses."""
    trunk = packaged(name, "siglip")
    if trunk == name:
        return IdentityScorer.from_pretrained(name, device)
    return IdentityScorer.from_pretrained(packaged(name, "nearid-reward"), device, trunk=trunk)


@dataclass
class IdentityTerm:
    """The reward's part of the loss, and when it counts; made by `open`."""

    options: RewardOptions
    seed: int
    first_step: int
    """The first rewarded optimizer step, counted from 1."""
    family: Family
    data: TrainingSet
    scorer: IdentityScorer
    subject: Subject
    path: Trajectory
    prompts: list[int]
    """Those of the rewarded pictures, used in turn, by their numbers in `data.prompts`."""
    guard: "RewardGuard"

    @classmethod
    def open(
        cls, options: LoraOptions, family: Family, data: TrainingSet, scorer: IdentityScorer, subject: Subject
    ) -> "IdentityTerm":
        """Move the VAE to the scorer's device; InputError for a family that is not tested with a reward."""
        if type(family).__name__ not in TESTED_FAMILIES:
            raise InputError(f"--reward-weight: {type(family.pipe).__name__} is not tested with a reward; give 0")
        vae = family.pipe.vae.to(scorer.model.device).requires_grad_(False)
        if vae._supports_gradient_checkpointing:  # block by block, inside what `decode` recomputes
            vae.enable_gradient_checkpointing()
        reward, first_step = options.reward, options.first_reward_step
        own = dict.fromkeys(sample.prompt for sample in data.samples[: data.num_references])
        return cls(
            options=reward,
            seed=options.seed,
            first_step=first_step,
            family=family,
            data=data,
            scorer=scorer,
            subject=subject,
            path=trajectory_of(family.pipe.scheduler, reward.reward_sampling_steps),
            prompts=[data.prompts.index(prompt) for prompt in reward.reward_prompts] or list(own),
            guard=RewardGuard(reward.reward_max_drop, first_step),
        )

    def due(self, step: int) -> bool:
        """Whether optimizer step number `step`, counted from 1, is rewarded."""
        since = step - self.first_step
        return since >= 0 and since % self.options.reward_every == 0 and self.guard.stopped_at is None

    def losses(
        self, predict: Callable[[Batch], Tensor], step: int, place: int = 0, places: int = 1, at_once: int | None = None
    ) -> Iterator[Tensor]:
        """Draw the rewarded pictures of a step, `at_once` at a time (None: all); the losses sum to -weight * mean
        identity.

        predict: the denoiser's answer to a batch. place: this process among `places`, each with pictures of its own.
        """
        size = self.options.reward_batch_size
        first = ((step - 1) * places + place) * size
        for part in parts(size, at_once or size):
            yield self.loss_of(predict, step, range(first, first + size)[part])

    def loss_of(self, predict: Callable[[Batch], Tensor], step: int, numbers: range) -> Tensor:
        """The part of the loss that the pictures of these numbers are."""
        options = self.options
        like = self.data.samples[step % self.data.num_references]
        drawn = [noise_of(self.seed, number, like.latents.shape[1:]) for number in numbers]
        chosen = shuffled_indices(numbers.start, len(numbers), len(self.prompts), self.seed)
        asking = guided(
            predict, [self.prompts[i] for i in chosen], self.data, like.frame, options.reward_guidance_scale
        )
        latents = sample(asking, torch.stack(drawn).to(self.scorer.model.device), self.path, options.reward_steps)
        scores = identity_reward(decode(self.family, latents), self.scorer, self.subject)
        return -options.reward_weight * scores.sum() / options.reward_batch_size


def decode(family: Family, latents: Tensor) -> Tensor:
    """`Family.decode` that keeps nothing for its gradient: each picture is decoded again when its turn has come."""
    return torch.cat([checkpoint(family.decode, one, use_reentrant=False) for one in latents.split(1)])


def noise_of(seed: int, number: int, shape: Sequence[int]) -> Tensor:
    """Draw the noise [C,h,w] that rewarded picture number `number` begins with."""
    return torch.from_numpy(np.random.default_rng([seed, number, 1]).standard_normal(tuple(shape), dtype=np.float32))


def guided(
    predict: Callable[[Batch], Tensor], prompts: Sequence[int], data: TrainingSet, frame: Tensor, scale: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """Make (noisy [B,C,h,w], timesteps [B]) -> prediction, with classifier-free guidance where `scale` is above 1.

    prompts: [B], numbers in `data`.
    """
    copies = 2 if scale > 1 else 1
    asked = [*prompts, *([data.prompts.index("")] * len(prompts) if copies == 2 else [])]
    rows, prompt_index = torch.tensor(asked).unique(return_inverse=True)
    frames = frame.expand(len(asked), -1)

    def ask(noisy: Tensor, timesteps: Tensor) -> Tensor:
        noisy, timesteps = noisy.repeat(copies, 1, 1, 1), timesteps.repeat(copies)
        ones = torch.ones(len(noisy))
        question = Noised(noisy, noisy, timesteps, ones)  # nothing is compared with the target
        batch = Batch(
            noised=question, importance=ones, share=ones, frame=frames, prompts=rows, prompt_index=prompt_index
        )
        predicted = predict(batch)
        if copies == 1:
            return predicted
        shown, plain = predicted.chunk(2)
        return plain + scale * (shown - plain)

    return ask


class RewardGuard:
    """Ends the reward when adherence or diversity has lost too much. Its state is saved in checkpoints.

    max_drop: share in (0, 1) of the value before the reward that may be lost. stopped_at: the step after which the
    reward ended, None while it counts.
    """

    def __init__(self, max_drop: float, first_step: int) -> None:
        self.max_drop, self.first_step = max_drop, first_step
        self.before: dict[str, float] = {}
        self.stopped_at: int | None = None

    def look(self, step: int, **values: float | None) -> str:
        """Note what was measured after `step` steps (larger is better, None: not measured); returns why the reward
        ends, else "".

        The last values before the first rewarded step are the reference.
        """
        known = {name: value for name, value in values.items() if value is not None}
        if step < self.first_step:
            self.before = known
        if self.stopped_at is not None:
            return ""
        for name, value in known.items():
            least = lowest(self.before[name], self.max_drop) if name in self.before else value
            if value < least:
                self.stopped_at = step
                return f"reward ended after step {step}: {name} {value:.3f}, {self.before[name]:.3f} before the reward"
        return ""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"before": self.before, "stopped_at": self.stopped_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        self.before, self.stopped_at = state["before"], state["stopped_at"]


def lowest(before: float, max_drop: float) -> float:
    """The smallest value that has lost no more than a share of `before`, whatever its sign."""
    return before - max_drop * abs(before)
