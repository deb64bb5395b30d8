"""An eye for identity for diffusers personalization pipelines.

Importing the package makes transformers' Auto classes read NearID checkpoints, and nothing more: the public names are
resolved on first use, and diffusers, peft, accelerate and gradio are not imported.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from transformers import AutoConfig

from nearid_personalize.lazy import attributes_of

if TYPE_CHECKING:
    from nearid_personalize.encoder.model import NearIDConfig as NearIDConfig
    from nearid_personalize.encoder.model import NearIDModel as NearIDModel
    from nearid_personalize.errors import InputError as InputError
    from nearid_personalize.gallery.gallery import Gallery as Gallery
    from nearid_personalize.guard.guard import IdentityGuard as IdentityGuard
    from nearid_personalize.guard.policy import FixedSchedule as FixedSchedule
    from nearid_personalize.guard.policy import RacingPolicy as RacingPolicy
    from nearid_personalize.guard.profile import PreviewProfile as PreviewProfile
    from nearid_personalize.scorer.calibration import CalibrationBank as CalibrationBank
    from nearid_personalize.scorer.ranking import Ranking as Ranking
    from nearid_personalize.scorer.scorer import IdentityScorer as IdentityScorer
    from nearid_personalize.scorer.subject import Subject as Subject
    from nearid_personalize.verification import verify as verify

_HOME_OF = {
    "CalibrationBank": "scorer.calibration",
    "FixedSchedule": "guard.policy",
    "Gallery": "gallery.gallery",
    "IdentityGuard": "guard.guard",
    "IdentityScorer": "scorer.scorer",
    "InputError": "errors",
    "NearIDConfig": "encoder.model",
    "NearIDModel": "encoder.model",
    "PreviewProfile": "guard.profile",
    "RacingPolicy": "guard.policy",
    "Ranking": "scorer.ranking",
    "Subject": "scorer.subject",
    "verify": "verification",
}
__all__ = ["__version__", *_HOME_OF]

try:
    __version__ = version("nearid-personalize")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+unknown"


__getattr__, __dir__ = attributes_of(__name__, _HOME_OF)


class _NearIDConfigOnDemand:
    """Stands for `NearIDConfig` in transformers' registry until a NearID checkpoint is met.

    The real classes need transformers' modelling code, which imports accelerate wherever that is installed. Importing
    `encoder` registers them, config and model, in this one's place.
    """

    def __new__(cls, *args: object, **fields: object):
        return import_module("nearid_personalize.encoder.model").NearIDConfig(*args, **fields)

    @staticmethod
    def from_dict(config_dict: dict, **fields: object):
        return import_module("nearid_personalize.encoder.model").NearIDConfig.from_dict(config_dict, **fields)


AutoConfig.register("nearid", _NearIDConfigOnDemand, exist_ok=True)
