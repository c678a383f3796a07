# Needs git, make and Python 3.11 to 3.13; every target does its own set-up and skips it when it is up to date.
SHELL := /bin/bash
UV_VERSION := 0.13.9
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
export OMP_WAIT_POLICY := passive

.PHONY: setup run test test-fast check lock compile format clean

setup: .venv/stamp

.venv/stamp: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 to 3.13 found; install one, or give it: make PYTHON=/path/to/python3"; exit 1; }
	@echo "set-up: virtual environment with the locked packages (about 6 GB on disk, a few minutes on the first run)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip install --quiet --compile-bytecode --require-hashes -r requirements.lock
	VIRTUAL_ENV=$(CURDIR)/.venv $(BIN)/uv pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

run: setup  ## the demo: from a poisoned delivery to a verdict, a model and evidence
	@$(BIN)/cbd demo

test: setup  ## all tests
	$(BIN)/pytest -n 2

test-fast: setup  ## under a minute
	$(BIN)/pytest -m "not slow" -n 2

check: setup  ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

compile: setup  ## refreshes the golden files
	$(BIN)/cbd compile

lock: setup  ## resolves requirements.lock anew
	$(BIN)/uv pip compile --universal --fork-strategy fewest --python-version 3.11 --generate-hashes --no-emit-index-url \
		--no-header --no-annotate --quiet --extra dev pyproject.toml -o requirements.lock

clean:
	rm -rf .venv cbd-demo cbd-workspace out
