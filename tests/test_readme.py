"""What README and guides show must run: scripts with small models in the place of theirs, commands to the parser."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import tiny_pipelines

from nearid_personalize import cli
from nearid_personalize.miniworld import example_references

ROOT = Path(__file__).parent.parent
GUIDES = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *GUIDES]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """(page, command) for every `nearid …` and `accelerate launch …` in a block without a language."""
    found = []
    for page in PAGES:
        for block in [*blocks(page, ""), *blocks(page, "bash")]:
            for line in block.replace("\\\n", " ").splitlines():
                line = line.split("  #")[0].strip()
                if line.startswith(("nearid ", "accelerate launch ")) and "…" not in line:
                    found.append((page.name, line))
    return found


def test_the_readme_is_one_screen_and_a_half():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_readme_script_runs(tmp_path, monkeypatch):
    """The script as it stands, with small models under the names that it asks for."""
    pipe, _ = tiny_pipelines.build("sdxl")
    pipe.save_pretrained(tmp_path / "base")
    (tmp_path / "photos").mkdir()
    for number, photo in enumerate(example_references(0)[0]):
        photo.save(tmp_path / "photos" / f"{number}.png")
    (script,) = blocks(ROOT / "README.md", "python")
    for shown, small in (
        ("stabilityai/stable-diffusion-xl-base-1.0", str(tmp_path / "base")),
        ("Aleksandar/nearid-siglip2", "miniworld"),
        ('"cuda"', '"cpu"'),
        ('pipe.load_lora_weights("my-lora")\n', ""),
        ("num_candidates=16", "num_candidates=4, num_inference_steps=2, height=32, width=32"),
    ):
        assert shown in script, shown
        script = script.replace(shown, small)
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    exec(compile(script, "README.md", "exec"), namespace)
    assert len(namespace["result"].candidates) == 4


def test_the_guides_script_runs(capsys):
    (script,) = blocks(ROOT / "docs" / "guard.md", "python")
    namespace: dict = {}
    exec(compile(script, "guard.md", "exec"), namespace)
    assert len(namespace["result"].candidates) == 4
    assert capsys.readouterr().out.count("0.") >= 1


@pytest.mark.parametrize(("page", "command"), commands())
def test_a_command_is_understood(page, command):
    words = shlex.split(command)
    if words[0] == "nearid":
        cli.parse(words[1:])
        return
    rest = words[2:]
    while rest[0].startswith("-") and rest[0] != "-m":
        rest = rest[1:] if rest[0] in ("--quiet", "--multi_gpu") else rest[2:]
    if rest[0] == "-m":
        module, flags = rest[1], rest[2:]
    else:
        module, flags = f"nearid_personalize.{Path(rest[0]).stem}", rest[1:]
    import_module(module).parse(flags)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_named_file_exists(page):
    text = page.read_text(encoding="utf-8")
    names = re.findall(r"(?:trainers|benchmarks|docs|tests|nearid_personalize)/[\w/]+\.(?:py|md|png|yaml)", text)
    links = [page.parent / link for link in re.findall(r"\]\((?!http)([\w/.-]+)", text)]
    missing = [name for name in names if not (ROOT / name).exists()]
    missing += [str(link) for link in links if not link.exists()]
    assert not missing


def test_make_knows_the_commands():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE):
        assert f"\n{target}:" in makefile
