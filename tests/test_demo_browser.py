"""The whole journey in a headless browser, on the mini-world; screenshots go to screenshots/, to be looked at."""

import json
import math
import re
import shutil
import socket
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny_pipelines
from playwright.sync_api import Browser, Page, expect, sync_playwright
from test_uploads import BAD_LORAS, BAD_PICTURES, pair

from nearid_personalize.commands.options import Demo
from nearid_personalize.demo.server import serve
from nearid_personalize.miniworld import example_references

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)")

SCREENSHOTS = Path(__file__).parent.parent / "screenshots"
QUIET = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
QUIET += " --disable-component-update --disable-sync"
PATIENCE = 180_000  # milliseconds, for a machine that is busy with other things

expect.set_options(timeout=PATIENCE)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def server():
    opened = serve(Demo(port=free_port(), lora_steps=8, steps=8, max_photos=8, max_upload_mb=5), block=False)
    yield opened
    opened.close()


@pytest.fixture(scope="module", params=["sdxl", "flux"])
def real_family_server(request, tmp_path_factory):
    """The page on a base model of that family in bfloat16, as it is on an accelerator."""
    base = tmp_path_factory.mktemp("base") / request.param
    tiny_pipelines.build(request.param)[0].save_pretrained(base)
    options = Demo(
        port=free_port(), base_model=(str(base),), model="miniworld", dtype="bfloat16", lora_steps=1, steps=2
    )
    opened = serve(options, block=False)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET.split())
        yield opened
        opened.close()


@contextmanager
def opened_page(browser: Browser, url: str, width: int, height: int, scheme: str) -> Iterator[Page]:
    """An open page; at the end, it must not have complained, nor asked any other host for anything."""
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    opened = context.new_page()
    opened.set_default_timeout(PATIENCE)
    complaints, strangers = [], []
    opened.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda asked: strangers.append(asked.url) if is_foreign(asked.url, url) else None)
    opened.goto(url)
    expect(opened.locator("#pets .tile")).to_have_count(10)
    yield opened
    context.close()
    assert strangers == [] and complaints == []


@pytest.fixture(params=[(1280, 900, "light"), (375, 800, "dark")], ids=["desktop", "phone"])
def page(request, browser, server):
    with opened_page(browser, server.url, *request.param) as opened:
        yield opened


@pytest.fixture
def real_family_page(browser, real_family_server):
    with opened_page(browser, real_family_server.url, 1280, 900, "light") as opened:
        yield opened


def is_foreign(url: str, home: str) -> bool:
    return not url.startswith((home, home.replace("http", "ws", 1), "data:", "blob:"))


def photograph(page: Page, name: str) -> None:
    """A picture of the whole page, which must fit its width."""
    width = page.viewport_size["width"]
    SCREENSHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{width}-{name}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_from_a_sample_pet_to_the_zip(page, tmp_path):
    photograph(page, "1-open")
    page.locator("#pets .tile").nth(1).focus()
    page.keyboard.press("Enter")  # a pet can be borrowed without a mouse
    expect(page.locator("#photos .tile")).to_have_count(4)
    expect(page.locator("#photo-note")).to_contain_text("4 photos that belong together")
    expect(page.locator("#word input")).to_have_value("cat")

    page.click("#train")
    expect(page.locator("#train-progress [role=progressbar]")).to_be_visible()
    expect(page.locator("#samples img").first).to_be_visible()
    photograph(page, "2-training")
    expect(page.locator("#train-note")).to_contain_text("Learnt")
    assert "Likeness to your photos" in page.locator("#train-progress svg").get_attribute("aria-label")

    page.locator("#candidates input[type=number]").fill("6")
    page.locator("#candidates input[type=number]").press("Enter")
    page.click("#draw")
    expect(page.locator("#draw-progress [role=progressbar]")).to_be_visible()
    expect(page.locator("#headline")).to_contain_text("of 6 pictures")
    expect(page.locator("#accepted .tile, #others .tile")).to_have_count(6)
    photograph(page, "3-drawn")

    page.locator("#others .tile").first.click()
    expect(page.locator("#details figure")).to_have_count(3)
    expect(page.locator("#details")).to_contain_text("Most like photo")
    page.locator("#details summary").click()
    expect(page.locator("#details dl")).to_contain_text("Seed")
    page.click("#plain")
    expect(page.locator("#without figure")).to_have_count(2)
    photograph(page, "4-details")
    assert page.evaluate("[...document.images].filter(i => i.offsetParent && !i.alt).map(i => i.outerHTML)") == []

    with page.expect_download() as caught:
        page.click("#download")
    caught.value.save_as(tmp_path / "got.zip")
    with zipfile.ZipFile(tmp_path / "got.zip") as content:
        (report,) = (name for name in content.namelist() if name.endswith("report.json"))
        assert len(json.loads(content.read(report))["candidates"]) == 6

    page.get_by_role("tab", name="Report card").click()
    page.click("#examine")
    expect(page.locator("#card")).to_contain_text("pictures at")
    expect(page.frame_locator("#card iframe").locator("img").first).to_be_visible()
    photograph(page, "7-report-card")

    page.get_by_role("tab", name="Personalize").click()
    page.click("#forget")
    expect(page.locator("#photos .tile")).to_have_count(0)
    expect(page.locator("#photo-note")).to_contain_text("are deleted")


def test_bad_photos_and_odd_ones(page, tmp_path):
    files = odd_files(tmp_path)
    page.set_input_files("#drop input[type=file]", files)
    expect(page.locator("#photos .tile")).to_have_count(4)
    note = page.locator("#photo-note")
    expect(note).to_contain_text("hello.png: not a picture")
    expect(note).to_contain_text("Photo 4: does not look like the others")
    photograph(page, "5-doubtful")
    page.click("#tidy")
    expect(page.locator("#photos .tile")).to_have_count(3)
    page.locator("#photos .tile").nth(2).click()
    page.click("#remove")
    expect(page.locator("#photos .tile")).to_have_count(2)
    expect(note).to_contain_text("Only 2 photos")


def odd_files(folder: Path) -> list[Path]:
    """Three photos of a pet, one of another, and a file that is none."""
    shown = [*example_references(0, category="dog")[0][:3], example_references(4, category="dog")[0][3]]
    paths = [folder / f"{place}.png" for place in range(4)]
    for path, photo in zip(paths, shown):
        photo.save(path)
    broken = folder / "hello.png"
    broken.write_text("hello")
    return [*paths, broken]


def test_training_can_be_cancelled_and_a_bad_lora_is_refused(page, tmp_path):
    page.click("#train")
    expect(page.get_by_text("there are no photos yet", exact=False).first).to_be_visible()
    page.locator("#pets .tile").first.click()
    expect(page.locator("#photos .tile")).to_have_count(4)
    page.click("#train")
    page.click("#cancel-train")
    expect(page.locator("#train-note")).to_contain_text("Cancelled")
    expect(page.locator("#train")).to_be_visible()
    page.get_by_text("I have a LoRA of it already").click()
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(pair([4, 32], [32, 4]))
    page.set_input_files("#lora input[type=file]", mine)
    expect(page.locator("#train-note")).to_contain_text("mine.safetensors will be used")
    page.locator("#lora").get_by_label("Clear").click()
    expect(page.locator("#train-note")).not_to_contain_text("mine.safetensors")
    small = [content for content in BAD_LORAS.values() if len(content) < 4_000_000]
    assert len(small) > 30
    for number, content in enumerate(small):
        lora = tmp_path / f"evil-{number}.safetensors"
        lora.write_bytes(content)
        page.set_input_files("#lora input[type=file]", lora)
        expect(page.locator("#train-note")).to_contain_text(re.compile(f"{lora.name}:", re.IGNORECASE))


def test_thirty_bad_pictures_are_each_refused_by_name(page, tmp_path):
    """What the browser lets through the picker: names of pictures, whatever is inside."""
    bad = {name: content for name, content in BAD_PICTURES.items() if not name.endswith((".svg", ".eps"))}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    good = odd_files(tmp_path)[:3]
    page.set_input_files("#drop input[type=file]", [*(tmp_path / name for name in bad), *good])
    expect(page.locator("#photos .tile")).to_have_count(3)
    for name in bad:
        expect(page.locator("#photo-note")).to_contain_text(name)


def test_compare(page, tmp_path):
    files = odd_files(tmp_path)
    page.get_by_role("tab", name="Compare").click()
    page.set_input_files("#compare-left input[type=file]", files[:2])
    page.set_input_files("#compare-right input[type=file]", files[3])
    page.click("#compare")
    expect(page.locator("#comparison")).to_contain_text("Different ones.")
    expect(page.locator("#comparison figure")).to_have_count(3)
    photograph(page, "6-compare")


def test_a_closed_tab_frees_the_device(browser, server):
    """Someone leaves in the middle of a long training: whoever waits gets the device within 5 seconds."""
    leaving, waiting = browser.new_context().new_page(), browser.new_context().new_page()
    for tab in (leaving, waiting):
        tab.goto(server.url)
        tab.locator("#pets .tile").first.click()
        expect(tab.locator("#photos .tile")).to_have_count(4)
    leaving.locator("#train-steps input[type=number]").fill("1000")
    leaving.locator("#train-steps input[type=number]").press("Enter")
    leaving.click("#train")
    expect(leaving.locator("#train-progress")).to_contain_text("of 1000")
    waiting.click("#train")
    expect(waiting.locator("#train-progress")).to_contain_text("1 before you")
    left = time.monotonic()
    leaving.context.close()
    expect(waiting.locator("#train-progress")).not_to_contain_text("before you")
    assert time.monotonic() - left < 5
    expect(waiting.locator("#train-note")).to_contain_text("Learnt")
    waiting.context.close()


# Last: gradio keeps one folder of uploads for a process, that of the server which was started last
def test_the_same_journey_with_sdxl_and_flux_in_bfloat16(real_family_page, tmp_path):
    """With the defaults of a real family: nothing that the toy world brings along, an untrained token, its own size."""
    page, paths = real_family_page, [tmp_path / f"{number}.png" for number in range(4)]
    for photo, path in zip(example_references(1, category="cat")[0], paths):
        photo.save(path)
    page.set_input_files("#drop input[type=file]", paths)
    expect(page.locator("#photos .tile")).to_have_count(4)
    page.click("#train")
    expect(page.locator("#train-note")).to_contain_text("Learnt")
    expect(page.locator("#samples img").first).to_be_visible()

    page.locator("#candidates input[type=number]").fill("4")
    page.locator("#candidates input[type=number]").press("Enter")
    page.click("#draw")
    expect(page.locator("#headline")).to_contain_text("of 4 pictures")
    page.locator("#others .tile").first.click()
    expect(page.locator("#details figure")).to_have_count(3)
    with page.expect_download() as caught:
        page.click("#download")
    caught.value.save_as(tmp_path / "got.zip")
    with zipfile.ZipFile(tmp_path / "got.zip") as content:
        (report,) = (name for name in content.namelist() if name.endswith("report.json"))
        candidates = json.loads(content.read(report))["candidates"]
    assert len(candidates) == 4 and all(math.isfinite(candidate["score"]) for candidate in candidates)

    page.get_by_role("tab", name="Report card").click()
    page.click("#examine")
    expect(page.locator("#card")).to_contain_text("pictures at")
    expect(page.frame_locator("#card iframe").locator("img").first).to_be_visible()
