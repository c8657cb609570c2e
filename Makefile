# On a fresh machine: 'make demo' runs the main job, 'make test' passes all checks. Both set up .venv first, once.
# Another interpreter: make PYTHON=python3.12 test. More arguments for pytest: make test ARGS='-k wire -x'.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
# Touched when everything is installed; made anew when what is to be installed changes.
STAMP := $(VENV)/.installed

# onnxruntime reports to its maker unless it is told not to.
export ORT_DISABLE_TELEMETRY = 1

.DEFAULT_GOAL := help
.PHONY: help setup test test-gpu demo bench format clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*  ## /  make \1\t/' | expand -t 16

setup: $(STAMP)  ## install everything into .venv (the others do it by themselves)
	@echo "$(VENV) is ready"

test: $(STAMP)  ## all checks: format, lint, types, tests
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

test-gpu: $(STAMP)  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu $(ARGS)

demo: $(STAMP)  ## train, export, serve and stream real sensor data
	$(BIN)/python -m recurd demo $(ARGS)

bench: $(STAMP)  ## the daemon beside its limits
	$(BIN)/python bench/limits.py $(ARGS)

format: $(STAMP)  ## put the code into its form
	$(BIN)/python -m ruff check --fix --exit-zero --quiet .
	$(BIN)/python -m ruff format .

clean:  ## remove .venv and everything that was made
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist demo-out
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "recurd needs Python 3.11 or newer: there is no $(PYTHON). Name one: make PYTHON=/usr/bin/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "recurd needs Python 3.11 or newer: $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	       "Name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) has no venv module: install it (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@echo "Setting up $(VENV) (once; some minutes)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[gpu,torch,keras,demo,dev]'
	@# For one file in its wheel, which a test serves. Without dependencies: it asks for torch, and some releases for a
	@# torchaudio that goes with an older torch only; the file needs neither.
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps silero-vad==6.2.3
	@touch $(STAMP)
