"""DreamBooth-LoRA: teach a text-to-image pipeline one subject from a few pictures."""

from typing import TYPE_CHECKING

from nearid_personalize.lazy import attributes_of

if TYPE_CHECKING:
    from nearid_personalize.training.lora.loop import Snapshot as Snapshot
    from nearid_personalize.training.lora.loop import train_lora as train_lora
    from nearid_personalize.training.lora.options import LoraOptions as LoraOptions

_HOME_OF = {
    "LoraOptions": "options",
    "Snapshot": "loop",
    "train_lora": "loop",
}
__all__ = [*_HOME_OF]
__getattr__, __dir__ = attributes_of(__name__, _HOME_OF)
