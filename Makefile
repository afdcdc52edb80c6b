# Two commands on a fresh machine: `make demo` and `make test`. Both make the environment first where it is missing.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
TESTS  ?= -n 2 --dist loadfile  # processes of pytest-xdist; TESTS= runs one

.PHONY: help env demo test test-all test-install lint types docs readme clean

help:  ## List the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

env: $(READY)  ## Make the environment (.venv, about 3 minutes and 6 GB)

demo: $(READY)  ## Explain two photos by an ImageNet classifier (under a minute on 2 cores)
	$(BIN)/attribution explain --out out/demo

test: $(READY)  ## Run the tests (under 8 minutes on 2 cores)
	$(BIN)/python -m pytest $(TESTS)

test-install: $(READY)  ## Run the slow tests of the installed wheel and of several processes
	$(BIN)/python -m pytest -m slow -k 'wheel or workers'

test-all: $(READY)  ## Run the slow tests too
	$(BIN)/python -m pytest $(TESTS) -m 'not readme'

lint: $(READY)  ## Check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ruff format --check --line-length 92 README.md docs/*.md docs/*/*.md

types: $(READY)  ## Check types
	$(BIN)/mypy

docs: $(READY)  ## Build the documentation into out/docs
	$(BIN)/python -m sphinx -W --keep-going -q -E -b html -d out/doctrees docs out/docs

readme: $(READY)  ## Run every command and program of README and documentation
	$(BIN)/python -m pytest -m readme tests/test_docs.py

clean:  ## Remove the environment and all outputs
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
