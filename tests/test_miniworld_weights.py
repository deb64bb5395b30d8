"""The packaged models load as their ecosystems load them, and do what their cards say."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import AutoModel, SiglipModel

from nearid_personalize import IdentityScorer
from nearid_personalize.evaluation import evaluate_rows
from nearid_personalize.miniworld import caption, picture, rows, weights_dir
from nearid_personalize.miniworld.judge import judge


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(weights_dir("pipeline"), use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_together_they_stay_small_and_each_has_a_card():
    folders = [weights_dir(name) for name in ("siglip", "nearid", "pipeline")]
    size = sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())
    assert size < 60e6
    for folder in folders:
        assert "## Training" in (folder / "README.md").read_text(encoding="utf-8")
        assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pkl", ".pt", ".pth", ".ckpt")]


def test_a_stock_pipeline_draws_what_the_caption_says(pipe):
    shots = [picture("test", index) for index in range(7000, 7004)]
    sources = [torch.Generator().manual_seed(index) for index in range(len(shots))]
    prompts = [caption(shot.pet, shot.context) for shot in shots]
    images = pipe(prompts, num_inference_steps=15, guidance_scale=3.0, generator=sources).images
    agreement = [judge(image, shot.pet, shot.context).agreement for image, shot in zip(images, shots)]
    assert np.mean(agreement) > 0.75


def test_the_autoencoder_keeps_subjects(pipe):
    pixels = torch.from_numpy(np.stack([picture("test", i).rendering.image for i in range(16)]))
    pixels = pixels.permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        error = (pipe.vae.decode(pipe.vae.encode(pixels).latents).sample - pixels).square().mean() / 4
    assert -10 * error.log10() > 26  # dB


def test_the_rare_token_is_one_token(pipe):
    assert len(pipe.tokenizer("sks", add_special_tokens=False).input_ids) == 1


def test_encoders_load_as_their_library_loads_them():
    assert type(AutoModel.from_pretrained(weights_dir("nearid"))).__name__ == "NearIDModel"
    assert isinstance(AutoModel.from_pretrained(weights_dir("siglip")), SiglipModel)


def test_the_head_beats_the_frozen_backbone_on_unseen_subjects():
    unseen = rows("test", 60)
    found = {}
    for name in ("siglip", "nearid"):
        scorer = IdentityScorer.from_pretrained(weights_dir(name))
        found[name] = evaluate_rows(scorer.model, scorer.preprocessing, unseen)["similar"]
    assert found["nearid"].ssr > found["siglip"].ssr
    assert found["nearid"].pa > found["siglip"].pa


def test_the_threshold_is_calibrated():
    scorer = IdentityScorer.from_pretrained("miniworld")
    assert scorer.calibration is not None and scorer.calibration.false_accept_rate <= 0.05
