"""What every floor is: a second opinion on a picture, with the reason for refusing it."""

from collections.abc import Sequence
from typing import Protocol

from PIL import Image


class Floor(Protocol):
    """Anything that can say why a finished picture is not to be accepted, whatever its identity score."""

    def judge(self, images: Sequence[Image.Image], prompt: str) -> list[str]:
        """One reason per picture, "" for those that pass."""
        ...


def first_failures(floors: Sequence[Floor], images: Sequence[Image.Image], prompt: str) -> list[str]:
    """For each picture the reason of the first floor that refuses it, "" where all let it pass."""
    reasons = [""] * len(images)
    for floor in floors:
        for place, reason in enumerate(floor.judge(images, prompt)):
            reasons[place] = reasons[place] or reason
    return reasons


def _short(value: float) -> str:
    """.12, 1.00, -.03"""
    return f"{value:.2f}".replace("0.", ".", 1)
