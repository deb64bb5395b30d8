"""Inpainting with every pipeline: records for those that inpaint, blended latents for those that draw from text."""

import inspect

import diffusers
import numpy as np
import pytest
import torch
from conftest import checkered
from diffusers.pipelines.auto_pipeline import AUTO_INPAINT_PIPELINES_MAPPING
from PIL import Image
from tiny_pipelines import build, kl_vae

from nearid_personalize.distractors.blending import as_loop, blend, encode_latents
from nearid_personalize.distractors.inpaint import (
    RECORDS,
    BlendingInpainter,
    PipelineInpainter,
    Repaint,
    inpainter_for,
    model_size,
    side_multiple,
)
from nearid_personalize.errors import InputError
from nearid_personalize.guard.previews import latents_for_vae

SIZE = 32
DRAWING = ("sd", "sd_v_prediction", "sdxl", "sd3", "flux", "flux2", "qwen", "z_image")


def half_mask() -> Image.Image:
    mask = Image.new("L", (SIZE, SIZE))
    mask.paste(255, (SIZE // 2, 0, SIZE, SIZE))
    return mask


def options_of(arguments: dict) -> dict:
    """What a family's call needs beside prompt, picture and size."""
    ours = ("prompt", "height", "width", "image", "mask_image", "strength")
    return {name: value for name, value in arguments.items() if name not in ours}


def job(seed: int = 3, picture: int = 1) -> Repaint:
    return Repaint(picture=checkered(picture, SIZE), mask=half_mask(), prompt="a cat", seed=seed)


# --- records ---------------------------------------------------------------------------------------------------------
def resized(model, **changes):
    """A model of the same class with another configuration."""
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    return type(model).from_config({**config, **changes})


def control_unet(pipe):
    small = (16, 16, 16)  # the VAE's factor is 4 here
    return {"controlnet": diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=small)}


def control_sd3(pipe):
    made = diffusers.SD3ControlNetModel.from_transformer
    return {"controlnet": made(pipe.transformer, num_layers=1, num_extra_conditioning_channels=1)}


def control_flux(pipe):
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    return {"controlnet": diffusers.FluxControlNetModel.from_transformer(pipe.transformer, **sizes)}


def control_qwen(pipe):
    sizes = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "extra_condition_channels": 4}
    made = diffusers.QwenImageControlNetModel.from_transformer
    return {"controlnet": made(pipe.transformer, load_weights_from_transformer=False, **sizes)}


def sixteen_channels(pipe):
    vae = kl_vae(16, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False)
    return {"vae": vae, "transformer": resized(pipe.transformer, in_channels=16, out_channels=16)}


def wider(channels: int):
    return lambda pipe: {"transformer": resized(pipe.transformer, in_channels=channels, out_channels=16)}


FROM = {
    "StableDiffusionInpaintPipeline": ("sd", None),
    "StableDiffusionPAGInpaintPipeline": ("sd", lambda pipe: {"pag_applied_layers": "mid"}),
    "StableDiffusionControlNetInpaintPipeline": ("sd", control_unet),
    "StableDiffusionXLInpaintPipeline": ("sdxl", None),
    "StableDiffusionXLPAGInpaintPipeline": ("sdxl", lambda pipe: {"pag_applied_layers": "mid"}),
    "StableDiffusionXLControlNetInpaintPipeline": ("sdxl", control_unet),
    "StableDiffusion3InpaintPipeline": ("sd3", sixteen_channels),
    "StableDiffusion3ControlNetInpaintingPipeline": ("sd3", control_sd3),
    "FluxInpaintPipeline": ("flux", None),
    "FluxFillPipeline": ("flux", wider(96)),
    "FluxKontextInpaintPipeline": ("flux", None),
    "FluxControlInpaintPipeline": ("flux", wider(32)),
    "FluxControlNetInpaintPipeline": ("flux", control_flux),
    "QwenImageInpaintPipeline": ("qwen", None),
    "QwenImageControlNetInpaintPipeline": ("qwen", control_qwen),
    "ZImageInpaintPipeline": ("z_image", None),
}
"""Inpainting classes and the tiny pipeline whose parts they are made of."""


def made(name: str):
    """An inpainting pipeline with random weights, and the options of its call."""
    family, change = FROM[name]
    pipe, arguments = build(family)
    kind = getattr(diffusers, name)
    known = inspect.signature(kind.__init__).parameters
    parts = {part: module for part, module in pipe.components.items() if part in known}
    parts |= change(pipe) if change else {}
    if "requires_safety_checker" in known:
        parts["requires_safety_checker"] = False
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe, options_of(arguments)


@pytest.mark.parametrize("name", FROM)
def test_an_inpainting_class_repaints_by_its_record(name):
    pipe, options = made(name)
    inpaint = inpainter_for(pipe, size=SIZE, steps=2, options=options)
    assert isinstance(inpaint, PipelineInpainter)
    (first,), (again,), (other,) = inpaint([job(seed=1)]), inpaint([job(seed=1)]), inpaint([job(seed=2)])
    assert first.size == (SIZE, SIZE)
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_every_class_that_diffusers_finds_for_inpainting_has_a_record():
    known = {kind.__name__ for kind in AUTO_INPAINT_PIPELINES_MAPPING.values()}
    assert known <= set(RECORDS)


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_names_arguments_that_its_class_has(name):
    kind = getattr(diffusers, name, None)
    if kind is None:
        pytest.skip(f"this diffusers has no {name}")
    known, record = inspect.signature(kind.__call__).parameters, RECORDS[name]
    wanted = {record.image, record.mask, record.reference, record.control, record.guidance, *record.extra} - {None}
    assert wanted <= set(known)
    assert ("strength" in known) == (record.strength is not None)


def test_a_prompt_reaches_the_pipeline():
    inpaint = inpainter_for(build("sd_inpaint")[0], size=SIZE, steps=2, guidance_scale=5.0)
    dog, cat = (inpaint([Repaint(checkered(1, SIZE), half_mask(), prompt, 3)])[0] for prompt in ("a dog", "seven cats"))
    assert not np.array_equal(dog, cat)


# --- blending --------------------------------------------------------------------------------------------------------
def pixels_of(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


def latents_before_decoding(pipe, arguments: dict) -> torch.Tensor:
    """What the VAE is given at the end of blending, [1,C,h,w] or [1,C,1,h,w]."""
    seen, decode = [], pipe.vae.decode

    def decoding(latents, *args, **kwargs):
        seen.append(latents)
        return decode(latents, *args, **kwargs)

    pipe.vae.decode = decoding
    call = {**arguments, "num_inference_steps": 3, "height": SIZE, "width": SIZE}
    call = {name: value for name, value in call.items() if name in inspect.signature(pipe.__call__).parameters}
    blend(pipe, [checkered(1, SIZE)], [half_mask()], [5], call)
    return seen[-1].float()


def assert_left_half_is_the_picture(pipe, ended: torch.Tensor, packed: bool) -> None:
    clean = encode_latents(pipe, pixels_of(checkered(1, SIZE)))
    expected = latents_for_vae(
        pipe, as_loop(pipe, clean, torch.zeros(1, 1, 1) if packed else clean), SIZE, SIZE, pipe.vae.config
    ).float()
    half = expected.shape[-1] // 2
    assert torch.allclose(ended[..., :half], expected[..., :half], atol=1e-4)
    assert not torch.allclose(ended[..., half:], expected[..., half:], atol=1e-2)


@pytest.mark.parametrize("family", DRAWING)
def test_blended_latents_end_as_the_picture_outside_the_mask(family):
    pipe, arguments = build(family)
    ended = latents_before_decoding(pipe, arguments)
    assert_left_half_is_the_picture(pipe, ended, packed=family in ("flux", "flux2", "qwen"))


@pytest.mark.parametrize(
    "scheduler",
    [
        "DPMSolverMultistepScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "DEISMultistepScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_blending_works_with_any_scheduler(scheduler):
    pipe, arguments = build("sd")
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    assert_left_half_is_the_picture(pipe, latents_before_decoding(pipe, arguments), packed=False)


@pytest.mark.parametrize("family", ["sd", "sdxl", "flux", "qwen"])
def test_encoded_latents_are_what_the_vae_decodes(family):
    pipe, _ = build(family)
    pixels = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = encode_latents(pipe, pixels)
        video = family == "qwen"
        raw = pipe.vae.encode((2 * pixels - 1)[:, :, None] if video else 2 * pixels - 1).latent_dist.mode()
        undone = latents_for_vae(pipe, latents[:, :, None] if video else latents, None, None, pipe.vae.config)
    assert torch.allclose(undone, raw, atol=1e-5)


def test_a_batch_of_blended_pictures_is_what_each_is_alone():
    inpaint = inpainter_for(build("sd")[0], size=SIZE, steps=3, guidance_scale=3.0)
    assert isinstance(inpaint, BlendingInpainter)
    jobs = [job(seed=1), job(seed=2, picture=4), job(seed=3, picture=5)]
    together, alone = inpaint(jobs), [inpaint([one])[0] for one in jobs]
    for a, b in zip(together, alone, strict=True):
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 2  # rounding


def test_the_pipeline_is_left_as_it_was():
    pipe, _ = build("sd")
    prepare = pipe.prepare_latents
    inpainter_for(pipe, size=SIZE, steps=2)([job()])
    assert pipe.prepare_latents == prepare and "prepare_latents" not in vars(pipe)


# --- choosing --------------------------------------------------------------------------------------------------------
def test_sizes_are_the_pipelines_own():
    pipe, _ = build("sd")
    assert model_size(pipe) == pipe.unet.config.sample_size * pipe.vae_scale_factor
    assert side_multiple(pipe) == 8  # a VAE of factor 4, and a UNet of two levels
    assert inpainter_for(pipe, size=45).size == 40


@pytest.mark.parametrize(("arguments", "flag"), [({"size": 3}, "--size"), ({"strength": 0.5}, "--strength")])
def test_what_cannot_be_is_refused_by_name(arguments, flag):
    with pytest.raises(InputError, match=flag):
        inpainter_for(build("sd")[0], **arguments)


def test_a_pipeline_that_can_do_neither_is_refused():
    class Fixed(diffusers.DiffusionPipeline):
        def __init__(self) -> None:
            super().__init__()

        def __call__(self, prompt: str) -> None: ...

    with pytest.raises(InputError, match="Fixed has no"):
        inpainter_for(Fixed(), size=SIZE)
