"""The encoder: a frozen trunk, an attention-pooling head, and how checkpoints of them are read."""

from typing import TYPE_CHECKING

from nearid_personalize.lazy import attributes_of

if TYPE_CHECKING:
    from nearid_personalize.encoder.checkpoints import load_encoder as load_encoder
    from nearid_personalize.encoder.model import DEFAULT_TRUNK as DEFAULT_TRUNK
    from nearid_personalize.encoder.model import NearIDConfig as NearIDConfig
    from nearid_personalize.encoder.model import NearIDModel as NearIDModel
    from nearid_personalize.encoder.model import NearIDOutput as NearIDOutput

_HOME_OF = {
    "DEFAULT_TRUNK": "model",
    "NearIDConfig": "model",
    "NearIDModel": "model",
    "NearIDOutput": "model",
    "load_encoder": "checkpoints",
}
__all__ = [*_HOME_OF]
__getattr__, __dir__ = attributes_of(__name__, _HOME_OF)
