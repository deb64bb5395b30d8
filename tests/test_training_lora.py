"""The LoRA loop on tiny real pipelines: reload exactness, resume exactness, several processes, and refusals."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import CLIPTextModel

from nearid_personalize.errors import InputError
from nearid_personalize.lora.files import count_missing
from nearid_personalize.training.checkpoints import whole_checkpoints
from nearid_personalize.training.lora import loop as lora
from nearid_personalize.training.lora.adapters import add_adapters, make_optimizer, token_id
from nearid_personalize.training.lora.families import StableDiffusion
from nearid_personalize.training.lora.loop import WEIGHTS_NAME, LoraOptions, load_lora, read_metadata, train_lora
from nearid_personalize.training.lora.noising import flow_noising
from nearid_personalize.training.lora.pictures import batch_loss, encode_all, make_batch, read_references

ROOT = Path(__file__).parent.parent


@pytest.fixture
def options(tiny_pipeline_dir: Path, photo_dir: Path, tmp_path: Path) -> LoraOptions:
    return LoraOptions.of(
        base_model=str(tiny_pipeline_dir),
        references=photo_dir,
        output=tmp_path / "lora",
        rank=4,
        alpha=8.0,
        text_rank=2,
        steps=4,
        batch_size=4,
        learning_rate=0.01,
        text_learning_rate=0.01,
        token_learning_rate=0.1,
        precision="fp32",
    )


def load_pipe(folder: Path | str) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def predict(pipe: StableDiffusionPipeline, prompt: str = "a photo of sks dog") -> torch.Tensor:
    """One denoiser prediction on fixed noise: sees the text encoder and the UNet."""
    noise = torch.randn(1, pipe.unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    embeddings, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
    return pipe.unet(noise, 500, embeddings).sample


@pytest.mark.parametrize("base", ["tiny_pipeline_dir", "tiny_kl_pipeline_dir"])
@pytest.mark.parametrize("more", [{}, {"ema_decay": 0.9}, {"target_modules": ("to_q",), "dropout": 0.5}])
def test_stock_reload_equals_the_last_sample_of_training(base, more, options, request):
    folder, seen = request.getfixturevalue(base), []
    options = options.but(base_model=str(folder), validate_every=2, **more)
    output = train_lora(options, lambda snapshot: seen.append(predict(snapshot.pipe)))
    pipe = load_pipe(folder)
    before = predict(pipe)
    pipe.load_lora_weights(output)
    assert torch.equal(predict(pipe), seen[-1])
    assert not torch.equal(seen[0], seen[-1])
    assert (predict(pipe) - before).abs().max() > 1e-3
    assert [path.name for path in output.iterdir()] == [WEIGHTS_NAME]


def test_looking_at_a_run_does_not_change_it(options):
    def look(snapshot):
        torch.rand(3)
        snapshot.pipe("sks", num_inference_steps=1, output_type="latent")
        snapshot.save(options.output / "seen")

    options = options.but(dropout=0.5, ema_decay=0.9, prior_pictures=2, class_prompts=("a dog",))
    plain = load_file(train_lora(options) / WEIGHTS_NAME)
    watched = options.but(validate_every=1, output=options.output.with_name("watched"))
    seen = load_file(train_lora(watched, look) / WEIGHTS_NAME)
    assert all(torch.equal(seen[name], plain[name]) for name in plain)


def test_who_hears_of_every_step_may_end_the_training(options):
    heard: list[int] = []
    folder = train_lora(options, on_step=lambda step, loss: heard.append(step) or step < 2)
    assert heard == [1, 2] and read_metadata(folder)["steps"] == 2


def test_the_file_says_how_it_was_made(options):
    metadata = read_metadata(train_lora(options))
    assert metadata == {
        "base_model": options.base_model,
        "prompt": "a photo of sks dog",
        "token": "sks",
        "rank": 4,
        "alpha": 8.0,
        "steps": 4,
        "references": lora.fingerprint(read_references(options.data)),
    }


def test_half_precision_trains_and_reloads(options, tiny_pipeline_dir):
    pipe = load_pipe(tiny_pipeline_dir)
    before = predict(pipe)
    load_lora(pipe, train_lora(options.but(precision="bf16")))
    assert (predict(pipe) - before).abs().max() > 1e-3


def test_only_the_tokens_row_changes(options, tiny_pipeline_dir):
    output = train_lora(options)
    pipe = load_pipe(tiny_pipeline_dir)
    table = pipe.text_encoder.get_input_embeddings()
    ids = torch.arange(table.num_embeddings)
    before = table(ids)
    load_lora(pipe, output)
    changed = (pipe.text_encoder.get_input_embeddings()(ids) != before).any(dim=1).nonzero().flatten()
    assert changed.tolist() == pipe.tokenizer("sks", add_special_tokens=False).input_ids


def test_token_starts_at_the_mean_of_its_init_words(options, tiny_pipeline_dir):
    pipe = load_pipe(tiny_pipeline_dir)
    rows = pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    add_adapters(StableDiffusion(pipe), options.but(token_init=("a", "b")).adapter, "sks")
    row = token_id(pipe.tokenizer, "sks", "token")
    expected = rows[[token_id(pipe.tokenizer, word, "token-init") for word in ("a", "b")]].mean(0)
    actual = pipe.text_encoder.get_input_embeddings()(torch.tensor([row]))[0]
    torch.testing.assert_close(actual, expected)


class Interruption(Exception):
    pass


VARIED = {
    "plain": {},
    "everything": {
        "gradient_accumulation_steps": 2,
        "ema_decay": 0.9,
        "dropout": 0.3,
        "prior_pictures": 2,
        "class_prompts": ("a photo of a dog",),
    },
    "fp16": {"precision": "fp16"},
}


@pytest.mark.parametrize("kind", VARIED)
def test_resumed_equals_uninterrupted(kind, options, tmp_path, monkeypatch):
    options = options.but(checkpoint_every=1, checkpoints_total_limit=2, **VARIED[kind])
    whole = load_file(train_lora(options.but(output=tmp_path / "whole")) / WEIGHTS_NAME)

    take_step = lora.LoraRun.take_step

    def fail_at_step_four(run, step):
        if step == 4:
            raise Interruption
        return take_step(run, step)

    with monkeypatch.context() as patch, pytest.raises(Interruption):
        patch.setattr(lora.LoraRun, "take_step", fail_at_step_four)
        train_lora(options)
    assert [path.name for path in whole_checkpoints(options.output / "checkpoint")] == ["step-000002", "step-000003"]
    assert read_metadata(whole_checkpoints(options.output / "checkpoint")[0])["steps"] == 2
    assert not (options.output / WEIGHTS_NAME).exists()

    with pytest.raises(InputError, match="--resume"):
        train_lora(options)
    with pytest.raises(InputError, match="--rank was 4, now 8"):
        train_lora(options.but(resume=True, rank=8))
    options = options.but(resume=True, keep_checkpoints=True)
    resumed = load_file(train_lora(options) / WEIGHTS_NAME)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert [path.name for path in whole_checkpoints(options.output / "checkpoint")] == ["step-000002", "step-000003"]


def test_resume_wants_the_same_references(options, photo_dir):
    train_lora(options.but(checkpoint_every=2, keep_checkpoints=True))
    (photo_dir / "photo-3.png").unlink()
    with pytest.raises(InputError, match="--resume: references was"):
        train_lora(options.but(resume=True))


KILLS = 8


def train_on_one_thread(options: LoraOptions) -> None:
    torch.set_num_threads(1)  # the pool of a forked process has no threads left
    tqdm.set_lock(threading.RLock())  # the default one is shared by forks: one killed inside it would keep it for good
    train_lora(options)


def folders_being_written(output: Path) -> set[tuple[str, int]]:
    """Unfinished checkpoints, each with the time it was last written to."""
    found = set()
    for path in output.glob("checkpoint/.partial-*"):
        with contextlib.suppress(FileNotFoundError):  # finished just now
            found.add((path.name, path.stat().st_mtime_ns))
    return found


def test_killed_again_and_again_ends_at_the_same_weights(options, tmp_path):
    """SIGKILL while it starts, between steps, or in the middle of a checkpoint: nothing half-written is resumed."""
    options = options.but(steps=KILLS + 2, checkpoint_every=1, ema_decay=0.9, batch_size=2)
    train_lora(options.but(output=tmp_path / "whole", checkpoint_every=0))
    killed = partial = 0
    for round in range(KILLS):
        had = whole_checkpoints(options.output / "checkpoint")
        options = options.but(resume=bool(had))
        process = multiprocessing.get_context("fork").Process(target=train_on_one_thread, args=(options,))
        process.start()
        if round % 2:  # inside a checkpoint
            before = folders_being_written(options.output)
            while process.is_alive() and folders_being_written(options.output) <= before:
                pass
        else:  # somewhere after one
            while process.is_alive() and whole_checkpoints(options.output / "checkpoint")[-1:] == had[-1:]:
                time.sleep(0.002)
            time.sleep(0.02 * (round % 3))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        partial += bool(folders_being_written(options.output))
    assert killed == KILLS and partial, f"{killed} killed, {partial} of them inside a checkpoint"
    train_lora(options.but(resume=True))
    expected, weights = (load_file(folder / WEIGHTS_NAME) for folder in (tmp_path / "whole", options.output))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_two_processes_share_the_batches_of_one(options, tmp_path):
    """Two processes of one pass are one process of two: the same pictures, noise and mean gradient."""
    options = options.but(
        batch_size=2, text_rank=0, prior_pictures=2, class_prompts=("a photo of a dog",), train_token=False
    )
    one = options.but(output=tmp_path / "one", gradient_accumulation_steps=2)
    expected = load_file(train_lora(one) / WEIGHTS_NAME)
    chosen = {
        "base_model": options.base_model,
        "references": options.data.references,
        "output": options.output,
        "rank": options.adapter.rank,
        "alpha": options.adapter.alpha,
        "text_rank": 0,
        "steps": options.steps,
        "batch_size": 2,
        "learning_rate": options.optimization.learning_rate,
        "precision": "fp32",
        "prior_pictures": 2,
        "class_prompts": "a photo of a dog",
    }
    flags = [part for name, value in chosen.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, str(ROOT / "trainers" / "train_lora.py"), *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    pictures = sorted(path.name for path in (options.output / "class_pictures").glob("*.png"))
    assert pictures == ["class-0000.png", "class-0001.png"]
    assert read_metadata(options.output) == read_metadata(one.output)
    weights = load_file(options.output / WEIGHTS_NAME)
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4)


def test_frozen_text_encoder_is_encoded_once(options, monkeypatch):
    calls = []
    forward = CLIPTextModel.forward
    monkeypatch.setattr(CLIPTextModel, "forward", lambda *args, **kw: calls.append(1) or forward(*args, **kw))
    output = train_lora(options.but(text_rank=0))
    assert len(calls) == 1
    assert all(name.startswith("unet.") for name in load_file(output / WEIGHTS_NAME))


def test_training_fits_the_reference(options, tiny_pipeline_dir):
    options = options.but(steps=40)
    pipe = load_pipe(tiny_pipeline_dir)
    family = StableDiffusion(pipe)
    data = encode_all(family, options.data, read_references(options.data), [])

    @torch.no_grad()
    def held_noise_loss() -> float:
        table = family.encode_prompts(data.prompts, torch.device("cpu"))
        losses = []
        for turn in range(1000, 1010):
            batch = make_batch(data, flow_noising, options, turn)
            rows = {name: tensor[[0] * len(batch.frame)] for name, tensor in table.items()}
            predicted = family.denoise(pipe.unet, batch.noised.noisy, batch.noised.timesteps, rows, batch.frame)
            losses.append(batch_loss(predicted, batch))
        return float(torch.stack(losses).mean())

    before = held_noise_loss()
    load_lora(pipe, train_lora(options))
    assert held_noise_loss() < 0.9 * before


@pytest.mark.parametrize(("optimizer", "package"), [("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt")])
def test_optimizers_that_are_not_installed_are_named(optimizer, package, options, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.optim", None)
    with pytest.raises(InputError, match=f"pip install {package}"):
        make_optimizer([], options.but(optimizer=optimizer).optimization)


@pytest.mark.parametrize(("optimizer", "package"), [("adamw8bit", "bitsandbytes"), ("prodigy", "prodigyopt")])
def test_optional_optimizers_train(optimizer, package, options):
    pytest.importorskip(package)
    start = load_file(train_lora(options.but(steps=1)) / WEIGHTS_NAME)
    weights = load_file(train_lora(options.but(optimizer=optimizer, steps=4)) / WEIGHTS_NAME)
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert any(not torch.equal(weights[name], tensor) for name, tensor in start.items())


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"rank": 0}, "--rank"),
        ({"steps": 0}, "--steps"),
        ({"learning_rate": 0.0}, "--learning-rate"),
        ({"seed": -1}, "--seed"),
        ({"alpha": -1.0}, "--alpha"),
        ({"prompt": "a photo of a dog"}, "--prompt"),
        ({"prior_pictures": 4}, "--class-prompts"),
        ({"class_prompts": ("a dog",)}, "--prior-pictures"),
        ({"prior_pictures": 4, "class_prompts": ("a dog",), "batch_size": 1}, "--batch-size"),
        ({"resolution": 4}, "--resolution"),
        ({"text_rank": 0, "token_init": ("dog",)}, "--token-init"),
        ({"dropout": 1.0}, "--dropout"),
        ({"ema_decay": -0.1}, "--ema-decay"),
        ({"min_snr_gamma": 0.0}, "--min-snr-gamma"),
        ({"background_weight": 1.5}, "--background-weight"),
        ({"masks": Path("masks")}, "--background-weight"),
        ({"gradient_accumulation_steps": 0}, "--gradient-accumulation-steps"),
    ],
)
def test_options_name_the_wrong_flag(options, change, flag):
    with pytest.raises(InputError, match=flag):
        options.but(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model": "/nowhere/at/all"}, "--base-model /nowhere/at/all"),
        ({"references": Path("/nowhere")}, "/nowhere"),
        ({"token": "dog"}, "--token 'dog' is 3 pieces"),
        ({"resolution": 33}, "--resolution"),
        ({"output": Path("/proc/nothing")}, "--output /proc/nothing"),
        ({"resume": True}, "--resume: no checkpoint"),
        ({"min_snr_gamma": 5.0}, "--min-snr-gamma: this base model predicts flow"),
        ({"target_modules": ("nowhere",)}, "--target-modules"),
    ],
)
def test_training_names_what_is_wrong(options, change, message):
    with pytest.raises(InputError, match=message) as error:
        train_lora(options.but(**change))
    assert "\n" not in str(error.value)


def test_base_model_without_weights_is_refused(options, tiny_pipeline_dir, tmp_path):
    folder = tmp_path / "no-weights"
    for source in tiny_pipeline_dir.rglob("*.json"):
        target = folder / source.relative_to(tiny_pipeline_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    with pytest.raises(InputError, match="--base-model"):
        train_lora(options.but(base_model=str(folder)))


def broken_file(folder: Path, kind: str) -> Path:
    """A LoRA file with one fault."""
    path = folder / WEIGHTS_NAME
    if kind == "text":
        path.write_text("not safetensors")
    if kind == "no lora":
        save_file({"weight": torch.ones(2)}, path)
    if kind == "other layers":
        save_file({f"unet.elsewhere.to_q.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}, path)
    if kind == "other component":
        save_file({f"transformer.blocks.0.to_q.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}, path)
    return path


@pytest.mark.parametrize("kind", ["missing", "text", "no lora", "other layers", "other component"])
def test_a_lora_that_loads_no_layer_is_refused(kind, tiny_pipeline_dir, tmp_path):
    pipe = load_pipe(tiny_pipeline_dir)
    before = predict(pipe)
    path = broken_file(tmp_path, kind)
    for source in (path, tmp_path):
        with pytest.raises(InputError, match="LoRA") as error:
            load_lora(pipe, source)
        assert "\n" not in str(error.value)
    assert torch.equal(predict(pipe), before)


def test_load_lora_refuses_partial_and_misfitting_files(options, tiny_pipeline_dir, tmp_path):
    weights = load_file(train_lora(options) / WEIGHTS_NAME)
    name = next(name for name in weights if name.startswith("unet.") and "lora_B" in name)
    save_file({**weights, f"unet.extra.{name[5:]}": weights[name].clone()}, tmp_path / "extra.safetensors")
    save_file({**weights, name: torch.ones(99, 4)}, tmp_path / "shape.safetensors")
    for file, message in (("extra", "1 of its"), ("shape", "does not fit")):
        with pytest.raises(InputError, match=message) as error:
            load_lora(load_pipe(tiny_pipeline_dir), tmp_path / f"{file}.safetensors")
        assert "\n" not in str(error.value)


def test_convert_to_diffusers_names_would_lose_layers(options, tiny_pipeline_dir, tmp_path):
    """The naming that `save_lora` avoids is one that `load_lora` must catch."""
    from diffusers.utils import convert_state_dict_to_diffusers

    weights = load_file(train_lora(options) / WEIGHTS_NAME)
    names = sorted((name for name in weights if name.startswith("unet.")), key=lambda name: "to_" in name)
    unet = convert_state_dict_to_diffusers({name.removeprefix("unet."): weights[name] for name in names})
    save_file({f"unet.{name}": tensor for name, tensor in unet.items()}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(InputError, match=r"reached no layer|does not fit"):
        load_lora(load_pipe(tiny_pipeline_dir), tmp_path)


def test_count_missing_pairs_each_tensor_with_one_of_its_own():
    one, two = torch.ones(2), torch.full((2,), 2.0)
    assert count_missing([one, two], [two, one, one]) == 0
    assert count_missing([one, one], [one, two]) == 1
    assert count_missing([one / 3], [(one / 3).half()]) == 0


def test_a_peft_too_old_for_this_transformers_is_one_line_with_both_versions(tmp_path, photo_dir, monkeypatch):
    """transformers 5.24.0 asked for a peft that was not released."""
    monkeypatch.setattr("nearid_personalize.lora.check.MIN_PEFT_VERSION", "999.0")
    with pytest.raises(InputError, match=r"transformers \S+: LoRA in text encoders needs peft 999.0 there, and \S+ is"):
        train_lora(LoraOptions.of(base_model="miniworld", references=photo_dir, output=tmp_path / "lora", steps=1))
