"""A LoRA run whose frozen weights are sharded over two processes is the run of one process. Run as a script, this file
is one of these processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_pipelines
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from nearid_personalize.errors import InputError
from nearid_personalize.lora.samples import draw_samples
from nearid_personalize.training.checkpoints import whole_checkpoints
from nearid_personalize.training.lora import loop as lora
from nearid_personalize.training.lora.loop import WEIGHTS_NAME, LoraOptions, Snapshot, train_lora
from nearid_personalize.training.lora.options import flat
from nearid_personalize.training.lora.pictures import read_references
from nearid_personalize.training.lora.sharding import requested_sharding

ROOT = Path(__file__).parent.parent
PROMPT = "a photo of sks dog"


@pytest.fixture
def options(photo_dir: Path, tmp_path: Path) -> LoraOptions:
    return LoraOptions.of(
        base_model=str(tmp_path / "base"),
        references=photo_dir,
        output=tmp_path / "sharded",
        rank=4,
        text_rank=0,
        steps=4,
        resolution=64,
        batch_size=2,
        learning_rate=0.01,
        precision="fp32",
        ema_decay=0.5,
        gradient_accumulation_steps=2,
        gradient_checkpointing="on",
        checkpoint_every=2,
        keep_checkpoints=True,
        validate_every=2,
    )


def look(snapshot: Snapshot, options: LoraOptions) -> bool:
    """Draw a picture and take a loss on the references, as a validation does."""
    generator = torch.Generator().manual_seed(0)
    image = snapshot.pipe(PROMPT, num_inference_steps=2, generator=generator, output_type="pt").images
    seen = {"image": image, "loss": torch.tensor(snapshot.loss_on(read_references(options.data)))}
    save_file(seen, options.output / f"seen-{snapshot.step}.safetensors")
    return True


def fail_once(snapshot: Snapshot, options: LoraOptions) -> bool:
    """Run out of memory in the middle of the denoiser; then draw a smaller batch, as a validation does."""

    def fail(*_) -> None:
        block.remove()
        raise torch.OutOfMemoryError("CUDA out of memory.")

    block = snapshot.pipe.transformer.transformer_blocks[-1].register_forward_pre_hook(fail)
    draw_samples(snapshot.pipe, [PROMPT], [0, 1], num_inference_steps=2)
    return True


def main(file: str) -> None:
    """Train as the file says; leave what the process held of the frozen weights."""
    told = json.loads(Path(file).read_text())
    options = LoraOptions.of(**{**told, "references": Path(told["references"]), "output": Path(told["output"])})
    held: dict[str, int] = {"frozen": 0, "whole": 0}
    take_step = lora.LoraRun.take_step

    def weigh(run, step):
        frozen = [weight for weight in run.family.denoiser.parameters() if not weight.requires_grad]
        held["frozen"] = sum(weight.to_local().numel() for weight in frozen if isinstance(weight, DTensor))
        held["whole"] = sum(weight.numel() for weight in frozen)
        return take_step(run, step)

    lora.LoraRun.take_step = weigh
    train_lora(options, lambda snapshot: (fail_once if "FAIL" in os.environ else look)(snapshot, options))
    (options.output / f"held-{os.environ['RANK']}.json").write_text(json.dumps(held))


def train_sharded(options: LoraOptions, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """`main` in two processes, told of FSDP as `accelerate launch` tells."""
    file = folder / "options.json"
    file.write_text(json.dumps(flat(options), default=str))
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, str(file)],
        env={
            **os.environ,
            **fsdp,
            **environment,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(("family", "text_rank"), [("flux", 0), ("sd", 2)])
def test_two_sharded_processes_train_what_one_does(family, text_rank, options, tmp_path):
    """The same LoRA, pictures and losses on the way; resumed in the middle too; half the frozen weights in each."""
    pipe, _ = tiny_pipelines.build(family)
    pipe.save_pretrained(options.base_model)
    options = options.but(text_rank=text_rank)
    one = options.but(output=tmp_path / "one", gradient_accumulation_steps=4)
    expected = load_file(train_lora(one, lambda snapshot: look(snapshot, one)) / WEIGHTS_NAME)

    done = train_sharded(options, tmp_path)
    assert done.returncode == 0, done.stderr
    weights = load_file(options.output / WEIGHTS_NAME)
    assert weights.keys() == expected.keys() and any("lora_B" in name and w.any() for name, w in weights.items())
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4)
    for step in (2, 4):
        seen, wanted = (load_file(run.output / f"seen-{step}.safetensors") for run in (options, one))
        torch.testing.assert_close(seen, wanted, rtol=1e-3, atol=1e-3)
    stock = DiffusionPipeline.from_pretrained(options.base_model, safety_checker=None)
    stock.load_lora_weights(options.output)
    image = stock(PROMPT, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
    torch.testing.assert_close(image, load_file(options.output / "seen-4.safetensors")["image"], rtol=0, atol=1e-5)

    held = [json.loads((options.output / f"held-{rank}.json").read_text()) for rank in (0, 1)]
    assert sum(one["frozen"] for one in held) == held[0]["whole"]
    assert max(one["frozen"] for one in held) < 0.6 * held[0]["whole"]
    checkpoint = whole_checkpoints(options.output / "checkpoint")[0]
    assert sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")) < 4 * held[0]["whole"]

    (options.output / WEIGHTS_NAME).unlink()
    done = train_sharded(options.but(resume=True), tmp_path)
    assert done.returncode == 0, done.stderr
    resumed = load_file(options.output / WEIGHTS_NAME)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())


def test_a_sharded_validation_that_runs_out_of_memory_ends_in_one_line(options, tmp_path):
    """The others are still in the call that failed: trying again would wait for them for ever."""
    pipe, _ = tiny_pipelines.build("flux")
    pipe.save_pretrained(options.base_model)
    done = train_sharded(options, tmp_path, FAIL="once")
    assert done.returncode != 0, done.stderr
    assert "--validation-batch-size: a batch did not fit into memory; give a smaller one" in done.stderr, done.stderr


def test_a_single_process_has_nothing_to_share(options, tmp_path, monkeypatch):
    pipe, _ = tiny_pipelines.build("flux")
    pipe.save_pretrained(options.base_model)
    expected = load_file(train_lora(options.but(output=tmp_path / "plain")) / WEIGHTS_NAME)
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}.items():
        monkeypatch.setenv(name, value)
    weights = load_file(train_lora(options) / WEIGHTS_NAME)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version 1: choose version 2"),
        ({"FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "--gradient-checkpointing"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params true: .* give false"),
    ],
)
def test_other_fsdp_configurations_are_refused(told, words, options, monkeypatch):
    for name, value in {"ACCELERATE_USE_FSDP": "true", **told}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=words):
        train_lora(options)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    with requested_sharding() as sharding:
        assert sharding is None


if __name__ == "__main__":
    main(sys.argv[1])
