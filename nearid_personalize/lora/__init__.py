"""A finished LoRA: its file, what it draws of its subject, and its report card."""

from typing import TYPE_CHECKING

from nearid_personalize.lazy import attributes_of

if TYPE_CHECKING:
    from nearid_personalize.lora.card import ReportCard as ReportCard
    from nearid_personalize.lora.card import report_card as report_card
    from nearid_personalize.lora.files import load_lora as load_lora
    from nearid_personalize.lora.files import read_metadata as read_metadata

_HOME_OF = {
    "ReportCard": "card",
    "load_lora": "files",
    "read_metadata": "files",
    "report_card": "card",
}
__all__ = [*_HOME_OF]
__getattr__, __dir__ = attributes_of(__name__, _HOME_OF)
