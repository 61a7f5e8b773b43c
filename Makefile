# Each target makes what it needs, from a bare Python with pip.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# With another one, .ci/run makes its virtual environments sooner.
INSTALLER ?= $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
# Tests start Python hundreds of times: what it compiles is kept, in the virtual environment. So pip compiles nothing
# of the thousands of files that are never imported.
export PYTHONPYCACHEPREFIX = $(abspath $(VENV))/.pycache
unexport PYTHONDONTWRITEBYTECODE
# With `dummy` the documentation is checked, and nothing is written: half the time.
BUILDER ?= html
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

.PHONY: help demo test check lint types editor docs spec bench load up lock image clean

help:  ## This list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "%-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.run  ## The example shop's story, over HTTP and with timings; ends by itself; ARGS=--serve: stays open; -v: Redis' commands
	PYTHONPATH=examples $(BIN)/python -m shop.demo $(ARGS)

up: $(VENV)/.run  ## Worker, beat and Flower on this machine; Ctrl-C ends them
	$(BIN)/stillroom up

test: $(VENV)/.dev  ## All tests, on all CPUs; ARGS="-n 0 -k name" for some of them
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

check: types docs editor lint  ## Lint, format, types, layers, docs; with -j 2 side by side

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(VENV)/.dev
	$(BIN)/mypy
	$(BIN)/mypy tests/typing/public.py

editor: $(VENV)/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.dev  ## The documentation, with its reference from the code, into docs/_build/html; a broken link fails
	$(BIN)/python -m sphinx --builder $(BUILDER) --fail-on-warning --keep-going --quiet docs docs/_build/html

spec: | $(VENV)/bin/python  ## What the tests promise, as sentences; ARGS=sessions: those of some files
	@$(BIN)/python -m tests.specification $(ARGS)

bench: $(VENV)/.bench  ## What calls and pages cost beside others, into bench/results; ARGS=--quick: a few minutes
	$(BIN)/python -m bench $(ARGS)

load: $(VENV)/.load  ## The example shop under load, with Stillroom and without, and while things go wrong
	PYTHONPATH=examples $(BIN)/python -m bench.load

lock: | $(VENV)/bin/python  ## Pin what the image is built from, with hashes
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip compile pyproject.toml --extra flower --extra health --extra images --universal --python-version 3.11 --upgrade \
	  --generate-hashes --no-annotate --custom-compile-command 'make lock' --quiet --output-file requirements.lock

image:  ## The image of the stack; ARGS="--build-arg PYTHON_IMAGE=…" for another base
	docker build --tag stillroom:$(VERSION) $(ARGS) .

clean:  ## Remove what the targets made
	rm -rf $(VENV) dist artefacts docs/_build docs/reference .mypy_cache .ruff_cache .pytest_cache .hypothesis

# The virtual environment grows with what is asked of it: .run, .dev, .bench, .load
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml | $(VENV)/bin/python
	$(INSTALLER) -e '.[example,flower]'
	touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(INSTALLER) -e '.[dev]'
	touch $@ $(VENV)/.run

$(VENV)/.load: pyproject.toml | $(VENV)/bin/python
	$(INSTALLER) -e '.[load]'
	touch $@

$(VENV)/.bench: pyproject.toml | $(VENV)/bin/python
	$(INSTALLER) -e '.[bench]'
	touch $@
