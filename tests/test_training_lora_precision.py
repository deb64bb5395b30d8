"""Every family in every precision with every feature: two steps of training, on tiny real pipelines.

The frozen weights are in the run's precision (`base_precision="same"`), as they are by default on an accelerator.
"""

import itertools
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import checkered
from safetensors.torch import load_file
from test_training_lora_families import WITH_TEXT, family_of, folders  # noqa: F401 - a fixture

from nearid_personalize.training.lora.loop import (
    WEIGHTS_NAME,
    LoraOptions,
    LoraRun,
    Snapshot,
    choose_autocast,
    train_lora,
)
from nearid_personalize.training.lora.pictures import read_references

FAMILIES = ("sd", "sdxl", "sd3", "flux", "qwen", "z_image")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FEATURES = {
    "plain": {},
    "validation": {"validate_every": 2},
    "class pictures": {"prior_pictures": 1, "class_prompts": ("a photo of a dog",)},
    "text LoRA": {"text_rank": 2},
    "reward": {"reward_weight": 1.0, "reward_warmup": 0.0, "reward_sampling_steps": 2},
    "gradient checkpointing": {"gradient_checkpointing": "on"},
}
CELLS = [
    (name, precision, feature)
    for name, precision, feature in itertools.product(FAMILIES, PRECISIONS, FEATURES)
    if feature != "text LoRA" or name in WITH_TEXT
]


@pytest.fixture(scope="module")
def options(folders, tiny_nearid_dir: Path, tmp_path_factory) -> LoraOptions:  # noqa: F811
    photos = tmp_path_factory.mktemp("photos")
    for seed in range(2):
        checkered(seed).save(photos / f"photo-{seed}.png")
    return LoraOptions.of(
        base_model="",
        references=photos,
        output=photos,
        rank=2,
        steps=2,
        batch_size=2,
        resolution=32,
        text_rank=0,
        prior_guidance_scale=2.0,
        reward_model=str(tiny_nearid_dir),
    )


def options_of(options: LoraOptions, folder: Path, precision: str, feature: str, output: Path) -> LoraOptions:
    return options.but(
        base_model=str(folder),
        output=output,
        precision=precision,
        base_precision="same",
        **FEATURES[feature],
    )


@pytest.mark.parametrize(("name", "precision", "feature"), CELLS)
def test_every_family_trains_in_every_precision(name, precision, feature, folders, options, tmp_path):  # noqa: F811
    drawn, losses = [], []

    def look(snapshot: Snapshot) -> None:
        assert snapshot.pipe.vae.dtype == PRECISIONS[precision]
        drawn.append(snapshot.pipe("sks dog", height=32, width=32, num_inference_steps=1, output_type="pt").images)
        losses.append(snapshot.loss_on(read_references(run.data)))

    run = options_of(options, folders(name), precision, feature, tmp_path / "lora")
    output = train_lora(run, look, lambda step, loss: losses.append(loss))
    weights = load_file(output / WEIGHTS_NAME)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert any(tensor.any() for key, tensor in weights.items() if "lora_B" in key)
    assert all(torch.tensor(losses).isfinite())
    assert len(drawn) == (feature == "validation")
    assert all(picture.isfinite().all() for picture in drawn)
    assert len(list(output.glob("class_pictures/*.png"))) == (feature == "class pictures")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_vae_is_itself_again_after_drawing(name, folders):  # noqa: F811
    family = family_of(folders(name))
    family.denoiser.to(torch.bfloat16)
    before = {key: tensor.clone() for key, tensor in family.pipe.vae.state_dict().items()}
    with family.ready_to_draw(torch.device("cpu")) as pipe:
        assert pipe.vae.dtype == torch.bfloat16
    after = family.pipe.vae.state_dict()
    assert all(torch.equal(after[key], tensor) and after[key].dtype == tensor.dtype for key, tensor in before.items())


@pytest.fixture
def accelerate_in_float16(monkeypatch) -> Accelerator:
    """An accelerator as `accelerate launch --mixed_precision fp16` makes it on a GPU."""
    accelerator = Accelerator()
    monkeypatch.setitem(vars(accelerator.state), "_mixed_precision", "fp16")
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return accelerator


def clipped_norm(options: LoraOptions, accelerator: Accelerator) -> float:
    """The length of the first step's gradient, as it is clipped."""
    torch.manual_seed(0)
    run, norms = LoraRun.open(options, accelerator, read_references(options.data)), []
    clip = accelerator.clip_grad_norm_
    accelerator.clip_grad_norm_ = lambda *args: norms.append(float(clip(*args)))
    run.take_step(1)
    return norms[0]


@pytest.mark.parametrize("precision", ["fp16", "auto"])
def test_accelerates_scaled_loss_is_not_scaled_again(precision, accelerate_in_float16, folders, options, tmp_path):  # noqa: F811
    exact = options_of(options, folders("sd"), "fp32", "plain", tmp_path / "lora")
    half = exact.but(precision=precision, base_precision="fp32")
    assert not LoraRun.open(half, accelerate_in_float16, read_references(half.data)).scaler.is_enabled()
    scaled = clipped_norm(half, accelerate_in_float16)
    assert scaled == pytest.approx(clipped_norm(exact, Accelerator()), rel=0.02)


def test_our_own_scale_is_taken_out_before_clipping(folders, options, tmp_path):  # noqa: F811
    exact = options_of(options, folders("sd"), "fp32", "plain", tmp_path / "lora")
    half = exact.but(precision="fp16", base_precision="fp32")
    assert clipped_norm(half, Accelerator()) == pytest.approx(clipped_norm(exact, Accelerator()), rel=0.02)


def test_the_flag_decides_over_what_accelerate_was_told():
    accelerator = Accelerator()
    assert choose_autocast("fp32", accelerator) == torch.float32
    assert choose_autocast("fp16", accelerator) == torch.float16


def test_float16_that_accelerate_leaves_undone_on_a_cpu_is_done_here(monkeypatch):
    accelerator = Accelerator()
    monkeypatch.setitem(vars(accelerator.state), "_mixed_precision", "fp16")
    assert accelerator.mixed_precision == "fp16" and not accelerator.native_amp
    assert choose_autocast("auto", accelerator) == torch.float16
