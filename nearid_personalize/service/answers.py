"""What the endpoints answer, as OpenAPI describes it."""

from typing import Literal

from pydantic import BaseModel, Field


class Scored(BaseModel):
    """One picture."""

    name: str = Field(description="as it was uploaded")
    score: float = Field(description="cosine with the subject, in [-1, 1], larger = more alike")
    accepted: bool
    reason: str = Field(description="why it was not accepted, empty when it was")


class Scores(BaseModel):
    """Pictures in the order given."""

    threshold: float = Field(description="the smallest accepted score")
    accepted: int
    images: list[Scored]


class Verified(BaseModel):
    """One item."""

    name: str = Field(description="the item's nearest picture, as it was uploaded")
    verdict: Literal["same", "different", "unsure"]
    score: float
    false_accept_rate: float | None = Field(description="smallest rate at which it would be called the same")
    false_reject_rate: float | None = Field(description="smallest rate at which it would be called different")
    nearest_reference: int = Field(description="place of the reference most alike to it, from 0")


class Verifications(BaseModel):
    """Items in the order given."""

    items: list[Verified]


class Like(BaseModel):
    """A subject of the gallery."""

    subject: str
    score: float = Field(description="cosine with the item, in [-1, 1], larger = more alike")
    metadata: dict[str, str | int | float | bool]


class Found(BaseModel):
    """One item."""

    name: str = Field(description="the item's first picture, as it was uploaded")
    subject: str | None = Field(description="the gallery's subject that it shows; null where it shows none")
    score: float = Field(description="that of the subject most alike")
    false_accept_rate: float | None = Field(description="smallest rate at which it would be taken for that subject")
    matches: list[Like] = Field(description="the subjects most alike, best first, whether accepted or not")


class Findings(BaseModel):
    """Items in the order given."""

    threshold: float = Field(description="the smallest accepted score of an item of one picture")
    false_accept_rate: float | None = Field(description="share of strangers that are taken for a subject at most")
    about: str = Field(description="what that rate rests on")
    subjects: int = Field(description="how many were searched")
    items: list[Found]


class Enrolled(BaseModel):
    """A subject that is known from now on."""

    name: str
    photos: int
    threshold: float
    about: str = Field(description="where the threshold comes from, and what error rates to expect")
    photo_scores: list[float | None] = Field(description="each photo's score against the others; null for a lone one")


class Subjects(BaseModel):
    """Names of the enrolled subjects."""

    subjects: list[str]


class Removed(BaseModel):
    """Whether there was such a subject."""

    removed: bool


class Health(BaseModel):
    """That the service is up, and with which encoder."""

    status: Literal["ok"] = "ok"
    model: str
