"""The page without a browser: folders, the line for the device, the studio, and the endpoints."""

import asyncio
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_uploads import BAD_LORAS, BAD_PICTURES, pair

from nearid_personalize import IdentityScorer
from nearid_personalize.commands.options import Demo
from nearid_personalize.demo.api import PHOTO_FILES, checked_places
from nearid_personalize.demo.handlers import Handlers
from nearid_personalize.demo.jobs import Cancelled, Device, Job
from nearid_personalize.demo.server import credentials, serve
from nearid_personalize.demo.studio import CARD_SCALES, CardRequest, Studio, TrainingRequest, lora_options
from nearid_personalize.demo.visitors import Visitors
from nearid_personalize.errors import InputError
from nearid_personalize.images import IMAGE_SUFFIXES
from nearid_personalize.miniworld import example_references

gradio_client = pytest.importorskip("gradio_client")


# --- visitors --------------------------------------------------------------------------------------------------------


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "mine.png"
    example_references(0, split="val")[0][0].save(path)
    return path


def test_each_visitor_has_a_folder_that_cannot_be_guessed(tmp_path, photo):
    visitors = Visitors(tmp_path / "root", 60, 5)
    one, other = visitors.new(), visitors.new()
    assert one.add_photos([photo]) == [] and other.photos == []
    assert one.photos[0].is_relative_to(one.folder)
    assert not one.folder.is_relative_to(other.folder) and len(one.folder.name) >= 24
    assert (tmp_path / "root").stat().st_mode & 0o077 == 0


def test_folders_go_after_the_time_stated_and_not_while_a_job_runs(tmp_path, photo):
    visitors = Visitors(tmp_path / "root", 60, 5)
    idle, working, fresh = visitors.new(), visitors.new(), visitors.new()
    for visitor in (idle, working, fresh):
        visitor.add_photos([photo])
    now = time.monotonic()
    idle.last_seen = working.last_seen = now - 61
    with working.at_work():
        working.last_seen = now - 61
        assert visitors.sweep(now) == 1
        assert not idle.folder.exists() and working.folder.exists() and fresh.folder.exists()
    assert visitors.sweep(time.monotonic() + 61) == 2 and len(visitors) == 0


def test_photos_lose_their_metadata_and_are_limited(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "where I live"
    picture = tmp_path / "a.jpg"
    example_references(0)[0][0].save(picture, exif=exif)
    visitor = Visitors(tmp_path / "root", 60, 2).new()
    refused = visitor.add_photos([picture, picture, picture])
    assert len(visitor.photos) == 2 and "room for 2 photos" in refused[0]
    assert not Image.open(visitor.photos[0]).getexif()
    visitor.remove_photos([0, 7])
    assert len(visitor.photos) == 1


def test_a_full_folder_takes_nothing_more(tmp_path, photo):
    visitors = Visitors(tmp_path / "all", keep_seconds=60, max_photos=20, max_bytes=2 * photo.stat().st_size)
    visitor = visitors.new()
    refused = visitor.add_photos([photo] * 4)
    assert 1 <= len(visitor.photos) < 4 and all("your folder is full" in sentence for sentence in refused)
    with pytest.raises(InputError, match="your folder is full"):
        visitor.new_folder("lora")
    visitor.remove_photos(range(4))
    assert visitor.add_photos([photo]) == [] and visitor.new_folder("lora").is_dir()


def test_a_bad_photo_is_refused_by_its_own_name(tmp_path, photo):
    bad = tmp_path / "evil.svg"
    bad.write_text("<svg><script>alert(1)</script></svg>")
    visitor = Visitors(tmp_path / "root", 60, 5).new()
    (sentence,) = visitor.add_photos([bad, photo])
    assert sentence.startswith("evil.svg: not a picture") and len(visitor.photos) == 1


# --- one job per device ----------------------------------------------------------------------------------------------


def test_jobs_have_the_device_one_at_a_time_in_the_order_they_came():
    device, running, log = Device(), [], []

    def work(number: int):
        def run(report_progress) -> int:
            running.append(number)
            assert len(running) == 1
            time.sleep(0.02)
            running.remove(number)
            log.append(number)
            return number

        return run

    def listen(job: Job) -> None:
        assert [news for news in job.news() if news is not None][-1] in range(5)

    listeners = []
    for number in range(5):
        listeners.append(threading.Thread(target=listen, args=[Job(work(number), device)]))
        listeners[-1].start()
        time.sleep(0.01)
    for listener in listeners:
        listener.join(10)
    assert log == [0, 1, 2, 3, 4] and len(device) == 0


def test_a_job_whose_listener_leaves_frees_the_device():
    device, ended = Device(), threading.Event()

    def endless(report_progress) -> int:
        try:
            while True:
                report_progress(0)
                time.sleep(0.01)
        except Cancelled:
            ended.set()
            raise

    news = Job(endless, device).news()
    assert next(news) == 0 or next(news) == 0
    news.close()
    assert ended.wait(2)
    assert [n for n in Job(lambda report_progress: 1, device).news() if n is not None] == [1]


def test_a_job_that_waits_leaves_the_line_when_cancelled():
    device, go = Device(), threading.Event()
    first = Job(lambda report_progress: go.wait(10), device).news()
    next(first)
    waiting = Job(lambda report_progress: 1, device)
    news = waiting.news()
    while not waiting.ahead:
        assert next(news) is None
    waiting.cancel()
    assert list(news) in ([], [None]) and len(device) == 1
    go.set()
    assert list(first)[-1] is True


def test_errors_of_the_work_are_raised_to_the_listener_and_the_line_is_limited():
    device = Device(max_waiting=0)

    def fail(report_progress) -> int:
        raise InputError("no such thing")

    with pytest.raises(InputError, match="no such thing"):
        list(Job(fail, device).news())
    go = threading.Event()
    first = Job(lambda report_progress: go.wait(10), device).news()
    next(first)
    with pytest.raises(InputError, match="others are waiting"):
        list(Job(lambda report_progress: 1, device).news())
    go.set()
    list(first)


# --- safe by default -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "::"])
def test_a_public_host_needs_a_password(host, monkeypatch):
    monkeypatch.delenv("NEARID_DEMO_AUTH", raising=False)
    with pytest.raises(InputError, match="--auth user:password"):
        credentials(Demo(host=host))
    assert credentials(Demo(host=host, auth="ann:secret:x")) == ("ann", "secret:x")
    monkeypatch.setenv("NEARID_DEMO_AUTH", "bob:hush")
    assert credentials(Demo(host=host)) == ("bob", "hush")


def test_the_command_refuses_in_one_line():
    code = "from nearid_personalize.cli import main; main()"
    for flags, told in ((["--host", "0.0.0.0"], "--auth"), (["--keep-hours", "0"], "--keep-hours")):
        environment = {k: v for k, v in os.environ.items() if k != "NEARID_DEMO_AUTH"}
        run = subprocess.run(
            [sys.executable, "-c", code, "demo", *flags], capture_output=True, text=True, timeout=120, env=environment
        )
        assert run.returncode == 2 and run.stderr.count("\n") == 1 and told in run.stderr


# --- what the page does ----------------------------------------------------------------------------------------------


def test_a_lora_gets_its_report_card(tmp_path):
    studio = Studio(IdentityScorer.from_pretrained("miniworld"), "miniworld", ("miniworld",))
    visitor = Visitors(tmp_path, 60, 5).new()
    folder = visitor.new_folder("photos")
    for place, photo in enumerate(example_references(0, split="val", category="dog")[0]):
        photo.save(folder / f"{place}.png")
    visitor.add_photos(sorted(folder.iterdir()))
    request = TrainingRequest("miniworld", folder, "dog", visitor.new_folder("lora"), steps=2)
    lora = last(studio.training(request)).lora
    request = CardRequest(
        "miniworld",
        tuple(visitor.photos),
        lora / "pytorch_lora_weights.safetensors",
        "sks dog",
        ("a photo of sks dog in snow",),
        visitor.new_folder("card"),
        steps=2,
    )
    marks = last(studio.card(request))
    assert marks.share == 1 and {cell.scale for cell in marks.card.cells} == set(CARD_SCALES)
    assert {"report_card.html", "report.json", "contact_sheet.png"} == {path.name for path in request.output.iterdir()}


def last(job: Job):
    """What a job returned."""
    return [news for news in job.news() if news is not None][-1]


def test_whatever_is_read_may_be_uploaded():
    """Python's table of MIME types knows neither .mpo nor, on a bare machine, .webp."""
    for suffix in IMAGE_SUFFIXES:
        assert gradio_client.utils.is_valid_file(f"IMG_1{suffix.upper()}", PHOTO_FILES)
    assert not gradio_client.utils.is_valid_file("notes.txt", PHOTO_FILES)


def test_an_uploaded_lora_is_used_until_it_is_taken_out(tmp_path):
    """A refused one leaves the box empty, and in use what was."""
    scorer = IdentityScorer.from_pretrained("miniworld")
    visitors, given = Visitors(tmp_path, 60, 5), tmp_path / "given.safetensors"
    handlers = Handlers(Studio(scorer, "miniworld", ("miniworld",)), visitors, lora=given)
    visit = handlers.welcome()["visit"]
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    good.write_bytes(pair([4, 32], [32, 4]))
    bad.write_bytes(BAD_LORAS["cut"])

    told = handlers.take_lora(visit, str(good))
    assert "good.safetensors will be used" in told["train_note"] and "lora_file" not in told
    used = visit.lora_in_use
    assert used.read_bytes() == good.read_bytes()
    told = handlers.take_lora(visit, str(bad))
    assert "bad.safetensors:" in told["train_note"].lower() and told["lora_file"] is None
    assert visit.lora_in_use == used
    assert handlers.drop_lora(visit) == {"train_note": ""}
    assert visit.lora_in_use == given


# --- the page as a server --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    opened = serve(Demo(port=free_port(), lora_steps=3, steps=4, max_photos=6, max_upload_mb=16), block=False)
    yield opened
    opened.close()
    assert not opened.root.exists()


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    return gradio_client.Client(server.url, verbose=False, download_files=tmp_path_factory.mktemp("downloads"))


@pytest.fixture(scope="module")
def pet(tmp_path_factory) -> list:
    """Four photos of a validation dog, as the client sends them."""
    paths = [tmp_path_factory.mktemp("pet") / f"photo {place}.png" for place in range(4)]
    for path, photo in zip(paths, example_references(0, split="val", category="dog")[0]):
        photo.save(path)
    return [gradio_client.handle_file(path) for path in paths]


def test_only_the_named_endpoints_are_public_and_typed(client):
    told = client.view_api(return_format="dict")
    named = {"/sample_photos", "/check_photos", "/compare", "/train", "/generate", "/report_card"}
    assert set(told["named_endpoints"]) == named
    assert not told["unnamed_endpoints"]
    names = [parameter["parameter_name"] for parameter in told["named_endpoints"]["/generate"]["parameters"]]
    assert names[:4] == ["photos", "text", "word", "lora"]


def test_check_and_compare(client, pet, tmp_path):
    check = client.predict(pet, api_name="/check_photos")
    assert len(check["photos"]) == 4 and all(not photo["problems"] for photo in check["photos"])
    stranger = tmp_path / "stranger.png"
    example_references(5, split="val", category="dog")[0][0].save(stranger)
    same, overlay = client.predict(pet[:2], pet[2:], api_name="/compare")
    other, _ = client.predict(pet[:2], [gradio_client.handle_file(stranger)], api_name="/compare")
    assert same["verdict"] == "same" and other["verdict"] == "different" and other["score"] < same["score"]
    assert same["false_accept_rate"] <= 0.01 < other["false_accept_rate"]
    assert Image.open(overlay).size == (64, 64)


def test_train_then_generate(client, pet):
    told, lora = client.predict(pet, "dog", "miniworld", 0, 0, api_name="/train")
    assert told["status"] == "done" and told["step"] == told["steps"] == 3 and told["identity"]
    arguments = (pet, "in space", "dog", gradio_client.handle_file(lora), "miniworld", 1, 3, "lenient", 5, 4)
    report, accepted, archive = client.predict(*arguments, api_name="/generate")
    assert report["prompt"] == "a photo of sks dog in space" and report["models"]["lora"]
    assert {c["seed"] for c in report["candidates"]} == {5, 6, 7}
    assert len(accepted or []) == sum(c["status"] == "accepted" for c in report["candidates"])
    with zipfile.ZipFile(archive) as content:
        names = {Path(name).name for name in content.namelist()}
        inside = json.loads(content.read(next(n for n in content.namelist() if n.endswith("report.json"))))
    assert {"report.json", "contact_sheet.png", "reference-0.png"} <= names
    assert {c["image"] for c in inside["candidates"] if c["image"]} <= names


def test_train_then_report_card(client, pet):
    _, lora = client.predict(pet, "dog", "miniworld", 0, 0, api_name="/train")
    lora = gradio_client.handle_file(lora)
    told, archive = client.predict(pet, lora, "dog", "miniworld", "in space\nin the snow", 4, api_name="/report_card")
    assert told["status"] == "done" and told["verdict"]
    with zipfile.ZipFile(archive) as content:
        names = {Path(name).name for name in content.namelist()}
        inside = json.loads(content.read(next(n for n in content.namelist() if n.endswith("report.json"))))
    assert {"report.json", "report_card.html"} <= names and inside.items() <= told.items()


@pytest.mark.parametrize("texts", ["", " \n ", "in space\n" * 9])
def test_a_report_card_needs_some_places(client, pet, tmp_path, texts):
    lora = gradio_client.handle_file(written(tmp_path, "any.safetensors", b"never read"))
    assert "any.safetensors" in refusal(client, pet, lora, "dog", "miniworld", "in space", 2, api_name="/report_card")
    assert "no LoRA" in refusal(client, pet, None, "dog", "miniworld", "in space", 2, api_name="/report_card")
    with pytest.raises(InputError, match="texts: "):
        checked_places(texts, "dog")


def test_the_lora_of_one_call_is_not_in_the_next(client, pet):
    """The same seeds without a LoRA, before and after a call with one, give the same scores."""
    _, lora = client.predict(pet, "dog", "miniworld", 0, 0, api_name="/train")

    def scores(file) -> dict:
        arguments = (pet, "in space", "dog", file, "miniworld", 1, 2, "strict", 0, 4)
        report, *_ = client.predict(*arguments, api_name="/generate")
        return {c["seed"]: c["score"] for c in report["candidates"]}

    before, between, after = scores(None), scores(gradio_client.handle_file(lora)), scores(None)
    assert before == pytest.approx(after) and before != pytest.approx(between)


def test_two_visitors_at_once_get_their_own(server, tmp_path):
    """Each draws from own seeds and compares own pets, at the same time."""

    def visit(number: int, found: list) -> None:
        client = gradio_client.Client(server.url, verbose=False, download_files=tmp_path / str(number))
        photos = [item["image"] if isinstance(item, dict) else item for item in sample(client, number)]
        told = [gradio_client.handle_file(path) for path in photos]
        arguments = (told, "in snow", "cat", None, "miniworld", 1, 2, "strict", 100 * number, 4)
        report, _, archive = client.predict(*arguments, api_name="/generate")
        with zipfile.ZipFile(archive) as content:
            first = next(name for name in content.namelist() if name.endswith("reference-0.png"))
            pixels = Image.open(BytesIO(content.read(first))).convert("RGB").tobytes()
        found.append((number, {c["seed"] for c in report["candidates"]}, pixels))

    def sample(client, number: int) -> list:
        return client.predict("cat", number, api_name="/sample_photos")

    found: list = []
    threads = [threading.Thread(target=visit, args=[number, found]) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(180)
    assert len(found) == 2
    for number, seeds, pixels in found:
        assert seeds == {100 * number, 100 * number + 1}
        assert pixels == example_references(number, category="cat")[0][0].tobytes()


def test_a_client_that_leaves_frees_the_device(server, client, pet):
    """A long training is cancelled when its client is: the next job begins within 5 seconds."""
    job = client.submit(pet, "dog", "miniworld", 5000, 0, api_name="/train")
    while not any(told.get("step", 0) > 1 for told, _ in job.outputs()):
        time.sleep(0.1)
    left = time.monotonic()
    job.cancel()
    arguments = (pet, "in space", "dog", None, "miniworld", 1, 1, "strict", 0, 1)
    following = client.submit(*arguments, api_name="/generate")
    while not any(told.get("status") in ("drawing", "done") for told, *_ in following.outputs()):
        assert time.monotonic() - left < 30
        time.sleep(0.05)
    assert time.monotonic() - left < 5
    following.result(timeout=60)


def test_what_calls_left_behind_is_gone(server, client, pet):
    client.predict(pet, api_name="/check_photos")
    time.sleep(0.5)
    assert [path for path in (server.root / "visitors").rglob("*") if path.is_file()] == []


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / "bad" / name
    path.parent.mkdir()
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", [*BAD_PICTURES, "<b>bold<b>.png"])
def test_bad_photos_are_refused_in_a_sentence_and_the_page_goes_on(client, pet, tmp_path, name):
    path = written(tmp_path, name, BAD_PICTURES.get(name, b"GIF89a"))
    told = refusal(client, [*pet, gradio_client.handle_file(path)], api_name="/check_photos")
    assert told and "\n" not in told
    assert client.predict(pet, api_name="/check_photos")["photos"]


def test_truncated_bombs_and_large_files(client, pet, tmp_path):
    whole = tmp_path / "whole.png"
    example_references(0)[0][0].save(whole)
    cut, bomb, large = tmp_path / "cut.png", tmp_path / "bomb.png", tmp_path / "large.png"
    cut.write_bytes(whole.read_bytes()[:500])
    Image.new("1", (12_000, 12_000)).save(bomb)
    large.write_bytes(whole.read_bytes() + b"\0" * 17_000_000)
    for path, told in ((cut, "cut.png"), (bomb, "pixels"), (large, "size")):
        assert told in refusal(client, [gradio_client.handle_file(path)], api_name="/check_photos").lower()


@pytest.mark.parametrize("kind", [kind for kind in BAD_LORAS if len(BAD_LORAS[kind]) < 16_000_000])
def test_bad_loras_are_refused_in_a_sentence(client, pet, tmp_path, kind):
    lora = gradio_client.handle_file(written(tmp_path, "evil.safetensors", BAD_LORAS[kind]))
    arguments = (pet, "in space", "dog", lora, "miniworld", 1, 1, "strict", 0, 2)
    assert "evil.safetensors" in refusal(client, *arguments, api_name="/generate")
    assert "evil.safetensors" in refusal(client, pet, lora, "dog", "miniworld", "in space", 2, api_name="/report_card")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({1: ""}, "say where"),
        ({1: "x" * 401}, "say where"),
        ({2: "y" * 41}, "say in a word"),
        ({5: 0}, "num_images"),
        ({6: 49}, "num_candidates"),
        ({8: -1}, "seed"),
        ({9: 101}, "steps"),
    ],
)
def test_wishes_out_of_range_are_refused(client, pet, change, told):
    arguments = [pet, "in space", "dog", None, "miniworld", 1, 1, "strict", 0, 2]
    for place, value in change.items():
        arguments[place] = value
    assert told in refusal(client, *arguments, api_name="/generate").lower()


def refusal(client, *arguments, api_name: str) -> str:
    """The sentence with which a call is refused: no paths of the server, no traceback, no markup."""
    with pytest.raises(Exception) as caught:
        client.predict(*arguments, api_name=api_name)
    sentence = str(caught.value)
    assert "Traceback" not in sentence and "nearid-demo-" not in sentence and "<b>" not in sentence
    return sentence


def test_the_actions_are_tools_for_agents(server, client, pet):
    """With the extra `mcp`: the endpoints, and nothing else, are tools; photos are told by address."""
    mcp = pytest.importorskip("mcp")
    from mcp.client.streamable_http import streamablehttp_client

    async def ask() -> tuple[set[str], str]:
        url = f"{server.url}gradio_api/mcp/"
        async with streamablehttp_client(url) as (read, write, _), mcp.ClientSession(read, write) as session:
            await session.initialize()
            tools = (await session.list_tools()).tools
            shown = await session.call_tool("sample_photos", {"category": "dog", "number": 1})
            return {tool.name for tool in tools}, str(shown)

    tools, answer = asyncio.run(ask())
    assert tools == {"sample_photos", "check_photos", "compare", "train", "generate", "report_card"}
    assert "photo-0.png" in answer


def test_files_of_the_machine_cannot_be_read(server):
    import httpx

    for path in ("/etc/passwd", str(Path(__file__).resolve()), str(server.root)):
        assert httpx.get(f"{server.url}gradio_api/file={path}").status_code in (403, 404)


def test_lora_is_trained_in_the_precision_that_pictures_are_drawn_in(tmp_path):
    request = TrainingRequest(base_model="a/model", photos=tmp_path, word="dog", output=tmp_path)
    whole, half = lora_options(request), lora_options(request, dtype=torch.bfloat16)
    assert (whole.compute.precision, whole.compute.base_precision) == ("auto", "auto")
    assert (half.compute.precision, half.compute.base_precision) == ("bf16", "same")
    toy = lora_options(dataclasses.replace(request, base_model="miniworld"), dtype=torch.float16)
    assert (toy.compute.precision, toy.compute.base_precision) == ("fp16", "same")
