"""What a model's name means: a folder, a Hub id, or miniworld for the packaged toy models."""


def packaged(name: str, kind: str) -> str:
    """The folder of a packaged toy model for "miniworld", else the name itself."""
    if name != "miniworld":
        return name
    from nearid_personalize.miniworld import weights_dir

    return str(weights_dir(kind))
