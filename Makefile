# The commands of longctx. `make` alone lists them.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

# Which torch: `make train` takes the CPU build; `make train TORCH_BUILD=cu128` a CUDA one.
# pip's own PIP_EXTRA_INDEX_URL names the index that carries the build (PyPI has only its default build).
TORCH_BUILD ?= cpu
TORCH_PIN := $(shell sed -n 's/^torch==//p' constraints.txt)

.PHONY: help install install-dev train test test-all check format bench bench-gpu clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "longctx needs Python >= 3.11, this is %s; set PYTHON=python3.11" % sys.version.split()[0]'
	$(PYTHON) -m venv $(VENV)

$(VENV)/torch-$(TORCH_BUILD): constraints.txt | $(VENV)/bin/python
	@rm -f $(VENV)/torch-*
	$(PIP) install -c constraints.txt 'torch==$(TORCH_PIN)+$(TORCH_BUILD)' \
	  || { echo "no build torch $(TORCH_PIN)+$(TORCH_BUILD) where pip looks; set PIP_EXTRA_INDEX_URL to an index that has it. Taking the default build (may be several GB)."; \
	       $(PIP) install -c constraints.txt torch; }
	@touch $@

$(VENV)/installed: pyproject.toml constraints.txt $(VENV)/torch-$(TORCH_BUILD)
	$(PIP) install -c constraints.txt -e .
	@touch $@

# megatron-core and yunchang are peers in tests and benchmarks; their dependencies are not needed for that.
$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) install -c constraints.txt -e '.[dev]'
	$(PIP) install -c constraints.txt --no-deps megatron-core yunchang
	@touch $@

install: $(VENV)/installed  ## create .venv with what training needs
install-dev: $(VENV)/installed-dev  ## add what tests, checks and benchmarks need

train: $(VENV)/installed  ## train the quickstart: the standard library's source at 8K context, under 5 minutes on 2 cores
	$(BIN)/longctx train configs/recipes/quickstart.yaml $(ARGS)

test: $(VENV)/installed-dev  ## the tests (under 20 minutes on 2 cores)
	$(BIN)/python -m pytest $(ARGS)

test-all: $(VENV)/installed-dev  ## the whole matrices, and the GPU tests where there is a GPU
	$(BIN)/python -m pytest -m '' $(ARGS)

check: $(VENV)/installed-dev  ## lint, format, types, import contracts, sizes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/support/sizes.py

format: $(VENV)/installed-dev  ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed-dev  ## every benchmark once with --quick; fails when a result breaks the schema
	$(BIN)/python benchmarks/run_all.py --quick

bench-gpu: $(VENV)/installed-dev  ## the GPU benchmarks; writes benchmarks/results/<gpu>/
	$(BIN)/python benchmarks/run_all.py --gpu

clean:  ## remove the environment and caches, never runs or data
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
