"""`nearid verify`: does each item show the subject of the photos?"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from PIL import Image

from nearid_personalize.commands.console import DONE, NONE_ACCEPTED, Stopwatch, picture_paths, say
from nearid_personalize.commands.options import Verify
from nearid_personalize.errors import InputError
from nearid_personalize.files import check_writable, write_atomically
from nearid_personalize.images import list_images, load_image, load_images, save_image
from nearid_personalize.loading import choose_device
from nearid_personalize.lora.card import data_uri, thumbnail
from nearid_personalize.report import Tile, contact_sheet, heat_overlay, rounded, to_json, versions, write_report

if TYPE_CHECKING:
    from nearid_personalize.scorer.subject import Subject
    from nearid_personalize.verification import Verification

SHEET_LIMIT = 48  # tiles of the contact sheet: six rows
STATUS = {"same": "accepted", "different": "rejected", "unsure": "unsure"}


@dataclass(frozen=True)
class Item:
    """What one question is asked about: a name, and its pictures."""

    name: str
    paths: tuple[Path, ...]


def items_of(images: Path) -> list[Item]:
    """The items that a flag means: one file; or each picture and each folder of pictures inside a folder.

    Raises InputError where there are none.
    """
    if images.is_file():
        return [Item(name=images.name, paths=(images,))]
    folders = sorted(path for path in images.iterdir() if path.is_dir()) if images.is_dir() else []
    items = [Item(name=folder.name, paths=tuple(list_images(folder))) for folder in folders]
    try:
        items += [Item(name=path.name, paths=(path,)) for path in list_images(images)]
    except InputError:
        if not items:  # a folder of folders has no pictures of its own
            raise
    return items


def run_verify(options: Verify) -> int:
    """`nearid verify`."""
    from nearid_personalize.scorer.scorer import IdentityScorer
    from nearid_personalize.verification import verify

    reference_paths = picture_paths(options.references)
    items = items_of(options.images)
    check_writable(options.out)
    say(options.json, f"plan: verify {len(items)} items against {len(reference_paths)} photos with {options.model}")
    clock = Stopwatch()
    with clock.stage("load"):
        scorer = IdentityScorer.from_pretrained(options.model, choose_device(options.device), trunk=options.trunk)
    with clock.stage("verify"):
        references = load_images(reference_paths)
        negatives = picture_paths(options.negatives) if options.negatives else None
        subject = scorer.enroll(references, negatives=negatives)
        answers = verify(
            scorer, subject, [item.paths for item in items], options.false_accept_rate, options.false_reject_rate
        )
    with clock.stage("maps"):
        shown = [
            row_of(item, answer, references, scorer if number < options.maps else None)
            for number, (item, answer) in enumerate(zip(items, answers))
        ]
    report = report_of(options, items, answers, subject, clock.seconds)
    page = to_html(options, report, shown, references)
    tiles = [
        Tile(load_image(item.paths[answer.nearest_picture]), item.name, answer.score, STATUS[answer.verdict])
        for item, answer in list(zip(items, answers))[:SHEET_LIMIT]
    ]
    sheet = contact_sheet(references, tiles, str(options.images), subject.threshold, heading="In the order given")
    save_image(sheet, options.out / "contact_sheet.png")
    write_atomically(options.out / "report.html", page)
    write_report(report, options.out / "report.json")
    return conclude(options, report)


def row_of(item: Item, answer: "Verification", references: Sequence[Image.Image], scorer: Any) -> dict[str, Any]:
    """What the page shows of an item; with a scorer, where it differs too."""
    from nearid_personalize.driftmap import drift_map

    picture = load_image(item.paths[answer.nearest_picture])
    overlay = None
    if scorer is not None:
        found = drift_map(scorer, picture, references)
        small = picture.convert("RGB")
        small.thumbnail((512, 512))
        overlay = data_uri(thumbnail(heat_overlay(small, found.at(*small.size).numpy())))
    return {
        "name": item.name,
        "count": len(item.paths),
        "answer": answer,
        "picture": data_uri(thumbnail(picture)),
        "overlay": overlay,
    }


def report_of(
    options: Verify,
    items: Sequence[Item],
    answers: Sequence["Verification"],
    subject: "Subject",
    seconds: dict[str, float],
) -> dict[str, Any]:
    """The content of report.json."""
    rows = []
    for item, answer in zip(items, answers):
        rows.append(
            {
                "item": item.name,
                "pictures": len(item.paths),
                "verdict": answer.verdict,
                "score": answer.score,
                "false_accept_rate": answer.false_accept_rate,
                "false_reject_rate": answer.false_reject_rate,
                "nearest_reference": answer.nearest_reference,
            }
        )
    counts = Counter(answer.verdict for answer in answers)
    return {
        "items": rows,
        "counts": {verdict: counts[verdict] for verdict in ("same", "unsure", "different")},
        "asked": {
            "false_accept_rate": options.false_accept_rate,
            "false_reject_rate": options.false_reject_rate,
        },
        "rests_on": rests_on(subject),
        "cost": {"seconds": rounded(seconds)},
        "models": {"scorer": options.model},
        "versions": versions(),
    }


def rests_on(subject: "Subject") -> str:
    """In words: which known scores the rates come from."""
    if not subject.known:
        return (
            "nothing: the encoder carries no calibration, and no negatives were given; verdicts follow a rule of thumb"
        )
    parts = []
    for known in subject.known:
        what = "negatives given" if known.source == "negatives" else "subjects of the encoder's calibration bank"
        held = "" if known.guaranteed else " (more photos than the bank serves: rates are not guaranteed)"
        parts.append(f"{len(known.impostor)} {what}{held}")
    return ", ".join(parts)


def to_html(
    options: Verify, report: dict[str, Any], rows: Sequence[dict[str, Any]], references: Sequence[Image.Image]
) -> str:
    """The report as one HTML file without any outside part."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"rate": rate_in_words, "score": "{:.3f}".format}
    source = files("nearid_personalize").joinpath("templates").joinpath("verification.html")
    template = environment.from_string(source.read_text(encoding="utf-8"))
    photos = [data_uri(thumbnail(photo)) for photo in references]
    return template.render(report=report, rows=rows, photos=photos, images=options.images.name)


def rate_in_words(rate: float | None) -> str:
    """An error rate for the eye: "0.25 %", "12 %", "not known"."""
    if rate is None:
        return "not known"
    return f"{rate:.2%}" if rate < 0.1 else f"{rate:.0%}"


def conclude(options: Verify, report: dict[str, Any]) -> int:
    """Print the report or a table; returns the exit status."""
    counts = report["counts"]
    if options.json:
        sys.stdout.write(to_json(report))
    else:
        width = max(len(row["item"]) for row in report["items"])
        print(f"{'item':<{width}}  verdict    score  false accepts  false rejects")
        for row in report["items"]:
            accepts, rejects = (rate_in_words(row[f"false_{side}_rate"]) for side in ("accept", "reject"))
            print(f"{row['item']:<{width}}  {row['verdict']:<9}  {row['score']:.3f}  {accepts:>13}  {rejects:>13}")
        print("  ".join(f"{verdict} {count}" for verdict, count in counts.items()))
        print(f"rates rest on {report['rests_on']}")
        print(f"look at {options.out / 'report.html'}")
    return DONE if counts["same"] else NONE_ACCEPTED
