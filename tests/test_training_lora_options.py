"""Options of the optimizer, its schedule and the batches: each does what it says, and is refused where it cannot."""

import math
from pathlib import Path

import pytest
import torch
import tyro
from safetensors.torch import load_file

from nearid_personalize.errors import InputError
from nearid_personalize.training.lora.adapters import make_optimizer, make_schedule
from nearid_personalize.training.lora.loop import WEIGHTS_NAME, train_lora
from nearid_personalize.training.lora.noising import flow_noising, noising_of
from nearid_personalize.training.lora.options import GROUPS, BaseSource, LoraOptions, Publishing, flat
from nearid_personalize.training.lora.pictures import NO_CAPTION, Sample, TrainingSet, make_batch

OPTIONS = LoraOptions.of(base_model="", references=Path(), output=Path(), batch_size=4)


def with_options(**more: object) -> LoraOptions:
    return OPTIONS.but(**more)


# --- learning rates over the steps -----------------------------------------------------------------------------------


def rates(steps: int, **more: object) -> list[float]:
    """The learning rate of every step of a run, for a rate of 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = make_schedule(optimizer, with_options(steps=steps, **more).optimization, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_warms_up_over_a_twentieth_and_falls_as_a_cosine():
    expected = [(step + 1) / 5 if step < 5 else (1 + math.cos(math.pi * (step - 5) / 95)) / 2 for step in range(100)]
    assert rates(100) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("polynomial", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
    ],
)
def test_other_schedules_and_warm_ups(name, expected):
    assert rates(6, lr_scheduler=name, warmup_steps=2) == pytest.approx(expected, abs=1e-6)
    assert rates(4, lr_scheduler=name, warmup_steps=0) == pytest.approx(expected[2:], abs=1e-6)


@pytest.mark.parametrize("name", ["adamw", "prodigy"])
def test_the_optimizer_decays_weights_as_told(name):
    if name == "prodigy":
        pytest.importorskip("prodigyopt")
    for decay in (0.0, 0.02):
        groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": 1e-4}]
        optimizer = make_optimizer(groups, with_options(optimizer=name, weight_decay=decay).optimization)
        assert optimizer.param_groups[0]["weight_decay"] == decay


def test_gradients_are_cut_down_to_the_norm(tiny_pipeline_dir, photo_dir, tmp_path):
    """Cut to nearly nothing, they are drowned by Adam's epsilon of 1e-8."""
    moved = {}
    for norm in (1.0, 1e-12, math.inf):
        options = LoraOptions.of(
            base_model=str(tiny_pipeline_dir),
            references=photo_dir,
            output=tmp_path / str(norm),
            rank=2,
            text_rank=0,
            steps=2,
            batch_size=1,
            learning_rate=0.01,
            max_gradient_norm=norm,
            precision="fp32",
        )
        weights = load_file(train_lora(options) / WEIGHTS_NAME)
        moved[norm] = max(float(tensor.abs().max()) for name, tensor in weights.items() if "lora_B" in name)
    assert moved[1e-12] < 0.01 * moved[1.0] and moved[math.inf] > 0.001


# --- batches ---------------------------------------------------------------------------------------------------------


def training_set() -> TrainingSet:
    """Four pictures with captions of their own, then the empty caption."""
    frame, importance = torch.zeros(6), torch.ones(4, 4)
    samples = []
    for number in range(4):
        latents = torch.stack([torch.full((3, 4, 4), float(number)), torch.zeros(3, 4, 4)])
        samples.append(Sample(latents=latents, importance=importance, frame=frame, prompt=number))
    prompts = ("one", "two", "three", "four", NO_CAPTION)
    return TrainingSet(samples=samples, prompts=prompts, num_references=4, fingerprint="")


def batch(turn: int, **more: object):
    return make_batch(training_set(), flow_noising, with_options(**more), turn)


def test_captions_are_dropped_in_that_share_and_nothing_else_changes():
    dropped = 0
    for turn in range(100):
        plain, some = batch(turn), batch(turn, caption_dropout=0.25)
        assert torch.equal(some.noised.noisy, plain.noised.noisy)
        captions, without = plain.prompts[plain.prompt_index], some.prompts[some.prompt_index]
        assert bool(((without == captions) | (without == 4)).all())
        dropped += int((without == 4).sum())
    assert 0.18 < dropped / 400 < 0.32
    assert bool((batch(0, caption_dropout=0.999).prompts == 4).all())


def test_offset_noise_is_one_value_for_a_channel():
    plain, offset = batch(7), batch(7, noise_offset=0.1)
    added = offset.noised.target - plain.noised.target  # [B,C,h,w]; the target holds the noise
    assert torch.allclose(added, added[:, :, :1, :1].expand_as(added), atol=1e-6)
    values = torch.cat([batch(t, noise_offset=0.1).noised.target - batch(t).noised.target for t in range(50)])
    assert values[:, :, 0, 0].std() == pytest.approx(0.1, rel=0.1)
    assert values[:, :, 0, 0].mean() == pytest.approx(0.0, abs=0.02)


def test_offset_noise_is_for_diffusion(tiny_pipeline_dir):
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    noising_of(DDIMScheduler(), with_options(noise_offset=0.1).noise)
    with pytest.raises(InputError, match="--noise-offset"):
        noising_of(FlowMatchEulerDiscreteScheduler(), with_options(noise_offset=0.1).noise)


def test_the_empty_caption_is_encoded_where_captions_are_dropped(tiny_pipeline_dir, photo_dir, tmp_path):
    options = LoraOptions.of(
        base_model=str(tiny_pipeline_dir),
        references=photo_dir,
        output=tmp_path / "out",
        rank=2,
        text_rank=2,
        steps=2,
        batch_size=2,
        learning_rate=0.01,
        caption_dropout=0.5,
        validate_every=2,
        precision="fp32",
    )
    losses = []
    train_lora(options, lambda snapshot: losses.append(snapshot.loss))
    assert math.isfinite(losses[0])


# --- refusals and groups ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"weight_decay": -0.1}, "--weight-decay"),
        ({"max_gradient_norm": 0.0}, "--max-gradient-norm"),
        ({"caption_dropout": 1.0}, "--caption-dropout"),
        ({"noise_offset": -1.0}, "--noise-offset"),
        ({"warmup_steps": -1}, "--warmup-steps"),
        ({"warmup_steps": 400}, "--warmup-steps must be below --steps 400"),
        ({"distilled_guidance": -1.0}, "--distilled-guidance"),
        ({"text_learning_rate": 1.0}, "--text-learning-rate"),
    ],
)
def test_options_name_the_wrong_flag(change, flag):
    with pytest.raises(InputError, match=flag):
        with_options(**change)


def test_options_are_known_by_their_flags_whatever_their_group():
    options = with_options(source=BaseSource(variant="fp16"), publishing=Publishing(push_to_hub="me/sks"), rank=3)
    values = flat(options)
    assert (values["variant"], values["push_to_hub"], values["batch_size"], values["rank"]) == ("fp16", "me/sks", 4, 3)
    assert not GROUPS.keys() & values.keys()
    assert options.adapter.rank == 3 and options.but(rank=5).adapter.rank == 5
    assert LoraOptions.of(**values) == options


def test_a_misspelt_option_is_an_error():
    with pytest.raises(TypeError, match="rnak"):
        with_options(rnak=3)


def test_every_group_is_spelt_as_plain_flags():
    flags = ["--base-model", "m", "--references", "r", "--output", "o", "--rank", "3", "--optimizer", "prodigy"]
    flags += ["--reward-weight", "0.5", "--reward-model", "h", "--no-train-token", "--min-snr-gamma", "5", "--resume"]
    options = tyro.cli(LoraOptions, args=flags)
    expected = LoraOptions.of(base_model="m", references=Path("r"), output=Path("o"), rank=3, optimizer="prodigy")
    assert options == expected.but(
        reward_weight=0.5, reward_model="h", train_token=False, min_snr_gamma=5.0, resume=True
    )


def test_resume_names_a_flag_of_a_group(tiny_pipeline_dir, photo_dir, tmp_path):
    options = LoraOptions.of(
        base_model=str(tiny_pipeline_dir),
        references=photo_dir,
        output=tmp_path / "out",
        rank=2,
        text_rank=0,
        steps=2,
        batch_size=1,
        checkpoint_every=1,
        keep_checkpoints=True,
        precision="fp32",
    )
    train_lora(options)
    resumed = options.but(resume=True, publishing=Publishing(report_to=("tensorboard",)))
    train_lora(resumed)
    with pytest.raises(InputError, match="--resume: --revision was None, now 'old'"):
        train_lora(resumed.but(source=BaseSource(revision="old")))
