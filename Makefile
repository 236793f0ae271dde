# One command each for the demo, the tests and the checks; every one sets up what it needs first.
#
#   make demo                     run the demo on simulated data
#   make demo DATA=papalexi21     run it on a real data set
#   make demo DEMO_ARGS=--quick   pass further arguments to demo/run.py
#   make test PYTEST_ARGS="-k ate"
#   make coverage                 the tests, and which lines and branches they take; below 95 % it fails
#   make lint                     ruff, mypy, spelling and the layers; `make format` repairs what ruff can
#   make docs                     the documentation, in docs/_build/html
#   make linkcheck                links within the documentation and between files; asks no network
#   make setup                    only the environment, with all that development needs
#   make audit                    known vulnerabilities of what is installed (asks a database over the network)
#   make build                    source distribution and wheel, in dist/
#   make test PYTHON=python3.12 VENV=.venv312   another Python, in an environment of its own
#
# The environment is installed once and again only after pyproject.toml has changed.

PYTHON ?= python3
VENV ?= .venv
DATA ?=
DEMO_ARGS ?=
# Files of tests are spread over processes; `make test PYTEST_ARGS=` runs them one after the other.
PYTEST_ARGS ?= -n auto --maxprocesses 4 --dist loadfile

VENV_PYTHON := $(VENV)/bin/python
TEST_STAMP := $(VENV)/.installed-test
DEV_STAMP := $(VENV)/.installed-dev
DOC_STAMP := $(VENV)/.installed-doc

# On Linux, the torch that pip finds by itself brings gigabytes of CUDA libraries, of no use
# without a GPU. There we install a pinned release first, so that a locally provided CPU wheel of it
# is picked up if pip is configured with one. TORCH= leaves the choice to pip, and
# TORCH=torch==X.Y.Z, or the path of a wheel, sets another.
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
GPU := $(shell nvidia-smi >/dev/null 2>&1 && echo gpu)
PLATFORM := $(shell uname -s) $(PYTHON_VERSION) $(GPU)
ifeq ($(strip $(PLATFORM)),Linux 3.11)
TORCH ?= torch==2.13.0
endif

# Tests on real data, and the demo on it, read the files in SCVI_SAMS_DATA_DIR. An empty value counts
# as none; then a folder shared/data beside the clone is taken where there is one.
ifeq ($(strip $(SCVI_SAMS_DATA_DIR)),)
override SCVI_SAMS_DATA_DIR := $(abspath $(wildcard ../shared/data))
endif
ifeq ($(strip $(SCVI_SAMS_DATA_DIR)),)
unexport SCVI_SAMS_DATA_DIR
else
export SCVI_SAMS_DATA_DIR
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test coverage docs linkcheck lint format audit build clean distclean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

setup: $(DEV_STAMP)

# One thread, unless told otherwise: two torch threads on a busy two-core machine were measured to be
# eight times slower than one. Numba is told too: its first parallel loop (in scanpy) sets the number
# of threads of OpenMP, and so of torch, to its own.
ONE_THREAD := export OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1}; \
	export NUMBA_NUM_THREADS=$${NUMBA_NUM_THREADS:-$$OMP_NUM_THREADS};

demo: $(TEST_STAMP)
	$(ONE_THREAD) $(VENV_PYTHON) demo/run.py $(if $(DATA),--data $(DATA)) $(DEMO_ARGS)

test: $(TEST_STAMP)
	$(ONE_THREAD) $(VENV_PYTHON) -m pytest $(PYTEST_ARGS)

coverage: $(TEST_STAMP)
	$(ONE_THREAD) $(VENV_PYTHON) -m pytest $(PYTEST_ARGS) --cov --cov-report=term

# From nothing each time: pages of functions that are gone would stay, and warnings are shown once only.
docs: $(DOC_STAMP)
	rm -rf docs/_build docs/api/generated docs/tutorials
	$(ONE_THREAD) $(VENV_PYTHON) -m sphinx -W --keep-going -b html docs docs/_build/html

# A link to a page, heading or object that is not there is a warning, and so an error.
linkcheck: $(DOC_STAMP)
	rm -rf docs/_build/links docs/api/generated docs/tutorials
	$(ONE_THREAD) $(VENV_PYTHON) -m sphinx -W --keep-going -b dummy docs docs/_build/links
	$(ONE_THREAD) $(VENV_PYTHON) -m pytest tests/test_links.py

lint: $(DEV_STAMP)
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m mypy
	$(VENV)/bin/codespell
	$(VENV)/bin/lint-imports --no-logo

format: $(DEV_STAMP)
	$(VENV_PYTHON) -m ruff check --fix .
	$(VENV_PYTHON) -m ruff format .

audit: $(TEST_STAMP)
	$(VENV_PYTHON) -m pip install --quiet pip-audit
	$(VENV_PYTHON) -m pip_audit --skip-editable

# The wheel is built from the source distribution, so a file missing from either shows here.
build: $(DEV_STAMP)
	rm -rf dist
	$(VENV_PYTHON) -m build
	$(VENV_PYTHON) -m zipfile -l dist/*.whl | grep scvi_sams/py.typed
	$(VENV_PYTHON) -m zipfile -l dist/*.whl | grep scvi_sams/benchmark/report.html.jinja
	$(VENV_PYTHON) -m zipfile -l dist/*.whl | grep scvi_sams/pages/page.html.jinja
	$(VENV_PYTHON) -m zipfile -l dist/*.whl | grep scvi_sams/cli/summary.html.jinja

$(VENV_PYTHON):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or newer is needed: name one, as in: make PYTHON=python3.12' >&2; exit 1; }
	@echo 'Setting up $(VENV): some minutes, once.'
	$(PYTHON) -m venv $(VENV)

# pip 25.1 is the first that reads dependency groups.
$(TEST_STAMP): pyproject.toml $(VENV_PYTHON)
	$(VENV_PYTHON) -m pip install --upgrade 'pip>=25.1'
	$(if $(TORCH),$(VENV_PYTHON) -m pip install '$(TORCH)')
	$(VENV_PYTHON) -m pip install --editable . --group test
	@touch $@

$(DEV_STAMP): $(TEST_STAMP)
	$(VENV_PYTHON) -m pip install --group dev
	@touch $@

$(DOC_STAMP): $(TEST_STAMP)
	$(VENV_PYTHON) -m pip install --group doc
	@touch $@

clean:
	rm -rf docs/_build docs/api/generated docs/tutorials
	rm -rf build dist demo_output mutants .coverage .coverage.* htmlcov .mypy_cache .pytest_cache .ruff_cache
	find src tests demo benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# Everything that make installed goes as well.
distclean: clean
	rm -rf .venv*
