"""Micro-batches: what a step learns does not depend on how many pictures go through at once, and a step that runs out
of memory is done again with fewer. Run as a script, this file is one of two processes, of which one has less memory."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from nearid_personalize.errors import InputError
from nearid_personalize.training.lora import loop as lora
from nearid_personalize.training.lora.loop import WEIGHTS_NAME, LoraOptions, LoraRun, train_lora
from nearid_personalize.training.lora.options import flat
from nearid_personalize.training.lora.pictures import batch_loss, make_batch, parts, read_references
from nearid_personalize.training.lora.reward import enroll_reward

ROOT = Path(__file__).parent.parent


@pytest.fixture
def options(tiny_kl_pipeline_dir: Path, photo_dir: Path, tmp_path: Path) -> LoraOptions:
    """Prior pictures, masks, weights by noise level, captions of one's own: all that a picture's share depends on."""
    for index in range(4):
        mask = Image.new("L", (48, 48))
        mask.paste(255, (0, 0, 12 * (index + 1), 48))
        mask.save(photo_dir / f"photo-{index}.mask.png")
    (photo_dir / "photo-0.txt").write_text("sks dog at night")
    return LoraOptions.of(
        base_model=str(tiny_kl_pipeline_dir),
        references=photo_dir,
        output=tmp_path / "lora",
        rank=4,
        text_rank=2,
        steps=2,
        batch_size=8,
        resolution=32,
        prior_pictures=3,
        class_prompts=("a photo of a dog",),
        prior_weight=0.7,
        background_weight=0.2,
        min_snr_gamma=5.0,
        precision="fp32",
    )


def start(options: LoraOptions) -> LoraRun:
    torch.manual_seed(0)
    accelerator, references = Accelerator(), read_references(options.data)
    return LoraRun.open(options, accelerator, references, enroll_reward(options, references, accelerator.device))


def gradients(run: LoraRun) -> tuple[float, Tensor]:
    """The loss and all gradients of the first step."""
    loss = run.make_gradients(1)
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in run.trained]
    return loss, torch.cat([gradient.flatten() for gradient in found])


def remember(denoiser: torch.nn.Module, limit: Callable[[], int] = lambda: 99) -> list[int]:
    """Note how many pictures each call of the denoiser has; above the limit it runs out of memory, as CUDA would."""
    seen: list[int] = []

    def hook(module, args):
        seen.append(len(args[0]))
        if len(args[0]) > limit():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    denoiser.register_forward_pre_hook(hook)
    return seen


def rewarded(options: LoraOptions, model: Path) -> LoraOptions:
    return options.but(
        reward_weight=2.0,
        reward_model=str(model),
        reward_warmup=0.0,
        reward_sampling_steps=2,
        reward_batch_size=4,
        reward_prompts=("sks", "sks dog"),
    )


@pytest.mark.parametrize("reward", [False, True])
def test_gradients_do_not_depend_on_the_micro_batch(reward, options, tiny_nearid_dir):
    options = rewarded(options, tiny_nearid_dir) if reward else options
    options = options.but(gradient_accumulation_steps=2)
    whole_loss, whole = gradients(start(options.but(micro_batch_size=8)))
    assert whole.abs().max() > 0
    for size in (1, 2, 3, 4):
        run = start(options.but(micro_batch_size=size))
        seen = remember(run.family.denoiser)
        loss, found = gradients(run)
        assert max(seen) == size
        assert loss == pytest.approx(whole_loss, rel=1e-5)
        torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-5 * float(whole.abs().max()))


def test_parts_of_a_batch_are_its_rows(options):
    run = start(options)
    batch = make_batch(run.data, run.noising, options, 0)
    assert len(batch) == 8 and [rows.stop - rows.start for rows in parts(8, 3)] == [3, 3, 2]
    asked = batch.prompts[batch.prompt_index]
    for rows in parts(8, 3):
        part = batch.part(rows)
        assert torch.equal(part.prompts[part.prompt_index], asked[rows])
        assert torch.equal(part.noised.timesteps, batch.noised.timesteps[rows])
        assert torch.equal(part.frame, batch.frame[rows])
    predicted = torch.randn_like(batch.noised.target)
    losses = [batch_loss(predicted[rows], batch.part(rows)) for rows in parts(8, 3)]
    torch.testing.assert_close(sum(losses), batch_loss(predicted, batch))


def test_a_step_that_runs_out_of_memory_is_done_again_with_fewer_pictures(options, capsys):
    plain, short = start(options), start(options)
    seen = remember(short.family.denoiser, lambda: 2)
    assert short.take_step(1) == pytest.approx(plain.take_step(1), rel=1e-5)
    assert seen == [8, 4, 2, 2, 2, 2] and short.micro_batch == 2
    for ours, theirs in zip(short.trained, plain.trained):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    assert "going on with micro-batches of 2" in capsys.readouterr().err


def test_gradients_are_checkpointed_before_giving_up(options, capsys):
    run = start(options.but(micro_batch_size=2))
    denoiser = run.family.denoiser
    seen = remember(denoiser, lambda: 1 if denoiser.is_gradient_checkpointing else 0)
    run.take_step(1)
    assert denoiser.is_gradient_checkpointing and seen[:3] == [2, 1, 1] and len(seen) == 10
    assert "micro-batches of 1, gradient checkpointing" in capsys.readouterr().err


@pytest.mark.parametrize("checkpointing", ["on", "off"])
def test_one_picture_too_many_is_told_in_one_line(checkpointing, options):
    run = start(options.but(gradient_checkpointing=checkpointing))
    remember(run.family.denoiser, lambda: 0)
    with pytest.raises(InputError, match=r"out of memory with one picture at a time: try .*--resolution") as error:
        run.take_step(1)
    assert "\n" not in str(error.value)


def test_other_errors_are_no_lack_of_memory(options):
    run = start(options)
    run.family.denoiser.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.take_step(1)


def test_large_pictures_go_through_a_few_at_a_time(options, monkeypatch):
    run = start(options)
    assert run.micro_batch == 8  # of 32 pixels
    monkeypatch.setattr(type(run.family), "pixels_at_once", 3 * 32 * 32)
    assert start(options).micro_batch == 3
    monkeypatch.setattr(type(run.family), "pixels_at_once", 31 * 31)
    assert start(options).micro_batch == 1


def main(file: str) -> None:
    """Train as the file says; process 1 has memory for two pictures. Leave how many went through at once."""
    told = json.loads(Path(file).read_text())
    options = LoraOptions.of(**{**told, "references": Path(told["references"]), "output": Path(told["output"])})
    rank, sizes = int(os.environ["RANK"]), []
    take_step = lora.LoraRun.take_step

    def with_little_memory(run, step):
        if step == 2 and rank == 1:
            remember(run.family.denoiser, lambda: 2)
        loss = take_step(run, step)
        sizes.append(run.micro_batch)
        return loss

    lora.LoraRun.take_step = with_little_memory
    train_lora(options)
    (options.output / f"sizes-{rank}.json").write_text(json.dumps(sizes))


def test_two_processes_agree_on_the_micro_batch(options, tmp_path):
    """One of them runs out of memory: both go on with less, to the weights of one process that had enough."""
    options = options.but(steps=3, batch_size=4, prior_pictures=0, class_prompts=())
    one = options.but(output=tmp_path / "one", gradient_accumulation_steps=2)
    expected = load_file(train_lora(one) / WEIGHTS_NAME)
    file = tmp_path / "options.json"
    file.write_text(json.dumps(flat(options), default=str))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, str(file)],
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert json.loads((options.output / f"sizes-{rank}.json").read_text()) == [4, 2, 2]
    assert done.stderr.count("going on with micro-batches of 2") == 1
    weights = load_file(options.output / WEIGHTS_NAME)
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4)


if __name__ == "__main__":
    main(sys.argv[1])
