"""Numbers in plain words, and as the small pieces of HTML that show them. Nothing here knows of gradio."""

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from math import isnan

from nearid_personalize.demo.studio import Comparison, DrawingResult, TrainingProgress
from nearid_personalize.guard.result import Candidate, Cost, RaceProgress
from nearid_personalize.photos import PhotoCheck
from nearid_personalize.verification import Verification

STRICTNESS = [
    ("Strict: at most 1 look-alike in 100 slips through", "strict"),
    ("Balanced: about 1 in 30", "balanced"),
    ("Lenient: about 1 in 10", "lenient"),
]


def score(value: float) -> str:
    """.93, 1.00, -.12; "-" for a score that is none."""
    return "–" if isnan(value) else f"{value:.2f}".replace("0.", ".", 1)


def duration(seconds: float) -> str:
    """ "8 s", "2 min 5 s", "1 h 3 min"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = whole % 3600 // 60
    return f"{whole // 3600} h" + (f" {minutes} min" if minutes else "")


def note(text: str, mood: str = "plain") -> str:
    """A paragraph in a box. mood: plain, good, doubt or bad; told by a sign as well as by colour."""
    sign = {"good": "✓", "doubt": "!", "bad": "✗", "plain": "i"}[mood]
    return f'<div class="note {mood}" role="status"><span aria-hidden="true">{sign}</span><p>{text}</p></div>'


def bar(share: float, text: str) -> str:
    """A progress bar with its text below; share in [0, 1]."""
    percent = round(100 * share)
    return (
        f'<div class="bar" role="progressbar" aria-valuenow="{percent}" aria-valuemin="0" aria-valuemax="100"'
        f' aria-label="{escape(text)}"><div style="width:{percent}%"></div></div><p class="bartext">{escape(text)}</p>'
    )


# --- photos ----------------------------------------------------------------------------------------------------------


def photo_captions(check: PhotoCheck) -> list[str]:
    """What stands below each photo."""
    return [
        f"{place}. " + ("" if isnan(photo.score) else f"{score(photo.score)} ") + "; ".join(photo.problems or ["fits"])
        for place, photo in enumerate(check.photos, start=1)
    ]


def photo_summary(check: PhotoCheck, refused: Sequence[str] = ()) -> str:
    """How the photos do together, and what was not taken."""
    lines = [escape(sentence) for sentence in refused]
    lines += [
        f"Photo {place}: {escape('; '.join(photo.problems))}."
        for place, photo in enumerate(check.photos, start=1)
        if photo.problems
    ]
    lines += [escape(w) for w in check.warnings if not w.startswith("Look at")]
    if lines:
        return note("<br>".join(lines), "doubt")
    likeness = f" Likeness among them: {score(check.consistency)} of 1." if len(check.photos) > 1 else ""
    return note(f"{len(check.photos)} photos that belong together.{likeness}", "good")


# --- training --------------------------------------------------------------------------------------------------------


def training_progress(progress: TrainingProgress) -> str:
    """The bar, the time left, and the identity curve as a drawing."""
    left = "" if progress.seconds_left is None else f", about {duration(progress.seconds_left)} left"
    text = "Getting ready…" if progress.step == 0 else f"Step {progress.step} of {progress.steps}{left}"
    return bar(progress.step / progress.steps, text) + identity_curve(progress)


def identity_curve(progress: TrainingProgress) -> str:
    """An SVG of likeness over steps: nothing before the first look."""
    if not progress.curve:
        return ""
    points = [(10 + 280 * step / progress.steps, 70 - 60 * max(0.0, value)) for step, value in progress.curve]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points)
    told = ", ".join(f"{score(value)} after {step} steps" for step, value in progress.curve)
    return (
        f'<figure class="curve"><svg viewBox="0 0 300 84" role="img" aria-label="Likeness to your photos: {told}">'
        '<line x1="10" y1="70" x2="290" y2="70" class="axis"/><line x1="10" y1="10" x2="290" y2="10" class="axis"/>'
        f'<polyline points="{line}"/>{dots}'
        '<text x="10" y="8">as alike as can be</text><text x="10" y="81">not alike</text></svg>'
        f"<figcaption>Likeness of the sample pictures to your photos: now {score(progress.curve[-1][1])}."
        "</figcaption></figure>"
    )


# --- pictures --------------------------------------------------------------------------------------------------------


def drawing_progress(progress: RaceProgress, num_candidates: int) -> str:
    """The bar of a race: what is finished, stopped, and under way."""
    counts = Counter(candidate.status for candidate in progress.candidates)
    over = len(progress.candidates)
    share = (over + len(progress.looks) * progress.step / progress.num_steps) / max(num_candidates, over, 1)
    told = [f"{counts['accepted']} accepted", f"{counts['rejected'] + counts['duplicate']} rejected"]
    told += [f"{counts['stopped']} stopped early"]
    if progress.looks:
        told.append(f"{len(progress.looks)} being drawn, step {progress.step} of {progress.num_steps}")
    return bar(min(share, 1.0), ", ".join(told) if over or progress.step else "Getting ready…")


def reason(candidate: Candidate, threshold: float) -> str:
    """Why a candidate is not accepted, in words."""
    if candidate.status == "stopped":
        return f"given up at step {candidate.stopped_at_step}"
    if candidate.status == "rejected" and candidate.score < threshold:
        return "not alike enough"
    return candidate.reason


def candidate_caption(candidate: Candidate, threshold: float, rank: int | None = None) -> str:
    """What stands below a candidate: rank, score, and what became of it."""
    number = f"{rank}. " if rank else ""
    return f"{number}{score(candidate.score)} {reason(candidate, threshold) or 'accepted'}"


def headline(outcome: DrawingResult, word: str) -> str:
    """How many of the candidates are the subject, in a sentence."""
    counts = Counter(candidate.status for candidate in outcome.result.candidates)
    total, yours = len(outcome.result.candidates), counts["accepted"]
    others = [f"{counts['rejected']} looked like another {word}"] if counts["rejected"] else []
    others += [f"{counts['stopped']} were given up half-way"] if counts["stopped"] else []
    others += [f"{counts['duplicate']} repeated a better one"] if counts["duplicate"] else []
    rest = f" {'; '.join(others).capitalize()}." if others else ""
    if not yours:
        advice = " Try more candidates, a longer training, or a less strict choice."
        return note(f"None of {total} pictures is surely your {escape(word)}.{rest}{advice}", "doubt")
    return note(f"<b>{yours} of {total}</b> pictures are your {escape(word)}.{escape(rest)}", "good")


def saving(cost: Cost, num_candidates: int) -> str:
    """The compute that stopping saved."""
    saved = 1 - cost.denoiser_rows / cost.denoiser_rows_best_of_n
    seconds = sum(cost.seconds.values())
    if saved < 0.005:
        return f"All {num_candidates} were drawn to the end, in {duration(seconds)}."
    return (
        f"Giving up hopeless ones early saved {saved:.0%} of the drawing: as much as drawing"
        f" {saved * num_candidates:.1f} of the {num_candidates} pictures. It took {duration(seconds)}."
    )


def details(candidate: Candidate, outcome: DrawingResult, nearest: int, rank: int) -> str:
    """Everything about one candidate: what became of it in words, the numbers on demand."""
    request = outcome.request
    asked = outcome.result.threshold
    too_little = f"its likeness is {score(candidate.score)}, accepted from {score(asked)} on"
    why = {
        "accepted": f"<b>Accepted:</b> its likeness is {score(candidate.score)}, asked for are {score(asked)}.",
        "rejected": f"<b>Rejected:</b> {too_little if candidate.score < asked else escape(candidate.reason)}.",
        "stopped": f"<b>Given up early:</b> {escape(candidate.reason)}. This is how far it had come.",
        "duplicate": f"<b>Left out:</b> {escape(candidate.reason)}, which is better.",
    }[candidate.status]
    numbers = {
        "Likeness": f"{candidate.score:.3f}; accepted from {outcome.result.threshold:.3f} on",
        "On the way": ", ".join(f"{score(value)} at {part:.0%}" for part, value in candidate.previews.items()),
        "Rank": f"{rank} of {len(outcome.result.candidates)}",
        "Seed": str(candidate.seed),
        "Prompt": request.prompt,
        "Model": f"{request.base_model}, LoRA {'yes' if request.lora else 'none'}",
        "Steps": str(request.steps),
        "Guidance": "the model's own" if request.guidance_scale is None else f"{request.guidance_scale:g}",
    }
    mood = "good" if candidate.status == "accepted" else "doubt"
    return note(f"{why} Most like photo {nearest + 1}.", mood) + on_demand("Seed, settings and numbers", numbers)


def on_demand(title: str, numbers: Mapping[str, str]) -> str:
    """A list that opens at a click."""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in numbers.items() if value)
    return f"<details><summary>{escape(title)}</summary><dl>{rows}</dl></details>"


def summary(outcome: DrawingResult) -> str:
    """The compute that was saved, and on demand what it cost and what accepting means."""
    cost = outcome.result.cost
    numbers = {
        "Accepted means": f"likeness {outcome.subject.threshold:.3f} or more: {outcome.subject.origin}",
        "Denoiser rows": f"{cost.denoiser_rows} of {cost.denoiser_rows_best_of_n}",
        "Seconds": ", ".join(f"{name} {value:.1f}" for name, value in cost.seconds.items()),
    }
    return f"<p>{saving(cost, len(outcome.result.candidates))}</p>" + on_demand("The numbers", numbers)


def without_guard(first: Candidate, threshold: float) -> str:
    """What the first try alone would have been."""
    if first.status == "accepted":
        return note("This time you would have been lucky: the very first try is accepted.", "plain")
    return note(
        f"Without the guard you would have got the first of these: {escape(reason(first, threshold))}.", "doubt"
    )


# --- comparing -------------------------------------------------------------------------------------------------------


def comparison(found: Comparison) -> str:
    """Same, different or unsure, with the numbers that say so."""
    verdict, mood = {
        "same": ("The same one.", "good"),
        "different": ("Different ones.", "bad"),
        "unsure": ("Cannot be said.", "doubt"),
    }[found.answer.verdict]
    return note(f"<b>{verdict}</b> Likeness {score(found.answer.score)}. {error_rates(found.answer)}", mood)


def error_rates(answer: Verification) -> str:
    """What a verdict rests on, in a sentence."""
    if answer.false_accept_rate is None or answer.false_reject_rate is None:
        return "This encoder carries no calibration, so the verdict follows a rule of thumb."
    return (
        f"Of near-identical strangers {answer.false_accept_rate:.1%} would score as high,"
        f" of the subject's own pictures {answer.false_reject_rate:.1%} as low."
    )
