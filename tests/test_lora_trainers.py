"""Folders laid out as sd-scripts, ai-toolkit and SimpleTuner leave them: checkpoints, order, subject, prompts, keys."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import checkered
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from tiny_pipelines import build

from nearid_personalize import cli
from nearid_personalize.commands.options import ReportCard
from nearid_personalize.commands.report_card import _card_prompts
from nearid_personalize.lora.files import check_lora_file, find_loras, load_lora
from nearid_personalize.lora.trainers import TrainerNotes, kohya_prompts, kohya_subject, notes_beside

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def kohya_tensors(strength: float) -> dict[str, torch.Tensor]:
    """A LoRA of rank 2 on one layer of the tiny UNet, in sd-scripts' keys."""
    name = "lora_unet_" + LAYER.replace(".", "_")
    generator = torch.Generator().manual_seed(0)
    return {
        f"{name}.lora_down.weight": torch.randn(2, 32, generator=generator),
        f"{name}.lora_up.weight": torch.randn(32, 2, generator=generator) * strength,
        f"{name}.alpha": torch.tensor(2.0),
    }


def peft_tensors(strength: float) -> dict[str, torch.Tensor]:
    """The same in the keys of diffusers' own files."""
    down, up, _ = kohya_tensors(strength).values()
    return {f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.lora_B.weight": up}


def kohya_folder(folder: Path) -> Path:
    """`--output_name rex --save_every_n_epochs 2 --save_state`, samples asked for in the GUI."""
    metadata = {
        "ss_output_name": "rex",
        "ss_network_module": "networks.lora",
        "ss_tag_frequency": json.dumps({"10_sks dog": {"sks dog": 20}}),
        "ss_dataset_dirs": json.dumps({"10_sks dog": {"n_repeats": 10, "img_count": 4}}),
    }
    folder.mkdir()
    for place, name in enumerate(("rex-000002", "rex-000010", "rex", "rex-step00000500")):
        save_file(kohya_tensors(0.01 * (1 + place)), folder / f"{name}.safetensors", metadata)
    state = folder / "rex-000010-state"
    state.mkdir()
    save_file({"unet.weight": torch.ones(1)}, state / "model.safetensors")
    save_file({"unet.weight": torch.ones(1)}, state / "model_1.safetensors")
    (folder / "sample").mkdir()
    checkered(0).save(folder / "sample" / "rex_e000002_00_20260101000000_42.png")
    prompts = "# two\nsks dog in space --n blurry --w 512 --h 512 --s 28\n\na cat --d 1\nphoto of sks dog, snow --l 7\n"
    (folder / "sample" / "prompt.txt").write_text(prompts)
    return folder


def ai_toolkit_folder(folder: Path) -> Path:
    """output/NAME with its config, checkpoints by step, and the last one without."""
    process = {
        "type": "sd_trainer",
        "trigger_word": "p3t",
        "sample": {"prompts": ["[trigger] on a beach --ctrl_img x.png", "a tree", "portrait of [trigger]"], "seed": 42},
    }
    folder.mkdir()
    config = {"job": "extension", "config": {"name": "rex", "process": [process]}, "meta": {"version": "1.0"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for place, name in enumerate(("rex", "rex_000000250", "rex_000001000", "rex_000000500")):
        metadata = {"format": "pt", "training_info": json.dumps({"step": 250, "epoch": 3}), "ss_output_name": "rex"}
        save_file(peft_tensors(0.01 * (1 + place)), folder / f"{name}.safetensors", metadata)
    (folder / "optimizer.pt").write_bytes(b"not for us")
    (folder / "samples").mkdir()
    return folder


def simpletuner_folder(folder: Path) -> Path:
    """checkpoint-N/, the last one at the top, a model card."""
    card = """---
base_model: "black-forest-labs/FLUX.1-dev"
tags: [lora]
instance_prompt: "a photo of sks dog"
widget:
- text: 'unconditional (blank prompt)'
  output: {url: ./assets/image_0_0.png}
- text: 'sks dog on the moon'
  parameters: {negative_prompt: 'blurry'}
  output: {url: ./assets/image_1_0.png}
---
# rex
"""
    for place, inside in enumerate(("checkpoint-1000", "checkpoint-500", ".")):
        (folder / inside).mkdir(parents=True, exist_ok=True)
        save_file(peft_tensors(0.01 * (1 + place)), folder / inside / "pytorch_lora_weights.safetensors")
        (folder / inside / "training_state.json").write_text("{}")
    (folder / "README.md").write_text(card)
    return folder


LAYOUTS = {
    "sd-scripts": (
        kohya_folder,
        ["rex-000002", "rex-000010", "rex-step00000500", "rex"],
        TrainerNotes("sd-scripts", "sks dog", ("sks dog in space", "photo of sks dog, snow")),
    ),
    "ai-toolkit": (
        ai_toolkit_folder,
        ["rex_000000250", "rex_000000500", "rex_000001000", "rex"],
        TrainerNotes("ai-toolkit", "p3t", ("p3t on a beach", "portrait of p3t")),
    ),
    "simpletuner": (
        simpletuner_folder,
        ["checkpoint-500", "checkpoint-1000", "run"],
        TrainerNotes("SimpleTuner or diffusers", "sks dog", ("sks dog on the moon",)),
    ),
}


@pytest.mark.parametrize("trainer", LAYOUTS)
def test_an_output_folder_gives_checkpoints_in_order_subject_and_prompts(trainer, tmp_path):
    make, names, _ = LAYOUTS[trainer]
    loras = find_loras([make(tmp_path / "run")])
    assert list(loras) == names
    options = ReportCard(lora=(tmp_path / "run",), base_model="x", references=tmp_path)
    name, token, prompts = _card_prompts(options, list(loras.values()))
    expected = LAYOUTS[trainer][2]
    first = next(iter(loras.values()))
    assert notes_beside(first, check_lora_file(first).metadata) == expected
    assert (name, token, prompts) == (expected.subject, expected.token, expected.prompts)
    own = ReportCard(lora=(tmp_path,), base_model="x", references=tmp_path, subject="my cat", prompts=("my cat here",))
    assert _card_prompts(own, list(loras.values())) == ("my cat", "my", ("my cat here",))


def test_a_report_card_of_sd_scripts_folder_picks_a_checkpoint(tiny_pipeline_dir, tiny_nearid_dir, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed in range(2):
        checkered(seed).save(photos / f"{seed}.png")
    folder = kohya_folder(tmp_path / "run")
    flags = ["--base-model", tiny_pipeline_dir, "--references", photos, "--model", tiny_nearid_dir, "--out", tmp_path]
    with pytest.raises(SystemExit) as ended:
        cli.main(["report-card", "--lora", str(folder), "--scales", "1.0", "--seeds", "1", "--steps", "1"]
                 + [str(flag) for flag in flags])  # fmt: skip
    assert ended.value.code in (0, 3)
    assert "the 2 that sd-scripts drew samples of" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert {cell["checkpoint"] for cell in report["cells"]} == set(LAYOUTS["sd-scripts"][1])


def test_kohya_keys_load_into_the_layers_they_name(tiny_pipeline_dir, tmp_path):
    save_file(kohya_tensors(1.0), tmp_path / "a.safetensors")
    pipe = DiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    load_lora(pipe, tmp_path / "a.safetensors")
    assert torch.equal(
        pipe.unet.get_submodule(LAYER).lora_B["subject"].weight, next(iter(list(kohya_tensors(1.0).values())[1:2]))
    )


@pytest.mark.parametrize(
    ("family", "name", "inside"),
    [
        ("z_image", "diffusion_model.layers.0.attention.to_q", "layers.0.attention.to_q"),
        ("qwen", "diffusion_model.transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q"),
    ],
)
def test_comfyui_keys_load(family, name, inside, tmp_path):
    """ai-toolkit's newer files carry ComfyUI's prefix."""
    pipe, _ = build(family)
    layer = pipe.transformer.get_submodule(inside)
    tensors = {
        f"{name}.lora_A.weight": torch.randn(2, layer.in_features),
        f"{name}.lora_B.weight": torch.randn(layer.out_features, 2),
    }
    save_file(tensors, tmp_path / "comfy.safetensors")
    load_lora(pipe, tmp_path / "comfy.safetensors")
    loaded = pipe.transformer.get_submodule(inside)
    assert torch.equal(loaded.lora_A["subject"].weight, tensors[f"{name}.lora_A.weight"])


@pytest.mark.parametrize(
    ("metadata", "subject"),
    [
        ({"ss_dataset_dirs": '{"10_sks dog": {}}'}, "sks dog"),
        ({"ss_tag_frequency": '{"img": {}, "3_ohwx man": {}}'}, "ohwx man"),
        ({"ss_datasets": '[{"subsets": [{"class_tokens": "zwx cat", "image_dir": "x"}]}]'}, "zwx cat"),
        ({"ss_datasets": '[{"subsets": [{"class_tokens": null}]}]', "ss_dataset_dirs": '{"2_a b": 1}'}, "a b"),
        ({"ss_dataset_dirs": "[" * 50_000}, None),
        ({"ss_dataset_dirs": '"10_sks dog"'}, None),
        ({"ss_tag_frequency": '{"photos": {}}'}, None),
    ],
)
def test_sd_scripts_metadata_name_the_subject(metadata, subject):
    assert kohya_subject(metadata) == subject


def test_prompt_lines_lose_options_and_comments():
    assert kohya_prompts("# a\nsks dog --n bad\n\n  b  \n") == ("sks dog", "b")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[" * 100_000, b"a: &a [*a]\n", b"- 1\n- 2", b"sample: 3"])
def test_notes_that_cannot_be_read_are_none(content, tmp_path):
    for name in ("config.yaml", "README.md", "sample_prompts.txt"):
        (tmp_path / name).write_bytes((b"---\n" if name == "README.md" else b"") + content)
    assert notes_beside(tmp_path / "a.safetensors", {}) is None
