"""What a model's name means: a folder, a Hub id, or "miniworld" for the packaged toy models."""

from pathlib import Path


def packaged(name: str | Path, kind: str) -> str:
    """The folder of the packaged model of a kind (`miniworld.MODELS`) for "miniworld", else the name itself."""
    if str(name) != "miniworld":
        return str(name)
    from nearid_personalize.miniworld import weights_dir  # the toy world's code is not needed otherwise

    return str(weights_dir(kind))
