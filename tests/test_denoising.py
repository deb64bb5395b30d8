"""Candidates stopped half-way: those that go on come out as in a plain call, and the pipeline is left as it was."""

import functools
import inspect
import random
from collections.abc import Callable, Collection

import numpy as np
import pytest
import torch
from conftest import checkered
from tiny_pipelines import build, embeddings, tiny_vae

from nearid_personalize.errors import InputError
from nearid_personalize.guard.hooks import Denoised, Moment, can_batch, can_race, denoise, find_denoiser, steps_at
from nearid_personalize.guard.previews import TESTED_SCHEDULERS, as_pixels, decode_latents, predict_clean

N, STEPS = 4, 4
TOLERANCE = 1e-5
NEGATIVE = {"negative_prompt_embeds": embeddings(1)}

# name of the case: family, its options, arguments of the call, denoiser rows per candidate and step
CASES = {
    "sd": ("sd", {}, {"guidance_scale": 3.0, "negative_prompt": "blurry"}, 2),
    "sd-unguided": ("sd", {}, {"guidance_scale": 1.0}, 1),
    "sd-v": ("sd_v_prediction", {}, {"guidance_scale": 3.0, "guidance_rescale": 0.7}, 2),
    "img2img": ("sd_img2img", {}, {"guidance_scale": 3.0}, 2),
    "img2img-unguided": ("sd_img2img", {}, {"guidance_scale": 1.0}, 1),
    "inpaint": ("sd_inpaint", {}, {"guidance_scale": 3.0}, 2),
    "inpaint-unguided": ("sd_inpaint", {}, {"guidance_scale": 1.0}, 1),
    "inpaint-9-channels": ("sd_inpaint_9", {}, {"guidance_scale": 3.0}, 2),
    "sdxl": ("sdxl", {}, {"guidance_scale": 3.0, "negative_original_size": (8, 8)}, 2),
    "sdxl-unguided": ("sdxl", {}, {"guidance_scale": 1.0}, 1),
    "sd3": ("sd3", {}, {"guidance_scale": 3.0}, 2),
    "sd3-unguided": ("sd3", {}, {"guidance_scale": 1.0}, 1),
    "flux": ("flux", {}, {"guidance_scale": 3.0}, 1),
    "flux-true-cfg": ("flux", {"guidance_embeds": False}, {"true_cfg_scale": 3.0, "negative_prompt": "cat"}, 2),
    "flux2": ("flux2", {}, {"guidance_scale": 3.0}, 1),
    "qwen": ("qwen", {}, {"true_cfg_scale": 1.0}, 1),
    "qwen-cfg": (
        "qwen",
        {},
        {"true_cfg_scale": 3.0, **NEGATIVE, "negative_prompt_embeds_mask": torch.ones(1, 5).long()},
        2,
    ),
    "z-image": ("z_image", {}, {"guidance_scale": 0.0}, 1),
    "z-image-cfg": (
        "z_image",
        {},
        {"guidance_scale": 3.0, "cfg_normalization": True, "negative_prompt_embeds": list(embeddings(1))},
        2,
    ),
}

FROM_A_PICTURE = (
    "sd_img2img",
    "sd_inpaint",
    "sd_inpaint_9",
    "sdxl_img2img",
    "sdxl_inpaint",
    "flux_img2img",
    "flux_inpaint",
    "qwen_img2img",
    "qwen_inpaint",
)

FLOWS = {
    "FlowMatchEulerDiscreteScheduler": {"stochastic_sampling": True},
    "FlowMatchHeunDiscreteScheduler": {},
    "FlowMatchLCMScheduler": {},
    "UniPCMultistepScheduler": {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    "DPMSolverMultistepScheduler": {
        "use_flow_sigmas": True,
        "prediction_type": "flow_prediction",
        "use_dynamic_shifting": True,
        "time_shift_type": "exponential",
    },
}
DIFFUSIONS = [name for name in TESTED_SCHEDULERS if not name.startswith("FlowMatch")]
NEEDS = {"LMSDiscreteScheduler": "scipy", "DPMSolverSDEScheduler": "torchsde"}

# NumPy 2 finds this in how schedulers take the logarithm of a tensor
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
    # torchsde, of a first step that is a rounding error early
    pytest.mark.filterwarnings("ignore:Should have ta:UserWarning"),
]


def generators(num: int = N) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(num)]


def plain(pipe, arguments, num: int = N):
    """The rows of the plain pipeline: one call for all of them.

    Some pipelines pass their generators on to no scheduler, and some schedulers take none: here they get them.
    """
    arguments, seeds, scheduler = dict(arguments), generators(num), pipe.scheduler
    if type(pipe).__name__ == "StableDiffusionInpaintPipeline":
        arguments["image"] = [arguments["image"]] * num
    if hasattr(scheduler, "noise_sampler_seed"):
        scheduler.noise_sampler_seed = list(range(num))
    step = scheduler.step
    if "generator" in inspect.signature(step).parameters:
        scheduler.step = functools.partial(step, generator=seeds)
    try:
        return pipe(**arguments, generator=seeds, num_images_per_prompt=num).images
    finally:
        scheduler.step = step
        del scheduler.step
        if hasattr(scheduler, "noise_sampler_seed"):
            scheduler.noise_sampler_seed = None


def following(schedule: dict[int, Collection[int]]) -> Callable[[Moment], Collection[int] | None]:
    """An `on_step` that lets go on at each step whom the schedule names."""
    return lambda moment: schedule.get(moment.step)


def random_schedule(seed: str, num_steps: int, num: int = N) -> dict[int, list[int]]:
    """Who goes on after which step: one or more stop at two random steps, at least one goes on."""
    chance = random.Random(seed)
    first, second = sorted(chance.sample(range(1, num_steps + 1), 2))
    some = chance.sample(range(num), chance.randint(2, num - 1))
    return {first: some, second: chance.sample(some, chance.randint(1, len(some) - 1))}


def assert_equal_rows(denoised: Denoised, rows: torch.Tensor) -> None:
    """Equal but for the rounding that another batch size brings, against the largest value."""
    images, rows = torch.as_tensor(denoised.images), torch.as_tensor(rows)[list(denoised.rows)]
    assert images.shape == rows.shape
    assert (images - rows).abs().max() <= TOLERANCE * max(1, rows.abs().max())


def counting(seen: list[int]) -> Callable[..., None]:
    """A forward pre-hook that notes the rows of each call."""
    return lambda module, args, kwargs: seen.append(len(args[0] if args else kwargs["hidden_states"]))


def traces(pipe) -> tuple:
    """All that a watch could leave behind."""
    denoiser = find_denoiser(pipe)
    hooks = (denoiser._forward_pre_hooks, denoiser._forward_pre_hooks_with_kwargs, denoiser._forward_hooks)
    return type(pipe.scheduler), "step" in vars(pipe.scheduler), [list(hook) for hook in hooks]


# --- who goes on comes out as in a plain call ------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_whoever_goes_on_comes_out_as_in_a_plain_call(case):
    family, options, call, rows_per_step = CASES[case]
    pipe, arguments = build(family, **options)
    arguments = {**arguments, **call, "num_inference_steps": STEPS, "output_type": "pt"}
    rows = plain(pipe, arguments)
    assert (rows[0] - rows[1]).abs().max() > 100 * TOLERANCE, "the candidates are to differ"
    left, num_steps = traces(pipe), pipe.num_timesteps
    for schedule in ({1: [2, 0]}, {num_steps: [3]}, random_schedule(case, num_steps)):
        seen: list[int] = []  # by somebody who looked at the denoiser before the run
        observer = find_denoiser(pipe).register_forward_pre_hook(counting(seen), with_kwargs=True)
        denoised = denoise(pipe, arguments, generators(), following(schedule))
        observer.remove()

        going_on = list(range(N))
        expected_rows = 0
        for step in range(1, num_steps + 1):
            expected_rows += len(going_on) * rows_per_step
            for row in set(going_on) - set(schedule.get(step, going_on)):
                assert denoised.stopped_at[row] == step
            going_on = sorted(schedule.get(step, going_on))
        assert denoised.rows == tuple(going_on)
        assert denoised.denoiser_rows == sum(seen) == expected_rows
        assert_equal_rows(denoised, rows)
        assert traces(pipe) == left
    assert torch.equal(plain(pipe, arguments), rows)


def with_scheduler(family: str, name: str, **config):
    """A pipeline of the family under another scheduler, configured as its own was but for `config`."""
    import diffusers

    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    pipe, arguments = build(family)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **config)
    return pipe, arguments


@pytest.mark.parametrize("name", DIFFUSIONS)
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_any_scheduler(family, name):
    check_scheduler(*with_scheduler(family, name), f"{family} {name}")


@pytest.mark.parametrize("name", ["DDPMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("family", ["sd_v_prediction", "sd_img2img", "sd_inpaint"])
def test_any_scheduler_in_other_pipelines(family, name):
    check_scheduler(*with_scheduler(family, name), f"{family} {name}")


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("family", ["sd3", "flux2"])
def test_any_flow_scheduler(family, name):
    if family == "flux2" and name == "FlowMatchHeunDiscreteScheduler":
        pytest.skip("FLUX pipelines pass sigmas, which this scheduler does not take")
    check_scheduler(*with_scheduler(family, name, **FLOWS[name]), f"{family} {name}")


def check_scheduler(pipe, arguments, seed: str) -> None:
    """A shrinking run gives the plain rows, and neither it nor one broken off changes the next plain call."""
    assert can_race(pipe)
    arguments = {**arguments, "num_inference_steps": 5, "output_type": "latent"}
    rows = plain(pipe, arguments)
    left, state = traces(pipe), vars(pipe.scheduler).keys()

    def interrupted(moment: Moment) -> Collection[int]:
        if moment.step == 3:
            raise KeyboardInterrupt
        return moment.rows[1:]

    with pytest.raises(KeyboardInterrupt):
        denoise(pipe, arguments, generators(), interrupted)
    assert traces(pipe) == left and vars(pipe.scheduler).keys() == state

    denoised = denoise(pipe, arguments, generators(), following(random_schedule(seed, pipe.num_timesteps)))
    assert len(denoised.rows) < N
    assert_equal_rows(denoised, rows)
    assert traces(pipe) == left and vars(pipe.scheduler).keys() == state
    assert torch.equal(plain(pipe, arguments), rows)


@pytest.mark.parametrize("padding_mask_crop", [None, 4])
@pytest.mark.parametrize("family", FROM_A_PICTURE)
def test_a_candidate_is_its_seeds_picture_whatever_the_batch(family, padding_mask_crop):
    """Also where the pipeline draws the latents of its source picture once, by the first generator."""
    pipe, arguments = build(family)
    arguments = {**arguments, "num_inference_steps": STEPS, "output_type": "pt"}
    if padding_mask_crop is not None:
        if "padding_mask_crop" not in inspect.signature(pipe.__call__).parameters:
            pytest.skip("no such argument")
        arguments |= {"padding_mask_crop": padding_mask_crop, "output_type": "pil"}
    assert can_batch(pipe)
    denoised = denoise(pipe, arguments, generators(2), following({1: [1]}))
    alone = [pipe(**arguments, generator=generator).images[0] for generator in generators(2)]
    if padding_mask_crop is None:
        assert_equal_rows(denoised, torch.stack(alone))
        return
    for image, row in zip(denoised.images, denoised.rows, strict=True):
        assert abs(np.asarray(image).astype(int) - np.asarray(alone[row])).max() <= 1
    assert "_encode_vae_image" not in vars(pipe)


def test_pipelines_that_start_from_a_picture_unheard_of_are_not_batched():
    """ZImageImg2ImgPipeline draws the latents of its source with the first generator, and has no place to mend that."""
    from diffusers import StableDiffusionUpscalePipeline, ZImageImg2ImgPipeline

    pipe, _ = build("z_image")
    assert can_batch(pipe) and not can_batch(ZImageImg2ImgPipeline(**pipe.components))
    pipe.__class__ = StableDiffusionUpscalePipeline
    assert not can_batch(pipe)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("FlowMatchLCMScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
        ("DPMSolverMultistepScheduler", {**FLOWS["DPMSolverMultistepScheduler"], "algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_schedulers_that_draw_noise_repeat_by_seed(name, config):
    """Their pipeline gives them no generator, and torch's own is never the same."""
    pipe, arguments = with_scheduler("flux", name, **config)
    arguments = {**arguments, "num_inference_steps": STEPS, "output_type": "pt"}
    together = denoise(pipe, arguments, generators()).images
    assert torch.equal(denoise(pipe, arguments, generators()).images, together)
    alone = [denoise(pipe, arguments, [generator]).images[0] for generator in generators()]
    assert (torch.stack(alone) - together).abs().max() <= TOLERANCE
    assert (together[0] - together[1]).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("seed", [None, 7])
def test_brownian_noise_repeats_by_seed(seed):
    """The scheduler's own seed, where it has one, makes the plain picture; else its tree has the candidate's seed."""
    pipe, arguments = with_scheduler("sd", "DPMSolverSDEScheduler")
    pipe.scheduler.noise_sampler_seed = seed
    arguments = {**arguments, "num_inference_steps": STEPS, "output_type": "pt"}
    together = denoise(pipe, arguments, generators()).images
    assert vars(pipe.scheduler)["noise_sampler_seed"] == seed
    if seed is None:
        alone = [denoise(pipe, arguments, [generator]).images[0] for generator in generators()]
    else:
        alone = [pipe(**arguments, generator=generator).images[0] for generator in generators()]
    assert (torch.stack(alone) - together).abs().max() <= TOLERANCE


def test_a_picture_drawn_at_random_is_the_same_for_pipelines_that_cannot_race():
    from diffusers import FluxPipeline

    class Mine(FluxPipeline):
        """A pipeline nobody has tested."""

    pipe, arguments = with_scheduler("flux", "FlowMatchLCMScheduler")
    arguments = {**arguments, "num_inference_steps": 2, "output_type": "pt"}
    mine = Mine(**pipe.components)
    mine.set_progress_bar_config(disable=True)
    assert not can_race(mine)
    expected = denoise(pipe, arguments, generators()).images
    assert torch.equal(denoise(mine, arguments, generators()).images, expected)


def test_prompts_share_the_candidates():
    pipe, arguments = build("sd")
    arguments = {"prompt": ["sks dog", "cat"], "negative_prompt": ["a", "b"], "num_inference_steps": STEPS}
    arguments["output_type"] = "np"
    rows = pipe(**arguments, generator=generators(), num_images_per_prompt=2).images
    assert_equal_rows(denoise(pipe, arguments, generators(), following({2: [1, 2]})), rows)
    with pytest.raises(InputError, match="got 3 for 2 prompts"):
        denoise(pipe, arguments, generators(3))


# --- on_step ---------------------------------------------------------------------------------------------------------


def test_nobody_going_on_ends_the_denoising():
    pipe, arguments = build("sd")
    arguments = {**arguments, "num_inference_steps": STEPS, "guidance_scale": 1.0}
    left = traces(pipe)
    denoised = denoise(pipe, arguments, generators(), following({1: [2], 2: []}))
    assert len(denoised.images) == 0 and denoised.rows == () and denoised.denoiser_rows == N + 1
    assert denoised.stopped_at == {0: 1, 1: 1, 3: 1, 2: 2}
    assert traces(pipe) == left


def test_moments_say_where_the_denoising_stands():
    pipe, arguments = build("sd")
    moments = []

    def on_step(moment: Moment) -> list[int]:
        moments.append(moment)
        return [row for row in moment.rows if row != 5 - moment.step]  # 3 stops after step 2, 2 after step 3

    arguments = {**arguments, "num_inference_steps": STEPS}
    denoised = denoise(pipe, arguments, generators(), on_step)
    assert [moment.step for moment in moments] == [1, 2, 3, 4]
    assert [moment.fraction for moment in moments] == [0.25, 0.5, 0.75, 1.0]
    assert [moment.rows for moment in moments] == [(0, 1, 2, 3), (0, 1, 2, 3), (0, 1, 2), (0, 1)]
    assert denoised.rows == (0,) and denoised.stopped_at == {3: 2, 2: 3, 1: 4}
    assert [image.size for image in denoised.images] == [(32, 32)]


def test_a_row_not_in_the_batch_is_refused():
    pipe, arguments = build("sd")
    left = traces(pipe)
    with pytest.raises(InputError, match=r"on_step returned rows \[1\]; in the batch are \[0, 2\]"):
        denoise(pipe, {**arguments, "num_inference_steps": 3}, generators(), following({1: [0, 2], 2: [0, 1]}))
    assert traces(pipe) == left


@pytest.mark.parametrize("interrupt", [False, True])
def test_the_users_callback_keeps_working(interrupt):
    pipe, arguments = build("sd")
    calls = []

    def callback(pipe, step, timestep, tensors):
        calls.append(sorted(tensors))
        pipe._interrupt = interrupt and step == 2
        return {"latents": 0.9 * tensors["latents"], "prompt_embeds": 1.1 * tensors["prompt_embeds"]}

    own = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["prompt_embeds", "latents"]}
    arguments = {**arguments, "num_inference_steps": STEPS, "output_type": "pt"}
    rows = plain(pipe, arguments | own)
    assert (rows - plain(pipe, arguments)).abs().max() > 100 * TOLERANCE
    expected, calls[:] = list(calls), []
    assert_equal_rows(denoise(pipe, arguments | own, generators(), following({1: [0, 1, 3], 3: [3, 0]})), rows)
    assert calls == expected
    assert arguments.keys().isdisjoint(own)


def test_diffusers_own_callbacks_name_their_tensors():
    from diffusers.callbacks import PipelineCallback

    class Warmer(PipelineCallback):
        tensor_inputs = ("prompt_embeds",)

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return {name: 1.2 * tensor for name, tensor in callback_kwargs.items()}

    pipe, arguments = build("sd")
    arguments = {**arguments, "num_inference_steps": STEPS, "output_type": "pt", "callback_on_step_end": Warmer()}
    assert_equal_rows(denoise(pipe, arguments, generators(), following({2: [1]})), plain(pipe, arguments))


@pytest.mark.parametrize(
    ("family", "callback"),
    [("sd", "SDCFGCutoffCallback"), ("sdxl", "SDXLCFGCutoffCallback"), ("sd3", "SD3CFGCutoffCallback")],
)
def test_guidance_may_be_cut_off_half_way(family, callback):
    """These callbacks of diffusers keep one row of the embeddings, which a batch cannot use."""
    from diffusers import callbacks

    pipe, arguments = build(family)
    cutoff = getattr(callbacks, callback)(cutoff_step_ratio=None, cutoff_step_index=1)
    arguments = {**arguments, "num_inference_steps": STEPS, "output_type": "pt", "guidance_scale": 3.0}
    whole = denoise(pipe, arguments, generators(2)).images
    arguments["callback_on_step_end"] = cutoff
    alone = [pipe(**arguments, generator=generator).images[0] for generator in generators()]
    denoised = denoise(pipe, arguments, generators(), following({1: [0, 1, 3], 3: [3, 0]}))
    assert_equal_rows(denoised, torch.stack(alone))
    assert denoised.denoiser_rows == 2 * N + 2 * 3 + 3 + 2, "both halves of guidance in two steps of four"
    assert (whole[0] - alone[0]).abs().max() > 2 * TOLERANCE
    pipe.__class__ = type("Mine", (type(pipe),), {})  # one that cannot race
    assert_equal_rows(denoise(pipe, arguments, generators()), torch.stack(alone))


def test_a_scheduler_someone_else_wrapped_is_given_back():
    pipe, arguments = build("sd")
    plain_step = pipe.scheduler.step
    pipe.scheduler.step = theirs = lambda *args, **kwargs: plain_step(*args, **kwargs)
    denoise(pipe, {**arguments, "num_inference_steps": 2}, generators(), following({1: [0]}))
    assert pipe.scheduler.step is theirs


# --- what cannot race ------------------------------------------------------------------------------------------------


def test_other_pipelines_and_schedulers_run_to_the_end():
    from diffusers import FirstBlockCacheConfig, IPNDMScheduler, StableDiffusionPipeline

    class Mine(StableDiffusionPipeline):
        """A pipeline nobody has tested."""

    pipe, arguments = build("sd")
    assert can_race(pipe)
    arguments = {**arguments, "num_inference_steps": 3, "output_type": "pt", "guidance_scale": 3.0}
    mine = Mine(**pipe.components, requires_safety_checker=False)
    assert not can_race(mine)
    denoised = denoise(mine, arguments, generators(), lambda moment: pytest.fail("asked"))
    assert denoised.rows == (0, 1, 2, 3) and denoised.denoiser_rows == 3 * 2 * N
    assert torch.equal(denoised.images, plain(pipe, arguments))

    pipe.scheduler = IPNDMScheduler()
    assert not can_race(pipe)
    flux, _ = build("flux")
    assert can_race(flux)
    flux.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    assert not can_race(flux)


def test_a_pipeline_without_a_denoiser_is_refused():
    with pytest.raises(InputError, match="neither a unet nor a transformer"):
        find_denoiser(object())


# --- what people load into their pipelines ---------------------------------------------------------------------------


def ip_adapter(unet, num_tokens: int = 4, width: int = 16) -> dict:
    """Random IP-Adapter weights for a UNet, in the published format."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    cross, layers, key = unet.config.cross_attention_dim, {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            module = unet.get_submodule(name.removesuffix(".processor"))
            made = IPAdapterAttnProcessor2_0(module.to_q.out_features, cross).state_dict()
            layers |= {f"{key}.{part.replace('.0.', '.')}": tensor for part, tensor in made.items()}
            key += 2
    projection = torch.nn.Linear(width, num_tokens * cross)
    norm = torch.nn.LayerNorm(cross)
    image = {f"proj.{k}": v for k, v in projection.state_dict().items()}
    image |= {f"norm.{k}": v for k, v in norm.state_dict().items()}
    return {"image_proj": image, "ip_adapter": layers}


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_ip_adapter_pictures_go_with_their_rows(guidance_scale):
    pipe, arguments = build("sd")
    # Two adapters and two candidates: a list as long as the batch that does not hold a row each
    pipe.unet._load_ip_adapter_weights([ip_adapter(pipe.unet), ip_adapter(pipe.unet)])
    halves = 2 if guidance_scale > 1 else 1
    pictures = [torch.randn(halves, 1, 16), torch.randn(halves, 1, 16)]
    arguments = {**arguments, "num_inference_steps": STEPS, "output_type": "pt", "guidance_scale": guidance_scale}
    rows = plain(pipe, {**arguments, "ip_adapter_image_embeds": pictures}, num=2)
    other = plain(pipe, {**arguments, "ip_adapter_image_embeds": [picture + 1 for picture in pictures]}, num=2)
    assert (rows - other).abs().max() > 100 * TOLERANCE
    arguments["ip_adapter_image_embeds"] = pictures
    assert_equal_rows(denoise(pipe, arguments, generators(2), following({2: [1]})), rows)


def test_lora_scale_reaches_the_denoiser():
    from peft import LoraConfig

    pipe, arguments = build("sd")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    arguments = {**arguments, "num_inference_steps": STEPS, "output_type": "pt"}
    scaled = {**arguments, "cross_attention_kwargs": {"scale": 0.5}}
    rows = plain(pipe, scaled)
    assert (rows - plain(pipe, arguments)).abs().max() > 100 * TOLERANCE
    assert_equal_rows(denoise(pipe, scaled, generators(), following({1: [0, 3]})), rows)


def test_skipped_layers_are_no_rows():
    pipe, arguments = build("sd3")
    arguments = {**arguments, "num_inference_steps": STEPS, "output_type": "pt", "skip_guidance_layers": [0, 1]}
    arguments |= {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    assert_equal_rows(denoise(pipe, arguments, generators(2), following({1: [1]})), plain(pipe, arguments, num=2))


def test_group_offload():
    pipe, arguments = build("sd")
    arguments = {**arguments, "num_inference_steps": STEPS, "output_type": "pt"}
    rows = plain(pipe, arguments)
    pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    previews = []

    def on_step(moment: Moment) -> list[int]:
        previews.append(moment.preview())
        return [2, 3]

    assert_equal_rows(denoise(pipe, arguments, generators(), on_step), rows)
    assert [len(preview) for preview in previews] == [4, 2, 2, 2]
    assert (previews[-1] - rows[2:]).abs().max() <= TOLERANCE


def with_safety_checker(pipe) -> None:
    """Gives a Stable Diffusion pipeline a safety checker of random weights."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPVisionConfig

    vision = CLIPVisionConfig(
        image_size=32, patch_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision.to_dict(), projection_dim=16))
    size = {"height": 32, "width": 32}
    extractor = CLIPImageProcessorPil(size=size, crop_size=size)
    pipe.register_modules(safety_checker=checker, feature_extractor=extractor)


def test_the_safety_checkers_word_goes_with_its_picture():
    pipe, arguments = build("sd")
    with_safety_checker(pipe)
    arguments = {**arguments, "num_inference_steps": STEPS, "output_type": "np"}
    output = pipe(**arguments, generator=generators(), num_images_per_prompt=N)
    denoised = denoise(pipe, arguments, generators(), following({2: [1, 3]}))
    assert denoised.nsfw_content_detected == [output.nsfw_content_detected[row] for row in (1, 3)]
    assert_equal_rows(denoised, output.images)


# --- previews --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("inpaint") or "9" in case])
def test_the_last_preview_is_the_picture(case):
    family, options, call, _ = CASES[case]
    pipe, arguments = build(family, **options)
    arguments = {**arguments, **call, "num_inference_steps": STEPS, "output_type": "pt"}
    previews = {}

    def on_step(moment: Moment) -> Collection[int]:
        previews[moment.step] = moment.preview()
        assert previews[moment.step] is moment.preview()
        return moment.rows[1:] if moment.step == 2 else moment.rows

    denoised = denoise(pipe, arguments, generators(), on_step)
    assert (previews[max(previews)] - denoised.images).abs().max() <= TOLERANCE
    assert [len(previews[step]) for step in sorted(previews)] == [N, N, N - 1, N - 1][: len(previews)]
    early = (previews[1][1:] - denoised.images).abs().mean()
    assert early > (previews[3][-3:] - denoised.images).abs().mean() or len(previews) == 3


def test_flux2_previews_take_the_shape_of_the_picture_it_edits():
    pipe, arguments = build("flux2")
    del arguments["height"], arguments["width"]
    arguments = {**arguments, "image": checkered(0).resize((64, 96)), "num_inference_steps": 2, "output_type": "pt"}
    previews = []
    denoised = denoise(pipe, arguments, generators(2), lambda moment: previews.append(moment.preview()))
    assert denoised.images.shape == (2, 3, 96, 64)
    assert (previews[-1] - denoised.images).abs().max() <= TOLERANCE


def test_flux2_latents_take_the_shape_of_the_picture_it_edits():
    pipe, arguments = build("flux2")
    del arguments["height"], arguments["width"]
    arguments = {**arguments, "image": checkered(0).resize((64, 96)), "num_inference_steps": 2}
    pixels = denoise(pipe, {**arguments, "output_type": "pt"}, generators(2)).images
    latents = denoise(pipe, {**arguments, "output_type": "latent"}, generators(2))
    assert latents.size == (96, 64)
    torch.testing.assert_close(as_pixels(latents.images, "latent", pipe, *latents.size), pixels, atol=1e-5, rtol=0)
    with pytest.raises(InputError, match=r"^height, width: 96 latent tokens are no picture of"):
        as_pixels(latents.images, "latent", pipe)


def model_output(x0, noise, x, sigma, predicts: str) -> torch.Tensor:
    """What a perfect model says of x; `sigma` is the noise over the signal, or the time of a flow."""
    if predicts == "flow_prediction":
        return noise - x0
    if predicts == "v_prediction":
        return (noise - sigma * x0) / (1 + sigma**2).sqrt()
    if predicts == "edm":  # Karras et al. 2022, table 1, sigma_data = 0.5
        return (x0 - x * 0.25 / (sigma**2 + 0.25)) * (sigma**2 + 0.25).sqrt() / (0.5 * sigma)
    return {"epsilon": noise, "sample": x0}[predicts]


def parametrisations() -> list[tuple[str, str]]:
    """Every scheduler with each thing that its model may predict."""
    pairs = [("DDIMScheduler", "sample"), ("EulerDiscreteScheduler", "sample"), ("UniPCMultistepScheduler", "sample")]
    for name in TESTED_SCHEDULERS:
        if name.startswith("FlowMatch"):
            pairs.append((name, "flow_prediction"))
        elif name.startswith("EDM"):
            pairs.append((name, "edm"))
        else:
            pairs += [(name, "epsilon"), (name, "v_prediction")]
        if name.startswith(("DEIS", "DPMSolverM", "DPMSolverSingle", "UniPC")):  # SASolver noises a flow as a diffusion
            pairs.append((name, "flow_prediction"))
    return pairs


@pytest.mark.parametrize(("name", "predicts"), parametrisations())
def test_the_clean_prediction_undoes_the_noising(name, predicts):
    """The scheduler's own forward process makes x of x0 and noise; a perfect model's output must lead back to x0."""
    import diffusers

    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    config = {} if name.startswith(("FlowMatch", "EDM")) else {"prediction_type": predicts}
    if config.get("prediction_type") == "flow_prediction":
        config["use_flow_sigmas"] = True
    if name == "PNDMScheduler":
        config["skip_prk_steps"] = True
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(5)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    x0, noise = torch.randn(2, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).unbind()
    checked = 0
    for timestep in scheduler.timesteps:
        if hasattr(scheduler, "scale_noise"):
            x = scheduler.scale_noise(x0, timestep[None], noise)
        else:
            x = scheduler.add_noise(x0, noise, timestep[None])
        sigma = torch.linalg.lstsq(torch.stack([x0.flatten(), noise.flatten()], 1), x.flatten()[:, None]).solution
        output = model_output(x0, noise, x, sigma[1] / sigma[0], predicts)
        first_order = getattr(scheduler, "state_in_first_order", True)
        scheduler.step(output, timestep, x)
        index = None if getattr(scheduler, "step_index", None) is None else scheduler.step_index - 1
        if first_order:
            torch.testing.assert_close(predict_clean(scheduler, output, timestep, x, index), x0, atol=2e-4, rtol=0)
            checked += 1
    assert checked >= 5


@pytest.mark.parametrize("name", ["DDIM", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete"])
def test_previews_show_what_the_scheduler_itself_predicts(name):
    pipe, arguments = with_scheduler("sd_v_prediction", f"{name}Scheduler")
    step, predicted = pipe.scheduler.step, []

    @functools.wraps(step)
    def keeping(*args, return_dict, **kwargs):
        first_order = getattr(pipe.scheduler, "state_in_first_order", True)
        output = step(*args, **kwargs)
        # a second-order scheduler's second half has no say of its own
        predicted.append(output.pred_original_sample if first_order else predicted[-1])
        return (output.prev_sample,)

    pipe.scheduler.step = keeping
    previews = []
    arguments = {**arguments, "num_inference_steps": 3}
    denoise(pipe, arguments, generators(2), lambda moment: previews.append(moment.preview()))
    assert len(previews) == len(predicted) >= 3
    for preview, latents in zip(previews, predicted):
        torch.testing.assert_close(preview, decode_latents(pipe, latents), atol=1e-4, rtol=0)


def test_a_tiny_autoencoder_may_decode_the_previews():
    pipe, arguments = build("sd")
    previews, tiny = [], tiny_vae()
    arguments = {**arguments, "num_inference_steps": 2, "output_type": "latent"}
    on_step = following({1: [1, 2]})
    denoised = denoise(
        pipe, arguments, generators(), lambda moment: previews.append(moment.preview()) or on_step(moment), None, tiny
    )
    with torch.no_grad():
        expected = (tiny.decode(denoised.images).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(previews[-1], expected)


def test_previews_are_kept_where_asked_for():
    pipe, arguments = build("sd")
    refused = []

    def on_step(moment: Moment) -> None:
        if moment.step in steps_at([0.3, 1.0], moment.num_steps):
            assert moment.preview().shape == (2, 3, 32, 32)
        else:
            with pytest.raises(InputError, match=f"preview_at does not name step {moment.step} of 4"):
                moment.preview()
            refused.append(moment.step)

    denoise(pipe, {**arguments, "num_inference_steps": 4}, generators(2), on_step, preview_at=[0.3, 1.0])
    assert refused == [1, 3]


def test_steps_at_fractions():
    assert steps_at([0.3, 0.5, 1.0], 10) == {3, 5, 10}
    assert steps_at([0.3], 4) == {2}
    assert steps_at([1e-6], 50) == {1}
    for step in range(1, 101):
        assert steps_at([step / 100], 100) == {step}
    with pytest.raises(InputError, match="preview_at holds 0"):
        steps_at([0], 10)


# --- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd", "sdxl", "flux", "flux2", "qwen"])
def test_pixels_of_every_output_type_agree(family):
    pipe, arguments = build(family)
    arguments = {**arguments, "num_inference_steps": 2}
    size = {name: arguments.get(name) for name in ("height", "width")}
    pixels = {
        output_type: as_pixels(plain(pipe, {**arguments, "output_type": output_type}, 2), output_type, pipe, **size)
        for output_type in ("pt", "np", "pil", "latent")
    }
    assert pixels["pt"].shape[:2] == (2, 3) and pixels["pt"].dtype == torch.float32
    for output_type, tolerance in {"np": 1e-6, "pil": 0.51 / 255, "latent": TOLERANCE}.items():
        torch.testing.assert_close(pixels[output_type], pixels["pt"], atol=tolerance, rtol=0)
    with pytest.raises(InputError, match="output_type must be"):
        as_pixels([], "jpeg", pipe)


def test_sdxl_decodes_in_float32_and_gives_its_vae_back():
    pipe, _ = build("sdxl")
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = decode_latents(pipe, latents)
    pipe.vae.half()
    assert (decode_latents(pipe, latents) - expected).abs().max() < 0.01
    assert pipe.vae.dtype == torch.float16
