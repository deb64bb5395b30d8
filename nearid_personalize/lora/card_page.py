"""The report card as one HTML file, and as a JSON report."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from PIL import Image

from nearid_personalize.files import write_atomically
from nearid_personalize.lora.card import Cell, ReportCard, cost_in_words, data_uri, times, verdict
from nearid_personalize.report import Tile, contact_sheet, rounded, versions, write_report


# --- writing ---------------------------------------------------------------------------------------------------------
def write_card(
    card: ReportCard, out: Path, models: Mapping[str, Any], seconds: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Write `report_card.html`, `contact_sheet.png` of the best cell and, last, `report.json` into `out`.

    models: what was drawn and scored with, as the report states it. seconds: wall time by stage. Returns the report.
    """
    report = card.to_dict()
    report |= {"cost": {"seconds": rounded(seconds or {})}, "models": dict(models), "versions": versions()}
    best = sorted(card.best.shots, key=lambda shot: -shot.score)
    status = {True: "accepted", False: "rejected"}
    tiles = [Tile(s.image, f"seed {s.seed}, {s.prompt}", s.score, status[s.accepted]) for s in best]
    references = [Image.open(BytesIO(jpeg)) for jpeg in card.references]
    title = f"{card.subject_name}: {card.best.checkpoint} at scale {card.best.scale:g}"
    buffer = BytesIO()
    contact_sheet(references, tiles, title, card.threshold).save(buffer, format="PNG")
    write_atomically(out / "contact_sheet.png", buffer.getvalue())
    write_atomically(out / "report_card.html", to_html(card, models))
    write_report(report, out / "report.json")
    return report


def to_html(card: ReportCard, models: Mapping[str, Any]) -> str:
    """The card as one HTML file without any outside part."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": "{:.0%}".format, "uri": data_uri, "times": times, "cost": cost_in_words}
    source = files("nearid_personalize").joinpath("templates").joinpath("report_card.html").read_text(encoding="utf-8")
    words = {"verdict": verdict(card), "weakness": weakness(card.best, card.prompts), "score": "{:.3f}".format}
    return environment.from_string(source).render(card=card, models=models, **words)


def weakness(cell: Cell, prompts: Sequence[str]) -> str:
    """The prompt with the fewest accepted pictures, and why the first was refused; "" when none stands out."""
    worst = min((cell.of_prompt(prompt) for prompt in prompts), key=lambda part: part.num_accepted)
    if worst.rate >= cell.rate or not cell.num_accepted:
        return ""
    first = next(shot for shot in worst.shots if not shot.accepted)
    return (
        f"Hardest: “{first.prompt}”, {worst.num_accepted} of {len(worst.shots)} accepted (the first: {first.reason})."
    )
