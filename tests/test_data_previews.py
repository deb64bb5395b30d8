import dataclasses
import json
from itertools import pairwise

import pytest
import torch
from conftest import tiny_tokenizer

from nearid_personalize import InputError
from nearid_personalize.data.previews import NoiseSchedule, load_previews
from nearid_personalize.data.reconstruct import Reconstruction
from nearid_personalize.miniworld import picture

CONFIGS = {
    "epsilon": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "v_prediction": {"beta_schedule": "linear", "rescale_betas_zero_snr": True},
    "flow_prediction": {"flow_shift": 3.0, "use_flow_sigmas": True},
}


def schedule_config(prediction_type):
    return {"num_train_timesteps": 1000, "prediction_type": prediction_type, **CONFIGS[prediction_type]}


def noise_pictures(count, size=32):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def tiny_xl_pipeline_dir(tiny_kl_pipeline_dir, tmp_path_factory):
    """A Stable Diffusion XL around the autoencoder and scheduler of the epsilon-predicting pipeline."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(0)
    plain = StableDiffusionPipeline.from_pretrained(tiny_kl_pipeline_dir, use_safetensors=True)
    text = CLIPTextConfig(**{**plain.text_encoder.config.to_dict(), "projection_dim": 32})
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=8,
        norm_num_groups=8,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32 + 6 * 8,
    )
    pipe = StableDiffusionXLPipeline(
        vae=plain.vae,
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=unet,
        scheduler=plain.scheduler,
        add_watermarker=False,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-xl-pipeline"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(params=["tiny_pipeline_dir", "tiny_kl_pipeline_dir", "tiny_xl_pipeline_dir"])
def base_dir(request):
    """Flow-matching, epsilon-predicting, and Stable Diffusion XL."""
    return request.getfixturevalue(request.param)


# --- the schedule


@pytest.mark.parametrize("prediction_type", CONFIGS)
@pytest.mark.parametrize("level", [0.0, 0.1, 0.5, 0.9])
def test_a_denoiser_that_knows_the_noise_gets_the_clean_latents_back(prediction_type, level):
    schedule = NoiseSchedule.of(schedule_config(prediction_type))
    clean, gaussian = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    step = round(1000 * level)
    signal, noise = schedule.signal[step], schedule.noise[step]
    right = {
        "epsilon": gaussian,
        "v_prediction": signal * gaussian - noise * clean,
        "flow_prediction": gaussian - clean,
    }[prediction_type]
    found = schedule.predict_clean(clean, gaussian, torch.full((3,), level), lambda noisy, timesteps: right)
    assert torch.allclose(found, clean, atol=2e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_diffusion_schedules_are_the_ones_of_diffusers(prediction_type):
    from diffusers import DDIMScheduler

    config = schedule_config(prediction_type)
    theirs, ours = DDIMScheduler.from_config(config, clip_sample=False), NoiseSchedule.of(config)
    theirs.set_timesteps(1000)
    clean, gaussian, answer = torch.randn(3, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for timestep in (1, 400, 900):
        heard = []

        def denoise(noisy, timesteps, heard=heard):
            heard.append((noisy, timesteps))
            return answer

        found = ours.predict_clean(clean, gaussian, torch.tensor([(timestep + 1) / 1000]), denoise)
        [(noisy, timesteps)] = heard
        assert timesteps.tolist() == [timestep]
        assert torch.allclose(noisy, theirs.add_noise(clean, gaussian, timesteps), atol=1e-5)
        expected = theirs.step(answer, timestep, noisy).pred_original_sample
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_schedules_are_the_ones_of_diffusers(shift):
    from diffusers import DPMSolverMultistepScheduler

    config = {**schedule_config("flow_prediction"), "flow_shift": shift}
    theirs, ours = DPMSolverMultistepScheduler.from_config(config), NoiseSchedule.of(config)
    theirs.set_timesteps(20)
    steps = torch.tensor([torch.argmin((ours.noise - sigma).abs()) for sigma in theirs.sigmas])
    assert torch.allclose(ours.noise[steps], theirs.sigmas, atol=2e-3)
    assert (ours.timesteps[steps][:-1] - theirs.timesteps).abs().max() <= 2
    assert torch.allclose(ours.signal + ours.noise, torch.ones(1001))


@pytest.mark.parametrize("config", [{"prediction_type": "sample"}, {"prediction_type": "epsilon", "sigma_data": 0.5}])
def test_other_schedulers_are_refused(config):
    with pytest.raises(InputError, match=r"--preview-augment: .*Other.* prediction type '(sample|epsilon)'"):
        NoiseSchedule.of({"num_train_timesteps": 1000, "_class_name": "Other", **config})


# --- the pictures


def test_without_noise_a_preview_is_a_reconstruction(base_dir):
    previews, pixels = load_previews(base_dir, 1.0), noise_pictures(3)
    clean = dataclasses.replace(previews, levels=(0.0, 0.0))(pixels, 0)
    expected = Reconstruction(previews.base.vae, 1.0, latent_noise=0.0)(pixels, 0)
    assert torch.allclose(clean, expected, atol=1e-5)
    assert not torch.allclose(previews(pixels, 0), expected, atol=1e-3)


def test_more_noise_means_less_of_the_picture():
    previews = load_previews("miniworld", 1.0)
    shown = [torch.from_numpy(picture("val", index).rendering.image) for index in range(12)]
    pixels = torch.stack(shown).permute(0, 3, 1, 2) / 255
    errors = []
    for level in (0.0, 0.25, 0.5, 0.75, 1.0):
        seen = dataclasses.replace(previews, levels=(level, level))(pixels, 0)
        errors.append((seen - pixels).square().mean(dim=(1, 2, 3)))  # [m]
    assert all((more > less).float().mean() > 0.9 for less, more in pairwise(errors))
    assert errors[2].mean() < 0.2 * errors[4].mean()  # half-way most of the picture is there


def test_a_seeded_share_is_shown_and_the_rest_stays(base_dir):
    previews, pixels = load_previews(base_dir, 0.5), noise_pictures(40)
    before = pixels.clone()
    once, again, other = (previews(pixels, seed) for seed in (1, 1, 2))
    changed = (once != pixels).flatten(1).any(dim=1)
    assert 10 <= changed.sum() <= 30
    assert torch.equal(once, again) and not torch.equal(once, other) and torch.equal(pixels, before)
    assert once.shape == pixels.shape and once.min() >= 0 and once.max() <= 1


def test_a_picture_is_a_preview_or_a_reconstruction_never_both(tiny_pipeline_dir):
    alone = load_previews(tiny_pipeline_dir, 0.5)
    rest = Reconstruction(alone.base.vae, 1.0, latent_noise=0.0)
    pixels = noise_pictures(20)
    shown, both = alone(pixels, 3), dataclasses.replace(alone, rest=rest)(pixels, 3)
    previewed = (shown != pixels).flatten(1).any(dim=1)
    assert torch.equal(both[previewed], shown[previewed])
    assert torch.allclose(both[~previewed], rest(pixels, 0)[~previewed], atol=1e-6)
    sparse = dataclasses.replace(alone, rest=dataclasses.replace(rest, share=0.5))
    touched = torch.stack([(sparse(pixels, seed) != pixels).flatten(1).any(dim=1) for seed in range(20)])
    assert 0.68 < touched.float().mean() < 0.82  # .5 and half of the rest: drawn independently of each other


def test_pictures_at_once_change_nothing(base_dir):
    previews, pixels = load_previews(base_dir, 0.8), noise_pictures(10)
    assert torch.allclose(previews(pixels, 0), dataclasses.replace(previews, max_batch_size=3)(pixels, 0), atol=1e-4)


def test_pictures_of_any_size_come_back_at_their_own(tiny_pipeline_dir):
    previews = load_previews(tiny_pipeline_dir, 1.0)
    assert previews(noise_pictures(2, size=48), 0).shape == (2, 3, 48, 48)
    assert previews(noise_pictures(2, size=19), 0).shape == (2, 3, 19, 19)


def test_the_base_is_given_no_prompt(tiny_pipeline_dir, tiny_xl_pipeline_dir):
    plain, xl = load_previews(tiny_pipeline_dir, 1.0), load_previews(tiny_xl_pipeline_dir, 1.0)
    ids = plain.base.tokenizer("", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        [text] = plain.unprompted
        assert torch.allclose(text, plain.base.text_encoder(ids)[0], atol=1e-6)
    assert [told.shape for told in xl.unprompted] == [(1, 77, 64), (1, 32)]
    assert not any(told.any() for told in xl.unprompted)  # its config says: zeros in place of the empty prompt


def test_nothing_is_changed_at_share_zero(tiny_pipeline_dir):
    pixels = noise_pictures(3)
    assert torch.equal(load_previews(tiny_pipeline_dir, 0.0)(pixels, 0), pixels)


def test_the_fingerprint_names_all_that_previews_depend_on(tiny_pipeline_dir, tiny_kl_pipeline_dir):
    previews = load_previews(tiny_pipeline_dir, 0.5)
    rest = Reconstruction(previews.base.vae, 0.5)
    schedule = NoiseSchedule.of({**previews.base.scheduler.config, "flow_shift": 2.0})
    assert previews.fingerprint == load_previews(tiny_pipeline_dir, 0.5).fingerprint
    others = [
        dataclasses.replace(previews, **change)
        for change in ({"share": 0.4}, {"levels": (0.1, 0.5)}, {"rest": rest}, {"schedule": schedule})
    ]
    others += [dataclasses.replace(previews, rest=dataclasses.replace(rest, share=0.2))]
    prints = [previews.fingerprint, *(other.fingerprint for other in others)]
    for module in (previews.base.vae, previews.base.unet):
        with torch.no_grad():
            next(module.parameters()).add_(0.5)
        prints.append(previews.fingerprint)
    prints.append(load_previews(tiny_kl_pipeline_dir, 0.5).fingerprint)
    assert len(set(prints)) == len(prints)


# --- wrong input


def test_wrong_input_is_one_line_that_names_the_flag(tmp_path, tiny_pipeline_dir):
    with pytest.raises(InputError, match=r"--preview-augment .*model_index.json") as caught:
        load_previews(tmp_path, 0.5)
    assert "\n" not in str(caught.value)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(InputError, match=r"FluxPipeline; give .*StableDiffusionPipeline or StableDiffusionXLPipeline"):
        load_previews(tmp_path, 0.5)
    with pytest.raises(InputError, match=r"--previewed 1\.5"):
        load_previews(tiny_pipeline_dir, 1.5)
