"""The subject of a command: reference photos, and the threshold that its flags ask for."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from nearid_personalize.commands.console import picture_paths
from nearid_personalize.commands.options import Accepting
from nearid_personalize.errors import InputError

if TYPE_CHECKING:
    from nearid_personalize.scorer.scorer import IdentityScorer
    from nearid_personalize.scorer.subject import Subject


def negative_paths(options: Accepting) -> list[Path] | None:
    """The pictures of --negatives. Raises InputError when the folder is missing or empty: ask before models load."""
    return None if options.negatives is None else picture_paths(options.negatives)


def enrolled(scorer: "IdentityScorer", references: Sequence[Image.Image], options: Accepting) -> "Subject":
    """The subject of the references, accepted as --false-accept-rate and --negatives ask.

    Raises InputError that names the flags, when neither the negatives nor the encoder can state so small a rate.
    """
    from nearid_personalize.scorer.calibration import CalibrationBank

    rate, negatives = options.false_accept_rate, negative_paths(options)
    if rate is not None and negatives is None and not isinstance(scorer.calibration, CalibrationBank):
        raise InputError(
            f"--false-accept-rate {rate:g}: this encoder has no calibration bank to set it by; "
            f"give --negatives, a folder of {math.ceil(1 / rate) - 1} or more pictures that are not the subject"
        )
    try:
        return scorer.enroll(references, negatives=negatives, false_accept_rate=rate)
    except InputError as error:
        message = str(error).replace("give more", "give more (--negatives)", 1)
        raise InputError(message.replace("false_accept_rate", "--false-accept-rate", 1)) from None
