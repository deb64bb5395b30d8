"""The endpoints: enroll, score, verify, search. What they do is the library's; here it is asked for and answered."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from fastapi import Depends, FastAPI, File, Form, Request, UploadFile
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from PIL import Image

from nearid_personalize.errors import InputError
from nearid_personalize.gallery import Finding, Gallery
from nearid_personalize.gate import judge_pictures
from nearid_personalize.images import MAX_PIXELS, load_upload
from nearid_personalize.report import finite_or_none
from nearid_personalize.scorer.scorer import IdentityScorer
from nearid_personalize.scorer.subject import Subject
from nearid_personalize.service.answers import (
    Enrolled,
    Findings,
    Found,
    Health,
    Like,
    Removed,
    Scored,
    Scores,
    Subjects,
    Verifications,
    Verified,
)
from nearid_personalize.service.door import Door, Turns
from nearid_personalize.service.subjects import SubjectStore
from nearid_personalize.verification import verify

Uploads = Annotated[list[UploadFile], File(description="pictures: JPEG, PNG, WebP, ...")]
References = Annotated[list[UploadFile], File(description="photos of the subject, in place of an enrolled one")]
SubjectName = Annotated[str | None, Form(description="an enrolled subject's name")]
Strictness = Annotated[Literal["strict", "balanced", "lenient"], Form(description="1, 3 or 10 look-alikes in 100 pass")]
Rate = Annotated[float | None, Form(gt=0, lt=1, description="share of look-alikes that may pass; before strictness")]

OneItem = Annotated[bool, Form(description="all pictures show one item")]
StrangerRate = Annotated[
    float | None,
    Form(gt=0, lt=1, description="share of strangers that may be taken for a subject; default 0.01 or what can be had"),
]


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    max_images: int = 64
    """Pictures of a request, references counted."""
    max_bytes: int = 200_000_000
    """Of a whole request."""
    max_pixels: int = MAX_PIXELS
    """Of one picture."""
    max_waiting: int = 64
    """Requests that may wait for the model."""


@dataclass
class Service:
    """The model, the subjects, and the limits. encoder: its name. gallery: what /search looks through."""

    scorer: IdentityScorer
    encoder: str
    subjects: SubjectStore
    limits: Limits = field(default_factory=Limits)
    gallery: Gallery | None = None

    def __post_init__(self) -> None:
        self.turns = Turns(self.limits.max_waiting)

    def pictures(self, *groups: list[UploadFile]) -> list[list[Image.Image]]:
        """Uploads, decoded, group by group; InputError for one that cannot be read, or for too many."""
        count = sum(len(group) for group in groups)
        if count > self.limits.max_images:
            raise InputError(f"{count} pictures are too many for one request; at most {self.limits.max_images} are")
        loaded = []
        for group in groups:
            loaded.append([load_upload(f.file.read(), named(f), self.limits.max_pixels) for f in group])
        return loaded

    def subject(self, name: str | None, references: list[Image.Image]) -> Subject:
        """The enrolled subject of a name, or that of the references; exactly one of the two must be given."""
        if (name is None) == (not references):
            raise InputError("give subject, the name of an enrolled one, or references, photos of it; one of the two")
        return self.scorer.enroll(references) if name is None else self.subjects.load(name)

    def known(self) -> Gallery:
        """The gallery; InputError when the service was started without one."""
        if self.gallery is None:
            raise InputError("this service has no gallery; start it with nearid serve --gallery URI")
        return self.gallery


def create_app(service: Service, token: str | None = None) -> FastAPI:
    """The app. token: what callers must send, None: nothing."""
    # The pages that FastAPI shows for docs load scripts from other hosts; /openapi.json is there without them
    app = FastAPI(
        title="NearID",
        description="How much pictures look like one subject, and whether they show it.",
        docs_url=None,
        redoc_url=None,
        dependencies=[Depends(HTTPBearer(auto_error=False))],
    )
    app.add_middleware(Door, token=token, max_bytes=service.limits.max_bytes)
    app.add_exception_handler(InputError, refused)
    add_subjects(app, service)
    add_questions(app, service)
    add_search(app, service)
    return app


def add_subjects(app: FastAPI, service: Service) -> None:
    """Endpoints that keep subjects."""

    @app.get("/health")
    def health() -> Health:
        """Whether the service is up; needs no token."""
        return Health(model=service.encoder)

    @app.post("/enroll")
    def enroll(name: Annotated[str, Form()], photos: Uploads) -> Enrolled:
        """Learn a subject from photos, in place of an earlier one of this name."""
        with service.turns.place():
            (pictures,) = service.pictures(photos)
            with service.turns.turn():
                subject = service.scorer.enroll(pictures)
            service.subjects.save(name, subject)
        return Enrolled(
            name=name,
            photos=len(pictures),
            threshold=subject.threshold,
            about=subject.describe(),
            photo_scores=[finite_or_none(score) for score in subject.reference_scores.tolist()],
        )

    @app.get("/subjects")
    def subjects() -> Subjects:
        """Which subjects are enrolled."""
        return Subjects(subjects=service.subjects.names())

    @app.delete("/subjects/{name}")
    def forget(name: str) -> Removed:
        """Forget a subject."""
        return Removed(removed=service.subjects.remove(name))


def add_questions(app: FastAPI, service: Service) -> None:
    """Endpoints that look at pictures."""

    @app.post("/score")
    def score(
        images: Uploads,
        subject: SubjectName = None,
        references: References = [],  # noqa: B006 - FastAPI copies it
        strictness: Strictness = "strict",
        false_accept_rate: Rate = None,
    ) -> Scores:
        """How much pictures look like the subject, and which of them are accepted."""
        with service.turns.place():
            pictures, photos = service.pictures(images, references)
            with service.turns.turn():
                enrolled = service.subject(subject, photos)
                asked = at_rate(enrolled, strictness, false_accept_rate)
                verdicts = judge_pictures(service.scorer, asked, pictures)
        scored = []
        for upload, verdict in zip(images, verdicts, strict=True):
            scored.append(
                Scored(name=named(upload), score=verdict.score, accepted=verdict.accepted, reason=verdict.reason)
            )
        return Scores(threshold=asked.threshold, accepted=sum(s.accepted for s in scored), images=scored)

    @app.post("/verify")
    def same_or_not(
        images: Uploads,
        subject: SubjectName = None,
        references: References = [],  # noqa: B006 - FastAPI copies it
        one_item: OneItem = False,
        false_accept_rate: Annotated[float, Form(gt=0, lt=1)] = 0.01,
        false_reject_rate: Annotated[float, Form(gt=0, lt=1)] = 0.05,
    ) -> Verifications:
        """Same, different or unsure, for each picture or for all of them as one item, at the error rates stated."""
        with service.turns.place():
            pictures, photos = service.pictures(images, references)
            items = [pictures] if one_item else [[picture] for picture in pictures]
            with service.turns.turn():
                enrolled = service.subject(subject, photos)
                answers = verify(service.scorer, enrolled, items, false_accept_rate, false_reject_rate)
        verified = []
        for place, answer in enumerate(answers):
            nearest = answer.nearest_picture if one_item else place
            verified.append(
                Verified(
                    name=named(images[nearest]),
                    verdict=answer.verdict,
                    score=answer.score,
                    false_accept_rate=answer.false_accept_rate,
                    false_reject_rate=answer.false_reject_rate,
                    nearest_reference=answer.nearest_reference,
                )
            )
        return Verifications(items=verified)


def add_search(app: FastAPI, service: Service) -> None:
    """The endpoint that looks through the gallery."""

    @app.post("/search")
    def search(
        images: Uploads,
        one_item: OneItem = False,
        false_accept_rate: StrangerRate = None,
        limit: Annotated[int, Form(ge=1, le=100, description="subjects named for each item")] = 5,
    ) -> Findings:
        """Which subject of the gallery each picture shows, or all of them as one item, if any."""
        gallery = service.known()
        with service.turns.place():
            (pictures,) = service.pictures(images)
            items = [pictures] if one_item else [[picture] for picture in pictures]
            with service.turns.turn():
                findings = gallery.search(items, false_accept_rate, limit=limit)
        rule = findings[0].rule
        return Findings(
            threshold=rule.threshold,
            false_accept_rate=rule.rate,
            about=str(rule.origin),
            subjects=rule.size,
            items=[found_as(named(images[place]), finding) for place, finding in enumerate(findings)],
        )


def found_as(name: str, finding: Finding) -> Found:
    """The answer about an item."""
    matches = []
    for match in finding.matches:
        matches.append(Like(subject=match.name, score=match.score, metadata=dict(match.metadata)))
    return Found(
        name=name,
        subject=finding.name,
        score=finding.score,
        false_accept_rate=finding.false_accept_rate,
        matches=matches,
    )


def at_rate(subject: Subject, strictness: str, false_accept_rate: float | None) -> Subject:
    """The subject with the threshold that a request asks for."""
    return subject.at_strictness(strictness) if false_accept_rate is None else subject.at(false_accept_rate)


def named(upload: UploadFile) -> str:
    """What an upload is called."""
    return upload.filename or "picture"


async def refused(request: Request, error: Exception) -> JSONResponse:
    """The caller's fault, in one sentence."""
    return JSONResponse({"detail": str(error)}, 422)
