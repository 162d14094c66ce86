# Everything that there is to type: `make` lists it. Two commands matter: `make course` and `make test`.
# All paths are relative, so the checkout may lie in a folder with spaces in its name.

PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/python -m

# Two threads suit the tiny model on any machine, and forked tokenizer threads only warn.
OMP_NUM_THREADS ?= 2
export OMP_NUM_THREADS
export TOKENIZERS_PARALLELISM = false

# The tests and the committed outputs are the tiny profile's; the tests also prove that it needs no network.
test test-fast notebooks: export COURSE_PROFILE = tiny
test test-fast: export HF_HUB_OFFLINE = 1
# They are a CPU's, too: on a GPU sums are formed in another order.
test test-fast notebooks: export CUDA_VISIBLE_DEVICES =

.DEFAULT_GOAL := help
.PHONY: help setup course test test-fast lint format notebooks doctor clean

help: ## this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "Without an NVIDIA GPU, on Linux, this leaves gigabytes of CUDA packages out:"
	@echo '  make course PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"'
	@echo 'Another Python:  make setup PYTHON=python3.12     Another profile:  COURSE_PROFILE=tiny make course'

setup: $(VENV)/.installed ## a virtual environment in .venv with all that is needed (once; minutes, about 2 GB without CUDA)

course: $(VENV)/.installed ## the five notebooks in order on the profile that fits; pages in build/
	$(RUN) helpers course

test: $(VENV)/.installed ## style, tests and notebooks on the tiny profile, offline
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	OMP_NUM_THREADS=1 $(RUN) pytest -n 2 tests
	rm -rf build/tested && mkdir -p build && cp -R notebooks build/tested
	$(RUN) pytest --nbmake --overwrite --nbmake-timeout=1800 --durations=10 build/tested
	$(RUN) helpers compare build/tested

test-fast: $(VENV)/.installed ## the tests that take seconds
	OMP_NUM_THREADS=1 $(RUN) pytest -n 2 -m "not slow" tests

lint: $(VENV)/.installed ## style only
	$(RUN) ruff check .
	$(RUN) ruff format --check .

format: $(VENV)/.installed ## repairs what style can repair by itself
	$(RUN) ruff check --fix .
	$(RUN) ruff format .

notebooks: $(VENV)/.installed ## executes the notebooks in place on the tiny profile and cleans them, for a commit
	$(RUN) helpers course --in-place

doctor: $(VENV)/.installed ## does this machine have what the course needs? [OK]/[FAIL], with what to type
	$(RUN) helpers doctor

clean: ## removes build/ and caches; keeps .venv and what you trained (runs/)
	rm -rf build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path './$(VENV)' -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

# The stamp is as new as the files that say what is installed: a second `make` goes straight to work.
$(VENV)/.installed: requirements.txt requirements-dev.txt constraints.txt pyproject.toml
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "Python 3.11 or newer is needed, but '$(PYTHON) --version' says: $$($(PYTHON) --version 2>&1). Name one: make setup PYTHON=python3.12" >&2; \
	    exit 1; }; \
	  echo "Making a virtual environment in $(VENV) (seconds)."; \
	  $(PYTHON) -m venv $(VENV); }
	@echo "Installing the course's packages into $(VENV): 2 to 10 minutes, by your network; about 2 GB without CUDA, several more with it."
	$(BIN)/python -m pip install $(PIP_ARGS) -r requirements-dev.txt -c constraints.txt
	$(BIN)/python -m pip install --no-deps --no-build-isolation --editable .
	@touch $@
