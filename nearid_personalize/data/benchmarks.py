"""The layouts of the three benchmarks of the paper (NearID, arXiv 2604.01973): NearID, Mind-the-Glitch, DreamBench++.

DreamBench++ is read as its authors publish it, two archives unpacked into one folder or two:

    samples/<method and settings>/src_image/<subject>/<prompt>_<image>.jpg     the reference, one copy per prompt
    samples/<method and settings>/tgt_image/<subject>/<prompt>_<image>.jpg     what the method drew
    data_human_rating/merged_data/group{1,2}/<method>-cp.json                  {"<subject>-<prompt>": 0 to 4}

where a subject is `<category>_<number>_<name>`: `live_subject_animal_00_kitten`, `object_20_magic_cube`.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nearid_personalize.errors import InputError
from nearid_personalize.files import parse_json
from nearid_personalize.images import IMAGE_SUFFIXES

from .rows import NEARID, NEARID_SPLITS, Rows
from .sources import load_rows

MTG = "abdo-eldesokey/mtg-dataset"
TABLE_SOURCES = ("Flux", "Flux_1024", "PowerPaint", "Qwen", "Qwen_1328", "SDXL", "SDXL_1024")
"""The seven sets of distractors that the paper's table pools; FluxC and FluxC_1024 are published and not in it."""

# The folders of samples spell out what the files of ratings abbreviate, in some releases.
_METHOD_SPELLINGS = {"vit_huge": "vit_h", "vit_giant": "vit_g"}
# Object 20 is called so in the samples, and otherwise in the ratings; both have the same nine prompts.
_SUBJECT_SPELLINGS = {"rubik's_cube": "magic_cube"}


# --- rows of views and distractors -----------------------------------------------------------------------------------


def nearid_rows(
    data: str | Path,
    distractors: Sequence[str | Path] = (),
    split: str | None = "test",
    hash_splits: bool = False,
    show: bool = False,
) -> Rows:
    """The rows of the NearID benchmark: views and, joined by id, the distractors of each source.

    The Hub's own data get the seven sources of the paper's table where none are named. Of its val and test split only
    the rows of that split are fetched.

    Raises:
        InputError: as `load_rows`; no distractors.
    """
    if str(data) == NEARID:
        sets = [str(place) for place in distractors] or [f"{NEARID}-{name}" for name in TABLE_SOURCES]
        if split in ("val", "test") and all(place.startswith(f"{NEARID}-") for place in sets):
            data, *distractors = [_published(place, split, show) for place in (NEARID, *sets)]
        else:
            distractors = sets
    rows = load_rows(data, distractors, split, hash_splits)
    if not rows.sources:
        raise InputError(f"{data}: no distractors to tell the identities from; name sets with --distractors")
    return rows


def _published(repository: str, split: str, show: bool) -> Path:
    """The rows of one split of a published set of NearID: splits are positions, in the order of `NEARID_SPLITS`."""
    try:
        from .parts import published_part
    except ModuleNotFoundError as error:
        raise InputError(
            f"reading tables of pictures needs {error.name}; pip install 'nearid-personalize[train]'"
        ) from None
    names = list(NEARID_SPLITS)
    start = sum(NEARID_SPLITS[name] for name in names[: names.index(split)])
    total = sum(NEARID_SPLITS.values())
    return published_part(repository, split, start, start + NEARID_SPLITS[split], total, show)


def part_edit_rows(data: str | Path, split: str | None = "test", hash_splits: bool = False) -> Rows:
    """The rows of Mind-the-Glitch: two views of a subject, each with one part edited, and masks of part and subject.

    Raises:
        InputError: as `load_rows`; the columns are not Mind-the-Glitch's.
    """
    rows = load_rows(data, split=split, hash_splits=hash_splits)
    first = rows[0]
    lacks = [
        name
        for name, there in (
            ("image_1_original, image_2_original", len(first.views) == 2),
            ("image_1_inpainted, image_2_inpainted", bool(rows.sources)),
            ("image_1_part_mask, image_2_part_mask", bool(first.part_masks)),
            ("image_1_object_mask, image_2_object_mask", bool(first.masks)),
        )
        if not there
    ]
    if lacks:
        raise InputError(f"{data}: no {lacks[0]}; --benchmark mtg needs the columns of {MTG}")
    return rows


# --- pictures that people have rated ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class RatedPicture:
    """A generated picture, its reference, and how alike two groups of people found them."""

    method: str
    """What drew it, as the files of ratings call it."""
    subject: str
    """`live_subject_animal_00_kitten`."""
    category: str
    """live_subject_animal, live_subject_human, object or style."""
    reference: Path
    picture: Path
    ratings: tuple[float, float]
    """Concept preservation, 0 to 4, by group 1 and group 2."""


@dataclass(frozen=True)
class RatedPictures:
    """All pictures that have been rated, and the folders of samples that nobody rated."""

    pictures: tuple[RatedPicture, ...]
    unrated: tuple[str, ...]

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that drew them."""
        return tuple(sorted({picture.method for picture in self.pictures}))

    @property
    def subjects(self) -> tuple[str, ...]:
        """The subjects, of all categories."""
        return tuple(sorted({picture.subject for picture in self.pictures}))

    def first_subjects(self, count: int) -> "RatedPictures":
        """The pictures of the first `count` subjects of each category."""
        kept: dict[str, list[str]] = {}
        for subject in self.subjects:
            kept.setdefault(_category(subject), []).append(subject)
        wanted = {subject for subjects in kept.values() for subject in subjects[:count]}
        return RatedPictures(tuple(picture for picture in self.pictures if picture.subject in wanted), self.unrated)


def load_rated_pictures(samples: Path, ratings: Path | None = None) -> RatedPictures:
    """DreamBench++'s samples with their human ratings of concept preservation.

    Args:
        samples: the folder of the methods' folders, or one that holds it.
        ratings: the same for the ratings. Default: they are looked for under `samples`.

    Raises:
        InputError: no such folders; pictures without a reference or a rating; ratings without a picture.
    """
    runs = _runs(samples)
    groups = _rating_groups(samples if ratings is None else ratings)
    rated_methods = sorted(path.name.removesuffix("-cp.json") for path in groups[0].glob("*-cp.json"))
    found: dict[str, Path] = {}
    unrated = []
    for run in runs:
        method = _method_of(run.name, rated_methods)
        if method is None:
            unrated.append(run.name)
        elif method in found:
            raise InputError(f"{run}: samples of {method}, as {found[method]}; keep one of the two")
        else:
            found[method] = run
    if not found:
        raise InputError(f"{samples}: no human ratings of {', '.join(unrated)}; rated are {', '.join(rated_methods)}")
    pictures = []
    for method, run in sorted(found.items()):
        pictures += _rated_run(method, run, [_ratings(group / f"{method}-cp.json") for group in groups], groups)
    return RatedPictures(tuple(pictures), tuple(unrated))


def _runs(samples: Path) -> list[Path]:
    """The folders of methods: those that hold `src_image` and `tgt_image`."""
    if not samples.is_dir():
        raise InputError(f"{samples}: no such folder; give the one where DreamBench++'s samples were unpacked")
    places = [samples, *sorted(samples.glob("*")), *sorted(samples.glob("*/*"))]
    runs = [place for place in places if (place / "src_image").is_dir() and (place / "tgt_image").is_dir()]
    if not runs:
        raise InputError(f"{samples}: no samples; each method needs a folder with src_image and tgt_image in it")
    return runs


def _rating_groups(place: Path) -> tuple[Path, Path]:
    """The folders of the two groups' ratings."""
    found = [path for path in sorted(place.rglob("group1")) if any(path.glob("*-cp.json"))]
    if len(found) != 1:
        count = "no human ratings" if not found else f"{len(found)} sets of human ratings"
        raise InputError(f"{place}: {count} (merged_data/group1/METHOD-cp.json); name their folder with --ratings")
    second = found[0].with_name("group2")
    if not second.is_dir():
        raise InputError(f"{second}: no such folder; M-H needs the ratings of both groups")
    return found[0], second


def _ratings(path: Path) -> dict[str, float]:
    """One file of ratings, its keys as `_key` spells them."""
    try:
        read = parse_json(path.read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"{path}: no such file; every rated method needs one in both groups") from None
    except ValueError as error:
        raise InputError(f"{path}: no JSON ({error}); unpack the human ratings again") from None
    if not isinstance(read, dict) or not all(isinstance(value, int | float) for value in read.values()):
        raise InputError(f"{path}: not one number for every picture; give DreamBench++'s merged_data")
    return {_respelled(key, _SUBJECT_SPELLINGS): float(value) for key, value in read.items()}


def _method_of(run: str, methods: Iterable[str]) -> str | None:
    """The method that a folder of samples (`emu2_gs3_step50_seed42_torch_bfloat16`) is of."""
    name = _respelled(run, _METHOD_SPELLINGS)
    fits = [method for method in methods if name == method or name.startswith(f"{method}_")]
    return max(fits, key=len, default=None)


def _rated_run(
    method: str, run: Path, ratings: Sequence[Mapping[str, float]], groups: Sequence[Path]
) -> list[RatedPicture]:
    """The pictures of one method, each with its reference and both groups' ratings."""
    references, drawn = (_by_key(run / kind) for kind in ("src_image", "tgt_image"))
    _check_same(references, run / "src_image", drawn, run / "tgt_image")
    for rated, group in zip(ratings, groups, strict=True):
        _check_same(drawn, run / "tgt_image", rated, group / f"{method}-cp.json")
    return [
        RatedPicture(
            method=method,
            subject=key.rpartition("-")[0],
            category=_category(key),
            reference=references[key],
            picture=picture,
            ratings=(ratings[0][key], ratings[1][key]),
        )
        for key, picture in sorted(drawn.items())
    ]


def _by_key(folder: Path) -> dict[str, Path]:
    """The pictures of `folder/<subject>/<prompt>_<image>.jpg` by `<subject>-<prompt>`."""
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*/*")):
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
            continue
        subject = _respelled(path.parent.name, _SUBJECT_SPELLINGS)
        key = f"{subject}-{path.stem.split('_')[0]}"
        if key in found:
            raise InputError(f"{path}: a second picture for {key}, as {found[key].name}; one was rated, keep that one")
        found[key] = path
    return found


def _check_same(mine: Mapping[str, object], here: Path, theirs: Mapping[str, object], there: Path) -> None:
    """Raise `InputError` unless both have the same keys."""
    for some, others, lacking in ((mine, theirs, there), (theirs, mine, here)):
        missing = sorted(some.keys() - others.keys())
        if missing:
            raise InputError(
                f"{lacking}: nothing for {missing[0]} ({len(missing)} such), which "
                f"{here if lacking is there else there} has; both must have the same pictures"
            )


def _category(subject: str) -> str:
    match = re.match(r"(\D+)_\d+_", subject)
    if match is None:
        raise InputError(f"{subject}: not a subject of DreamBench++, as object_20_magic_cube is")
    return match[1]


def _respelled(name: str, spellings: Mapping[str, str]) -> str:
    for theirs, ours in spellings.items():
        name = name.replace(theirs, ours)
    return name
