"""Who hears of a run: trackers, and the Hub repository of its LoRA, uploaded for real to a server on this machine."""

import base64
import importlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from safetensors.torch import load
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nearid_personalize.errors import InputError
from nearid_personalize.training.lora.loop import WEIGHTS_NAME, train_lora
from nearid_personalize.training.lora.options import LoraOptions, Publishing
from nearid_personalize.training.lora.publishing import LOGS, PROJECT, make_repository, push_lora

TOKEN = "hf_of_this_test"


def options(base_model: Path, photos: Path, output: Path, **publishing) -> LoraOptions:
    return LoraOptions.of(
        base_model=str(base_model),
        references=photos,
        output=output,
        rank=2,
        text_rank=0,
        steps=3,
        batch_size=1,
        learning_rate=0.01,
        lr_scheduler="constant",
        warmup_steps=2,
        precision="fp32",
        publishing=Publishing(**publishing),
    )


# --- trackers --------------------------------------------------------------------------------------------------------


def test_tensorboard_hears_every_step(tiny_pipeline_dir, photo_dir, tmp_path):
    train_lora(options(tiny_pipeline_dir, photo_dir, tmp_path / "out", report_to=("tensorboard",)))
    events = EventAccumulator(str(tmp_path / "out" / LOGS / PROJECT)).Reload()
    heard = [(event.step, round(event.value, 6)) for event in events.Scalars("learning_rate")]
    assert heard == [(1, 0.005), (2, 0.01), (3, 0.01)]
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]
    assert all(event.value > 0 for event in events.Scalars("loss"))


@pytest.mark.parametrize(
    ("name", "words"), [("tensorbored", "no tracker of that name"), ("wandb", "pip install wandb")]
)
def test_trackers_that_are_not_there_are_named(name, words, tiny_pipeline_dir, photo_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("nearid_personalize.training.lora.publishing.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(InputError, match=f"--report-to {name}: .*{words}"):
        train_lora(options(tiny_pipeline_dir, photo_dir, tmp_path / "out", report_to=(name,)))
    assert not (tmp_path / "out").exists()


# --- the Hub ---------------------------------------------------------------------------------------------------------


class Receiver(BaseHTTPRequestHandler):
    """The part of the Hub that takes an upload: create, preupload, commit. What it took lies in `server.files`."""

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if not self.has_token():
            return self.answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            return self.answer({"url": f"{self.server.url}/me/sks", "id": "me/sks", "name": "me/sks"})
        if self.path.endswith("/preupload/main"):
            asked = [file["path"] for file in json.loads(body)["files"]]
            return self.answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in asked]})
        if self.path.endswith("/commit/main"):
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer({"commitUrl": f"{self.server.url}/me/sks/commit/1", "commitOid": "1" * 40})
        return self.answer({"errors": [], "warnings": []})

    def do_GET(self) -> None:
        """The repository can be read by all, and written to with the token."""
        if self.path.endswith("/auth-check/write") and not self.has_token():
            return self.answer({"error": "Forbidden"}, 403)
        self.answer({"id": "me/sks", "sha": "0" * 40, "siblings": []})

    def has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def answer(self, value: dict, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Keep quiet."""


@pytest.fixture
def hub_that_receives(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    server.files, server.created, server.url = {}, [], f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_lora_is_uploaded_with_its_card(hub_that_receives, tiny_pipeline_dir, photo_dir, tmp_path):
    make_repository("me/sks")
    folder = train_lora(options(tiny_pipeline_dir, photo_dir, tmp_path / "out"))
    assert push_lora(folder, "me/sks") == f"{hub_that_receives.url}/me/sks/commit/1"
    assert hub_that_receives.created[0]["visibility"] == "private"
    files = hub_that_receives.files
    assert set(files) == {WEIGHTS_NAME, "README.md"}
    assert load(files[WEIGHTS_NAME]).keys() and files[WEIGHTS_NAME] == (folder / WEIGHTS_NAME).read_bytes()
    card = files["README.md"].decode()
    assert 'instance_prompt: "a photo of sks dog"' in card and str(tiny_pipeline_dir) in card


def test_what_the_hub_refuses_is_one_line(hub_that_receives, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    with pytest.raises(InputError, match="--push-to-hub me/sks") as refused:
        make_repository("me/sks")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="--push-to-hub me/sks") as offline:
        make_repository("me/sks")
    with pytest.raises(InputError, match="--push-to-hub no/such/name") as misspelt:
        make_repository("no/such/name")
    assert not any("\n" in str(error.value) for error in (refused, offline, misspelt))


@pytest.fixture
def trainer():
    """The program as a module; its name is also that of a function here."""
    return importlib.import_module("nearid_personalize.train_lora")


def test_the_trainer_asks_the_hub_first_and_uploads_last(
    hub_that_receives, trainer, tiny_pipeline_dir, photo_dir, tmp_path, capsys, monkeypatch
):
    told = options(tiny_pipeline_dir, photo_dir, tmp_path / "out", push_to_hub="me/sks")
    arguments = trainer.Arguments(told, trainer.ValidationOptions())
    with monkeypatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_of_somebody_else")
        with pytest.raises(InputError, match="--push-to-hub me/sks"):
            trainer.run(arguments)
    assert not (tmp_path / "out").exists() and not hub_that_receives.files
    trainer.run(arguments)
    assert hub_that_receives.files[WEIGHTS_NAME] == (tmp_path / "out" / WEIGHTS_NAME).read_bytes()
    assert f"uploaded to {hub_that_receives.url}/me/sks/commit/1" in capsys.readouterr().out
