# Needs git, make and Python 3.11 to 3.13; every target does its own set-up and skips it when it is up to date.
SHELL := /bin/bash
UV_VERSION := 0.13.9
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && { echo $$p; break; }; done)
BIN := .venv/bin
export OMP_WAIT_POLICY := passive
DOCKER ?= docker
IMAGE ?= cbd
TAG ?= $(shell git rev-parse --short HEAD)

.PHONY: setup run test test-fast test-services check lock compile format image image-test clean

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

test: setup  ## all tests, but for test-services
	$(BIN)/pytest -n 2 --dist worksteal -m "not services"

test-fast: setup  ## under a minute
	$(BIN)/pytest -m "not slow" -n 2 --dist worksteal

test-services: setup .venv/tracking/stamp  ## whole runs against MLflow on PostgreSQL and S3: CBD_TEST_POSTGRES, CBD_TEST_S3_ENDPOINT
	CBD_TEST_MLFLOW=$(CURDIR)/.venv/tracking/bin/python $(BIN)/pytest -m services tests/test_services.py

.venv/tracking/stamp: mlflow/requirements.lock | .venv/stamp
	$(PYTHON) -m venv --clear --without-pip .venv/tracking
	$(BIN)/uv pip install --python .venv/tracking/bin/python --quiet --require-hashes -r mlflow/requirements.lock
	@touch $@

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
	sed -n 's/^\([^ ].*==.*\) \\$$/\1/p' requirements.lock > .venv/pins.txt
	$(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate --quiet \
		--constraint .venv/pins.txt mlflow/requirements.in -o mlflow/requirements.lock

image:  ## the image of all steps and that of the tracking server: BASE=python:3.11-slim-bookworm@sha256:..., DOCKER_BUILD for more options
	@test -n "$(BASE)" || { echo "error: name the base image by its digest: make image BASE=python:3.11-slim-bookworm@sha256:DIGEST"; exit 1; }
	$(DOCKER) build $(DOCKER_BUILD) --build-arg BASE="$(BASE)" --build-arg COMMIT="$$(git rev-parse HEAD)" \
		--build-arg VERSION="$$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)" --tag "$(IMAGE):$(TAG)" .
	$(DOCKER) build $(DOCKER_BUILD) --build-arg BASE="$(BASE)" --build-arg COMMIT="$$(git rev-parse HEAD)" --tag "$(IMAGE)-mlflow:$(TAG)" mlflow

image-test:  ## runs every component inside the image: no network, read-only root, a random user
	DOCKER="$(DOCKER)" bash tests/image.sh "$(IMAGE):$(TAG)" "$(IMAGE)-mlflow:$(TAG)"

clean:
	rm -rf .venv cbd-demo cbd-workspace out
