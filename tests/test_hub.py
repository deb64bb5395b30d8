"""Downloads, run for real: processes with a cache of their own, and a hub on this machine (`hub_server`)."""

import shutil
import subprocess
import sys
from pathlib import Path

from hub_server import HubServer

LOAD = "from nearid_personalize import IdentityScorer; print(IdentityScorer.from_pretrained({name!r}).model.dtype)"
RELEASED = "Aleksandar/nearid-siglip2"


def run(hub: HubServer, home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python process that knows no hub but ours."""
    env = hub.environment(home, PYTHONPATH=str(Path(__file__).parents[1]), **environment)
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=env)


def test_the_default_model_is_downloaded_once_and_then_needs_no_hub(
    hub: HubServer, tiny_nearid_dir: Path, tmp_path: Path
) -> None:
    hub.publish(RELEASED, tiny_nearid_dir)
    first = run(hub, tmp_path, "-c", LOAD.format(name=RELEASED))
    assert first.stdout == "torch.float32\n", first.stderr
    fetched = [request for request in hub.requests if request.startswith("GET") and "/resolve/" in request]
    assert len(fetched) == len(list(tiny_nearid_dir.iterdir()))

    hub.stop()
    again = run(hub, tmp_path, "-c", LOAD.format(name=RELEASED))
    assert again.stdout == "torch.float32\n", again.stderr


def test_a_text_image_models_vocabulary_is_downloaded_and_no_code(
    hub: HubServer, tiny_nearid_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "siglip"
    shutil.copytree(tiny_nearid_dir, folder)
    for name in ("spiece.model", "merges.txt", "modeling.py", "pytorch_model.bin"):
        (folder / name).write_bytes(b"x")
    hub.publish("owner/siglip", folder)
    code = "from nearid_personalize.checkpoints import checkpoint_folder as get; print(*get('owner/siglip').iterdir())"
    ended = run(hub, tmp_path, "-c", code)
    names = {Path(path).name for path in ended.stdout.split()}
    assert {"spiece.model", "merges.txt", "model.safetensors", "config.json"} <= names, ended.stderr
    assert not names & {"modeling.py", "pytorch_model.bin"}
