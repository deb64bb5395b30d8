"""Every model family, tiny and real: our conditioning, latents and denoiser call are the pipeline's own, and what was
trained comes back from a stock `load_lora_weights` with difference 0."""

from pathlib import Path

import pytest
import tiny_pipelines
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from nearid_personalize.errors import InputError
from nearid_personalize.guard.previews import decode_latents
from nearid_personalize.training.lora import loop as lora
from nearid_personalize.training.lora.adapters import PromptedDenoiser, add_adapters
from nearid_personalize.training.lora.families import FAMILIES, Family, pack, unpack
from nearid_personalize.training.lora.loop import (
    WEIGHTS_NAME,
    LoraOptions,
    Snapshot,
    load_lora,
    read_metadata,
    train_lora,
)
from nearid_personalize.training.lora.noising import noising_of

NAMES = ("sd", "sd_v_prediction", "sdxl", "sd3", "flux", "qwen", "z_image")
WITH_TEXT = ("sd", "sdxl", "sd3", "flux")
PROMPTS = ("a photo of sks dog", "sks")
CHAT = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def byte_tokenizer():
    """A `Qwen2Tokenizer` of single bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocab = {piece: index for index, piece in enumerate([*marks, *sorted(ByteLevel.alphabet())])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], additional_special_tokens=marks[1:])
    tokenizer.chat_template = CHAT
    return tokenizer


def language_model(name: str):
    """A text encoder of width 32: Qwen2.5-VL or Qwen3."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen3Config, Qwen3Model

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"num_key_value_heads": 2, "vocab_size": 259, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if name == "z_image":
        return Qwen3Model(Qwen3Config(**size, head_dim=16)).eval()
    size["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=size, vision_config=vision)).eval()


def build(name: str):
    """The tiny pipeline of a family, with a text encoder."""
    pipe, _ = tiny_pipelines.build(name)
    if name in ("qwen", "z_image"):
        pipe.register_modules(text_encoder=language_model(name), tokenizer=byte_tokenizer())
    return pipe


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder of each family's saved pipeline, made on first use."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("families") / name
            build(name).save_pretrained(made[name])
        return made[name]

    return folder


def load(folder: Path) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def family_of(folder: Path) -> Family:
    pipe = load(folder)
    return FAMILIES[type(pipe).__name__](pipe)


def draw(pipe: DiffusionPipeline) -> torch.Tensor:
    """One small picture in two steps, as latents, without guidance."""
    arguments = {
        "prompt": PROMPTS[0],
        "height": 32,
        "width": 16,
        "num_inference_steps": 2,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
        "guidance_scale": 0.0 if "ZImage" in type(pipe).__name__ else 1.0,
    }
    if "Qwen" in type(pipe).__name__:
        arguments |= {"true_cfg_scale": 1.0, "guidance_scale": None}
    return pipe(**arguments).images


@pytest.fixture
def options(photo_dir: Path, tmp_path: Path) -> LoraOptions:
    return LoraOptions.of(
        base_model="",
        references=photo_dir,
        output=tmp_path / "lora",
        rank=4,
        alpha=8.0,
        steps=2,
        batch_size=2,
        resolution=32,
        learning_rate=0.03,
        text_learning_rate=0.03,
        precision="fp32",
    )


@pytest.mark.parametrize("name", NAMES)
def test_denoiser_call_is_the_pipelines_own(name, folders):
    """Given the latents, time and prompt of a sampling step, we call the denoiser to the same answer."""
    family = family_of(folders(name))
    calls = []

    def keep(module, args, kwargs, output):
        named = dict(zip(("hidden_states", "timestep"), args))
        calls.append({**named, **kwargs, "output": output[0] if isinstance(output, tuple) else output.sample})

    with family.denoiser.register_forward_hook(keep, with_kwargs=True):
        draw(family.pipe)
    call = calls[0]
    noisy, output, time = call["hidden_states"], call["output"], call["timestep"].reshape(-1)[:1].float()
    if name in ("flux", "qwen"):
        noisy, output, time = unpack(noisy, 4, 2), unpack(output, 4, 2), time * 1000
    if name == "z_image":
        noisy, output, time = torch.stack(noisy)[:, :, 0], -torch.stack(output)[:, :, 0], (1 - time) * 1000
    assert noisy.shape == (1, 4, 8, 4)
    frame = torch.tensor([[32.0, 16, 0, 0, 32, 16]])
    with torch.no_grad():
        table = family.encode_prompts(PROMPTS[:1], torch.device("cpu"))
        answer = family.denoise(family.denoiser, noisy, time, table, frame)
    torch.testing.assert_close(answer, output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_target_is_what_the_scheduler_takes_the_output_for(name, folders, options):
    """From the exact answer, the pipeline's scheduler steps to the clean latents (or straight towards them)."""
    family = family_of(folders(name))
    latents, noise = torch.randn(2, 1, 4, 8, 8)
    noised = noising_of(family.pipe.scheduler, options.noise)(latents, noise, torch.tensor([0.5]))
    flows = name in ("sd3", "flux", "qwen", "z_image")
    assert noised.timesteps.is_floating_point() == flows
    if flows:
        clean = noised.noisy - noised.timesteps / 1000 * noised.target
    elif name == "sdxl":
        alpha = family.pipe.scheduler.alphas_cumprod[noised.timesteps]
        clean = (noised.noisy - (1 - alpha).sqrt() * noised.target) / alpha.sqrt()
    else:
        scheduler = family.pipe.scheduler
        scheduler.set_timesteps(1000)
        clean = scheduler.step(noised.target, int(noised.timesteps), noised.noisy).pred_original_sample
    torch.testing.assert_close(clean, latents, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_batch_is_its_pictures_one_by_one(name, folders):
    """Prompts of different lengths and noise levels in one batch: as if each were alone."""
    family = family_of(folders(name))
    noisy, times = torch.randn(2, 4, 8, 4), torch.tensor([700, 200])
    frame = torch.tensor([[32.0, 16, 0, 0, 32, 16]] * 2)
    with torch.no_grad():
        table = family.encode_prompts(PROMPTS, torch.device("cpu"))
        both = family.denoise(family.denoiser, noisy, times, table, frame)
        for i in range(2):
            rows = {key: value[i : i + 1] for key, value in table.items()}
            one = family.denoise(family.denoiser, noisy[i : i + 1], times[i : i + 1], rows, frame[:1])
            torch.testing.assert_close(both[i : i + 1], one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_latents_decode_to_what_the_vae_makes_of_the_picture(name, folders):
    family = family_of(folders(name))
    pixels = torch.rand(1, 3, 32, 16) * 2 - 1
    with torch.no_grad():
        mean, std = family.encode_pictures(pixels)
        frames = pixels[:, :, None] if name == "qwen" else pixels
        raw = family.pipe.vae.encode(frames).latent_dist.mode()
        decoded = family.pipe.vae.decode(raw).sample.reshape(1, 3, 32, 16)
        latents = pack(mean) if name in ("flux", "qwen") else mean
        ours = decode_latents(family.pipe, latents, 32, 16)
    assert mean.shape == std.shape == (1, 4, 8, 4) and std.min() > 0
    torch.testing.assert_close(ours, (decoded / 2 + 0.5).clamp(0, 1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", WITH_TEXT)
def test_trained_text_encoders_start_as_the_frozen_ones(name, folders, options):
    """Embedding ids in the loop is the pipeline's `encode_prompt`, and every text LoRA that counts gets a gradient."""
    family = family_of(folders(name))
    frozen = family.encode_prompts(PROMPTS, torch.device("cpu"))
    table = frozen | family.tokenize(PROMPTS)
    add_adapters(family, options.but(text_rank=2).adapter, options.data.token)
    model = PromptedDenoiser(family, family.text_names)
    embedded = family.embed(dict(model.text.items()), table)
    assert embedded.keys() == frozen.keys()
    for key in frozen:
        torch.testing.assert_close(embedded[key], frozen[key])
    noisy, frame = torch.randn(2, 4, 8, 8), torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2)
    model(noisy, torch.tensor([700, 200]), table, torch.tensor([0, 1]), frame).square().mean().backward()
    missing = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert all(name == "sdxl" and key.startswith("text.text_encoder.") and "layers.1." in key for key in missing)


@pytest.mark.parametrize(("name", "dora"), [*((name, False) for name in NAMES), ("sd", True), ("flux", True)])
def test_stock_reload_equals_the_samples_of_training(name, dora, folders, options):
    """Alpha is kept: the last early sample, drawn in the run, is what a stock pipeline draws with the file."""
    drawn = []
    options = options.but(
        base_model=str(folders(name)),
        dora=dora,
        text_rank=2 if name in WITH_TEXT and not dora else 0,
        validate_every=2,
    )
    output = train_lora(options, lambda snapshot: drawn.append(draw(snapshot.pipe)))
    pipe = load(folders(name))
    before = draw(pipe)
    pipe.load_lora_weights(output)
    assert torch.equal(draw(pipe), drawn[0])
    assert (drawn[0] - before).abs().max() > 1e-4
    assert read_metadata(output)["rank"] == 4
    text = {key.split(".")[0] for key in load_file(output / WEIGHTS_NAME)} - {"unet", "transformer"}
    assert text == (set(FAMILIES[type(pipe).__name__].text_names) if options.adapter.text_rank else set())
    checked = load(folders(name))
    load_lora(checked, output)
    assert torch.equal(draw(checked), drawn[0])


@pytest.mark.parametrize("name", ["sdxl", "flux", "z_image"])
def test_nothing_is_encoded_twice(name, folders, options, monkeypatch):
    """Frozen text encoders and the VAE see each prompt and picture once, however long the run."""
    calls = {"vae": 0, "text": 0}
    load_family = lora.load_family

    def count(part):
        def hook(*_):
            calls[part] += 1

        return hook

    def load_and_count(*arguments):
        family = load_family(*arguments)
        family.pipe.vae.encoder.register_forward_pre_hook(count("vae"))
        for encoder in family.text_encoders().values():
            encoder.register_forward_pre_hook(count("text"))
        return family

    monkeypatch.setattr(lora, "load_family", load_and_count)
    train_lora(options.but(base_model=str(folders(name)), steps=5, text_rank=0))
    assert calls == {
        "vae": 4,
        "text": len(load_family(options.but(base_model=str(folders(name)))).text_encoders()),
    }


@pytest.mark.parametrize("name", ["sd", "flux", "z_image"])
def test_checkpointed_gradients_and_half_precision_train(name, folders, options):
    base = options.but(base_model=str(folders(name)))
    plain = load_file(train_lora(base) / WEIGHTS_NAME)
    lean = base.but(gradient_checkpointing="on", output=base.output.with_name("lean"))
    recomputed = load_file(train_lora(lean) / WEIGHTS_NAME)
    for key in plain:
        torch.testing.assert_close(recomputed[key], plain[key])
    half = base.but(precision="bf16", base_precision="same", output=base.output.with_name("half"))
    weights = load_file(train_lora(half) / WEIGHTS_NAME)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert any(not torch.equal(weights[key], plain[key]) for key in plain)


def test_pack_and_unpack_are_the_pipelines():
    from diffusers import FluxPipeline

    latents = torch.randn(2, 3, 8, 4)
    tokens = FluxPipeline._pack_latents(latents, 2, 3, 8, 4)
    assert torch.equal(pack(latents), tokens)
    assert torch.equal(unpack(tokens, 4, 2), latents)


def test_text_lora_is_refused_where_none_can_be_loaded(folders, options):
    with pytest.raises(InputError, match="--text-rank 2: ZImagePipeline takes no"):
        train_lora(options.but(base_model=str(folders("z_image")), text_rank=2))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "sd_v_prediction"])
def test_a_lora_that_would_load_no_layer_is_refused(name, folders, tmp_path):
    pipe = load(folders(name))
    before = draw(pipe)
    for prefix in ("unet.nowhere.to_q", "transformer.nowhere.to_q", "nowhere.to_q", "diffusion_model.nowhere.to_q"):
        path = tmp_path / f"{prefix}.safetensors"
        save_file({f"{prefix}.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}, path)
        with pytest.raises(InputError, match="LoRA") as error:
            load_lora(pipe, path)
        assert "\n" not in str(error.value)
    assert torch.equal(draw(pipe), before)


def test_unknown_pipelines_and_layers_are_refused(folders, options, tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "LTXPipeline"}')
    with pytest.raises(InputError, match="is a LTXPipeline; give one of StableDiffusionPipeline"):
        train_lora(options.but(base_model=str(tmp_path)))
    with pytest.raises(InputError, match="--target-modules"):
        train_lora(options.but(base_model=str(folders("flux")), target_modules=("nowhere",)))


def test_validation_can_end_the_run(folders, options):
    seen: list[int] = []

    def stop(snapshot: Snapshot) -> bool:
        seen.append(snapshot.step)
        snapshot.save(options.output / f"best-{snapshot.step}", score=0.5)
        return snapshot.step < 2

    many = options.but(base_model=str(folders("z_image")), steps=9, validate_every=1)
    output = train_lora(many, stop)
    assert seen == [1, 2]
    assert read_metadata(output)["steps"] == 2
    assert read_metadata(output / "best-1") | {"score": 0} == read_metadata(output) | {"steps": 1, "score": 0}
    assert read_metadata(output / "best-1")["score"] == 0.5
