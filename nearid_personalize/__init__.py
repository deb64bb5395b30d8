"""An eye for identity for diffusers personalization pipelines.

Importing the package makes transformers' Auto classes read NearID checkpoints, and nothing more: the public names are
resolved on first use, and diffusers, peft, accelerate and gradio are not imported.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from transformers import AutoConfig

if TYPE_CHECKING:
    from nearid_personalize.calibration import Calibration as Calibration
    from nearid_personalize.calibration import CalibrationBank as CalibrationBank
    from nearid_personalize.encoder import NearIDConfig as NearIDConfig
    from nearid_personalize.encoder import NearIDModel as NearIDModel
    from nearid_personalize.errors import InputError as InputError
    from nearid_personalize.guard import IdentityGuard as IdentityGuard
    from nearid_personalize.scorer import IdentityScorer as IdentityScorer
    from nearid_personalize.scorer import Ranking as Ranking
    from nearid_personalize.scorer import Subject as Subject
    from nearid_personalize.selection import FixedSchedule as FixedSchedule
    from nearid_personalize.selection import PreviewProfile as PreviewProfile
    from nearid_personalize.selection import RacingPolicy as RacingPolicy

_HOME_OF = {
    "Calibration": "calibration",
    "CalibrationBank": "calibration",
    "FixedSchedule": "selection",
    "IdentityGuard": "guard",
    "IdentityScorer": "scorer",
    "InputError": "errors",
    "NearIDConfig": "encoder",
    "NearIDModel": "encoder",
    "PreviewProfile": "selection",
    "RacingPolicy": "selection",
    "Ranking": "scorer",
    "Subject": "scorer",
}
__all__ = ["__version__", *_HOME_OF]

try:
    __version__ = version("nearid-personalize")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> object:
    """Import a public name from its module the first time it is asked for (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


class _NearIDConfigOnDemand:
    """Stands for `NearIDConfig` in transformers' registry until a NearID checkpoint is met.

    The real classes need transformers' modelling code, which imports accelerate wherever that is installed. Importing
    `encoder` registers them, config and model, in this one's place.
    """

    def __new__(cls, *args: object, **fields: object):
        return import_module("nearid_personalize.encoder").NearIDConfig(*args, **fields)

    @staticmethod
    def from_dict(config_dict: dict, **fields: object):
        return import_module("nearid_personalize.encoder").NearIDConfig.from_dict(config_dict, **fields)


AutoConfig.register("nearid", _NearIDConfigOnDemand, exist_ok=True)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
