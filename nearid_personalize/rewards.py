"""Identity as reward: a differentiable one for pixels, and the plain callable that reinforcement learners call.

Rewards are identity scores, cosines in [-1, 1], larger = more alike. Whoever trains on a score will find pictures that
please it and nobody else: judge the result with another head than the one that rewarded it, and watch what identity
does not see (prompt adherence, diversity, copies).

Shape letters: N pictures, H W picture size, D width.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor
from torch.func import functional_call

from nearid_personalize.encoder.checkpoints import weights_fingerprint
from nearid_personalize.errors import InputError
from nearid_personalize.floors.base import Floor, first_failures
from nearid_personalize.images import ImageSource, check_pixel_range, load_images
from nearid_personalize.scorer.scorer import IdentityScorer
from nearid_personalize.scorer.subject import Subject, identity_scores

Pictures = ImageSource | Iterable[ImageSource]
"""A tensor [N,3,H,W], an array [N,H,W,3], or single pictures in a sequence; uint8, or float in [0, 1]."""


def identity_reward(pixels: Tensor, scorer: IdentityScorer, subject: Subject) -> Tensor:
    """Float pixels [N,3,H,W] in [0, 1] -> identity scores [N] in [-1, 1], differentiable in the pixels alone.

    The scorer's weights get no gradient, whether or not they are frozen. Its score of the same pictures as bytes
    differs by the rounding of the pixels.

    Raises InputError for pixels of another type, shape or range, and for a subject of another model's width.
    """
    if not pixels.is_floating_point():
        raise InputError(f"pixels: {pixels.dtype} has no gradient; give float [N,3,H,W] in [0, 1]")
    check_pixel_range(pixels, "pixels")
    model = scorer.model
    weights = {name: value.detach() for name, value in model.state_dict(keep_vars=True).items()}
    embedded = functional_call(model, weights, (scorer.preprocessing(pixels, model.device),)).image_embeds
    if embedded.shape[1] != subject.embeddings.shape[1]:
        raise InputError(
            f"subject: embeddings of width {subject.embeddings.shape[1]}, this model makes {embedded.shape[1]}; "
            "enroll the photos again with this scorer"
        )
    return identity_scores(embedded, subject.embeddings.to(embedded), subject.aggregation)


@dataclass(frozen=True, eq=False)
class IdentityReward:
    """`reward(images, prompts, metadata) -> list[float]`, as DDPO-like trainers call it; deterministic.

    A picture has the same reward in whichever form it comes, tensor, array or PIL: all become bytes first.

    scorer, subject: what the reward is measured with, and against.
    floors: what a picture must pass besides, see `floors`: a copy of a reference or a damaged picture scores high.
    refused: the reward of a picture that fails a floor, in [-1, 1]; by default that of the opposite of the subject.
    """

    scorer: IdentityScorer
    subject: Subject
    floors: tuple[Floor, ...] = ()
    refused: float = -1.0

    def __post_init__(self) -> None:
        if not -1 <= self.refused <= 1:
            raise InputError(f"refused {self.refused}: a reward is a cosine; give one in [-1, 1]")

    def __call__(
        self,
        images: Pictures,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None = None,
    ) -> list[float]:
        """Rewards [N]. prompts: for floors that ask for them, "" for each where not given. metadata: not looked at.

        Raises InputError for no pictures, floats outside [0, 1], or one prompt too many or few.
        """
        return self.with_reasons(images, prompts, metadata)[0]

    def with_reasons(
        self,
        images: Pictures,
        prompts: Sequence[str] | None = None,
        metadata: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None = None,
    ) -> tuple[list[float], dict[str, list[Any]]]:
        """The same as a pair (rewards, details), for trainers that unpack one (trl's DDPOTrainer, Flow-GRPO).

        details: `identity`, the scores before the floors, and `reason`, why a picture was refused, "" for the others.
        """
        pictures = load_images(images)
        asked = [""] * len(pictures) if prompts is None else list(prompts)
        if len(asked) != len(pictures):
            raise InputError(f"prompts: {len(asked)} for {len(pictures)} pictures; give one each")
        identity = self.scorer.score(pictures, self.subject).tolist()
        reasons = self._reasons(pictures, asked)
        rewards = [self.refused if reason else score for score, reason in zip(identity, reasons)]
        return rewards, {"identity": identity, "reason": reasons}

    def _reasons(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
        """The first floor's reason for each picture, "" for those that pass all."""
        reasons = [""] * len(pictures)
        for prompt in dict.fromkeys(prompts):
            rows = [row for row, asked in enumerate(prompts) if asked == prompt]
            failures = first_failures(self.floors, [pictures[row] for row in rows], prompt)
            for row, failure in zip(rows, failures, strict=True):
                reasons[row] = failure
        return reasons


def require_other_head(reward: IdentityScorer, validation: IdentityScorer) -> None:
    """Raise InputError when the head that rewards is the head that validates: it would praise its own blind spots."""
    heads = [weights_fingerprint(scorer.model.head.state_dict()) for scorer in (reward, validation)]
    if heads[0] == heads[1]:
        raise InputError(
            f"--reward-model: its head (fingerprint {heads[0][:12]}) is the --validation-model's; "
            "give a head trained from another seed to one of them"
        )
