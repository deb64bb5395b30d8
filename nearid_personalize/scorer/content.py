"""What makes two pictures, or two encoders, the same: content hashes and fingerprints.

Shape letters: N pictures, P probes, D width, S pixels of the model's side.
"""

import hashlib
import random
from collections.abc import Iterable

import torch
from PIL import Image
from torch import Tensor

from nearid_personalize.errors import InputError
from nearid_personalize.images import ImageSource, iterate_sources, load_image, to_square
from nearid_personalize.scorer.scorer import IdentityScorer

PROBES = 4
"""Pictures that a fingerprint is made of."""

LEAST_ALIKE = 0.995
"""Smallest cosine at which two embeddings of a probe are by the same encoder. On the mini-world's encoder bfloat16 gave
0.9999 beside float32, and its other head 0.10 or less."""


def square_of(scorer: IdentityScorer, source: ImageSource) -> Tensor:
    """A picture as the encoder sees it: uint8 [3,S,S]. Raises InputError as `load_image`."""
    return to_square(load_image(source), scorer.image_size, scorer.resample)


def content_hash(square: Tensor) -> str:
    """uint8 [3,S,S] -> 32 hex digits, the same for pictures that the encoder sees the same, pixel for pixel."""
    return hashlib.sha256(square.contiguous().numpy().tobytes()).hexdigest()[:32]


def embed_distinct_photos(scorer: IdentityScorer, photos: ImageSource | Iterable[ImageSource]) -> dict[str, Tensor]:
    """Content hash -> embedding [D] of each distinct picture, in the order given.

    Raises InputError for no pictures, and for one that cannot be read.
    """
    squares: dict[str, Tensor] = {}
    for source in iterate_sources(photos):
        square = square_of(scorer, source)
        squares.setdefault(content_hash(square), square)
    if not squares:
        raise InputError("photos: empty; give at least one picture")
    return dict(zip(squares, scorer.embed(torch.stack([*squares.values()]))))


def encoder_fingerprint(scorer: IdentityScorer) -> Tensor:
    """Embeddings [P,D] of fixed pictures: they tell encoders apart, weights and preparation of pictures alike.

    Unlike a hash of the weights they are the same to rounding in every precision and on every device.
    """
    return scorer.embed([_probe(number) for number in range(PROBES)])


def same_encoder(one: Tensor, other: Tensor) -> bool:
    """Whether two fingerprints [P,D] are those of one encoder."""
    if one.shape != other.shape:
        return False
    return bool(((one * other).sum(dim=-1) >= LEAST_ALIKE).all())


def _probe(number: int) -> Image.Image:
    """8 x 8 blocks of random colour, blurred into one another."""
    rng = random.Random(f"nearid probe {number}")
    # Only `random` has a stream that Python guarantees across versions.
    pixels = bytes(int(256 * rng.random()) for _ in range(8 * 8 * 3))
    return Image.frombytes("RGB", (8, 8), pixels).resize((256, 256), Image.Resampling.BICUBIC)
