"""Which text-image model the trainer takes by itself: one that is in the Hub's cache whole, and says so."""

from pathlib import Path

import pytest

from nearid_personalize import train_lora
from nearid_personalize.training.lora.text_image import WELL_KNOWN, cached_text_image_model

FILES = ("config.json", "tokenizer.json", "preprocessor_config.json", "model.safetensors")
BASE, CLIP = "google/siglip2-base-patch16-224", "openai/clip-vit-base-patch32"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Puts files of a repository into an empty Hub cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(repository: str, *files: str) -> None:
        folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text("a" * 40)
        snapshot = folder / "snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in files:
            (snapshot / file).write_text("{}")

    return put


def test_the_best_known_of_those_that_are_there_whole(cache):
    assert cached_text_image_model() is None
    cache(BASE, *FILES[:3])
    assert cached_text_image_model() is None
    cache(CLIP, *FILES)
    assert cached_text_image_model() == CLIP
    cache(BASE, FILES[3])
    assert cached_text_image_model() == BASE
    assert WELL_KNOWN.index(BASE) < WELL_KNOWN.index(CLIP)


@pytest.mark.parametrize("base_model", ["owner/base", "miniworld"])
def test_the_plan_says_what_measures_adherence(base_model, cache, capsys):
    lora = train_lora.LoraOptions.of(base_model=base_model, references=Path(), output=Path(), validate_every=5)
    told = {}
    for case in ("empty", "cached", "asked"):
        if case == "cached":
            cache(CLIP, *FILES)
        named = train_lora.ValidationOptions(text_image_model="mine" if case == "asked" else None)
        completed = train_lora.completed(train_lora.Arguments(lora, named))
        train_lora.print_plan(completed)
        told[case] = (
            completed.validation.text_image_model,
            "adherence to the prompts is not" in capsys.readouterr().out,
        )
    if base_model == "miniworld":
        assert told == {"empty": ("miniworld", False), "cached": ("miniworld", False), "asked": ("mine", False)}
    else:
        assert told == {"empty": (None, True), "cached": (CLIP, False), "asked": ("mine", False)}
