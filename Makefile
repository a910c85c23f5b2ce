# make demo [DATA=DIR]   the whole method on procedural tiles, or on your own folder of tiles
# make test              style and quick tests
# make test-slow         the tests that `make test` leaves out
# make docs              the tables of docs/configuration.md, from the code
# make gpu-test          the tests that need a GPU: three minutes
#
# Each sets up .venv first, when that is missing or older than pyproject.toml.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
RUN := $(VENV)/bin/python

# By environment, so that any character in a path reaches the command unchanged.
export DATA

.PHONY: help demo test test-slow gpu-test docs lint setup clean

help:
	@sed -n 's/^# \{0,1\}//p; /^$$/q' Makefile

demo: $(STAMP)
	@$(RUN) scripts/demo.py $${DATA:+--data "$$DATA"}

# Networks this small are faster in one thread than shared among several; files of tests side by side. A process
# takes up to 2 GB, so no more than four of them.
test: lint
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n logical --maxprocesses 4 --dist loadfile

test-slow: $(STAMP)
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -q -m slow

gpu-test: $(STAMP)
	@$(RUN) -m pytest -q -rs -m gpu tests/test_gpu.py

docs: $(STAMP)
	@$(RUN) docs/configuration.py

lint: $(STAMP)
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(VENV)/bin/lint-imports

setup: $(STAMP)

# The stamp comes last: an interrupted installation is repeated. A virtual environment without pip
# (Debian's python3 without python3-venv leaves one) is not kept.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: PYTHON=$(PYTHON) is not Python 3.11 or later; try make PYTHON=python3.11" >&2; \
	  exit 1; }
	@echo "Setting up $(VENV): a few minutes and some gigabytes, once"
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	@$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

clean:
	@rm -rf .pytest_cache .ruff_cache build *.egg-info
	@find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
