"""The floors: what identity cannot see. Is it a picture, does it show the prompt, is it a copy?"""

from typing import TYPE_CHECKING

from nearid_personalize.lazy import attributes_of

if TYPE_CHECKING:
    from nearid_personalize.floors.adherence import AdherenceFloor as AdherenceFloor
    from nearid_personalize.floors.adherence import TextImageEncoder as TextImageEncoder
    from nearid_personalize.floors.base import Floor as Floor
    from nearid_personalize.floors.chosen import chosen_floors as chosen_floors
    from nearid_personalize.floors.copies import CopyFloor as CopyFloor
    from nearid_personalize.floors.copies import copy_rate as copy_rate
    from nearid_personalize.floors.copies import diversity as diversity
    from nearid_personalize.floors.copies import near_duplicates as near_duplicates
    from nearid_personalize.floors.quality import QualityFloor as QualityFloor
    from nearid_personalize.floors.quality import QualityProbe as QualityProbe
    from nearid_personalize.floors.quality import QualityRates as QualityRates
    from nearid_personalize.floors.quality import find_quality_floor as find_quality_floor

_HOME_OF = {
    "AdherenceFloor": "adherence",
    "CopyFloor": "copies",
    "Floor": "base",
    "QualityFloor": "quality",
    "QualityProbe": "quality",
    "QualityRates": "quality",
    "TextImageEncoder": "adherence",
    "chosen_floors": "chosen",
    "copy_rate": "copies",
    "diversity": "copies",
    "find_quality_floor": "quality",
    "near_duplicates": "copies",
}
__all__ = [*_HOME_OF]
__getattr__, __dir__ = attributes_of(__name__, _HOME_OF)
