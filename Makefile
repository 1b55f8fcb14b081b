# The first target that needs it installs into .venv; it is done again when pyproject.toml or constraints.txt change.
PYTHON = python3
BIN = .venv/bin
INSTALLED = .venv/installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-gpu lint types check format clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## +/\t/' | expand -t 14

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing into .venv (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tilestream needs Python 3.11 or newer, got " \
		+ sys.version.split()[0] + "; use make PYTHON=/path/to/python3.11")'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --upgrade 'pip>=25.1'  # 25.1 knows --group
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt --editable . --group dev
	@touch $@

install: $(INSTALLED)  ## everything needed, into .venv

demo: $(INSTALLED)  ## synthetic photographs through the whole method, into demo/
	$(BIN)/tilestream demo --out demo

test: $(INSTALLED)  ## the tests, without those marked slow or gpu
	$(BIN)/python -m pytest

test-slow: $(INSTALLED)  ## the tests marked slow
	$(BIN)/python -m pytest -m 'slow and not gpu'

test-gpu: $(INSTALLED)  ## the tests marked gpu: they need a CUDA device
	$(BIN)/python -m pytest -m gpu

lint: $(INSTALLED)  ## ruff: rules and layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)  ## mypy
	$(BIN)/mypy

check: lint types test test-slow  ## all that needs no GPU

format: $(INSTALLED)  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv, builds and caches; results stay
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
