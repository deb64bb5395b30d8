"""Identity as reward in a LoRA run: true gradients, only where they belong; exact resume; the guards."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from test_training_lora_families import NAMES, build, folders  # noqa: F401 - a fixture

from nearid_personalize import IdentityScorer, InputError
from nearid_personalize.miniworld import example_references, weights_dir
from nearid_personalize.training.lora import loop as lora
from nearid_personalize.training.lora.loop import WEIGHTS_NAME, LoraOptions, LoraRun, read_metadata, train_lora
from nearid_personalize.training.lora.noising import sample, trajectory_of
from nearid_personalize.training.lora.options import flat
from nearid_personalize.training.lora.pictures import read_references
from nearid_personalize.training.lora.reward import RewardGuard, enroll_reward

ROOT = Path(__file__).parent.parent


@pytest.fixture
def options(tiny_pipeline_dir: Path, tiny_nearid_dir: Path, photo_dir: Path, tmp_path: Path) -> LoraOptions:
    return LoraOptions.of(
        base_model=str(tiny_pipeline_dir),
        references=photo_dir,
        output=tmp_path / "lora",
        rank=4,
        text_rank=2,
        steps=4,
        batch_size=2,
        resolution=32,
        learning_rate=0.01,
        precision="fp32",
        reward_weight=1.0,
        reward_model=str(tiny_nearid_dir),
        reward_warmup=0.25,
        reward_sampling_steps=3,
    )


def start(options: LoraOptions) -> LoraRun:
    references = read_references(options.data)
    return LoraRun.open(options, Accelerator(), references, enroll_reward(options, references, torch.device("cpu")))


# --- sampling --------------------------------------------------------------------------------------------------------


def ddim(prediction_type: str) -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False, prediction_type=prediction_type, timestep_spacing="trailing")


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_sampling_is_the_schedulers_own(kind):
    """Against diffusers' DDIM and Euler flow schedulers, with an answer that depends on latents and time."""

    def predict(noisy, timesteps):
        return 0.6 * noisy.roll(1, dims=-1) + timesteps.view(-1, 1, 1, 1) / 3000

    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    if kind == "flow":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 5, 5))
    else:
        scheduler = ddim(kind)
        scheduler.set_timesteps(5)
    expected = noise
    for t in scheduler.timesteps:
        expected = scheduler.step(predict(expected, t.expand(2)), t, expected).prev_sample
    torch.testing.assert_close(sample(predict, noise, trajectory_of(scheduler, 5), 0), expected, rtol=1e-3, atol=1e-4)


def test_only_the_last_steps_are_differentiated():
    path = trajectory_of(ddim("epsilon"), 4)
    noise = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def gradient(steps_with_gradient: int, weight_of_step) -> float:
        weight = torch.tensor(0.1, requires_grad=True)
        steps = iter(range(4))
        answer = sample(lambda x, t: weight_of_step(next(steps), weight) * x.tanh(), noise, path, steps_with_gradient)
        return torch.autograd.grad(answer.square().sum(), weight)[0].item()

    def frozen_before(kept: int):
        return lambda step, weight: weight if step >= 4 - kept else weight.detach()

    found = [gradient(k, lambda step, weight: weight) for k in (1, 2, 3, 4)]
    # Differentiated through all steps, but with the weight constant in the first ones
    assert found == pytest.approx([gradient(4, frozen_before(k)) for k in (1, 2, 3, 4)], rel=1e-4)
    assert len({round(value, 3) for value in found}) == 4


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_the_slope_of_the_reward_in_every_family(name, folders, options):  # noqa: F811
    """Through sampling, guidance, VAE and head: backward equals finite differences along the gradient."""
    options = options.but(
        base_model=str(folders(name)),
        text_rank=None,
        reward_sampling_steps=2,
        reward_steps=2,
        reward_guidance_scale=2.0,
    )
    run = start(options)
    run.add_reward(run.reward, 1)
    slopes = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in run.trained]
    length = torch.cat([slope.flatten() for slope in slopes]).norm()
    assert length > 0
    step = 0.03
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            for parameter, slope in zip(run.trained, slopes):
                parameter += sign * step * slope / length
            values.append(float(sum(run.reward.losses(run.predict, 1))))
    assert values[0] > values[1]
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(length), rel=0.1)


def test_gradient_reaches_the_lora_alone_on_the_packaged_world(options, tmp_path):
    references = tmp_path / "pet"
    references.mkdir()
    photos, category, _ = example_references(0, "val")
    for number, photo in enumerate(photos):
        photo.save(references / f"{number}.png")
    prompt = f"a photo of sks {category}"
    run = start(
        options.but(
            base_model="miniworld",
            reward_model=str(weights_dir("nearid")),
            references=references,
            prompt=prompt,
            resolution=None,
            reward_batch_size=1,
            reward_guidance_scale=3.0,
        )
    )
    run.add_reward(run.reward, 1)
    trained = {id(parameter) for parameter in run.trained}
    pipe = run.family.pipe
    models = (pipe.unet, pipe.text_encoder, pipe.vae, run.reward.scorer.model)
    touched = [p for model in models for p in model.parameters() if p.grad is not None]
    assert touched and all(id(p) in trained for p in touched)
    assert any(p.grad.abs().sum() > 0 for p in pipe.unet.parameters() if p.grad is not None)
    assert any(p.grad.abs().sum() > 0 for p in pipe.text_encoder.parameters() if p.grad is not None)


def test_rewarded_training_raises_the_reward(options):
    """The same noise before and after; the denoising loss weighs little here."""
    options = options.but(
        steps=30,
        learning_rate=0.02,
        reward_weight=100.0,
        reward_warmup=0.0,
        reward_batch_size=4,
        reward_steps=3,
    )
    run = start(options)

    def identity() -> float:
        with torch.no_grad():
            return -float(sum(run.reward.losses(run.predict, 10_000))) / options.reward.reward_weight

    before = identity()
    for step in range(1, 31):
        run.take_step(step)
    assert identity() > before + 0.005


def test_rewarded_steps_alone_use_the_reward(options):
    run = start(options.but(steps=10, reward_warmup=0.5, reward_every=2))
    assert [step for step in range(1, 11) if run.reward.due(step)] == [6, 8, 10]


# --- runs ------------------------------------------------------------------------------------------------------------


def test_weight_zero_is_plain_training(options, tmp_path):
    told = {name: value for name, value in flat(options).items() if not name.startswith("reward")}
    plain = LoraOptions.of(**told).but(dropout=0.3)
    weights = load_file(train_lora(plain) / WEIGHTS_NAME)
    off = options.but(reward_weight=0.0, dropout=0.3, output=tmp_path / "off")
    assert all(torch.equal(weights[name], value) for name, value in load_file(train_lora(off) / WEIGHTS_NAME).items())
    on = options.but(dropout=0.3, output=tmp_path / "on")
    rewarded = load_file(train_lora(on) / WEIGHTS_NAME)
    assert any(not torch.equal(weights[name], value) for name, value in rewarded.items())
    told = {"model": options.reward.reward_model, "weight": 1.0, "ended_after": None}
    assert read_metadata(tmp_path / "on")["reward"] == told
    assert "reward" not in read_metadata(tmp_path / "off")


class Interruption(Exception):
    pass


def falling(snapshot) -> None:
    """Adherence is well until the reward has had two steps."""
    snapshot.guard_reward(adherence=0.3 if snapshot.step < 4 else 0.2, diversity=None)


def test_resumed_equals_uninterrupted(options, tmp_path, monkeypatch):
    options = options.but(steps=8, dropout=0.3, checkpoint_every=1, validate_every=1, reward_guidance_scale=2.0)
    whole = load_file(train_lora(options.but(output=tmp_path / "whole"), falling) / WEIGHTS_NAME)
    take_step, rewarded = LoraRun.take_step, []

    def stop_sometimes(run, step):
        if (step, "stopped") not in rewarded and step in (4, 6):
            rewarded.append((step, "stopped"))
            raise Interruption
        rewarded.append((step, run.reward.due(step)))
        return take_step(run, step)

    monkeypatch.setattr(lora.LoraRun, "take_step", stop_sometimes)
    for resume in (False, True):
        with pytest.raises(Interruption):
            train_lora(options.but(resume=resume), falling)
    resumed = load_file(train_lora(options.but(resume=True), falling) / WEIGHTS_NAME)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    assert [step for step, due in rewarded if due is True] == [3, 4]
    assert read_metadata(options.output)["reward"]["ended_after"] == 4
    assert read_metadata(tmp_path / "whole")["reward"]["ended_after"] == 4


def test_two_processes_share_the_pictures_of_one(options, tmp_path):
    """Two processes of one rewarded picture each are one process of two: the same noise, prompts and mean gradient."""
    options = options.but(text_rank=0, reward_weight=10.0, reward_guidance_scale=2.0)
    one = options.but(output=tmp_path / "one", gradient_accumulation_steps=2, reward_batch_size=2)
    expected = load_file(train_lora(one) / WEIGHTS_NAME)
    chosen = ("base_model", "references", "output", "rank", "text_rank", "steps", "batch_size", "learning_rate")
    chosen += ("precision", "resolution", "reward_weight", "reward_model", "reward_warmup", "reward_sampling_steps")
    chosen += ("reward_guidance_scale",)
    flags = [part for name in chosen for part in (f"--{name.replace('_', '-')}", str(flat(options)[name]))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, str(ROOT / "trainers" / "train_lora.py"), *flags, "--reward-batch-size", "1"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    weights = load_file(options.output / WEIGHTS_NAME)
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4)
    plain = load_file(train_lora(one.but(reward_weight=0.0, output=tmp_path / "plain")) / WEIGHTS_NAME)
    assert any((plain[name] - tensor).abs().max() > 1e-3 for name, tensor in expected.items())


# --- guards ----------------------------------------------------------------------------------------------------------


def test_guard_ends_the_reward_when_a_value_falls():
    guard = RewardGuard(max_drop=0.1, first_step=11)
    assert guard.look(5, adherence=0.5, diversity=0.1) == ""
    assert guard.look(10, adherence=0.3, diversity=0.4) == ""  # the last before the reward counts
    assert guard.look(20, adherence=0.28, diversity=0.5) == ""
    assert guard.look(30, adherence=0.3, diversity=0.35) == (
        "reward ended after step 30: diversity 0.350, 0.400 before the reward"
    )
    assert guard.stopped_at == 30
    assert guard.look(40, adherence=0.0) == ""
    assert guard.stopped_at == 30


def test_guard_knows_negative_and_unmeasured_values():
    guard = RewardGuard(max_drop=0.1, first_step=2)
    guard.look(1, adherence=-0.2, diversity=None)
    assert guard.look(2, adherence=-0.21, diversity=0.0) == ""
    assert guard.look(3, adherence=-0.23) != ""


class Judge:
    """A validation with a head of its own."""

    def __init__(self, scorer: IdentityScorer) -> None:
        self.scorer = scorer

    def __call__(self, snapshot) -> bool:
        return True


def test_the_head_that_rewards_may_not_validate(options):
    options = options.but(validate_every=1)
    scorer = IdentityScorer.from_pretrained(options.reward.reward_model)
    with pytest.raises(InputError, match=r"its head .* is the --validation-model's"):
        train_lora(options, Judge(scorer))
    torch.manual_seed(1)
    scorer.model.reset_head()
    assert (train_lora(options, Judge(scorer)) / WEIGHTS_NAME).exists()


def test_refusals(options, monkeypatch):
    with pytest.raises(InputError, match="needs a --reward-model"):
        options.but(reward_model="")
    with pytest.raises(InputError, match="--reward-prompts must be a text with the word 'sks'"):
        options.but(reward_prompts=("a photo of a dog",))
    with pytest.raises(InputError, match="--reward-steps must be at most --reward-sampling-steps 3"):
        options.but(reward_steps=4)
    with pytest.raises(InputError, match="--validate-every 2: the reward begins at step 2"):
        train_lora(options.but(validate_every=2), falling)
    monkeypatch.setattr("nearid_personalize.training.lora.reward.TESTED_FAMILIES", frozenset())
    with pytest.raises(InputError, match="StableDiffusionPipeline is not tested with a reward"):
        start(options)
