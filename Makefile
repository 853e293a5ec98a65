# Two commands that do all of their own set-up: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python -m
ROUNDS ?= 40
SEED ?= 0

.PHONY: demo test test-fast soak lint install clean
.DEFAULT_GOAL := demo

install: $(VENV)/installed

# The environment is made anew where what it is made from has changed.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another with make PYTHON=...")'
	@[ ! -e $(VENV) ] || [ "$$(cat $@ 2>/dev/null)" = "$(CURDIR)" ] || [ $(VENV) = .venv ] || { echo "$(VENV) was not made here: it would be wiped"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@echo "installing (PyTorch, Ray and more: some minutes at the first time)"
	$(RUN) pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@echo "$(CURDIR)" > $@

demo: $(VENV)/installed
	@$(RUN) jobs.cli demo

test: $(VENV)/installed
	@$(RUN) pytest

# Without the tests that start a Ray, or that take long for another reason.
test-fast: $(VENV)/installed
	@$(RUN) pytest -m "not slow"

# Kills and faults at random: make soak ROUNDS=100 SEED=3
soak: $(VENV)/installed
	@$(RUN) tests.soak --rounds $(ROUNDS) --seed $(SEED)

lint: $(VENV)/installed
	@$(RUN) ruff check
	@$(RUN) ruff format --check
	@$(RUN) mypy
	@$(VENV)/bin/lint-imports --no-logo --no-cache

clean:
	rm -rf $(VENV) demo-output
