# One .venv for everything. `make env` needs only python3.11 (or PYTHON=...), and is a no-op while its inputs are unchanged.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
DATA ?= ../shared/data

.PHONY: help env demo test test-kernels test-browser check bench docs mini clean

help:            ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/'

env: .venv/.stamp ## make .venv with moedge and its test tools
	@$(BIN)/python moedge/native/build.py

.venv/.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --prefer-binary -c constraints.txt -e '.[dev]'
	@touch $@

demo: env        ## three prompts on the mini model with room for half of its experts
	$(BIN)/python examples/demo.py

test: env        ## every test, on two cores
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-kernels: env ## the C kernels under sanitizers, for a minute
	MOEDGE_CHECK_SECONDS=30 $(BIN)/python -m pytest tests/native

test-browser: env ## the page of moedge serve in headless Chromium; SCREENSHOT=docs/serve-page.png takes a picture
	$(BIN)/python -m pytest -m browser tests/browser

check: env       ## lint, format, types, generated docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

docs: env        ## write the generated pages of docs/
	$(BIN)/python docs/generate.py

bench: env       ## the offloading benchmark; needs root, 8 GB of disk and about ten minutes
	$(BIN)/python benchmarks/make_olmoe.py
	$(BIN)/python benchmarks/offload.py

mini: env        ## train checkpoints/mini again; resumes where it stopped
	$(BIN)/python -m recipes.mini --data $(DATA)

clean:           ## everything that make made, but not .venv
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage* htmlcov build dist
