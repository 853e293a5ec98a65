# Every target creates the virtual environment that it needs. Run `make help` for the list of targets.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python -m
T ?=
ROUNDS ?= 40
SEED ?= 0

.PHONY: help install demo test test-all test-fast soak lint format docs lock clean
.DEFAULT_GOAL := help

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(VENV)/installed ## Create the virtual environment with the locked versions

# A changed pyproject.toml or constraints.txt recreates the environment. The file `installed` contains the path
# of the repository: an environment with another path, or without this file, was created by something else.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is required, and $(PYTHON) is " + sys.version.split()[0] + ": name another interpreter with make PYTHON=...")'
	@[ ! -e $(VENV) ] || [ "$$(cat $@ 2>/dev/null)" = "$(CURDIR)" ] || [ $(VENV) = .venv ] || { echo "$(VENV) was not created by this Makefile and would be deleted: name another folder with make VENV=..."; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@echo "installing PyTorch, Ray and other packages (the first installation takes several minutes)"
	$(RUN) pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@echo "$(CURDIR)" > $@

demo: $(VENV)/installed ## Label 1,000 images from a local S3 server
	@$(RUN) jobs.cli demo

test: $(VENV)/installed ## Run all tests, or one path: make test T=tests/cvt
	@$(RUN) pytest $(T)

test-all: $(VENV)/installed ## Run all tests, also the longest (T=path)
	@KILL_AT_EVERY_WRITE=1 $(RUN) pytest -m "long or not long" $(T)

test-fast: $(VENV)/installed ## Run the tests that take seconds and start no Ray (T=path)
	@$(RUN) pytest -m "not slow" $(T)

soak: $(VENV)/installed ## Label under random crashes and faults (ROUNDS=100 SEED=3)
	@$(RUN) tests.soak --rounds $(ROUNDS) --seed $(SEED)

lint: $(VENV)/installed ## Check style, formatting, types, and imports between packages
	@$(RUN) ruff check
	@$(RUN) ruff format --check
	@$(RUN) mypy
	@$(VENV)/bin/lint-imports --no-logo --no-cache

format: $(VENV)/installed ## Format the code and fix simple style faults
	@$(RUN) ruff format
	@$(RUN) ruff check --fix

docs: $(VENV)/installed ## Build the documentation site into site/
	@PYTHONPATH=. $(VENV)/bin/python docs/generate.py
	@NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --quiet --strict
	@echo "open site/index.html, or serve it with search: python -m http.server --directory site"

# uv keeps the locked versions that pyproject.toml allows. UPGRADE=--upgrade takes the latest versions instead.
lock: $(VENV)/installed ## Update constraints.txt from pyproject.toml (UPGRADE=--upgrade)
	@$(RUN) uv pip compile --quiet --universal --python-version 3.11 --all-extras --no-annotate $(UPGRADE) \
	    --custom-compile-command "make lock" --output-file constraints.txt pyproject.toml

clean: ## Delete the virtual environment and what demo and docs created
	rm -rf $(VENV) demo-output site
