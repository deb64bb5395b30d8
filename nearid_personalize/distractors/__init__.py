"""Near-identity distractors from photos: the same background, another individual of the kind.

`build_distractors` does it all: `masks` finds the subject, `prompts` says what to ask for, `inpaint` repaints it,
`regions` pastes it back so that no other pixel changes, `nearness` refuses what is not near or not different enough.
"""

from typing import TYPE_CHECKING

from nearid_personalize.lazy import attributes_of

if TYPE_CHECKING:
    from nearid_personalize.distractors.build import build_distractors as build_distractors
    from nearid_personalize.distractors.inpaint import inpainter_for as inpainter_for
    from nearid_personalize.distractors.masks import load_mask_model as load_mask_model
    from nearid_personalize.distractors.nearness import Limits as Limits
    from nearid_personalize.distractors.nearness import Measuring as Measuring
    from nearid_personalize.distractors.nearness import Quantiles as Quantiles
    from nearid_personalize.distractors.options import BuildOptions as BuildOptions
    from nearid_personalize.distractors.prompts import Prompts as Prompts

_HOME_OF = {
    "BuildOptions": "options",
    "Limits": "nearness",
    "Measuring": "nearness",
    "Prompts": "prompts",
    "Quantiles": "nearness",
    "build_distractors": "build",
    "inpainter_for": "inpaint",
    "load_mask_model": "masks",
}

__getattr__, __dir__ = attributes_of(__name__, _HOME_OF)
