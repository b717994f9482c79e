# Two commands: `make demo` and `make test`. Everything else is a step of one of them.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help demo test lint types contracts unit bench engine clean

help:
	@echo "make demo   install, run the default sweep, write results/demo/"
	@echo "make test   install if missing, then lint, types, import contracts, tests"
	@echo "make bench  print simulated requests per CPU second"
	@echo "make engine install the real SGLang for the CPU into .engine (about 3 GB)"
	@echo "make clean  remove the environment and every generated file"

$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 or pass PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

demo: $(STAMP)
	$(BIN)/voltana demo --out results/demo

test: lint types contracts unit

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

contracts: $(STAMP)
	$(BIN)/lint-imports

unit: $(STAMP)
	$(BIN)/pytest

bench: $(STAMP)
	$(BIN)/python benchmarks/requests_per_second.py

engine:
	sh hwreplay/engine/install.sh .engine

clean:
	rm -rf $(VENV) results .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
