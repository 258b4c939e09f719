# make quickstart   install what the demo needs, then run it
# make test         lint, type check and tests: what CI runs
# make help         the other targets

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
WORKERS ?= auto

# One thread a process: two test processes on two cores are faster than two that fight for both.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.DEFAULT_GOAL := help
.PHONY: help quickstart test fast lint typecheck format docs chromium clean

help: ## list the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(VENV)/.installed ## install, then run the embedded demo
	$(BIN)/peft-vision quickstart

test: lint typecheck chromium ## lint, type check, every test (what CI runs)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist worksteal $(ARGS)

fast: $(VENV)/.installed-dev ## the tests that take less than 5 s each
	$(TEST_ENV) $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 -m "not slow" $(ARGS)

lint: $(VENV)/.installed-dev ## ruff check and format check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(VENV)/.installed-dev ## mypy --strict over the package
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## rewrite the code the way ruff likes it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-dev ## build the documentation site into site/
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

chromium: ## the browser that the report's tests open; they are skipped without it
	@if command -v chromium >/dev/null 2>&1; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then \
	  echo "installing Debian's chromium for the tests that open a page"; \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
	    apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1 \
	  || echo "chromium could not be installed: the tests that open a page will be skipped"; \
	else echo "no chromium: the tests that open a page will be skipped"; fi

clean: ## remove what the tools wrote, and the virtual environment
	rm -rf $(VENV) site build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find peft_vision tests examples docs -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	|| { echo "peft_vision needs Python 3.10 or newer: make PYTHON=/path/to/python3.11 ..."; exit 2; }
	"$(PYTHON)" -m venv $(VENV)

# A stamp is newer than pyproject.toml when nothing has to be installed.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(PIP) install --quiet -e ".[demo,export,report]"
	@touch $@

$(VENV)/.installed-dev: pyproject.toml | $(BIN)/python
	$(PIP) install --quiet -e ".[dev]"
	@touch $(VENV)/.installed $@
