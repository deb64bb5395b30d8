"""Near-identity distractors from photos: drawn, proved, measured, and kept where they are near and different enough."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from nearid_personalize.data import Rows, load_rows
from nearid_personalize.distractors.inpaint import Inpainter, Repaint
from nearid_personalize.distractors.masks import MaskFinder
from nearid_personalize.distractors.nearness import (
    Limits,
    Measuring,
    Pair,
    Scores,
    limits_from,
    refusal,
    same_subject_similarities,
)
from nearid_personalize.distractors.options import BuildOptions
from nearid_personalize.distractors.outputs import write_outputs
from nearid_personalize.distractors.places import (
    Describe,
    Place,
    Prepared,
    list_places,
    prepare,
    write_mask,
    write_picture,
)
from nearid_personalize.distractors.prompts import Prompts
from nearid_personalize.distractors.records import Outcome, Records, Try, wait_until
from nearid_personalize.distractors.regions import Region, changed_outside, paste, region_around
from nearid_personalize.errors import InputError
from nearid_personalize.files import check_writable
from nearid_personalize.images import load_image

THUMBNAIL = 256
"""Longer side of the pictures of refused tries that are kept for the contact sheet, pixels."""


class BackgroundChanged(RuntimeError):
    """A written distractor differs from its view outside the painted region: our own fault, never the user's."""


@dataclass(frozen=True)
class Share:
    """Which of a run's processes this is."""

    rank: int = 0
    count: int = 1

    @classmethod
    def of_process(cls) -> "Share":
        """As `accelerate launch` and `torchrun` tell it."""
        return cls(rank=int(os.environ.get("RANK", 0)), count=int(os.environ.get("WORLD_SIZE", 1)))

    def of(self, places: Sequence[Place]) -> list[Place]:
        """This process's places: every count-th."""
        return list(places[self.rank :: self.count])


@dataclass(frozen=True, eq=False)
class Builder:
    """Everything that a run works with.

    Args:
        rows: the views.
        inpaint: what repaints, see `inpainter_for`.
        measure: what is known of a pair; without models only the seam.
        find_mask: where a view has no mask of its own.
        describe: captions the subject where there is no caption.
        captions: (row, slot) -> the caption of a view, where there is one.
    """

    rows: Rows
    records: Records
    inpaint: Inpainter
    options: BuildOptions
    prompts: Prompts
    measure: Measuring
    share: Share
    find_mask: MaskFinder | None = None
    describe: Describe | None = None
    captions: Mapping[tuple[int, int], str] | None = None
    show: bool = False

    def run(self, places: Sequence[Place]) -> None:
        """Draw this process's share of the places; with several processes, returns when all are done."""
        mine = self.share.of(places)
        for place in mine:
            self.records.unskip(place)
        self._draw_round(mine, 0)
        self._agree_on_limits(places)
        for number in range(self.options.tries):
            self._draw_round(mine, number)
            self._judge_round(mine, number)
        if self.share.rank == 0:
            wait_until(lambda: all(self._is_finished(place) for place in places))

    def finish(self, places: Sequence[Place], models: Mapping[str, Any]) -> dict[str, Any]:
        """Write report, sheet and plot; raises InputError when no view at all could be repainted."""
        skipped = [self.records.skipped(place) for place in places]
        if all(reason is not None for reason in skipped):
            raise InputError(
                f"{self.rows.name}: no view can be repainted; {skipped[0] if skipped else 'there is none'}"
            )
        return write_outputs(self.rows, places, self.records, models)

    def _is_finished(self, place: Place) -> bool:
        return self._is_settled(place) or self.records.skipped(place) is not None

    def _is_settled(self, place: Place) -> bool:
        """Whether a view has its distractor, or has had all its tries; an earlier run may have had fewer."""
        outcome = self.records.outcome(place)
        return outcome is not None and (outcome.kept is not None or len(outcome.refusals) >= self.options.tries)

    # --- drawing -----------------------------------------------------------------------------------------------------
    def _draw_round(self, places: Sequence[Place], number: int) -> None:
        """Try number `number` of every view that is open and lacks it."""
        missing = [place for place in places if self._lacks(place, number)]
        what = "first tries" if number == 0 else f"tries {number + 1}"
        with tqdm(total=len(missing), desc=what, unit="picture", disable=not self.show or not missing) as progress:
            for batch in _batches(self._prepared(missing), self._region, self.options.batch_size):
                self._draw(batch, number)
                progress.update(len(batch))

    def _lacks(self, place: Place, number: int) -> bool:
        return not self._is_finished(place) and self.records.read_try(place, number) is None

    def _prepared(self, places: Iterable[Place]) -> Iterator[Prepared]:
        """The views that can be repainted; the others are left out, with the reason."""
        for place in places:
            try:
                yield self.prepare(place)
            except InputError as error:
                self.records.skip(place, str(error))

    def prepare(self, place: Place) -> Prepared:
        """A view with its masks; raises InputError where it cannot be repainted."""
        caption = (self.captions or {}).get((place.row, place.slot))
        return prepare(place, self.rows[place.row], self.options, self.find_mask, self.describe, caption)

    def _region(self, view: Prepared) -> Region:
        return region_around(view.painted, self.inpaint.size, self.inpaint.multiple, self.options.padding)

    def _draw(self, batch: Sequence[Prepared], number: int) -> None:
        """Draw, write, prove, measure and remember try number `number` of some views whose crops have one size."""
        started = time.perf_counter()
        jobs = [self.job(view, number) for view in batch]
        pictures = self.inpaint(jobs)
        seconds = (time.perf_counter() - started) / len(batch)
        pairs = []
        for view, painted in zip(batch, pictures, strict=True):
            path = self.records.picture_file(view.place, number)
            write_picture(self.paste(view, painted), path)
            pairs.append(
                Pair(
                    view=view.photo,
                    distractor=proved(view, path),
                    subject=view.subject,
                    painted=view.painted,
                    category=view.category,
                )
            )
        for view, job, scores in zip(batch, jobs, self.measure(pairs), strict=True):
            found = Try(number=number, prompt=job.prompt, seed=job.seed, scores=scores, seconds=round(seconds, 4))
            if number == 0 and self.measure.tells_identity:
                embedding = self.measure.embed_subjects([(view.photo, view.painted)])[0]
                self.records.add_embedding(view.place, embedding)
            self.records.add_try(view.place, found)

    def job(self, view: Prepared, number: int) -> Repaint:
        """What the inpainter is asked for."""
        picture, mask = self._region(view).crop(view.photo, view.painted)
        seed = view.place.seed(self.options.seed, number)
        prompt = self.prompts.prompt(view.category, view.caption, f"{self.options.seed}/{view.place.key}/{number}")
        return Repaint(picture=picture, mask=mask, prompt=prompt, seed=seed)

    def paste(self, view: Prepared, painted: Image.Image) -> Image.Image:
        """The photo with what was painted, at the photo's own size."""
        whole = self._region(view).restore(painted, view.photo)
        return paste(view.photo, whole, view.painted, round(self.options.feather * max(view.photo.size)))

    # --- judging -----------------------------------------------------------------------------------------------------
    def _agree_on_limits(self, places: Sequence[Place]) -> None:
        """Set the limits from all first tries, those of other processes too; the first process does it for all."""
        if self.share.rank > 0:
            wait_until(lambda: self.records.limits() is not None)
        if self.records.limits() is not None:
            return
        wait_until(lambda: not any(self._lacks(place, 0) for place in places))
        first = [found.scores for place in places if (found := self.records.read_try(place, 0)) is not None]
        self.records.set_limits(self._limits(first, places) if self.options.filter else Limits())

    def _limits(self, first: Sequence[Scores], places: Sequence[Place]) -> Limits:
        quality = self.measure.quality
        return limits_from(
            first_tries=first,
            same_subject=same_subject_similarities(self.records.embeddings(places)),
            quantiles=self.options.quantiles,
            min_quality=None if quality is None else quality.threshold,
            given=self.options.limits,
        )

    def _judge_round(self, places: Sequence[Place], number: int) -> None:
        """Keep or refuse try number `number` of every view that has one."""
        limits = self.records.limits()
        assert limits is not None, "set after the first round"
        for place in places:
            found = None if self._is_settled(place) else self.records.read_try(place, number)
            if found is None:
                continue
            reasons = tuple(refusal(earlier.scores, limits) for earlier in self.records.tries(place)[: number + 1])
            if not reasons[-1]:
                self._keep(place, number, reasons[:-1])
            else:
                _shrink(self.records.picture_file(place, number))
                if number + 1 == self.options.tries:
                    self.records.settle(place, Outcome(kept=None, refusals=reasons))

    def _keep(self, place: Place, number: int, refusals: tuple[str, ...]) -> None:
        """Move a try's picture to where the built set has it, and prove once more that its background is the view's."""
        view, picture = self.prepare(place), self.records.picture_file(place, number)
        write_mask(view.painted, place.painted_file)
        if picture.is_file():
            os.replace(picture, place.distractor_file)
        proved(view, place.distractor_file)
        self.records.settle(
            place,
            Outcome(
                kept=number,
                refusals=refusals,
                background_pixels=int((~view.painted).sum()),
                subject_pixels=int(view.subject.sum()),
                oracle=view.oracle,
            ),
        )


def proved(view: Prepared, path: Path) -> Image.Image:
    """The picture in a file, read back; raises `BackgroundChanged` unless its background is the view's, as written."""
    picture = load_image(path)
    changed = changed_outside(load_image(view.place.view_file), picture, view.painted)
    if changed:
        raise BackgroundChanged(
            f"{path}: {changed} pixels outside the painted region differ from {view.place.view_file}"
        )
    return picture


def _shrink(path: Path) -> None:
    """Leave a small copy of a refused picture, for the contact sheet."""
    if path.is_file():
        picture = load_image(path)
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        write_picture(picture, path)


def _batches(views: Iterable[Prepared], region: Callable[[Prepared], Region], size: int) -> Iterator[list[Prepared]]:
    """Views in order, at most `size` together, all of whose crops are given to the model at one size."""
    batch: list[Prepared] = []
    for view in views:
        if batch and (len(batch) == size or region(view).size != region(batch[0]).size):
            yield batch
            batch = []
        batch.append(view)
    if batch:
        yield batch


# --- the whole -------------------------------------------------------------------------------------------------------
def build_distractors(
    views: Rows | str | Path,
    out: str | Path,
    inpaint: Inpainter,
    options: BuildOptions = BuildOptions(),  # noqa: B008 - frozen
    prompts: Prompts = Prompts(),  # noqa: B008 - frozen
    measure: Measuring = Measuring(),  # noqa: B008 - frozen
    find_mask: MaskFinder | None = None,
    describe: Describe | None = None,
    captions: Mapping[tuple[int, int], str] | None = None,
    settings: Mapping[str, Any] | None = None,
    show: bool = False,
) -> dict[str, Any]:
    """Build a near-identity distractor for every view: the same background, another individual of the kind.

    A run that was killed goes on where it was when it is called again. Several processes (`accelerate launch`) share
    the work; all of them see `out`.

    Args:
        views: rows, or what `data.load_rows` opens: a folder of subjects' folders, parquet, a Hub id.
        out: a folder of subjects' folders, as training and evaluation read it.
        inpaint: what repaints, see `inpainter_for`.
        prompts: what is asked for.
        measure: the models by which distractors are refused; without any, by the seam alone.
        find_mask: (photo, category) -> mask, for views that have none of their own.
        describe: (photo, mask, category) -> a caption of the subject, which is then contradicted.
        captions: (row, slot) -> caption, in place of `describe`.
        settings: what else may not change when a run goes on, by the flag's name, such as the model's name.

    Returns:
        What is in `report.json` (of the first process; {} of the others).

    Raises:
        InputError: no view can be repainted, or the folder was begun with other settings.
    """
    rows = views if isinstance(views, Rows) else load_rows(views)
    out = Path(out)
    check_writable(out)
    places = list_places(rows, out, options.limit)
    share = Share.of_process()
    records = Records(out)
    if share.rank == 0:
        records.begin({**run_settings(options, inpaint, prompts), **(settings or {})})
    builder = Builder(
        rows=rows,
        records=records,
        inpaint=inpaint,
        options=options,
        prompts=prompts,
        measure=_with_categories(measure, rows, options),
        share=share,
        find_mask=find_mask,
        describe=describe,
        captions=captions,
        show=show and share.rank == 0,
    )
    builder.run(places)
    return builder.finish(places, settings or {}) if share.rank == 0 else {}


def run_settings(options: BuildOptions, inpaint: Inpainter, prompts: Prompts) -> dict[str, Any]:
    """What decides a try's picture and whether it is kept; how often it is tried may change."""
    chosen = asdict(options)
    for name in ("tries", "batch_size", "link", "limit", "quantiles", "limits"):
        chosen.pop(name)
    chosen |= {f"quantile_{name}": value for name, value in asdict(options.quantiles).items()}
    chosen |= {name: value for name, value in asdict(options.limits).items() if value is not None}
    told = {name: getattr(inpaint, name, None) for name in ("size", "steps", "guidance_scale", "strength")}
    return {**chosen, **told, "prompts": list(prompts.listed), "changes": list(prompts.changes)}


def _with_categories(measure: Measuring, rows: Rows, options: BuildOptions) -> Measuring:
    """Measuring that knows what else there is: the data's own categories."""
    if measure.text_image is None or options.category is not None:
        return measure
    known = {row.category for row in rows if row.category}
    return replace(measure, categories=tuple(sorted({*measure.categories, *known})))
