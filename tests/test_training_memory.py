"""What a LoRA run will need: counted on fake tensors, without weights, and close to what a real step takes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_training_lora_families import NAMES, folders, load  # noqa: F401 - a fixture
from torch._subclasses.fake_tensor import FakeTensorMode

from nearid_personalize.errors import InputError
from nearid_personalize.training.lora.memory import Needs, dry_run, needs_of, outline
from nearid_personalize.training.lora.options import LoraOptions
from nearid_personalize.training.memory import PeakMemory, bytes_of

ROOT = Path(__file__).parent.parent
PLAN = LoraOptions.of(
    base_model="", references=Path(), output=Path(), resolution=64, validate_every=1, batch_size=2, text_rank=0
)


def plan(folder: Path, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, **changes: object) -> Needs:
    options = PLAN.but(base_model=str(folder), **changes)
    return needs_of(outline(options, dtype), options, device, dtype)


def test_what_is_alive_at_once_is_counted():
    with FakeTensorMode(), PeakMemory() as memory:
        first = torch.empty(1000)  # 4,000 bytes
        second = first * 2
        del first
        third = second.view(10, 100) + 1
        del second
        assert memory.now == 4000 and third.shape == (10, 100)
    assert memory.peak == 8000
    real = torch.empty(1000)
    with PeakMemory([real]) as memory:
        (real + 1).sum()
    assert memory.peak == 4004


@pytest.mark.parametrize("name", [name for name in NAMES if name != "sd_v_prediction"])
def test_every_family_is_planned_from_its_configurations_alone(name, folders, tmp_path):  # noqa: F811
    """No weight is read: the folder that is planned from has none."""
    bare = tmp_path / "bare"
    for file in folders(name).rglob("*"):
        if file.is_file() and file.suffix != ".safetensors":
            (bare / file.relative_to(folders(name))).parent.mkdir(parents=True, exist_ok=True)
            (bare / file.relative_to(folders(name))).write_bytes(file.read_bytes())
    needs = plan(bare, reward_weight=1.0, reward_model="miniworld")
    assert set(needs.phases) == {"texts", "pictures", "steps", "reward", "drawing"}
    pipe = load(folders(name))
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    frozen = bytes_of(denoiser) / 2  # in bfloat16
    assert needs.phases["steps"] > 1e9 + frozen + 3 * needs.lora
    assert needs.phases["pictures"] > 1e9 + bytes_of(pipe.vae)
    assert needs.peak == max(needs.phases.values()) and needs.lora > 0


def test_more_pictures_and_kept_activations_need_more(folders):  # noqa: F811
    one, two = (plan(folders("flux"), micro_batch_size=size, gradient_checkpointing="off") for size in (1, 2))
    lean = plan(folders("flux"), micro_batch_size=2, gradient_checkpointing="on")
    assert one.phases["steps"] < two.phases["steps"] and lean.phases["steps"] < two.phases["steps"]
    assert (one.micro_batch, two.micro_batch, lean.checkpointed, two.checkpointed) == (1, 2, True, False)
    assert plan(folders("flux")).checkpointed and not plan(folders("flux"), "cpu").checkpointed
    assert plan(folders("sd"), dtype=torch.float32).phases["steps"] > plan(folders("sd")).phases["steps"]


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_estimate_is_what_a_real_step_takes(checkpointed):
    """Against torch's own record of what its allocator gave and took back; the benchmark does it at a larger size."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from memory import estimate_and_measure

    sys.path.pop(0)
    estimate, measured = estimate_and_measure(checkpointed, count=2, side=64)
    assert estimate == pytest.approx(measured, rel=0.15)


def test_a_device_with_less_is_warned_of():
    needs = Needs(phases={"steps": 30 * 10**9}, lora=1, disk=1, micro_batch=2, checkpointed=True)
    assert needs.warning(40 * 10**9, "cuda") == ""
    assert needs.warning(24 * 10**9, "cuda").startswith("warning: cuda has 24.0 GB, the run needs about 30.0; try")
    assert any("30.0 GB, 2 at once, gradients checkpointed" in line for line in needs.lines())


def test_checkpoints_count_on_the_disk(folders):  # noqa: F811
    bare = plan(folders("sd"), validate_every=0)
    assert bare.disk == bare.lora and "drawing" not in bare.phases
    assert plan(folders("sd"), checkpoint_every=1).disk > 3 * bare.lora


def test_a_base_model_without_configurations_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--base-model .*nowhere"):
        dry_run(PLAN.but(base_model=str(tmp_path / "nowhere")))


def test_dry_run_prints_the_plan_and_trains_nothing(tmp_path, photo_dir):
    flags = ["--base-model", "miniworld", "--references", str(photo_dir), "--output", str(tmp_path / "lora")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "trainers" / "train_lora.py"), *flags, "--dry-run"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for words in ("micro_batch_size", "steps", "peak memory", "disk"):
        assert words in done.stdout
    assert not (tmp_path / "lora").exists()
