"""What the README shows must run."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    namespace: dict = {}
    exec(compile(block, "README.md", "exec"), namespace)
    assert len(namespace["result"].candidates) == 4
    assert capsys.readouterr().out.count("0.") >= 1


def test_every_named_file_exists():
    names = re.findall(r"(?:trainers|benchmarks|docs|tests|nearid_personalize)/[\w/]+\.(?:py|md|png)", README)
    assert names
    missing = [name for name in names if not (ROOT / name).exists()]
    assert not missing


def test_make_knows_the_commands():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
