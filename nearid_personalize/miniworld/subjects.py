"""Who lives in the mini-world: subjects as attribute vectors, their splits, edits, distances and captions.

A subject is a category and eight part-level attributes, 1.5 million combinations in all. Everything random here is
drawn with `random.Random(text).random()`, whose stream Python guarantees across versions and machines.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, TypeVar, get_args

from ..errors import InputError

T = TypeVar("T")
Split = Literal["train", "val", "test"]

CATEGORIES = ("dog", "cat", "bear", "robot", "teapot")
"""Categories that the packaged models know, and that subjects are sampled from."""
UNTRAINED_CATEGORIES = ("backpack",)
"""Categories that can be drawn, and sampled by name; no packaged model was trained on them."""
BODY_COLORS = ("brown", "red", "yellow", "green", "blue", "purple", "pink", "white")
COLORS = (*BODY_COLORS, "black")
PATTERNS = ("plain", "spots", "stripes", "halves", "patches")
EARS = ("pointy", "floppy", "round")
TAILS = ("long", "short", "bushy")
ACCESSORIES = ("hat", "crown", "scarf", "bow", "glasses")
EYE_COLORS = ("green", "blue", "orange")

RARE_TOKEN = "sks"


@dataclass(frozen=True)
class Pet:
    """One identity of the mini-world: a category and eight part-level attributes."""

    category: str
    body_color: str
    second_color: str
    """Muzzle, belly, paws, ear linings, tail tip, and the pattern's colour; never the body colour."""
    pattern: str
    ears: str
    """Ear shape; on a teapot the shape of the lid's knob, which a hat or crown covers."""
    tail: str
    """Tail shape; on a teapot the shape of the spout."""
    accessory: str
    accessory_color: str
    """Neither of the two coat colours, so that every attribute shows."""
    eye_color: str

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value not in VALUES[field.name]:
                allowed = ", ".join(VALUES[field.name])
                raise InputError(f"unknown {field.name} {value!r}; choose one of: {allowed}")
        for field in fields(self):
            if getattr(self, field.name) not in allowed_values(self, field.name):
                raise InputError(f"{field.name} {getattr(self, field.name)!r} repeats another colour of the subject")

    @property
    def split(self) -> Split:
        """The one split this identity belongs to: a hash of its attributes decides (80 / 10 / 10 %)."""
        digest = hashlib.sha256("/".join(getattr(self, f.name) for f in fields(self)).encode()).digest()
        bucket = int.from_bytes(digest[:4], "big") % 10
        return "test" if bucket == 9 else "val" if bucket == 8 else "train"


VALUES: dict[str, tuple[str, ...]] = {
    "category": (*CATEGORIES, *UNTRAINED_CATEGORIES),
    "body_color": BODY_COLORS,
    "second_color": COLORS,
    "pattern": PATTERNS,
    "ears": EARS,
    "tail": TAILS,
    "accessory": ACCESSORIES,
    "accessory_color": COLORS,
    "eye_color": EYE_COLORS,
}
GOODS_WORDS = {"teapot": ("knob", "spout"), "backpack": ("handle", "strap")}
"""Goods have these in the place of ears and of a tail; their shapes are the attributes `ears` and `tail`."""
ATTRIBUTES = tuple(name for name in VALUES if name != "category")

# How much of a subject's look an attribute carries; sums to one, so that distances lie in [0, 1].
ATTRIBUTE_WEIGHTS = {
    "body_color": 0.25,
    "second_color": 0.15,
    "pattern": 0.15,
    "ears": 0.10,
    "tail": 0.08,
    "accessory": 0.12,
    "accessory_color": 0.08,
    "eye_color": 0.07,
}


def allowed_values(pet: Pet, attribute: str) -> tuple[str, ...]:
    """Values that `attribute` of `pet` can take, its present one included, given the pet's other colours."""
    others = {
        "body_color": (pet.second_color, pet.accessory_color),
        "second_color": (pet.body_color, pet.accessory_color),
        "accessory_color": (pet.body_color, pet.second_color),
    }.get(attribute, ())
    return tuple(value for value in VALUES[attribute] if value not in others)


def pick(rng: random.Random, values: Sequence[T]) -> T:
    """A uniform choice that uses only `Random.random`, the part of the module with a guaranteed stream."""
    return values[int(rng.random() * len(values))]


def uniform(rng: random.Random, low: float, high: float) -> float:
    """A uniform float in [low, high)."""
    return low + (high - low) * rng.random()


def check_split(split: str) -> None:
    """Raise `InputError` unless `split` is one of train, val, test."""
    if split not in get_args(Split):
        raise InputError(f"unknown split {split!r}; choose one of: {', '.join(get_args(Split))}")


def sample_pet(
    split: Split,
    index: int,
    category: str | None = None,
    seed: int | str = 0,
    categories: Sequence[str] = CATEGORIES,
) -> Pet:
    """Subject number `index` of a split (of one category, or of some, when given): the same on every machine.

    Splits cannot overlap: an identity belongs to exactly one, by a hash of its own attributes.

    Raises:
        InputError: unknown split or category.
    """
    check_split(split)
    if category is not None and category not in VALUES["category"]:
        raise InputError(f"unknown category {category!r}; choose one of: {', '.join(VALUES['category'])}")
    rng = random.Random(f"pet/{seed}/{split}/{category}/{index}")
    while True:
        body, second, third = _distinct_colors(rng)
        pet = Pet(
            category=category or pick(rng, categories),
            body_color=body,
            second_color=second,
            pattern=pick(rng, PATTERNS),
            ears=pick(rng, EARS),
            tail=pick(rng, TAILS),
            accessory=pick(rng, ACCESSORIES),
            accessory_color=third,
            eye_color=pick(rng, EYE_COLORS),
        )
        if pet.split == split:
            return pet


def _distinct_colors(rng: random.Random) -> tuple[str, str, str]:
    body = pick(rng, BODY_COLORS)
    second = pick(rng, [c for c in COLORS if c != body])
    third = pick(rng, [c for c in COLORS if c not in (body, second)])
    return body, second, third


def edit(pet: Pet, attributes: Sequence[str], rng: random.Random) -> Pet:
    """`pet` with each of the named attributes changed to another allowed value."""
    for name in attributes:
        others = [value for value in allowed_values(pet, name) if value != getattr(pet, name)]
        pet = replace(pet, **{name: pick(rng, others)})
    return pet


def similar_pet(pet: Pet, rng: random.Random, num_changes: int) -> Pet:
    """A near-identity: same category, same split, exactly `num_changes` of the eight attributes differ.

    Raises:
        InputError: the split holds no such subject (possible for a single change only; see `single_edits`).
    """
    for _ in range(2000):
        names = list(ATTRIBUTES)
        chosen = [names.pop(int(rng.random() * len(names))) for _ in range(num_changes)]
        other = edit(pet, chosen, rng)
        if other.split == pet.split and len(differences(pet, other)) == num_changes:
            return other
    raise InputError(
        f"no subject of split {pet.split} differs from {pet} in {num_changes} attributes; ask for 2 or more"
    )


def single_edits(pet: Pet) -> Iterator[tuple[str, Pet]]:
    """Every subject that differs from `pet` in one attribute, with that attribute's name."""
    for name in ATTRIBUTES:
        for value in allowed_values(pet, name):
            if value != getattr(pet, name):
                yield name, replace(pet, **{name: value})


def differences(a: Pet, b: Pet) -> tuple[str, ...]:
    """Names of the attributes (category included) in which two subjects differ."""
    return tuple(field.name for field in fields(a) if getattr(a, field.name) != getattr(b, field.name))


def oracle_distance(a: Pet, b: Pet) -> float:
    """How far two subjects are apart, in [0, 1]: the summed weight of differing attributes, 1 across categories."""
    names = differences(a, b)
    return 1.0 if "category" in names else sum(ATTRIBUTE_WEIGHTS[name] for name in names)


def attribute_phrases(pet: Pet) -> dict[str, str]:
    """The words a caption uses for the pet's parts, keyed by the part."""
    goods = pet.category in GOODS_WORDS
    ear_word, tail_word = GOODS_WORDS.get(pet.category, ("ears", "tail"))
    pattern = "paws" if pet.pattern == "plain" else pet.pattern
    ears = f"a {pet.ears} {ear_word}" if goods else f"{pet.ears} {ear_word}"
    article = "" if pet.accessory == "glasses" else "a "
    return {
        "coat": f"{pet.second_color} {pattern}",
        "ears": ears,
        "tail": f"a {pet.tail} {tail_word}",
        "accessory": f"{article}{pet.accessory_color} {pet.accessory}",
        "eyes": f"{pet.eye_color} eyes",
    }


def caption(pet: Pet, context: str, rng: random.Random | None = None, drop: float = 0.0, short: float = 0.0) -> str:
    """An English caption that names the subject's attributes and its context.

    Args:
        rng: source of the random omissions; without it nothing is left out.
        drop: probability in [0, 1] with which each attribute is left unnamed.
        short: probability of a caption of the category alone, half of them with the rare token as a filler word,
            so that the token has a place in the grammar and no meaning of its own.
    """
    rng = rng or random.Random(0)
    if rng.random() < short:
        return f"a photo of {pick(rng, ('a', RARE_TOKEN))} {pet.category} in {context}"
    named = [words for words in attribute_phrases(pet).values() if rng.random() >= drop]
    color = f"{pet.body_color} " if rng.random() >= drop else ""
    parts = " with " + " and ".join(named) if named else ""
    return f"a photo of a {color}{pet.category}{parts} in {context}"
