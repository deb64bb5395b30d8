"""The floors that suit a scorer and a base model, where nobody names them."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from nearid_personalize.scorer.scorer import IdentityScorer
from nearid_personalize.floors.adherence import AdherenceFloor
from nearid_personalize.floors.base import Floor
from nearid_personalize.floors.copies import CopyFloor
from nearid_personalize.floors.quality import find_quality_floor

# --- all of them -----------------------------------------------------------------------------------------------------
ADHERENCE_LEAD = 0.1  # over the references; at 0 an eighth of pictures of another place pass (quality_floor.py)


def chosen_floors(
    model: str,
    scorer: "IdentityScorer",
    references: Sequence[Image.Image],
    reject_copies: bool = False,
    text_image_model: str | None = None,
) -> list[Floor]:
    """What else a picture must pass: the quality floor of an encoder that has one, and what is asked for.

    Their models work on the scorer's device and in its precision.
    """
    floors: list[Floor] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is none is no news on every run
        if quality := find_quality_floor(model, scorer):
            floors.append(quality)
    if reject_copies:
        floors.append(CopyFloor.from_references(references))
    if text_image_model is not None:
        encoder = scorer.model
        adherence = AdherenceFloor.from_pretrained(
            text_image_model,
            ADHERENCE_LEAD,
            references=references,
            device=encoder.device,
            dtype=encoder.backbone.dtype,
        )
        floors.append(adherence)
    return floors
