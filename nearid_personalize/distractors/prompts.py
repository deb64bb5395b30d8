"""What to ask for: another individual of the subject's kind.

A vocabulary has kinds (animal, goods, …), each with groups of words that exclude each other: colours, patterns, breeds.
Every draw is a pure function of a seed's text.
"""

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nearid_personalize.errors import InputError


@dataclass(frozen=True)
class Kind:
    """How things of one kind are described."""

    template: str
    """Holds {category}, and {group} for groups that are drawn from."""
    groups: Mapping[str, tuple[str, ...]]
    """Words of a group exclude each other."""
    breeds: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Category -> what may stand in its place."""


ANIMAL = Kind(
    template="a photo of a {build} {colour} {category} with {pattern} fur and {ears} ears",
    groups={
        "colour": ("black", "white", "brown", "grey", "golden", "cream", "red", "silver"),
        "pattern": ("plain", "spotted", "patchy", "brindle", "striped", "two-tone", "speckled"),
        "ears": ("pointed", "floppy", "small", "large", "folded"),
        "build": ("slim", "stocky", "small", "large", "fluffy", "short-haired", "long-haired"),
    },
    breeds={
        "dog": (
            *("beagle", "border collie", "bulldog", "chihuahua", "corgi", "dachshund", "dalmatian", "german shepherd"),
            *("golden retriever", "greyhound", "husky", "labrador", "poodle", "pug", "shiba inu", "spaniel", "terrier"),
        ),
        "cat": ("tabby cat", "siamese cat", "persian cat", "bengal cat", "maine coon cat", "calico cat", "sphynx cat"),
    },
)
GOODS = Kind(
    template="a photo of a {shape} {colour} {material} {category} with {pattern}",
    groups={
        "colour": (
            *("black", "white", "red", "blue", "green", "yellow", "orange", "purple", "pink", "brown", "grey", "beige"),
        ),
        "material": ("plastic", "metal", "wooden", "leather", "fabric", "ceramic", "glass", "rubber"),
        "pattern": ("stripes", "dots", "checks", "no pattern", "a floral print", "a geometric print", "a worn surface"),
        "shape": ("rounded", "angular", "tall", "flat", "slim", "bulky", "small", "large"),
    },
)
LIVING = ("bear", "bird", "cat", "cow", "dog", "fox", "hamster", "horse", "rabbit", "sheep")
"""Categories that are animals; every other one is goods."""


@dataclass(frozen=True)
class Vocabulary:
    """Which kind a category is; what is not listed is of the kind `default`."""

    kinds: Mapping[str, Kind]
    default: Kind

    def kind(self, category: str) -> Kind:
        """The kind of a category; "golden retriever dog" is of the kind of "dog"."""
        return self.kinds.get(_noun(category), self.default)


VOCABULARY = Vocabulary(kinds=dict.fromkeys(LIVING, ANIMAL), default=GOODS)


def read_vocabulary(path: Path) -> Vocabulary:
    """A vocabulary of one's own: {"dog": {"template": "a photo of a {colour} dog", "colour": ["black", …]}, …}.

    Kinds that are not in it, `"default"` aside, are those of the built-in one. Raises InputError where it is no such.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        kinds = {category: _read_kind(fields) for category, fields in content.items()}
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise InputError(
            f"--vocabulary {path}: {error}; give JSON such as "
            '{"dog": {"template": "a photo of a {colour} dog", "colour": ["black", "white"]}}'
        ) from None
    default = kinds.pop("default", GOODS)
    return Vocabulary(kinds={**VOCABULARY.kinds, **kinds}, default=default)


def _read_kind(fields: Mapping) -> Kind:
    groups = {name: tuple(str(word) for word in words) for name, words in fields.items() if name != "template"}
    if any(len(words) < 2 for words in groups.values()):
        raise ValueError("every group needs two words or more")
    kind = Kind(template=fields["template"], groups=groups)
    kind.template.format(category="", **dict.fromkeys(groups, ""))  # KeyError: names a group that is not there
    return kind


def drawn(kind: Kind, category: str, seed: str) -> str:
    """A description drawn from a kind's groups: the same for the same seed."""
    rng = random.Random(f"drawn/{seed}")
    words = {name: _pick(rng, group) for name, group in kind.groups.items()}
    names = kind.breeds.get(_noun(category), ())
    return kind.template.format(category=_pick(rng, (category, *names)), **words)


def _noun(category: str) -> str:
    """The last word: an "old street dog" is a dog, and a "dog bowl" is none."""
    return category.lower().split()[-1] if category.strip() else ""


def contradicted(kind: Kind, caption: str, seed: str, changes: tuple[int, int]) -> str:
    """A caption in which some words of the kind's groups are exchanged for others of their group.

    changes: fewest and most words that are exchanged. Where the caption has fewer, all of them are; where it has none,
    it comes back unchanged. What a caption says of the place stays, so that the background still fits.
    """
    rng = random.Random(f"contradicted/{seed}")
    found = _mentions(kind, caption)
    found.sort(key=lambda _: rng.random())
    wanted = changes[0] + int(rng.random() * (changes[1] - changes[0] + 1))
    present = {caption[start:end].lower() for start, end, _ in found}
    exchanged: list[tuple[int, int, str]] = []
    for start, end, group in found:
        others = [word for word in kind.groups[group] if word not in present]
        if len(exchanged) < wanted and others:
            word = _pick(rng, others)
            present.add(word)
            exchanged.append((start, end, word))
    for start, end, word in sorted(exchanged, reverse=True):
        caption = caption[:start] + word + caption[end:]
    return caption


def _mentions(kind: Kind, caption: str) -> list[tuple[int, int, str]]:
    """(Start, end, group) of each of the kind's words in a caption, the longest word first where two overlap."""
    words = [(word, name) for name, group in kind.groups.items() for word in group]
    found: list[tuple[int, int, str]] = []
    for word, name in sorted(words, key=lambda pair: -len(pair[0])):
        for match in re.finditer(rf"\b{re.escape(word)}\b", caption, re.IGNORECASE):
            start, end = match.span()
            if all(end <= other_start or start >= other_end for other_start, other_end, _ in found):
                found.append((start, end, name))
    return sorted(found)


@dataclass(frozen=True)
class Prompts:
    """What is asked for, for each subject and seed."""

    listed: tuple[str, ...] = ()
    """Drawn from these, "{category}" filled in, whatever the caption; (): from the caption and the vocabulary."""
    vocabulary: Vocabulary = VOCABULARY
    changes: tuple[int, int] = (2, 4)
    """Fewest and most words of a caption that are exchanged."""

    def prompt(self, category: str, caption: str | None, seed: str) -> str:
        """The prompt of one try.

        category: may be "" where it is not known. caption: what describes the subject, in words of the vocabulary.
        """
        if self.listed:
            return _pick(random.Random(f"listed/{seed}"), self.listed).replace("{category}", category or "thing")
        kind = self.vocabulary.kind(category)
        if caption:
            other = contradicted(kind, caption, seed, self.changes)
            if other != caption:
                return other
        return drawn(kind, category or "thing", seed)


def read_prompts(path: Path) -> tuple[str, ...]:
    """The lines of a file, empty ones left out; raises InputError where there is none."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts {path}: cannot be read ({error}); give a text file, a prompt a line") from None
    listed = tuple(line for line in lines if line)
    if not listed:
        raise InputError(f"--prompts {path}: empty; give a prompt a line, {{category}} where the category goes")
    return listed


def _pick(rng: random.Random, values: Sequence[str]) -> str:
    # `random.random` is the part of the module whose stream is the same in every version of Python
    return values[int(rng.random() * len(values))]
