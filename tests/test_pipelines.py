"""The diffusers custom pipeline and the modular blocks: the guard's own pictures, the base's own ways."""

import dataclasses
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import checkered
from diffusers import DiffusionPipeline, FluxAutoBlocks, ModularPipelineBlocks
from packaging.version import Version
from test_examples import save_lora
from tiny_pipelines import build

from nearid_personalize import IdentityGuard, IdentityScorer, InputError
from nearid_personalize.floors.adherence import AdherenceFloor, TextImageEncoder
from nearid_personalize.guard.policy import FixedSchedule, StoppingPolicy
from nearid_personalize.guard.previews import decode_latents

PIPELINES = str(Path(__file__).parent.parent / "pipelines")
HALVING = FixedSchedule({0.5: 0.5})
N, STEPS = 4, 4
FAMILIES = {"flux": "flux", "sd3": "stable-diffusion-3", "sdxl": "stable-diffusion-xl"}
GUIDANCE = {"flux": 3.5, "sd3": 7.0, "sdxl": 7.5}
OLD_DIFFUSERS = Version(version("diffusers")) < Version("0.42.0")


@pytest.fixture(autouse=True)
def code_cache(tmp_path, monkeypatch):
    """diffusers copies code that it is told to trust into a cache, and puts that on the path: here, the test's."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture(scope="module")
def scorer(tiny_nearid_dir) -> IdentityScorer:
    return IdentityScorer.from_pretrained(tiny_nearid_dir)


@pytest.fixture(scope="module")
def subject(scorer):
    """One that every picture passes for."""
    return dataclasses.replace(scorer.enroll([checkered(0), checkered(1)]), threshold=-1.0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saves the pipeline of a family once and returns its folder."""
    folder = tmp_path_factory.mktemp("bases")

    def saved(family: str) -> Path:
        if not (folder / family).exists():
            build(family)[0].save_pretrained(folder / family)
        return folder / family

    return saved


def load(base: Path, scorer, **kwargs):
    kwargs = {"custom_pipeline": PIPELINES, "trust_remote_code": True, "scorer": scorer, **kwargs}
    pipe = DiffusionPipeline.from_pretrained(base, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def largest_difference(image, other) -> int:
    """Of 8-bit pixels."""
    return np.abs(np.asarray(image).astype(int) - np.asarray(other).astype(int)).max()


# --- the custom pipeline ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux", "sd_img2img"])
def test_the_custom_pipeline_gives_what_the_guard_gives(family, saved, scorer, subject):
    plain, arguments = build(family)
    call = {**arguments, "num_images": 2, "num_candidates": N, "seed": 3, "num_inference_steps": STEPS}
    expected = IdentityGuard(plain, scorer, subject, policy=HALVING)(**call)

    pipe = load(saved(family), scorer, subject=subject, guard_options={"policy": HALVING})
    assert isinstance(pipe, type(plain))
    result = pipe(**call)
    assert [(c.seed, c.status, c.stopped_at_step) for c in result.candidates] == [
        (c.seed, c.status, c.stopped_at_step) for c in expected.candidates
    ]
    assert [c.score for c in result.candidates] == pytest.approx([c.score for c in expected.candidates], abs=1e-3)
    assert len(result.images) == 2
    for image, other in zip(result.images, expected.images, strict=True):
        assert largest_difference(image, other) <= 1
    assert result.cost.denoiser_rows == expected.cost.denoiser_rows < result.cost.denoiser_rows_best_of_n


def test_the_subject_is_given_with_the_pipeline_or_with_the_call(saved, scorer, subject, photo_dir):
    call = {"num_images": 1, "num_candidates": 1, "num_inference_steps": 1}
    pipe = load(saved("sd"), scorer)
    with pytest.raises(InputError, match=r"^subject is not known"):
        pipe("sks dog", **call)
    with pytest.raises(InputError, match=r"^references cannot be given beside subject"):
        pipe("sks dog", subject=subject, references=photo_dir, **call)
    enrolled = scorer.enroll(photo_dir)
    scores = [pipe("sks dog", subject=enrolled, **call).best.score]
    scores += [pipe("sks dog", references=photo_dir, **call).best.score]
    scores += [load(saved("sd"), scorer, references=photo_dir)("sks dog", **call).best.score]
    pipe.subject = enrolled
    scores += [pipe("sks dog", **call).best.score]
    assert scores == [scores[0]] * 4
    assert pipe("sks dog", subject=subject, **call).best.score != scores[0]


def test_the_scorer_may_be_named(saved, tiny_nearid_dir, photo_dir):
    pipe = load(saved("sd"), str(tiny_nearid_dir), references=photo_dir)
    assert pipe("sks dog", num_images=1, num_inference_steps=1).candidates
    with pytest.raises(InputError, match=r"^scorer must be given"):
        load(saved("sd"), None)


def test_a_scorer_given_by_name_works_where_and_as_the_pipeline_does(saved, tiny_nearid_dir, scorer, photo_dir):
    """With its floors. One that is given as a scorer stays as it is."""
    text_image = TextImageEncoder.from_pretrained("miniworld")
    floor = AdherenceFloor(text_image, floor=-1.0)
    half = {"dtype": torch.bfloat16, "references": photo_dir, "guard_options": {"floors": [floor]}}
    call = {"num_images": 1, "num_candidates": 2, "num_inference_steps": 1}
    pipe = load(saved("sd"), str(tiny_nearid_dir), **half)
    assert pipe("sks dog", **call).candidates
    assert pipe.scorer.model.backbone.dtype == text_image.model.dtype == torch.bfloat16
    assert next(pipe.scorer.model.head.parameters()).dtype == torch.float32
    pipe.to(torch.float32)
    pipe("sks dog", **call)
    assert pipe.scorer.model.backbone.dtype == text_image.model.dtype == torch.float32

    pipe = load(saved("sd"), scorer, **half)
    assert pipe("sks dog", **call).candidates
    assert pipe.scorer is scorer and scorer.model.backbone.dtype == text_image.model.dtype == torch.float32


def test_whatever_is_done_to_the_pipeline_holds_under_its_guard(saved, scorer, subject, tmp_path):
    """Another scheduler, a LoRA, parts of one's own, offloading, a callback: those of the base."""
    from diffusers import EulerDiscreteScheduler

    plain, _ = build("sd")
    with torch.no_grad():
        plain.unet.conv_out.weight.mul_(2.0)
    pipe = load(saved("sd"), scorer, subject=subject, unet=plain.unet, safety_checker=None)
    assert pipe.unet is plain.unet
    pipe.scheduler = plain.scheduler = EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1)
    save_lora(build("sd")[0], tmp_path / "lora")
    pipe.load_lora_weights(tmp_path / "lora")
    assert pipe.get_list_adapters() == {"unet": ["default_0"]}
    pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    seen = []

    def note(pipe, step, timestep, tensors):
        seen.append(type(pipe.scheduler))
        pipe._interrupt = step == 1
        return {}

    call = {"num_inference_steps": 3, "callback_on_step_end": note, "cross_attention_kwargs": {"scale": 0.5}}
    (image,) = pipe("sks dog", num_images=1, num_candidates=1, seed=5, **call).images
    expected = plain("sks dog", generator=torch.Generator().manual_seed(5), **call).images[0]
    assert largest_difference(image, expected) <= 1 and seen == [EulerDiscreteScheduler] * 4

    pipe.save_pretrained(tmp_path / "again")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "again")) is type(plain)


def test_a_batch_size_that_fits_is_kept(saved, scorer, subject):
    def fails_above_two(module, args, kwargs):
        if len(args[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    pipe = load(saved("sd"), scorer, subject=subject)
    pipe.unet.register_forward_pre_hook(fails_above_two, with_kwargs=True)
    call = {"num_images": 1, "num_candidates": 4, "num_inference_steps": 1, "guidance_scale": 1.0}
    assert len(pipe("sks dog", **call).candidates) == 4
    assert pipe.guard_options["max_batch_size"] == 2


def test_the_file_alone_works_and_nothing_runs_untrusted(saved, scorer, subject):
    pipe = load(saved("sd"), scorer, subject=subject, custom_pipeline=f"{PIPELINES}/pipeline.py", dtype=torch.bfloat16)
    assert pipe.unet.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(saved("sd"), scorer, trust_remote_code=False)


def test_bases_it_does_not_know_are_refused(saved, scorer):
    load(saved("sd"), scorer)
    guarded = sys.modules["diffusers_modules.local.pipeline"].IdentityGuardPipeline
    with pytest.raises(InputError, match="base StableDiffusionControlNetPipeline has controlnet, unknown here"):
        guarded(base="StableDiffusionControlNetPipeline", scorer=scorer)
    with pytest.raises(InputError, match="base 'MyPipeline' is no pipeline of diffusers"):
        guarded(base="MyPipeline", scorer=scorer)


# --- modular blocks --------------------------------------------------------------------------------------------------


def modular(blocks: ModularPipelineBlocks, base: Path):
    pipe = blocks.init_pipeline(str(base))
    index = DiffusionPipeline.load_config(base)
    pipe.load_components([name for name in pipe.component_names if (index.get(name) or [None])[0]])
    for block in (pipe.blocks, *pipe.blocks.sub_blocks.values()):
        block.set_progress_bar_config(disable=True) if hasattr(block, "set_progress_bar_config") else None
    return pipe


def identity_blocks(family: str = "flux", **kwargs) -> ModularPipelineBlocks:
    return ModularPipelineBlocks.from_pretrained(PIPELINES, trust_remote_code=True, family=FAMILIES[family], **kwargs)


def modular_call(family: str, **kwargs) -> dict:
    _, arguments = build(family)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(N)]
    call = {"num_images_per_prompt": N, "num_inference_steps": STEPS, "generator": seeds, "output_type": "pt"}
    return {"height": 32, "width": 32, **arguments, **call, **kwargs}


@pytest.mark.parametrize("family", FAMILIES)
def test_rejected_in_the_loop_and_re_ranked_at_the_end(family, saved, scorer, subject):
    import diffusers

    automatic = {"flux": "FluxAutoBlocks", "sd3": "StableDiffusion3AutoBlocks", "sdxl": "StableDiffusionXLAutoBlocks"}
    rows = modular(getattr(diffusers, automatic[family])(), saved(family))(**modular_call(family)).images
    pipe = modular(identity_blocks(family), saved(family))
    seen = []
    denoiser = pipe.unet if family == "sdxl" else pipe.transformer
    denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(args[0] if args else kwargs["hidden_states"])), with_kwargs=True
    )
    guard = {"scorer": scorer, "subject": subject, "num_images": 2, "policy": FixedSchedule({0.25: 0.75, 0.5: 0.5})}
    state = pipe(**modular_call(family, **guard))

    assert sorted(state.stopped_at.values()) == [1, 2] and len(state.rows) == 2
    assert state.profile.step_fractions == (0.25, 0.5) and state.profile.freedom == (1.0, 0.0)
    assert {*state.stopped_at, *state.rows} == {0, 1, 2, 3}
    assert sorted(set(seen), reverse=True) == [4, 3, 2] and seen == sorted(seen, reverse=True)
    scores = scorer.score(rows, subject)
    best = sorted(state.rows, key=lambda row: -scores[row])
    assert [verdict.index for verdict in state.verdicts[:2]] == best
    assert {v.index: v.reason for v in state.verdicts[2:]} == {
        row: f"stopped after step {step}" for row, step in state.stopped_at.items()
    }
    assert (state.images - rows[best]).abs().max() <= 1e-5


def test_whoever_goes_on_keeps_its_own_noise(saved, scorer, subject):
    """A scheduler that draws noise at every step draws it by the generator of each row that is left."""
    from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionXLAutoBlocks

    plain = modular(StableDiffusionXLAutoBlocks(), saved("sdxl"))
    pipe = modular(identity_blocks("sdxl"), saved("sdxl"))
    for each in (plain, pipe):
        each.update_components(scheduler=EulerAncestralDiscreteScheduler.from_config(each.scheduler.config))
    rows = plain(**modular_call("sdxl")).images
    state = pipe(**modular_call("sdxl", scorer=scorer, subject=subject, num_images=4, policy=KeepsTheLast()))
    assert state.rows == [2, 3]
    best = [verdict.index for verdict in state.verdicts[:2]]
    assert (state.images - rows[best]).abs().max() <= 1e-5


class KeepsTheLast(StoppingPolicy):
    """A policy that stops the first half of the batch."""

    step_fractions = (0.5,)

    def decide(self, step_fraction, preview_scores, num_images):
        return torch.arange(len(preview_scores)) >= len(preview_scores) // 2


def test_a_modular_preview_that_is_no_picture_stops_nobody(saved, scorer, subject, monkeypatch):
    pipe = modular(identity_blocks(), saved("flux"))
    decode = type(pipe.vae).decode

    def overflowing(vae, latents, **kwargs):
        decoded = decode(vae, latents, **kwargs)
        if len(latents) == N:
            decoded[0][:2] = float("nan")
        return decoded

    monkeypatch.setattr(type(pipe.vae), "decode", overflowing)
    state = pipe(
        **modular_call("flux", scorer=scorer, subject=subject, num_images=1, policy=FixedSchedule({0.5: 0.25}))
    )
    assert set(state.rows) > {0, 1} and len(state.rows) == 3


def test_modular_sdxl_previews_are_decoded_in_float32(saved):
    pipe = modular(identity_blocks("sdxl"), saved("sdxl"))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected, seen = decode_latents(pipe, latents), []
    pipe.vae.half().decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    assert (decode_latents(pipe, latents) - expected).abs().max() < 0.01
    assert seen == [torch.float32] and pipe.vae.dtype == torch.float16


@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_the_blocks_stop_whom_the_guard_stops(family, saved, scorer, subject):
    plain, arguments = build(family)
    call = {"num_images": 1, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE[family]}
    result = IdentityGuard(plain, scorer, subject, policy=HALVING)(**arguments, num_candidates=N, **call)
    guard = {"scorer": scorer, "subject": subject, "num_images": 1, "policy": HALVING, "output_type": "pil"}
    state = modular(identity_blocks(family), saved(family))(**modular_call(family, **guard))
    assert state.stopped_at == {c.seed: c.stopped_at_step for c in result.candidates if c.status == "stopped"}
    assert largest_difference(state.images[0], result.images[0]) <= 1


# Before 0.42 diffusers' own last block looks for a function that modular pipelines do not have.
LATENT = pytest.param("latent", marks=pytest.mark.skipif(OLD_DIFFUSERS, reason="needs diffusers 0.42"))


@pytest.mark.parametrize("output_type", ["pil", "np", LATENT])
def test_modular_images_come_in_the_output_type_asked_for(output_type, saved, scorer, subject):
    pipe = modular(identity_blocks(), saved("flux"))
    guard = {"scorer": scorer, "subject": subject, "num_images": 2, "policy": HALVING}
    as_tensors = pipe(**modular_call("flux", **guard))
    state = pipe(**modular_call("flux", **{**guard, "output_type": output_type}))
    kind, shape = {"pil": (list, (2,)), "np": (np.ndarray, (2, 32, 16, 3)), "latent": (torch.Tensor, (2, 4, 8, 4))}[
        output_type
    ]
    assert isinstance(state.images, kind) and np.shape(state.images)[: len(shape)] == shape
    for verdict, other in zip(state.verdicts[:2], as_tensors.verdicts[:2], strict=True):
        assert verdict.score == pytest.approx(other.score, abs=1e-3)


def test_nobody_accepted_is_no_picture(saved, scorer, subject):
    pipe = modular(identity_blocks(), saved("flux"))
    strict = dataclasses.replace(subject, threshold=1.1)
    state = pipe(**modular_call("flux", scorer=scorer, subject=strict))
    assert len(state.images) == 0 and "below threshold 1.100" in state.verdicts[0].reason


def test_diffusers_own_blocks_stay_as_they_are():
    identity_blocks()
    loop = FluxAutoBlocks().sub_blocks["denoise"].sub_blocks["denoise"]
    assert list(loop.sub_blocks) == ["denoiser", "after_denoiser"]


class Nobody(StoppingPolicy):
    def decide(self, step_fraction, preview_scores, num_images):
        return torch.zeros(len(preview_scores), dtype=torch.bool)


def test_what_the_blocks_cannot_do_is_refused_by_name(saved, scorer, subject):
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    guard = {"scorer": scorer, "subject": subject}
    pipe = modular(identity_blocks(), saved("flux"))
    with pytest.raises(InputError, match=r"^policy stopped every candidate"):
        pipe(**modular_call("flux", **guard, policy=Nobody()))
    with pytest.raises(InputError, match=r"^prompt must be one text, got 2"):
        pipe(**modular_call("flux", **guard, prompt=["sks dog", "a cat"], num_images_per_prompt=2))
    pipe.scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    with pytest.raises(InputError, match=r"^scheduler UniPCMultistepScheduler cannot lose rows here"):
        pipe(**modular_call("flux", **guard))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(InputError, match=r"^scheduler FlowMatchEulerDiscreteScheduler draws noise by no seed"):
        pipe(**modular_call("flux", **guard))
    with pytest.raises(InputError, match=r"^family 'wan'; one of flux, "):
        ModularPipelineBlocks.from_pretrained(PIPELINES, trust_remote_code=True, family="wan")
