"""Nodes that judge pictures: gate, rank, floors, drift map, verify. Batches keep their order."""

from collections.abc import Sequence
from typing import Any

import torch
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from nearid_personalize import InputError
from nearid_personalize.driftmap import drift_maps
from nearid_personalize.floors.base import Floor
from nearid_personalize.floors.chosen import chosen_floors
from nearid_personalize.gate import judge_pictures
from nearid_personalize.report import heat_overlay
from nearid_personalize.scorer.calibration import FALSE_ACCEPT_RATES
from nearid_personalize.scorer.ranking import Verdict
from nearid_personalize.scorer.subject import Subject
from nearid_personalize.verification import verify

from .wires import (
    CATEGORY,
    EnrolledSubject,
    FloorsWire,
    LoadedModel,
    NearID,
    SubjectWire,
    lines,
    picked,
    to_image,
    to_pictures,
)

OWN_RATE, AS_ENROLLED = "at the rate below", "as enrolled"
STRICTNESS = [*reversed(FALSE_ACCEPT_RATES), OWN_RATE, AS_ENROLLED]
SKIP, PASS_BEST, STOP = "skip what follows", "pass the best one on", "stop with an error"


def strictness_inputs() -> list[io.Input]:
    """How sure one must be: in words, or as a rate."""
    words = ", ".join(f"{word}: {rate:.0%} of look-alikes pass" for word, rate in FALSE_ACCEPT_RATES.items())
    return [
        io.Combo.Input("strictness", options=STRICTNESS, default="strict", tooltip=words),
        io.Float.Input(
            "false_accept_rate",
            default=0.01,
            min=0.0001,
            max=0.5,
            step=0.0001,
            tooltip=f'Share of near-identical strangers that may be accepted; counts with "{OWN_RATE}"',
        ),
    ]


def at_strictness(subject: Subject, strictness: str, false_accept_rate: float) -> Subject:
    """The subject with the threshold that the two inputs ask for."""
    if strictness == AS_ENROLLED:
        return subject
    return subject.at(false_accept_rate) if strictness == OWN_RATE else subject.at_strictness(strictness)


def verdicts_on(
    nearid: LoadedModel,
    subject: EnrolledSubject,
    pictures: Sequence[Image.Image],
    strictness: str,
    false_accept_rate: float,
    floors: Sequence[Floor] | None,
) -> list[Verdict]:
    """One verdict for each picture, in order."""
    asked = at_strictness(subject.subject, strictness, false_accept_rate)
    with nearid.on_device() as scorer:
        return judge_pictures(scorer, asked, pictures, floors or ())


class Gate(io.ComfyNode):
    """Accepted and rejected pictures of a batch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NearIDGate",
            display_name="Identity gate",
            category=CATEGORY,
            description="Which pictures show the subject? What follows an output without a picture is skipped.",
            inputs=[
                NearID.Input("nearid"),
                SubjectWire.Input("subject"),
                io.Image.Input("images"),
                FloorsWire.Input("floors", optional=True),
                *strictness_inputs(),
                io.Combo.Input("when_none", options=[SKIP, PASS_BEST, STOP], default=SKIP),
            ],
            outputs=[
                io.Image.Output("accepted", display_name="accepted"),
                io.Image.Output("rejected", display_name="rejected"),
                io.Image.Output("best", display_name="best", tooltip="The accepted picture most like the subject"),
                io.Int.Output("num_accepted", display_name="num_accepted"),
                io.Int.Output("num_rejected", display_name="num_rejected"),
                io.Float.Output("scores", display_name="scores", is_output_list=True, tooltip="-1 to 1, in order"),
                io.String.Output("reasons", display_name="reasons", is_output_list=True),
                io.String.Output("report", display_name="report", tooltip="A line for each picture"),
            ],
        )

    @classmethod
    def execute(
        cls,
        nearid: LoadedModel,
        subject: EnrolledSubject,
        images: Tensor,
        strictness: str,
        false_accept_rate: float,
        when_none: str,
        floors: Sequence[Floor] | None = None,
    ) -> io.NodeOutput:
        verdicts = verdicts_on(nearid, subject, to_pictures(images), strictness, false_accept_rate, floors)
        best_first = sorted(verdicts, key=lambda verdict: (not verdict.accepted, -verdict.score))
        accepted = [verdict.index for verdict in verdicts if verdict.accepted]
        num_accepted = len(accepted)
        if not accepted and when_none == STOP:
            raise InputError(f"Identity gate: none of {len(verdicts)} pictures was accepted\n{lines(verdicts)}")
        if not accepted and when_none == PASS_BEST:
            accepted = [best_first[0].index]
        rejected = [verdict.index for verdict in verdicts if verdict.index not in accepted]
        return io.NodeOutput(
            picked(images, accepted),
            picked(images, rejected),
            picked(images, [best_first[0].index] if accepted else []),
            num_accepted,
            len(verdicts) - num_accepted,
            [verdict.score for verdict in verdicts],
            [verdict.reason for verdict in verdicts],
            lines(verdicts),
        )


class Rank(io.ComfyNode):
    """A batch, most alike first."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NearIDRank",
            display_name="Identity rank",
            category=CATEGORY,
            description="The pictures of a batch, most like the subject first.",
            inputs=[
                NearID.Input("nearid"),
                SubjectWire.Input("subject"),
                io.Image.Input("images"),
                io.Int.Input("keep", default=0, min=0, max=4096, tooltip="How many of the best; 0: all"),
            ],
            outputs=[
                io.Image.Output("ranked", display_name="ranked"),
                io.Float.Output("scores", display_name="scores", is_output_list=True),
                io.Int.Output("places", display_name="places", is_output_list=True, tooltip="In the batch, from 0"),
            ],
        )

    @classmethod
    def execute(cls, nearid: LoadedModel, subject: EnrolledSubject, images: Tensor, keep: int) -> io.NodeOutput:
        with nearid.on_device() as scorer:
            ranked = scorer.rank(to_pictures(images), subject.subject).entries
        kept = ranked[:keep] if keep else ranked
        places = [entry.index for entry in kept]
        return io.NodeOutput(images[places], [entry.score for entry in kept], places)


class Floors(io.ComfyNode):
    """What else a picture must pass."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NearIDFloors",
            display_name="Quality and copy floors",
            category=CATEGORY,
            description="What identity cannot see: damaged pictures, and copies of your photos. Connect it to a gate.",
            inputs=[
                NearID.Input("nearid"),
                SubjectWire.Input("subject"),
                io.Boolean.Input("quality", default=True, tooltip="Where the encoder has a quality floor"),
                io.Boolean.Input("copies", default=True, tooltip="Refuse pictures that repeat a photo"),
            ],
            outputs=[
                FloorsWire.Output("floors", display_name="floors"),
                io.String.Output("about", display_name="about", tooltip="What is looked for"),
            ],
        )

    @classmethod
    def execute(cls, nearid: LoadedModel, subject: EnrolledSubject, quality: bool, copies: bool) -> io.NodeOutput:
        photos = subject.need_photos("copies") if copies else []
        with nearid.on_device() as scorer:
            found = chosen_floors(nearid.name, scorer, photos, reject_copies=copies)
        names = [type(floor).__name__ for floor in found]
        floors = [floor for floor, name in zip(found, names) if quality or name != "QualityFloor"]
        about = ["copies of the photos"] if copies else []
        if quality:
            about.append("picture quality" if "QualityFloor" in names else "no quality floor with this encoder")
        return io.NodeOutput(floors, ", ".join(about) or "nothing")


class DriftMap(io.ComfyNode):
    """Where each picture drifted."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NearIDDriftMap",
            display_name="Drift map",
            category=CATEGORY,
            description="Where a picture departs from the subject: red in the overlay, and as a mask for inpainting.",
            inputs=[NearID.Input("nearid"), SubjectWire.Input("subject"), io.Image.Input("images")],
            outputs=[
                io.Image.Output("overlay", display_name="overlay"),
                io.Mask.Output("heat", display_name="heat", tooltip="0 to 1, relative to each picture's hottest place"),
                io.Float.Output(
                    "peak_rises",
                    display_name="peak_rises",
                    is_output_list=True,
                    tooltip="How much the score would rise were the hottest place right; small for the subject itself",
                ),
            ],
        )

    @classmethod
    def execute(cls, nearid: LoadedModel, subject: EnrolledSubject, images: Tensor) -> io.NodeOutput:
        pictures, photos = to_pictures(images), subject.need_photos("Drift map")
        with nearid.on_device() as scorer:
            maps = drift_maps(scorer, pictures, photos)
        heats = [found.at(*picture.size).cpu() for found, picture in zip(maps, pictures)]
        overlays = [heat_overlay(picture, heat.numpy()) for picture, heat in zip(pictures, heats)]
        return io.NodeOutput(to_image(overlays), torch.stack(heats), [found.peak_rise for found in maps])


class Verify(io.ComfyNode):
    """Same, different or unsure."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="NearIDVerify",
            display_name="Verify identity",
            category=CATEGORY,
            description="Same item, another one, or unsure, at error rates that you state.",
            inputs=[
                NearID.Input("nearid"),
                SubjectWire.Input("subject"),
                io.Image.Input("images"),
                io.Boolean.Input("one_item", default=False, tooltip="All pictures of the batch show one item"),
                io.Float.Input("false_accept_rate", default=0.01, min=0.0001, max=0.5, step=0.0001),
                io.Float.Input("false_reject_rate", default=0.05, min=0.0001, max=0.5, step=0.0001),
            ],
            outputs=[
                io.Image.Output("same", display_name="same"),
                io.Image.Output("unsure", display_name="unsure"),
                io.Image.Output("different", display_name="different"),
                io.String.Output("verdicts", display_name="verdicts", is_output_list=True),
                io.Float.Output("scores", display_name="scores", is_output_list=True),
            ],
        )

    @classmethod
    def execute(
        cls,
        nearid: LoadedModel,
        subject: EnrolledSubject,
        images: Tensor,
        one_item: bool,
        false_accept_rate: float,
        false_reject_rate: float,
    ) -> io.NodeOutput:
        pictures = to_pictures(images)
        items: list[Any] = [pictures] if one_item else [[picture] for picture in pictures]
        with nearid.on_device() as scorer:
            answers = verify(scorer, subject.subject, items, false_accept_rate, false_reject_rate)
        each = answers * len(pictures) if one_item else answers
        routed = []
        for verdict in ("same", "unsure", "different"):
            routed.append(picked(images, [place for place, answer in enumerate(each) if answer.verdict == verdict]))
        return io.NodeOutput(*routed, [answer.verdict for answer in answers], [answer.score for answer in answers])
