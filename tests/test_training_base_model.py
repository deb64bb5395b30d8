"""Base models from folders, variants and single files, and the learning rates that suit them."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from original_layout import original_layout
from safetensors.torch import load_file, save_file

from nearid_personalize.errors import InputError
from nearid_personalize.loading import load_pipeline
from nearid_personalize.training.lora.adapters import add_adapters, parameter_groups
from nearid_personalize.training.lora.base_model import RECOMMENDED, load_base_model
from nearid_personalize.training.lora.families import Flux, StableDiffusion, StableDiffusion3, StableDiffusionXL
from nearid_personalize.training.lora.options import BaseSource, LoraOptions

ROOT = Path(__file__).parent.parent
UNUSED = {"references": Path(), "output": Path()}


def load(base_model: object, **more: object):
    return load_base_model(LoraOptions.of(base_model=str(base_model), **UNUSED, **more), torch.float32)


def rates(family, **told: float) -> list[float]:
    options = LoraOptions.of(base_model="", **UNUSED, text_rank=2, rank=2, **told)
    return [
        group["lr"]
        for group in parameter_groups(add_adapters(family, options.adapter, options.data.token), options.optimization)
    ]


# --- learning rates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "family", "expected"),
    [
        (tiny_pipelines.sd, StableDiffusion, [1e-4, 1e-5, 5e-4]),
        (tiny_pipelines.sdxl, StableDiffusionXL, [1e-4, 5e-6, 5e-4]),
        (tiny_pipelines.sd3, StableDiffusion3, [1e-4, 5e-6, 5e-4]),
        (tiny_pipelines.flux, Flux, [1e-4, 5e-6, 5e-4]),
    ],
)
def test_rates_are_those_in_common_use_unless_told(build, family, expected):
    assert rates(family(build()[0])) == expected
    told = {"learning_rate": 0.1, "text_learning_rate": 0.2, "token_learning_rate": 0.3}
    assert rates(family(build()[0]), **told) == [0.1, 0.2, 0.3]


def test_a_base_models_folder_may_ask_for_rates(tiny_kl_pipeline_dir, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(tiny_kl_pipeline_dir, folder)
    (folder / RECOMMENDED).write_text('{"learning_rate": 0.02, "token_learning_rate": 0.03}')
    assert rates(load(folder)) == [0.02, 1e-5, 0.03]
    assert rates(load(folder), learning_rate=0.5) == [0.5, 1e-5, 0.03]
    for wrong in ("{", "[1]", '{"rate": 0.1}', '{"learning_rate": 7}', '{"learning_rate": "much"}'):
        (folder / RECOMMENDED).write_text(wrong)
        with pytest.raises(InputError, match=RECOMMENDED) as error:
            load(folder)
        assert "\n" not in str(error.value)


def test_the_mini_world_keeps_the_rates_it_was_tuned_with():
    assert rates(load("miniworld")) == [1e-3, 5e-4, 5e-3]


# --- which files -----------------------------------------------------------------------------------------------------


def test_a_variant_is_read_when_it_is_named(tiny_kl_pipeline_dir, tmp_path):
    StableDiffusionPipeline.from_pretrained(tiny_kl_pipeline_dir).save_pretrained(tmp_path / "base", variant="fp16")
    with pytest.raises(InputError, match="--base-model"):
        load(tmp_path / "base")
    with pytest.raises(InputError, match="--variant fp8"):
        load(tmp_path / "base", source=BaseSource(variant="fp8"))
    assert load(tmp_path / "base", source=BaseSource(variant="fp16")).pipe.unet.dtype == torch.float32


def test_a_revision_and_a_variant_come_from_the_hub(hub, tiny_kl_pipeline_dir, tiny_nearid_dir, photo_dir, tmp_path):
    old = tmp_path / "old"
    StableDiffusionPipeline.from_pretrained(tiny_kl_pipeline_dir).save_pretrained(old, variant="fp16")
    hub.publish("owner/base", tiny_nearid_dir)
    hub.publish("owner/base", old, revision="old")
    flags = ["--base-model", "owner/base", "--references", photo_dir, "--output", tmp_path / "out", "--steps", "1"]
    flags += ["--batch-size", "1", "--revision", "old", "--variant", "fp16"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "trainers" / "train_lora.py"), *map(str, flags)],
        env=hub.environment(tmp_path / "home", PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert any("unet/diffusion_pytorch_model.fp16.safetensors" in request for request in hub.requests)


def test_two_revisions_are_refused():
    with pytest.raises(InputError, match="--revision new"):
        load("owner/base@old", source=BaseSource(revision="new"))


def configuration(folder: Path, target: Path) -> Path:
    """A pipeline's folder without its weights."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))
    return target


def pipeline(name: str) -> DiffusionPipeline:
    """A tiny pipeline whose CLIPs differ in width, by which diffusers tells them apart in a file."""
    if name == "sd":
        return tiny_pipelines.sd()[0]
    pipe, _ = getattr(tiny_pipelines, name)(second_width=48)
    if name == "sd3":
        torch.nn.init.eye_(pipe.text_encoder.text_projection.weight)  # as diffusers takes it to be
    return pipe


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Callable[[str], tuple[DiffusionPipeline, Path, Path]]:
    """Pipeline, its folder and its one file, each made once."""

    @cache
    def save(name: str) -> tuple[DiffusionPipeline, Path, Path]:
        folder = tmp_path_factory.mktemp(name)
        pipe = pipeline(name)
        pipe.save_pretrained(folder / "whole")
        save_file(original_layout(pipe), folder / "model.safetensors")
        configuration(folder / "whole", folder / "config")
        return pipe, folder, folder / "model.safetensors"

    return save


def same_weights(pipe: DiffusionPipeline, expected: DiffusionPipeline) -> None:
    for name, part in expected.components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        weights = getattr(pipe, name).state_dict()
        for key, tensor in part.state_dict().items():
            assert torch.equal(weights[key], tensor.to(weights[key].dtype)), f"{name} {key}"


FAMILY_OF = {"sd": StableDiffusion, "sdxl": StableDiffusionXL, "sd3": StableDiffusion3}


@pytest.mark.parametrize("name", FAMILY_OF)
def test_one_file_in_the_authors_layout_is_the_same_model(name, saved):
    expected, folder, file = saved(name)
    source = BaseSource(base_config=str(folder / "config"))
    family = load_base_model(LoraOptions.of(base_model=str(file), **UNUSED, source=source), torch.bfloat16)
    assert isinstance(family, FAMILY_OF[name])
    assert (family.denoiser.dtype, family.pipe.vae.dtype) == (torch.bfloat16, torch.float32)
    same_weights(family.pipe, expected)
    pipe = load_pipeline(str(file), "cpu", torch.float32, str(folder / "config"))
    assert pipe.vae.dtype == torch.float32
    same_weights(pipe, expected)


@pytest.mark.parametrize(
    ("name", "lacking", "part"),
    [("sd3", "text_encoders.t5xxl.", "text_encoder_3"), ("sdxl", "first_stage_model.", "vae")],
)
def test_what_a_file_lacks_comes_from_the_pipeline_of_its_configuration(name, lacking, part, saved, tmp_path):
    expected, folder, file = saved(name)
    less = tmp_path / "less.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if not key.startswith(lacking)}, less)
    same_weights(load(less, source=BaseSource(base_config=str(folder / "whole"))).pipe, expected)
    for loader in (
        lambda: load(less, source=BaseSource(base_config=str(folder / "config"))),
        lambda: load_pipeline(str(less), "cpu", torch.float32, str(folder / "config")),
    ):
        with pytest.raises(
            InputError, match=f"--base-model .*less.safetensors: holds no {part}.*--base-config"
        ) as error:
            loader()
        assert "\n" not in str(error.value)


def test_a_flux_transformer_alone_takes_all_else_from_its_pipeline(tmp_path):
    """In diffusers' own keys: it reads the authors' at the published width alone."""
    expected, _ = tiny_pipelines.flux()
    expected.save_pretrained(tmp_path / "whole")
    file = tmp_path / "flux.safetensors"
    save_file(expected.transformer.state_dict(), file)
    family = load(file, source=BaseSource(base_config=str(tmp_path / "whole")))
    assert isinstance(family, Flux)
    same_weights(family.pipe, expected)


def test_a_pipeline_that_diffusers_reads_from_no_file_is_refused_by_name(tmp_path):
    pipe, _ = tiny_pipelines.qwen()
    pipe.save_pretrained(tmp_path / "whole")
    save_file({"weight": torch.ones(2)}, tmp_path / "qwen.safetensors")
    with pytest.raises(InputError, match="no QwenImagePipeline from one file; give a folder or Hub id"):
        load(tmp_path / "qwen.safetensors", source=BaseSource(base_config=str(tmp_path / "whole")))


def test_a_single_file_that_cannot_be_read_is_refused(tiny_kl_pipeline_dir, tmp_path):
    config = configuration(tiny_kl_pipeline_dir, tmp_path / "config")
    pickle, damaged, other = tmp_path / "model.ckpt", tmp_path / "damaged.safetensors", tmp_path / "other.safetensors"
    pickle.write_bytes(b"x")
    damaged.write_bytes(b"x" * 100)
    save_file({"weight": torch.ones(2)}, other)
    for file, words in ((pickle, "only .safetensors"), (damaged, "damaged.safetensors"), (other, "other.safetensors")):
        with pytest.raises(InputError, match=words) as error:
            load(file, source=BaseSource(base_config=str(config)))
        assert "\n" not in str(error.value) and "--base-model" in str(error.value)


def test_a_single_file_whose_configuration_is_nowhere_says_what_to_give(tiny_kl_pipeline_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    file = tmp_path / "model.safetensors"
    save_file(original_layout(StableDiffusionPipeline.from_pretrained(tiny_kl_pipeline_dir)), file)
    with pytest.raises(InputError, match="--base-config") as error:
        load(file)
    assert "\n" not in str(error.value)


# --- guidance --------------------------------------------------------------------------------------------------------


def test_a_guidance_distilled_transformer_is_told_its_guidance(tmp_path):
    pipe, _ = tiny_pipelines.flux()
    pipe.save_pretrained(tmp_path / "flux")
    for told, expected in ((None, 1.0), (3.5, 3.5)):
        family = load(tmp_path / "flux", distilled_guidance=told)
        assert family.told_guidance(torch.tensor([10.0, 20.0])).tolist() == [expected] * 2
    assert Flux(tiny_pipelines.flux(guidance_embeds=False)[0]).told_guidance(torch.ones(1)) is None


def test_guidance_is_refused_where_none_was_distilled(tiny_kl_pipeline_dir):
    with pytest.raises(InputError, match="--distilled-guidance"):
        load(tiny_kl_pipeline_dir, distilled_guidance=3.5)
