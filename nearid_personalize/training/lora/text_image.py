"""Which model measures adherence where the user names none: one that lies in the Hub's cache already."""

from pathlib import Path

from huggingface_hub import try_to_load_from_cache

# Better at telling what a picture shows first.
WELL_KNOWN = (
    "google/siglip2-so400m-patch14-384",
    "google/siglip2-so400m-patch14-224",
    "google/siglip-so400m-patch14-384",
    "google/siglip2-large-patch16-256",
    "google/siglip2-base-patch16-224",
    "google/siglip-base-patch16-224",
    "openai/clip-vit-large-patch14-336",
    "openai/clip-vit-large-patch14",
    "openai/clip-vit-base-patch16",
    "openai/clip-vit-base-patch32",
)


_NEEDED = ("config.json", "tokenizer.json", "preprocessor_config.json", "model.safetensors")


def cached_text_image_model() -> str | None:
    """The first of the well-known models that is in the Hub's cache whole; asks no network."""
    return next((name for name in WELL_KNOWN if all(_is_cached(name, file) for file in _NEEDED)), None)


def _is_cached(repository: str, file: str) -> bool:
    path = try_to_load_from_cache(repository, file)
    return isinstance(path, str) and Path(path).is_file()
