"""DreamBooth-LoRA on tiny real pipelines: reload exactness, resume exactness, noising, and refusals."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from safetensors.torch import load_file, save_file

from nearid_personalize.errors import InputError
from nearid_personalize.training import lora
from nearid_personalize.training.lora import WEIGHTS_NAME, LoraOptions, load_lora, train_lora


@pytest.fixture
def options(tiny_pipeline_dir: Path, photo_dir: Path, tmp_path: Path) -> LoraOptions:
    return LoraOptions(
        base_model=str(tiny_pipeline_dir),
        references=photo_dir,
        output=tmp_path / "lora",
        rank=4,
        alpha=8.0,
        text_rank=2,
        steps=4,
        batch_size=4,
        learning_rate=0.01,
        text_learning_rate=0.01,
        token_learning_rate=0.1,
        precision="fp32",
    )


def load_pipe(folder: Path | str) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def predict(pipe: StableDiffusionPipeline, prompt: str = "a photo of sks dog") -> torch.Tensor:
    """One denoiser prediction on fixed noise: sees the text encoder and the UNet."""
    noise = torch.randn(1, pipe.unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    embeddings, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
    return pipe.unet(noise, 500, embeddings).sample


@pytest.mark.parametrize("base", ["tiny_pipeline_dir", "tiny_kl_pipeline_dir"])
def test_stock_reload_equals_what_was_trained(base, options, request, monkeypatch):
    folder = request.getfixturevalue(base)
    trained = {}
    save = lora.save_lora

    def save_and_keep(model, output):
        pipe = load_pipe(folder)
        pipe.unet, pipe.text_encoder = model.unet.eval(), model.text_encoder.eval()
        trained["prediction"] = predict(pipe)
        save(model, output)

    monkeypatch.setattr(lora, "save_lora", save_and_keep)
    output = train_lora(dataclasses.replace(options, base_model=str(folder)))
    pipe = load_pipe(folder)
    pipe.unet.set_attn_processor(AttnProcessor())  # as in training: other processors round differently
    before = predict(pipe)
    pipe.load_lora_weights(output)
    assert torch.equal(predict(pipe), trained["prediction"])
    assert (predict(pipe) - before).abs().max() > 1e-3
    assert [path.name for path in output.iterdir()] == [WEIGHTS_NAME]


def test_half_precision_trains_and_reloads(options, tiny_pipeline_dir):
    pipe = load_pipe(tiny_pipeline_dir)
    before = predict(pipe)
    load_lora(pipe, train_lora(dataclasses.replace(options, precision="bf16")))
    assert (predict(pipe) - before).abs().max() > 1e-3


def test_only_the_tokens_row_changes(options, tiny_pipeline_dir):
    output = train_lora(options)
    pipe = load_pipe(tiny_pipeline_dir)
    table = pipe.text_encoder.get_input_embeddings()
    ids = torch.arange(table.num_embeddings)
    before = table(ids)
    load_lora(pipe, output)
    changed = (pipe.text_encoder.get_input_embeddings()(ids) != before).any(dim=1).nonzero().flatten()
    assert changed.tolist() == pipe.tokenizer("sks", add_special_tokens=False).input_ids


def test_token_starts_at_the_mean_of_its_init_words(options, tiny_pipeline_dir):
    pipe = load_pipe(tiny_pipeline_dir)
    rows = pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    lora.add_adapters(pipe, dataclasses.replace(options, token_init=("a", "b")))
    row = lora.token_id(pipe.tokenizer, "sks", "token")
    expected = rows[[lora.token_id(pipe.tokenizer, word, "token-init") for word in ("a", "b")]].mean(0)
    actual = pipe.text_encoder.get_input_embeddings()(torch.tensor([row]))[0]
    torch.testing.assert_close(actual, expected)


class Interruption(Exception):
    pass


def test_resumed_equals_uninterrupted(options, tmp_path, monkeypatch):
    options = dataclasses.replace(options, checkpoint_every=2, prior_pictures=2, class_prompts=("a photo of a dog",))
    whole = load_file(train_lora(dataclasses.replace(options, output=tmp_path / "whole")) / WEIGHTS_NAME)

    loss = lora.batch_loss

    def fail_at_step_three(model, data, prompt_input, noising, options, turn):
        if turn == 3:
            raise Interruption
        return loss(model, data, prompt_input, noising, options, turn)

    with monkeypatch.context() as patch, pytest.raises(Interruption):
        patch.setattr(lora, "batch_loss", fail_at_step_three)
        train_lora(options)
    assert [path.name for path in lora.checkpoints(options.output)] == ["step-000002"]
    assert not (options.output / WEIGHTS_NAME).exists()

    with pytest.raises(InputError, match="--resume"):
        train_lora(options)
    with pytest.raises(InputError, match="--rank was 4, now 8"):
        train_lora(dataclasses.replace(options, resume=True, rank=8))
    resumed = load_file(train_lora(dataclasses.replace(options, resume=True)) / WEIGHTS_NAME)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_frozen_text_encoder_is_encoded_once(options, monkeypatch):
    calls = []
    forward = lora.CLIPTextModel.forward
    monkeypatch.setattr(lora.CLIPTextModel, "forward", lambda *args, **kw: calls.append(1) or forward(*args, **kw))
    output = train_lora(dataclasses.replace(options, text_rank=0, train_token=False))
    assert len(calls) == 1
    assert all(name.startswith("unet.") for name in load_file(output / WEIGHTS_NAME))


def test_training_fits_the_reference(options, tiny_pipeline_dir):
    options = dataclasses.replace(options, steps=40)
    pipe = load_pipe(tiny_pipeline_dir)
    data = lora.build_training_set(pipe, options)

    @torch.no_grad()
    def held_noise_loss(pipe: StableDiffusionPipeline) -> float:
        ids = lora.prompt_inputs(pipe, data.prompts, as_ids=True)
        model = lora.PromptedDenoiser(pipe.unet, pipe.text_encoder)
        losses = [lora.batch_loss(model, data, ids, lora.flow_noising, options, turn) for turn in range(1000, 1010)]
        return float(torch.stack(losses).mean())

    before = held_noise_loss(pipe)
    load_lora(pipe, train_lora(options))
    assert held_noise_loss(pipe) < 0.9 * before


# --- noising ---------------------------------------------------------------------------------------------------------


def test_flow_noising_is_what_the_shipped_scheduler_inverts():
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    noising = lora.noising_of(scheduler.config)
    latents, noise = torch.randn(2, 3, 4, 4, 4)
    noisy, target, timesteps = noising(latents, noise, torch.tensor([0.1, 0.5, 0.9]))
    torch.testing.assert_close(noisy - timesteps.view(-1, 1, 1, 1) / 1000 * target, latents)
    assert timesteps[1] == 500 and timesteps.diff().min() > 0


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_diffusion_noising_matches_a_slow_oracle(prediction_type):
    scheduler = DDPMScheduler(prediction_type=prediction_type)
    latents, noise = torch.randn(2, 3, 4, 4, 4)
    noisy, target, timesteps = lora.noising_of(scheduler.config)(latents, noise, torch.tensor([0.001, 0.5, 0.999]))
    assert timesteps.tolist() == [1, 500, 999]
    for i, t in enumerate(timesteps.tolist()):
        a, s = math.sqrt(scheduler.alphas_cumprod[t]), math.sqrt(1 - scheduler.alphas_cumprod[t])
        torch.testing.assert_close(noisy[i], a * latents[i] + s * noise[i])
        expected = noise[i] if prediction_type == "epsilon" else a * noise[i] - s * latents[i]
        torch.testing.assert_close(target[i], expected)


def test_unknown_prediction_type_is_refused():
    with pytest.raises(InputError, match="'sample'"):
        lora.noising_of({"prediction_type": "sample"})


def test_every_epoch_shows_every_picture_once():
    order = lora.shuffled_indices(0, 15, size=5, seed=3)
    assert all(sorted(order[i : i + 5]) == [0, 1, 2, 3, 4] for i in (0, 5, 10))
    assert order[7:12] == lora.shuffled_indices(7, 5, size=5, seed=3)


def test_levels_cover_every_slice():
    levels = lora.stratified_levels(torch_rng := lora.np.random.default_rng(0), 8)
    assert sorted((levels * 8).long().tolist()) == list(range(8))
    assert not torch.equal(levels, lora.stratified_levels(torch_rng, 8))


def test_learning_rate_warms_up_and_decays():
    factors = [lora.learning_rate_factor(step, 100) for step in range(100)]
    assert factors[0] == 0.2 and max(factors) == factors[5] == 1.0
    assert factors[5:] == sorted(factors[5:], reverse=True) and 0 < factors[-1] < 0.01


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"rank": 0}, "--rank"),
        ({"steps": 0}, "--steps"),
        ({"learning_rate": 0.0}, "--learning-rate"),
        ({"seed": -1}, "--seed"),
        ({"alpha": -1.0}, "--alpha"),
        ({"prompt": "a photo of a dog"}, "--prompt"),
        ({"prior_pictures": 4}, "--class-prompts"),
        ({"class_prompts": ("a dog",)}, "--prior-pictures"),
        ({"prior_pictures": 4, "class_prompts": ("a dog",), "batch_size": 1}, "--batch-size"),
        ({"resolution": 4}, "--resolution"),
        ({"text_rank": 0}, "--no-train-token"),
    ],
)
def test_options_name_the_wrong_flag(options, change, flag):
    with pytest.raises(InputError, match=flag):
        dataclasses.replace(options, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model": "/nowhere/at/all"}, "--base-model /nowhere/at/all"),
        ({"references": Path("/nowhere")}, "/nowhere"),
        ({"token": "dog"}, "--token 'dog' is 3 pieces"),
        ({"resolution": 33}, "--resolution"),
        ({"output": Path("/proc/nothing")}, "--output /proc/nothing"),
        ({"resume": True}, "--resume: no checkpoint"),
    ],
)
def test_training_names_what_is_wrong(options, change, message):
    with pytest.raises(InputError, match=message) as error:
        train_lora(dataclasses.replace(options, **change))
    assert "\n" not in str(error.value)


def test_base_model_without_weights_is_refused(options, tiny_pipeline_dir, tmp_path):
    folder = tmp_path / "no-weights"
    for source in tiny_pipeline_dir.rglob("*.json"):
        target = folder / source.relative_to(tiny_pipeline_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    with pytest.raises(InputError, match="--base-model"):
        train_lora(dataclasses.replace(options, base_model=str(folder)))


def broken_file(folder: Path, kind: str) -> Path:
    """A LoRA file with one fault."""
    path = folder / WEIGHTS_NAME
    if kind == "text":
        path.write_text("not safetensors")
    if kind == "no lora":
        save_file({"weight": torch.ones(2)}, path)
    if kind == "other layers":
        save_file({f"unet.elsewhere.to_q.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}, path)
    if kind == "other component":
        save_file({f"transformer.blocks.0.to_q.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}, path)
    return path


@pytest.mark.parametrize("kind", ["missing", "text", "no lora", "other layers", "other component"])
def test_a_lora_that_loads_no_layer_is_refused(kind, tiny_pipeline_dir, tmp_path):
    pipe = load_pipe(tiny_pipeline_dir)
    before = predict(pipe)
    path = broken_file(tmp_path, kind)
    for source in (path, tmp_path):
        with pytest.raises(InputError, match="LoRA") as error:
            load_lora(pipe, source)
        assert "\n" not in str(error.value)
    assert torch.equal(predict(pipe), before)


def test_load_lora_refuses_partial_and_misfitting_files(options, tiny_pipeline_dir, tmp_path):
    weights = load_file(train_lora(options) / WEIGHTS_NAME)
    name = next(name for name in weights if name.startswith("unet.") and "lora_B" in name)
    save_file({**weights, f"unet.extra.{name[5:]}": weights[name].clone()}, tmp_path / "extra.safetensors")
    save_file({**weights, name: torch.ones(99, 4)}, tmp_path / "shape.safetensors")
    for file, message in (("extra", "1 of its"), ("shape", "does not fit")):
        with pytest.raises(InputError, match=message) as error:
            load_lora(load_pipe(tiny_pipeline_dir), tmp_path / f"{file}.safetensors")
        assert "\n" not in str(error.value)


def test_convert_to_diffusers_names_would_lose_layers(options, tiny_pipeline_dir, tmp_path):
    """The naming that `save_lora` avoids is one that `load_lora` must catch."""
    from diffusers.utils import convert_state_dict_to_diffusers

    weights = load_file(train_lora(options) / WEIGHTS_NAME)
    names = sorted((name for name in weights if name.startswith("unet.")), key=lambda name: "to_" in name)
    unet = convert_state_dict_to_diffusers({name.removeprefix("unet."): weights[name] for name in names})
    save_file({f"unet.{name}": tensor for name, tensor in unet.items()}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(InputError, match=r"reached no layer|does not fit"):
        load_lora(load_pipe(tiny_pipeline_dir), tmp_path)


def test_count_missing_pairs_each_tensor_with_one_of_its_own():
    one, two = torch.ones(2), torch.full((2,), 2.0)
    assert lora.count_missing([one, two], [two, one, one]) == 0
    assert lora.count_missing([one, one], [one, two]) == 1
    assert lora.count_missing([one / 3], [(one / 3).half()]) == 0


def test_pictures_of_any_size_become_latents(tiny_pipeline_dir):
    pipe = load_pipe(tiny_pipeline_dir)
    latents = lora.encode_pictures(pipe.vae, [Image.new("RGB", (50, 90)), Image.new("RGB", (32, 32))], 32)
    assert latents.shape == (2, 4, 8, 8)
