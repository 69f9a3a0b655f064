# Every target does its own set-up: a virtual environment in .venv with the pinned versions of constraints.txt.
# The set-up runs again only when one of its inputs changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# Packages of others, in an environment of their own that sees the packages of .venv.
ECOSYSTEM := .venv-ecosystem
# Only for a torch without CUDA, which brings no Triton of its own.
TRITON := triton==3.6.0
DEMO ?=
FUZZ ?=
FAULTS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test test-all test-ecosystem fuzz faults test-packages docs bench-gate gpu-check ctest sanitize lint format clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1	\2/'

$(STAMP): pyproject.toml setup.py constraints.txt $(shell find csrc -type f)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "Python 3.10 or later is needed, $(PYTHON) is older; say make PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
		|| { rm -rf $(VENV); echo "$(PYTHON) -m venv failed; install your system's package for it (python3-venv)" >&2; exit 1; }
	@echo "Setting up $(VENV) (once; a few minutes)"
	@$(BIN)/python -m pip --version
	@# torch first: its build, CPU or CUDA, decides what the rest may bring.
	$(PIP) torch setuptools wheel pybind11
	$(PIP) --no-build-isolation -e '.[dev]'
	@$(BIN)/python -c 'import triton' 2>/dev/null || { echo "$(PIP) $(TRITON)"; $(PIP) $(TRITON); }
	@touch $@

install: $(STAMP)  ## Set up .venv only

demo: $(STAMP)  ## Train the slot cell with RTRL, BPTT and TBPTT and compare them (at most 5 minutes)
	$(BIN)/sparse-rtrl demo $(DEMO)

test: $(STAMP)  ## Run the tests, one process per core, and every benchmark once
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest bench --benchmark-disable

test-all: $(STAMP)  ## The same with all combinations of parameters instead of all pairs (minutes more)
	SPARSE_RTRL_TEST_ALL=1 $(MAKE) test

$(ECOSYSTEM)/.installed: $(STAMP) tests/ecosystem/requirements.txt
	$(BIN)/python -m venv --clear $(ECOSYSTEM)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(ECOSYSTEM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth"
	$(subst $(VENV),$(ECOSYSTEM),$(PIP)) --no-deps -r tests/ecosystem/requirements.txt
	@touch $@

test-ecosystem: $(ECOSYSTEM)/.installed  ## Carry recurrent modules of other packages; write docs/modules.md
	PATH="$(abspath $(BIN)):$$PATH" OMP_NUM_THREADS=1 $(ECOSYSTEM)/bin/python -m pytest tests/ecosystem \
		--modules-table docs/modules.md

fuzz: $(STAMP)  ## Compare 10,000 random cases with BPTT (about ten minutes on two cores); FUZZ='--seed 20000' for others
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz.run --cases 10000 $(FUZZ)

faults: $(STAMP)  ## Plant faults one at a time, list those no test sees (minutes); FAULTS='--only NAME' for one
	$(BIN)/python -m tests.planted_faults $(FAULTS)

test-packages: $(STAMP)  ## Build sdist and wheels, install them where no compiler is, run README and docs
	OMP_NUM_THREADS=1 $(BIN)/python tools/test_packages.py

$(VENV)/.docs-installed: $(STAMP)
	@# The package is there already, so that this adds what its extra names and no more.
	$(PIP) 'sparse_rtrl[docs]'
	@touch $@

docs: $(VENV)/.docs-installed  ## Build the documentation in build/site, running the pages of examples/
	OMP_NUM_THREADS=1 $(BIN)/python -m mkdocs build --strict

bench-gate: $(STAMP)  ## Compare twelve ratios of time with the stored ones, against slower code (a minute)
	OMP_NUM_THREADS=1 $(BIN)/python bench/gate.py

gpu-check:  ## Build, test and measure on a GPU; needs torch, triton, nvcc and pytest, and no network
	$(PYTHON) -m bench.gpu_check

ctest: $(STAMP)  ## Build and run the C++ tests
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/cpp
	PATH="$(abspath $(BIN)):$$PATH" cmake --build build/cpp --parallel
	PATH="$(abspath $(BIN)):$$PATH" ctest --test-dir build/cpp --output-on-failure

sanitize: $(STAMP)  ## Run C++ tests and tests of the operations under ASan and UBSan
	PATH="$(abspath $(BIN)):$$PATH" tools/sanitize.sh $(abspath $(BIN))/python

lint: $(STAMP)  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy sparse_rtrl

format: $(STAMP)  ## Rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove caches and build outputs; environments and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -path './.venv*' -prune -o -name __pycache__ -type d -print | xargs rm -rf
