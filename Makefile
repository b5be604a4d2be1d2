# Every target does its own set-up, in .venv; nothing outside this folder is touched.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STORY  := Tell me a story about a brave mouse.

.DEFAULT_GOAL := help
.PHONY: help setup run serve test test-slow fidelity lint types format bench notebooks clean

help:  ## print this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1|\2/p' Makefile \
		| while IFS='|' read -r target text; do printf '  make %-10s %s\n' "$$target" "$$text"; done

setup: $(VENV)/.test  ## make .venv with everything that developing needs

run: $(VENV)/.run  ## hear a story; or: make run MODEL=file.gguf PROMPT="Once upon a time"
	@$(BIN)/refollama run "$${MODEL:-fable}" $(if $(MODEL)$(PROMPT),$${PROMPT:+"$$PROMPT"},"$(STORY)")
	@$(if $(MODEL)$(PROMPT),,echo 'Now you: $(BIN)/refollama run fable')

serve: $(VENV)/.run  ## answer HTTP requests at OLLAMA_HOST (default 127.0.0.1:11434)
	@$(BIN)/refollama serve

test: $(VENV)/.test  ## the tests that a commit must pass; a few minutes
	$(BIN)/python -m pytest -n auto --dist worksteal

test-slow: $(VENV)/.clients  ## the long tests: real processes, other clients, thousands of damaged files
	$(BIN)/python -m pytest -m slow -n 2 --dist loadscope

fidelity: $(VENV)/.test  ## measure every deviation again, and write docs/fidelity.md
	$(BIN)/python -m pytest -m "" --fidelity=docs/fidelity.md

lint: $(VENV)/.test  ## style and layout, by ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test  ## types, by mypy in strict mode
	$(BIN)/mypy

format: $(VENV)/.test  ## let ruff lay out the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.bench  ## measure: load, first token, prefill, decode, rivals, and pull, in tables
	$(BIN)/python -m benchmarks.first_light
	$(BIN)/python -m benchmarks.around
	$(BIN)/python -m benchmarks.rivals --quick
	$(BIN)/python -m benchmarks.registry $(if $(MEGABYTES),--megabytes $(MEGABYTES))

# The second one without a real model shows gibberish, so what is saved in them is left alone.
notebooks: $(VENV)/.notebooks  ## run every notebook; with MODEL=file.gguf, save what it shows
	$(if $(MODEL),MODEL="$(abspath $(MODEL))") $(BIN)/jupyter nbconvert --to notebook --execute \
		--ExecutePreprocessor.record_timing=False \
		$(if $(MODEL),--inplace,--output-dir $(VENV)/notebooks) notebooks/*.ipynb

clean:  ## remove .venv and everything that was built
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each set of packages, so that `make run` waits only for what it needs.
$(VENV)/.run:       EXTRAS :=
$(VENV)/.test:      EXTRAS := [test]
$(VENV)/.clients:   EXTRAS := [test,clients]
$(VENV)/.bench:     EXTRAS := [bench]
$(VENV)/.notebooks: EXTRAS := [notebooks]

$(VENV)/.run $(VENV)/.test $(VENV)/.clients $(VENV)/.bench $(VENV)/.notebooks: setup.cfg constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV) (PyTorch is large: this takes a minute or more)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".$(EXTRAS)"
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "refollama needs Python 3.10 or newer; choose one: make PYTHON=python3.12 …"; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
		|| { rm -rf $(VENV); echo "Python's venv module is missing; on Debian: apt-get install python3-venv"; exit 1; }
