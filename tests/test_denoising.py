"""Candidates stopped half-way: those that go on come out as in a plain call, and the pipeline is left as it was."""

import random
from collections.abc import Callable, Collection

import numpy as np
import pytest
import torch
from conftest import checkered
from tiny_pipelines import build, embeddings, tiny_vae

from nearid_personalize.denoising import (
    TESTED_SCHEDULERS,
    Denoised,
    Moment,
    as_pixels,
    can_race,
    decode_latents,
    denoise,
    find_denoiser,
    predict_clean,
    steps_at,
)
from nearid_personalize.errors import InputError

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

KARRAS = [
    name for name in TESTED_SCHEDULERS if "FlowMatch" not in name and name != "DPMSolverSDEScheduler"
]  # DPMSolverSDE needs torchsde


def generators(num: int = N) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(num)]


def plain(pipe, arguments, num: int = N):
    """The rows of the plain pipeline: one call for all of them."""
    arguments = dict(arguments)
    if type(pipe).__name__ == "StableDiffusionInpaintPipeline":
        arguments["image"] = [arguments["image"]] * num
    return pipe(**arguments, generator=generators(num), num_images_per_prompt=num).images


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
    assert len(denoised.images) == len(denoised.rows)
    assert (torch.as_tensor(denoised.images) - torch.as_tensor(rows)[list(denoised.rows)]).abs().max() <= TOLERANCE


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
        seen = []
        find_denoiser(pipe).register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(len(args[0] if args else kwargs["hidden_states"])),
            with_kwargs=True,
        )
        denoised = denoise(pipe, arguments, generators(), following(schedule))
        find_denoiser(pipe)._forward_pre_hooks.clear()
        find_denoiser(pipe)._forward_pre_hooks_with_kwargs.clear()

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


@pytest.mark.parametrize("name", KARRAS)
@pytest.mark.parametrize("family", ["sd", "sd_v_prediction", "sdxl", "sd_inpaint"])
def test_any_scheduler(family, name):
    import diffusers

    pipe, arguments = build(family)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    arguments = {**arguments, "guidance_scale": 2.0, "num_inference_steps": 6, "output_type": "latent"}
    check_scheduler(pipe, arguments, f"{family} {name}")


FLOWS = {
    "FlowMatchHeunDiscreteScheduler": {},
    "FlowMatchLCMScheduler": {},
    "UniPCMultistepScheduler": {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    "DPMSolverMultistepScheduler": {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
}


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("family", ["sd3", "flux2"])
def test_any_flow_scheduler(family, name):
    import diffusers

    if family == "flux2" and name == "FlowMatchHeunDiscreteScheduler":
        pytest.skip("FLUX pipelines pass sigmas, which this scheduler does not take")
    pipe, arguments = build(family)
    pipe.scheduler = getattr(diffusers, name)(**FLOWS[name])
    check_scheduler(pipe, {**arguments, "num_inference_steps": 6, "output_type": "latent"}, f"{family} {name}")


def check_scheduler(pipe, arguments, seed: str) -> None:
    """A shrinking run gives the plain rows, and neither it nor one broken off changes the next plain call."""
    assert can_race(pipe)
    rows = plain(pipe, arguments)
    left, state = traces(pipe), vars(pipe.scheduler).keys()
    denoised = denoise(pipe, arguments, generators(), following(random_schedule(seed, pipe.num_timesteps)))
    assert len(denoised.rows) < N
    assert_equal_rows(denoised, rows)
    assert traces(pipe) == left and vars(pipe.scheduler).keys() == state

    def interrupted(moment: Moment) -> None:
        if moment.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        denoise(pipe, arguments, generators(), interrupted)
    assert traces(pipe) == left and vars(pipe.scheduler).keys() == state
    assert torch.equal(plain(pipe, arguments), rows)
