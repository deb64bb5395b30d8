import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset
from transformers import SiglipVisionConfig, SiglipVisionModel

from nearid_personalize import InputError, NearIDModel, metrics
from nearid_personalize.encoder import Preprocessing, load_encoder
from nearid_personalize.images import preprocess
from nearid_personalize.training.head import (
    HeadOptions,
    anchor_first,
    batch_loss,
    batch_rows,
    cache_tokens,
    embed_slots,
    evaluate_retrieval,
    identity_similarities,
    train_head,
    warmup_cosine,
)

TRAINER = Path(__file__).parents[1] / "trainers" / "train_head.py"
PREPROCESSING = Preprocessing(size=32)


class Tiles(Dataset):
    """Identities as a coloured tile on backgrounds of any colour; a distractor is another tile in the same place.

    Every third row has only two views: its last slot is padding, filled with `padding`.
    """

    def __init__(self, num_rows, seed=0, padding=0.5):
        self.num_rows, self.seed, self.padding = num_rows, seed, padding

    def __len__(self):
        return self.num_rows

    def __getitem__(self, index):
        if not 0 <= index < self.num_rows:
            raise IndexError(index)
        generator = torch.Generator().manual_seed(self.seed * 100_003 + index)
        views = torch.rand(3, 3, 1, 1, generator=generator).expand(-1, -1, 32, 32).clone()
        distractors = views.clone()
        colour = torch.rand(3, 1, 1, generator=generator)
        for v in range(3):
            views[v, :, 8:24, 8:24] = colour
            distractors[v, :, 8:24, 8:24] = torch.rand(3, 1, 1, generator=generator)
        mask = torch.tensor([True, True, index % 3 != 0])
        views[~mask] = distractors[~mask] = self.padding
        return {"views": views, "distractors": distractors, "view_mask": mask, "distractor_mask": mask.clone()}


def vision_config():
    return SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )


def tiny_model():
    torch.manual_seed(0)
    return NearIDModel.from_vision_model(SiglipVisionModel(vision_config()))


def quick_options(output, **changes):
    options = HeadOptions(output, steps=6, batch_size=8, warmup_steps=2, evaluate_every=0)
    return dataclasses.replace(options, **changes)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- the cache


def test_cache_holds_valid_pictures_only_and_what_the_trunk_says():
    model, rows = tiny_model(), Tiles(5)
    cache = cache_tokens(model, rows, PREPROCESSING, rows_per_batch=2)
    assert cache.tokens.shape == (5 * 6 - 2 * 2, 16, 32)
    assert sorted(cache.slots[cache.slots >= 0].tolist()) == list(range(26))
    item = rows[4]
    with torch.no_grad():
        pixels = preprocess(item["distractors"], 32, PREPROCESSING.mean, PREPROCESSING.std)
        expected = model.tokens(pixels)[1]
    assert torch.allclose(cache.tokens[cache.slots[4, 1, 1]].float(), expected, atol=2e-3)


def test_padding_content_and_batching_change_nothing():
    model = tiny_model()
    one = cache_tokens(model, Tiles(4, padding=0.5), PREPROCESSING, rows_per_batch=4)
    other = cache_tokens(model, Tiles(4, padding=float("nan")), PREPROCESSING, rows_per_batch=3)
    assert torch.equal(one.slots, other.slots)
    assert torch.allclose(one.tokens.float(), other.tokens.float(), atol=2e-3)


def test_cache_on_disk_is_the_cache_in_memory(tmp_path):
    model, rows = tiny_model(), Tiles(4)
    memory = cache_tokens(model, rows, PREPROCESSING)
    disk = cache_tokens(model, rows, PREPROCESSING, file=tmp_path / "tokens")
    assert torch.equal(memory.tokens, disk.tokens)
    assert (tmp_path / "tokens").stat().st_size == 4 * 6 * 16 * 32 * 2


def test_embedded_slots_are_unit_vectors_and_zero_where_padded():
    model = tiny_model()
    cache = cache_tokens(model, Tiles(6), PREPROCESSING)
    with torch.no_grad():
        embeddings = embed_slots(model, cache, torch.tensor([3, 1]))
    assert embeddings.shape == (2, 2, 3, 32)
    lengths = torch.ones(2, 2, 3)
    lengths[0, :, 2] = 0
    assert torch.allclose(embeddings.norm(dim=-1), lengths)


# --- measuring


def test_retrieval_agrees_with_embedding_each_row_by_itself():
    model, rows = tiny_model(), Tiles(12)
    views, distractors = torch.full((2, 12, 3, 3), float("nan"))
    with torch.no_grad():
        for n in range(12):
            item = rows[n]
            pixels = {k: preprocess(item[k], 32, (0.5,) * 3, (0.5,) * 3) for k in ("views", "distractors")}
            v, d = (model.get_image_features(pixels[k]) for k in ("views", "distractors"))
            for i in range(3):
                for j in range(3):
                    if item["view_mask"][i] and item["view_mask"][j]:
                        views[n, i, j], distractors[n, i, j] = v[i] @ v[j], v[i] @ d[j]
    ours = identity_similarities(model, cache_tokens(model, rows, PREPROCESSING))
    for measured, expected in zip(ours, (views, distractors), strict=True):
        assert torch.allclose(measured, expected, atol=1e-3, equal_nan=True)
    result = evaluate_retrieval(model, rows, PREPROCESSING)
    assert result.ssr == pytest.approx(metrics.sample_success_rate(*ours))
    assert result.pa == pytest.approx(metrics.pairwise_accuracy(*ours))
    assert result.ssr_interval[0] <= result.ssr <= result.ssr_interval[1]
    assert result.pa_interval[0] <= result.pa <= result.pa_interval[1]
    assert result.num_identities == 12


# --- order, anchors, rate


def test_anchors_are_valid_even_and_leave_the_other_slots():
    mask = torch.tensor([[True, True, False], [True, True, True]]).repeat(600, 1)
    order = anchor_first(mask, torch.Generator().manual_seed(0))
    assert (order.sort(dim=1).values == torch.arange(3)).all()
    assert mask.gather(1, order)[:, 0].all()
    two, three = order[::2, 0].bincount(minlength=3), order[1::2, 0].bincount(minlength=3)
    assert two[2] == 0 and two[:2].min() > 250 and three.min() > 160


def test_each_epoch_sees_each_row_once_in_an_order_of_its_own():
    options = HeadOptions(Path("unused"), batch_size=4)
    epochs = [[batch_rows(12, options, 3 * epoch + b).tolist() for b in range(3)] for epoch in range(2)]
    assert all(sorted(row for batch in epoch for row in batch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert batch_rows(12, options, 4).tolist() == epochs[1][1]
    assert batch_rows(12, dataclasses.replace(options, seed=1), 0).tolist() != epochs[0][0]
    assert sorted(batch_rows(3, options, 7).tolist()) == [0, 1, 2]


def test_rate_rises_then_falls_to_nothing():
    factors = [warmup_cosine(step, 10, 100) for step in range(101)]
    assert factors[:11] == sorted(factors[:11]) and factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[0] > 0 and factors[10] == 1 and factors[100] == pytest.approx(0, abs=1e-6)
    assert warmup_cosine(0, 0, 1) == 1


def test_loss_depends_on_the_step_only_through_the_anchors():
    model = tiny_model()
    cache = cache_tokens(model, Tiles(6), PREPROCESSING)
    options, rows = HeadOptions(Path("unused")), torch.arange(6)
    losses = [batch_loss(model, cache, rows, options, step).item() for step in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


# --- the loop


def test_training_teaches_the_head_and_leaves_the_trunk_alone(tmp_path):
    model = tiny_model()
    before = weights(model)
    result = train_head(
        HeadOptions(tmp_path, steps=150, batch_size=32, warmup_steps=10, learning_rate=3e-3, evaluate_every=75),
        model,
        Tiles(160),
        PREPROCESSING,
        Tiles(60, seed=1),
    )
    after = weights(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("backbone.head.") for name in changed)
    assert list(result.validation) == [0, 75, 150] and len(result.losses) == 150
    assert sum(result.losses[-10:]) < sum(result.losses[:10])
    assert result.validation[150].pa_interval[0] > result.validation[0].pa_interval[1]
    assert result.validation[150].ssr > result.validation[0].ssr


def test_output_is_a_whole_model_and_nothing_else(tmp_path):
    model, preprocessing = tiny_model(), Preprocessing(32, (0.4, 0.5, 0.6), (0.3, 0.3, 0.3))
    train_head(quick_options(tmp_path / "out", checkpoint_every=2, tokens_on_disk=True), model, Tiles(9), preprocessing)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "training.json",
    ]
    again, read, _ = load_encoder(tmp_path / "out")
    assert read == preprocessing
    assert same(weights(again), weights(model))
    report = json.loads((tmp_path / "out" / "training.json").read_text())
    assert report["recipe"]["steps"] == 6 and len(report["losses"]) == 6


def test_same_seed_same_weights_other_seed_other_weights(tmp_path):
    models = []
    for number, seed in enumerate((3, 3, 4)):
        model = tiny_model()
        train_head(quick_options(tmp_path / str(number), seed=seed), model, Tiles(20), PREPROCESSING)
        models.append(weights(model))
    assert same(models[0], models[1]) and not same(models[0], models[2])


def test_resumed_run_ends_in_exactly_the_unbroken_runs_weights(tmp_path):
    unbroken = tiny_model()
    options = quick_options(tmp_path, steps=10, checkpoint_every=4, keep_checkpoint=True)
    whole = train_head(options, unbroken, Tiles(20), PREPROCESSING)
    # What lies in the folder now is the checkpoint of step 8, as if the run had been killed after it.
    resumed = tiny_model()
    rest = train_head(dataclasses.replace(options, resume=True), resumed, Tiles(20), PREPROCESSING)
    assert rest.losses == whole.losses[8:]
    assert same(weights(resumed), weights(unbroken))
    with pytest.raises(InputError, match=r"--learning-rate 0\.01: the checkpoint .* --learning-rate 0\.001"):
        train_head(
            dataclasses.replace(options, resume=True, learning_rate=1e-2), tiny_model(), Tiles(20), PREPROCESSING
        )


def test_rows_without_a_positive_are_left_out(tmp_path):
    class Alone(Tiles):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            if index != 1:
                item["view_mask"] = torch.tensor([True, False, False])
            return item

    assert cache_tokens(tiny_model(), Alone(4), PREPROCESSING).trainable_rows().tolist() == [1]

    class AllAlone(Alone):
        def __getitem__(self, index):
            return super().__getitem__(0) if index < len(self) else super().__getitem__(index)

    with pytest.raises(InputError, match="no identity has two views"):
        train_head(quick_options(tmp_path), tiny_model(), AllAlone(3), PREPROCESSING)


# --- wrong input


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"steps": 0}, "--steps"),
        ({"batch_size": 0}, "--batch-size"),
        ({"temperature": 0.0}, "--temperature"),
        ({"learning_rate": -1.0}, "--learning-rate"),
        ({"alpha": -0.5}, "--alpha"),
    ],
)
def test_impossible_options_name_their_flag(change, flag):
    with pytest.raises(InputError, match=flag):
        HeadOptions(Path("unused"), **change)


def test_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="--output"):
        train_head(quick_options(tmp_path / "file"), tiny_model(), Tiles(4), PREPROCESSING)


# --- the entry point


@pytest.fixture
def trainer(monkeypatch):
    """Runs the script's `main` here, with the flags given."""
    spec = importlib.util.spec_from_file_location("train_head", TRAINER)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_head", module)  # where tyro looks for the options' docstrings
    spec.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [TRAINER.name, *map(str, arguments)])
        return module.main()

    return run


def test_trainer_shows_its_plan_and_trains_on_the_mini_world(trainer, tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "trunk")
    arguments = ("--trunk", tmp_path / "trunk", "--num-identities", 6, "--num-validation", 3, "--steps", 2)
    assert trainer(*arguments, "--output", tmp_path / "out", "--dry-run") == 0
    assert "32 x 32 pixels" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert trainer(*arguments, "--output", tmp_path / "out") == 0
    assert "SSR" in capsys.readouterr().out
    assert not same(weights(load_encoder(tmp_path / "out")[0]), weights(tiny_model()))


@pytest.mark.parametrize(("flag", "value"), [("--trunk", "none"), ("--steps", 0), ("--num-views", 1)])
def test_trainer_answers_wrong_input_with_one_line(trainer, tmp_path, capsys, flag, value):
    tiny_model().save_pretrained(tmp_path / "trunk")
    arguments = {"--trunk": tmp_path / "trunk", "--output": tmp_path / "out", flag: value}
    assert trainer(*(item for pair in arguments.items() for item in pair)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and (flag in error or str(value) in error)
    assert not (tmp_path / "out").exists()


def test_trainer_refuses_more_than_one_process(tmp_path):
    tiny_model().save_pretrained(tmp_path / "trunk")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(TRAINER))
    result = subprocess.run(
        [sys.executable, *launcher, "--trunk", str(tmp_path / "trunk"), "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
    )
    assert result.returncode != 0 and not (tmp_path / "out").exists()
    assert "error: --num_processes 2: the head trains in one process" in result.stderr
