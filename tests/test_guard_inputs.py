"""What people pass to their pipelines and switch on in them goes on working while candidates are stopped."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import checkered
from test_denoising import ip_adapter, traces, with_safety_checker
from tiny_pipelines import build, from_a_picture

from nearid_personalize import IdentityGuard, IdentityScorer, InputError
from nearid_personalize.guard.policy import FixedSchedule
from nearid_personalize.guard.result import NothingAcceptedWarning

N, STEPS = 4, 4


@pytest.fixture(scope="module")
def scorer(tiny_nearid_dir) -> IdentityScorer:
    return IdentityScorer.from_pretrained(tiny_nearid_dir)


@pytest.fixture
def guarded(scorer):
    """Makes a guard that stops half of the candidates half-way, and accepts the others."""
    subject = dataclasses.replace(scorer.enroll([checkered(0), checkered(1)]), threshold=-1.0)
    return lambda pipe: IdentityGuard(pipe, scorer, subject, policy=FixedSchedule({0.5: 0.5}))


def assert_candidates_are_plain_pictures(guard: IdentityGuard, arguments: dict) -> None:
    """Half are stopped, and the others are what the plain pipeline makes of their seeds and these arguments."""
    left = traces(guard.pipe)
    call = {**arguments, "num_inference_steps": STEPS}
    result = guard(**call, num_images=1, num_candidates=N)
    assert [c.stopped_at_step for c in result.candidates].count(2) == N // 2
    assert traces(guard.pipe) == left
    for candidate in result.accepted:
        plain = guard.pipe(**call, generator=torch.Generator().manual_seed(candidate.seed)).images[0]
        assert largest_difference(candidate.image, plain) <= 1


def largest_difference(image, other) -> int:
    """Of 8-bit pixels."""
    return np.abs(np.asarray(image).astype(int) - np.asarray(other).astype(int)).max()


def change(pipe, arguments: dict, **others) -> int:
    """How much other arguments change the plain pipeline's picture, in 8-bit pixels."""
    images = [
        pipe(**call, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0)).images[0]
        for call in (arguments, {**arguments, **others})
    ]
    return largest_difference(*images)


RACED = (
    "sd",
    "sd_v_prediction",
    "sd_img2img",
    "sd_inpaint",
    "sd_inpaint_9",
    "sdxl",
    "sd3",
    "flux",
    "flux2",
    "qwen",
    "z_image",
)


@pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning")  # by SDXL's own call
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", RACED)
def test_half_precision(family, dtype, guarded):
    """Who goes on is what the plain pipeline makes in that precision, but for the rounding of another batch size."""
    pipe, arguments = build(family)
    pipe.to(dtype)
    call = {name: in_precision(value, dtype) for name, value in arguments.items()}
    call |= {"num_inference_steps": 3, "output_type": "pt"}
    result = guarded(pipe)(**call, num_images=1, num_candidates=3)
    assert [c.status for c in result.candidates].count("stopped") == 1
    assert all(np.isfinite(score) for c in result.candidates for score in c.previews.values())
    first, second = (as_drawn_alone(pipe, call, c.seed) for c in result.accepted)
    spread = (first - second).abs().mean()
    difference = (result.images[0].float() - first).abs()
    # Measured: at most 2.5 of 255, and a 300th of what another seed changes
    assert difference.max() <= 8 / 255 and difference.mean() <= spread / 50


@pytest.mark.filterwarnings("ignore:ZImageImg2ImgPipeline with .* is not among:UserWarning")
def test_pipelines_that_cannot_keep_a_batchs_promise_draw_one_at_a_time(guarded):
    pipe, arguments = from_a_picture("ZImageImg2ImgPipeline", *build("z_image"))
    pipe.set_progress_bar_config(disable=True)
    call = {**arguments, "num_inference_steps": 2}
    for candidate in guarded(pipe)(**call, num_images=1, num_candidates=2).candidates:
        plain = pipe(**call, generator=torch.Generator().manual_seed(candidate.seed)).images[0]
        assert largest_difference(candidate.image, plain) <= 1


def test_chosen_floors_work_where_and_as_the_scorer_does(tiny_nearid_dir):
    from nearid_personalize.floors.chosen import chosen_floors

    scorer = IdentityScorer.from_pretrained(tiny_nearid_dir, dtype=torch.bfloat16)
    (floor,) = chosen_floors(str(tiny_nearid_dir), scorer, [checkered(0)], text_image_model="miniworld")
    assert floor.encoder.model.dtype == torch.bfloat16 and floor.encoder.model.device == scorer.model.device
    assert len(floor.judge([checkered(1)], "a red bag")) == 1


def in_precision(value, dtype: torch.dtype):
    """Embeddings in the precision of the pipeline; other arguments as they are."""
    if isinstance(value, list):
        return [in_precision(item, dtype) for item in value]
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def as_drawn_alone(pipe, call: dict, seed: int) -> torch.Tensor:
    """The plain pipeline's picture of a seed, `[3,H,W]` float32."""
    return pipe(**call, generator=torch.Generator().manual_seed(seed)).images[0].float()


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_a_callback_that_changes_the_latents(family, guarded):
    def callback(pipe, step, timestep, tensors):
        return {"latents": (1 - 0.1 * step) * tensors["latents"], "prompt_embeds": 1.5 * tensors["prompt_embeds"]}

    pipe, arguments = build(family)
    own = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["prompt_embeds", "latents"]}
    assert change(pipe, arguments, **own) > 1
    assert_candidates_are_plain_pictures(guarded(pipe), arguments | own)


def test_ip_adapter_pictures(guarded):
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModelWithProjection

    pipe, arguments = build("sd")
    vision = CLIPVisionConfig(
        image_size=32,
        patch_size=8,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=16,
    )
    size = {"height": 32, "width": 32}
    extractor = CLIPImageProcessorPil(size=size, crop_size=size)
    pipe.register_modules(image_encoder=CLIPVisionModelWithProjection(vision).eval(), feature_extractor=extractor)
    pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet)])
    arguments["ip_adapter_image"] = checkered(0)
    assert change(pipe, arguments, ip_adapter_image=checkered(5)) > 1
    assert_candidates_are_plain_pictures(guarded(pipe), arguments)
    pipe.set_ip_adapter_scale(0.3)
    assert_candidates_are_plain_pictures(guarded(pipe), arguments)


def test_pictures_blackened_by_a_safety_checker_are_rejected(scorer, guarded):
    pipe, arguments = build("sd")
    with_safety_checker(pipe)
    checker = pipe.safety_checker
    call = {**arguments, "num_images": 4, "num_candidates": N, "num_inference_steps": 2}

    def word_on(seed: int) -> bool:
        generator = torch.Generator().manual_seed(seed)
        return pipe(**arguments, num_inference_steps=2, generator=generator).nsfw_content_detected[0]

    checker.concept_embeds_weights.fill_(1.0)  # above any cosine: every picture passes
    checker.special_care_embeds_weights.fill_(1.0)
    assert not word_on(0) and len(guarded(pipe)(**call).images) == N
    checker.concept_embeds_weights.fill_(-1.0)
    with pytest.warns(NothingAcceptedWarning, match="blackened by the safety checker"):
        result = guarded(pipe)(**call)
    assert word_on(0) and len(result.images) == 0
    for candidate in result.candidates:
        assert candidate.status == "rejected" and candidate.reason == "blackened by the safety checker"
        assert np.isnan(candidate.score) and np.asarray(candidate.image).max() == 0


def test_a_blackened_picture_is_no_evidence_for_the_policy(guarded):
    """A second wave is informed by what finished: by seen pictures alone, and ranked after them."""
    from nearid_personalize.guard.policy import RacingPolicy

    pipe, arguments = build("sd")
    with_safety_checker(pipe)
    forward, told = type(pipe.safety_checker).forward, []

    class Listening(RacingPolicy):
        def informed(self, profile, run):
            told.append(run.finished)
            return super().informed(profile, run)

    def second_is_black(clip_input, images):
        forward(pipe.safety_checker, clip_input, images)
        flags = [index == 1 for index in range(len(images))]
        return torch.stack([0 * image if black else image for image, black in zip(images, flags)]), flags

    pipe.safety_checker.forward = second_is_black
    guard = guarded(pipe)
    guard.policy, guard.max_batch_size = Listening(margin=9.0), 3
    result = guard(**arguments, num_images=1, num_candidates=6, num_inference_steps=2)
    black = {c.seed for c in result.candidates if c.reason.startswith("blackened")}
    assert black == {1, 4} and {c.seed for c in result.ranked[-2:]} == black
    assert len(told) == 2 and told[1] == tuple(result.candidates[seed].score for seed in (0, 2))


@pytest.mark.parametrize(("family", "name"), [("sdxl", "cross_attention_kwargs"), ("flux", "joint_attention_kwargs")])
def test_the_scale_of_a_lora(family, name, guarded):
    from peft import LoraConfig

    pipe, arguments = build(family)
    denoiser = pipe.unet if family == "sdxl" else pipe.transformer
    denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    scale = {name: {"scale": 0.3}}
    assert change(pipe, arguments, **scale) > 1
    assert_candidates_are_plain_pictures(guarded(pipe), arguments | scale)


@pytest.mark.parametrize("family", ["sdxl", "flux", "qwen"])
@pytest.mark.parametrize("output_type", ["latent", "pt", "np"])
def test_every_output_type(family, output_type, guarded):
    pipe, arguments = build(family)
    guard = guarded(pipe)
    call = {**arguments, "num_images": 2, "num_candidates": N, "num_inference_steps": STEPS}
    as_pil, result = guard(**call), guard(**call, output_type=output_type)
    seeds = [candidate.seed for candidate in result.accepted]
    assert [candidate.seed for candidate in as_pil.accepted] == seeds
    assert [c.score for c in result.accepted] == pytest.approx([c.score for c in as_pil.accepted], abs=1e-3)
    plain = {**arguments, "num_inference_steps": STEPS, "output_type": output_type}
    for image, seed in zip(result.images, seeds, strict=True):
        other = pipe(**plain, generator=torch.Generator().manual_seed(seed)).images[0]
        assert type(image) is type(other) and abs(image - other).max() <= 1e-5 * max(1, abs(other).max())


def test_lists_of_prompts_with_lists_of_negative_and_second_prompts(guarded):
    pipe, _ = build("sdxl")
    lists = {"prompt": ["sks dog", "a cat"], "negative_prompt": ["dark", "blurry"], "prompt_2": ["in space", "at sea"]}
    call = {"num_images": 1, "num_candidates": N, "num_inference_steps": STEPS}
    results = guarded(pipe)(**lists, **call)
    alone = [guarded(pipe)(**{name: values[i] for name, values in lists.items()}, **call) for i in range(2)]
    assert [result.prompt for result in results] == lists["prompt"] and len(results.images) == 2
    for image, other in zip(results.images, alone, strict=True):
        assert largest_difference(image, other.images[0]) == 0


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_group_offloading(family, guarded):
    pipe, arguments = build(family)
    expected = guarded(pipe)(**arguments, num_images=1, num_candidates=N, num_inference_steps=STEPS)
    pipe.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    result = guarded(pipe)(**arguments, num_images=1, num_candidates=N, num_inference_steps=STEPS)
    assert [c.stopped_at_step for c in result.candidates] == [c.stopped_at_step for c in expected.candidates]
    assert largest_difference(result.images[0], expected.images[0]) <= 1


def test_slicing_and_tiling(guarded):
    pipe, arguments = build("sd")
    pipe.enable_attention_slicing(1)
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    assert_candidates_are_plain_pictures(guarded(pipe), arguments)


def test_attention_backends(guarded):
    """`native` is torch's own attention."""
    pipe, arguments = build("flux")
    pipe.transformer.set_attention_backend("native")
    try:
        assert_candidates_are_plain_pictures(guarded(pipe), arguments)
    finally:
        pipe.transformer.reset_attention_backend()


@pytest.mark.skipif(torch.cuda.is_available(), reason="xformers works with CUDA")
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_what_diffusers_refuses_leaves_the_guard_working(family, guarded):
    pipe, arguments = build(family)
    guard = guarded(pipe)
    with pytest.raises((ImportError, ValueError)):  # not installed, or no CUDA
        pipe.enable_xformers_memory_efficient_attention()
    with pytest.raises(RuntimeError, match="accelerator"):
        pipe.enable_model_cpu_offload()
    assert_candidates_are_plain_pictures(guard, arguments)


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("sd", {"prompt": []}, "prompt is an empty list"),
        (
            "sd",
            {"negative_prompt_embeds": torch.zeros(2, 77, 32)},
            "negative_prompt_embeds must be of one prompt, got 2",
        ),
        ("sd_img2img", {"image": [checkered(0), checkered(1)]}, "image must be one picture, got 2"),
        ("sd_inpaint", {"image": torch.zeros(3, 3, 32, 32)}, "image must be one picture, got 3"),
    ],
)
def test_what_cannot_work_is_refused_by_name(family, arguments, message, guarded):
    pipe, own = build(family)
    with pytest.raises(InputError, match=f"^{message}"):
        guarded(pipe)(**{**own, **arguments})
