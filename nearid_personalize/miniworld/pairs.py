"""Known pairs: photos of a subject, and pictures of it and of its near-identities as a pipeline would draw them.

Accept thresholds are set and tested on these (`nearid_personalize.scorer.calibration`).
"""

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .render import render
from .scene import CONTEXTS, sample_view
from .subjects import Pet, Split, pick, sample_pet, similar_pet

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

    from nearid_personalize.scorer.scorer import IdentityScorer

NEW_CONTEXTS = 2
"""How many of the contexts are kept for the pictures: a subject is seldom drawn where its photos were taken."""

Pictures = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class KnownPairs:
    """Photos [R], genuine pictures [G] of the same subject and impostor pictures [K], each of another that differs in
    two to four of eight attributes: uint8 [n,64,64,3] each."""

    photos: Pictures
    genuine: Pictures
    impostor: Pictures


def known_pairs(
    split: Split, index: int, num_photos: int, num_genuine: int, num_impostor: int, wide: bool = False, seed: int = 0
) -> KnownPairs:
    """Pairs of subject number `index` of a split. No picture's place or view depends on how many others are drawn."""
    pet, order = sample_pet(split, index, seed=seed), random.Random(f"pairs/{seed}/{split}/{index}")
    places = sorted(CONTEXTS, key=lambda _: order.random())
    new, old = places[:NEW_CONTEXTS], places[NEW_CONTEXTS:]

    def draw(kind: str, number: int, contexts: list[str]) -> Pictures:
        pictures = []
        for i in range(number):
            rng = random.Random(f"pairs/{seed}/{split}/{index}/{kind}/{i}")
            shown: Pet = similar_pet(pet, rng, pick(rng, (2, 3, 4))) if kind == "impostor" else pet
            pictures.append(render(shown, contexts[i % len(contexts)], sample_view(rng, wide)).image)
        return np.stack(pictures)

    return KnownPairs(
        draw("photo", num_photos, old), draw("genuine", num_genuine, new), draw("impostor", num_impostor, new)
    )


def as_drawn(vae: "AutoencoderTiny", pictures: Pictures) -> Tensor:
    """uint8 [N,64,64,3] -> float [N,3,64,64] in [0, 1], through a text-to-image model's autoencoder and back: what a
    generated picture looks like at best."""
    with torch.no_grad():
        return vae.decode(vae.encode(_floats(pictures) * 2 - 1).latents).sample.clamp(-1, 1) / 2 + 0.5


def embed_pairs(scorer: "IdentityScorer", vae: "AutoencoderTiny", pairs: KnownPairs) -> tuple[Tensor, Tensor, Tensor]:
    """Unit embeddings of photos [R,D] as they are, and of genuine [G,D] and impostor [K,D] pictures `as_drawn`."""
    drawn = as_drawn(vae, np.concatenate([pairs.genuine, pairs.impostor]))
    sizes = [len(pairs.photos), len(pairs.genuine), len(pairs.impostor)]
    references, genuine, impostor = scorer.embed(torch.cat([_floats(pairs.photos), drawn])).split(sizes)
    return references, genuine, impostor


def _floats(pictures: Pictures) -> Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
