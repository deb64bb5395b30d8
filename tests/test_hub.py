"""Downloads, run for real: processes with a cache of their own, and a hub on this machine (`hub_server`).

Two processes do it all, since starting one costs more than what it loads: the first meets every fault and fills its
cache, the second finds no hub any more.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import checkered
from hub_server import Damage, HubServer
from test_data_sources import views, write

RELEASED = "Aleksandar/nearid-siglip2"
WHOLE = {  # what is loaded, under which name, and what comes of it
    f"load_encoder {RELEASED}": "torch.float32",
    "load_encoder owner/head": "torch.float32",
    "load_base owner/base": "StableDiffusionPipeline",
    "load_base_to_train owner/base": "StableDiffusion",
    "find_lora owner/lora": "2",
    "load_data owner/data": "x y",
    "find_pictures owner/data": "x True y True",
    "load_encoder owner/branches@tiny": "torch.float32",
    "load_base owner/branches@base": "StableDiffusionPipeline",
}
SMALL_DISK = 64 * 1024
CUT = r"cut short; run the same again"
DENIED = r"open only to those whom its owner lets in; .*hf auth login"
NOWHERE = r"not on the Hub, or not open to you"
NO_REVISION = r"no such revision"
DOWN = r"the Hub cannot be reached, and no copy is in the cache"
FAULTS = {
    "load_encoder owner/truncated": CUT,
    "load_encoder owner/interrupted": CUT,
    "load_encoder owner/gated": DENIED,
    "load_encoder owner/nowhere": NOWHERE,
    "load_encoder owner/branches@later": NO_REVISION,
    "load_base owner/truncated-base": CUT,
    "load_base owner/interrupted-base": CUT,
    "load_base owner/gated": DENIED,
    "load_base owner/nowhere": NOWHERE,
    "load_base owner/branches@later": NO_REVISION,
    "load_base owner/lora": "lacks a file that is needed here",
    "load_base_to_train owner/truncated-base": CUT,
    "load_base_to_train owner/gated": DENIED,
    "load_base_to_train owner/nowhere": NOWHERE,
    "load_base_to_train owner/branches@later": NO_REVISION,
    "find_lora owner/truncated-lora": CUT,
    "find_lora owner/gated": DENIED,
    "find_lora owner/nowhere": NOWHERE,
    "find_lora owner/lora@later": NO_REVISION,
    "load_data owner/truncated-data": CUT,
    "load_data owner/gated-data": r"gated dataset on the Hub",
    "load_data owner/nowhere": r"doesn't exist on the Hub or cannot be accessed",
    "load_data owner/data@later": NO_REVISION,
    "find_pictures owner/nowhere": NOWHERE,
    "find_pictures owner/data@later": NO_REVISION,
}
FULL = "load_encoder owner/full-disk"


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, tiny_nearid_dir: Path, tiny_pipeline_dir: Path
) -> SimpleNamespace:
    """Local copies of what the hub offers: an encoder, a head alone, a pipeline, a LoRA and a data set."""
    from nearid_personalize.encoder.checkpoints import load_encoder, save_head

    root = tmp_path_factory.mktemp("published")
    model, preprocessing, _ = load_encoder(tiny_nearid_dir)
    save_head(model, root / "head", RELEASED, preprocessing)
    save_tiny_lora(tiny_pipeline_dir, root / "lora")
    write(root / "data" / "data" / "train-00000-of-00001.parquet", views(["x", "y"]))
    (root / "photos").mkdir()
    for seed in range(3):
        checkered(seed).save(root / "photos" / f"{seed}.png")
    return SimpleNamespace(root=root, encoder=tiny_nearid_dir, base=tiny_pipeline_dir)


def save_tiny_lora(base: Path, folder: Path) -> None:
    """A LoRA of rank 2 for the UNet's attention, as diffusers' own scripts write one."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe = StableDiffusionPipeline.from_pretrained(base)
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    pipe.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(pipe.unet))


def publish_all(hub: HubServer, folders: SimpleNamespace) -> None:
    """Whole repositories, one that needs a token, one with branches, and those whose files arrive damaged."""
    root = folders.root
    hub.publish(RELEASED, folders.encoder)
    hub.publish("owner/base", folders.base)
    for name in ("head", "lora"):
        hub.publish(f"owner/{name}", root / name)
    hub.publish("owner/data", root / "data", "datasets")
    hub.publish("owner/branches", folders.encoder, revision="tiny")
    hub.publish("owner/branches", folders.base, revision="base")
    hub.publish("owner/gated", folders.encoder, token="hf_right")
    hub.publish("owner/gated-data", root / "data", "datasets", token="hf_right")
    hub.publish("owner/full-disk", folders.encoder)
    damages: tuple[Damage, ...] = ("truncated", "interrupted")
    for damage in damages:
        hub.publish(f"owner/{damage}", folders.encoder, damaged={"model.safetensors": damage})
        hub.publish(f"owner/{damage}-base", folders.base, damaged={"diffusion_pytorch_model.safetensors": damage})
    hub.publish("owner/truncated-lora", root / "lora", damaged={"pytorch_lora_weights.safetensors": "truncated"})
    table = {"train-00000-of-00001.parquet": "truncated"}
    hub.publish("owner/truncated-data", root / "data", "datasets", damaged=table)


def drive(hub: HubServer, home: Path, asked: list[str], mount: str = "") -> dict[str, str]:
    """What became of each thing asked for ("kind name"), in a process that knows no hub but ours."""
    driver = [sys.executable, str(Path(__file__).with_name("hub_driver.py")), json.dumps([a.split() for a in asked])]
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh"] if mount else []
    env = hub.environment(home, PYTHONPATH=str(Path(__file__).parents[1]), HF_HUB_DISABLE_PROGRESS_BARS="1")
    done = subprocess.run([*command, *driver], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def may_mount() -> bool:
    """Whether a process may have a small disk of its own here."""
    probe = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return shutil.which("unshare") is not None and subprocess.run(probe, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def outcomes(folders: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """What became of all that was asked for, first with a hub, then without."""
    home = tmp_path_factory.mktemp("home")
    crowded = home / "hub" / "models--owner--full-disk"
    crowded.mkdir(parents=True)
    mount = f"mount -t tmpfs -o size={SMALL_DISK} none {crowded}" if may_mount() else ""
    by_default = f"score_by_default {folders.root / 'photos'}"
    with HubServer() as hub:
        publish_all(hub, folders)
        online = drive(hub, home, [*WHOLE, by_default, *FAULTS, FULL], mount)
        requests = list(hub.requests)
        hub.stop()
        down = ["load_encoder owner/full-disk", "load_base owner/new", "find_lora owner/new", "load_data owner/new"]
        offline = drive(hub, home, [*WHOLE, by_default, *down])
    yield SimpleNamespace(
        online=online, offline=offline, requests=requests, by_default=by_default, down=down, small=bool(mount)
    )


@pytest.mark.parametrize("asked", WHOLE)
def test_what_is_whole_is_downloaded_and_then_needs_no_hub(outcomes: SimpleNamespace, asked: str) -> None:
    assert outcomes.online[asked] == WHOLE[asked]
    assert outcomes.offline[asked] == WHOLE[asked]


def test_the_released_encoder_is_what_commands_load(outcomes: SimpleNamespace) -> None:
    assert outcomes.online[outcomes.by_default] == outcomes.offline[outcomes.by_default] == "0"


def test_nothing_is_downloaded_twice(outcomes: SimpleNamespace) -> None:
    fetched = [r for r in outcomes.requests if r.startswith("GET") and "/resolve/" in r]
    whole = [r for r in fetched if f"/{RELEASED}/" in r or "/owner/base/" in r or "/owner/lora/" in r]
    assert whole and len(whole) == len(set(whole))


@pytest.mark.parametrize("asked", FAULTS)
def test_a_fault_is_told_in_one_line_that_names_what_was_asked_for(outcomes: SimpleNamespace, asked: str) -> None:
    name = asked.split()[1]
    said = outcomes.online[asked]
    assert said.startswith("error: ") and "\n" not in said and name in said
    assert re.search(FAULTS[asked], said), said


def test_a_full_disk_is_called_so(outcomes: SimpleNamespace) -> None:
    if not outcomes.small:
        pytest.skip("no small disk can be mounted here")
    assert "the disk is full; make room, or let HF_HOME name a folder on another disk" in outcomes.online[FULL]


def test_without_a_hub_what_is_not_in_the_cache_is_told(outcomes: SimpleNamespace) -> None:
    for asked in outcomes.down:
        assert DOWN in outcomes.offline[asked], asked


def test_an_interrupted_download_goes_on_by_itself(hub: HubServer, folders: SimpleNamespace, tmp_path: Path) -> None:
    hub.publish("owner/shaky", folders.encoder, damaged={"model.safetensors": "interrupted once"})
    code = "import huggingface_hub as h; print(h.snapshot_download('owner/shaky'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=hub.environment(tmp_path))
    copy = Path(done.stdout.strip()) / "model.safetensors"
    assert copy.read_bytes() == (folders.encoder / "model.safetensors").read_bytes()


def test_a_text_image_models_vocabulary_is_downloaded_and_no_code(
    hub: HubServer, tiny_nearid_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "siglip"
    shutil.copytree(tiny_nearid_dir, folder)
    for name in ("spiece.model", "merges.txt", "modeling.py", "pytorch_model.bin"):
        (folder / name).write_bytes(b"x")
    hub.publish("owner/siglip", folder)
    code = "from nearid_personalize.encoder.checkpoints import checkpoint_folder\n"
    code += "print(*checkpoint_folder('owner/siglip').iterdir())"
    env = hub.environment(tmp_path, PYTHONPATH=str(Path(__file__).parents[1]))
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    names = {Path(path).name for path in ended.stdout.split()}
    assert {"spiece.model", "merges.txt", "model.safetensors", "config.json"} <= names, ended.stderr
    assert not names & {"modeling.py", "pytorch_model.bin"}
