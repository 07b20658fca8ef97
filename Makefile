# Everything a bare machine needs is Python 3.11 or newer and make.
#
#   make demo     train, quantize, export and run a small network; prints one table
#   make test     the test-suite, once per backend
#   make lint     style and format, without changing anything
#   make format   applies both
#   make keras-tests   Keras's own tests, with the package imported first and without
#   make clean    removes the environment and every cache
#
# PYTHON=python3.12 picks another interpreter, OUT=folder another place for the demo's files,
# TENSORFLOW=, JAX= and TORCH= other builds (on a GPU machine: TENSORFLOW=tensorflow),
# BACKENDS="tensorflow jax" fewer passes, PYTEST_ARGS="-k ridge" fewer tests.

PYTHON ?= python3
VENV ?= .venv
OUT ?= keras_rq_demo
WORKERS ?= 2
BACKENDS ?= tensorflow jax torch numpy
PYTEST_ARGS ?=

# The CPU build of TensorFlow exists for Linux and Windows; elsewhere there is only one build.
ifeq ($(shell uname -s),Darwin)
TENSORFLOW ?= tensorflow
else
TENSORFLOW ?= tensorflow-cpu
endif
JAX ?= jax
# Exactly this release: a looser range can pull a build with gigabytes of GPU libraries.
TORCH ?= torch==2.13.0
# Without what they ask for: models that are made from their settings need no tensorflow-text, which
# holds TensorFlow to a release, and no downloads.
KERAS_HUB ?= keras-hub==0.32.0 regex==2026.11.19 tokenizers==0.23.3

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# One place states the version of ruff: the `dev` extra.
RUFF := $(shell sed -n 's/^ *"\(ruff==[0-9.]*\)".*/\1/p' pyproject.toml)

.PHONY: demo test notebooks keras-tests lint format clean

demo: $(VENV)/.demo
	TF_CPP_MIN_LOG_LEVEL=2 $(BIN)/python -m keras_rq demo --out $(OUT)

test: $(VENV)/.test
	$(BIN)/python tests/passes.py --workers $(WORKERS) --backends $(BACKENDS) -- $(PYTEST_ARGS)

notebooks: $(VENV)/.test
	$(BIN)/python tests/notebooks.py

keras-tests: $(VENV)/.test
	$(BIN)/python benchmarks/keras_tests.py --backends $(filter-out numpy,$(BACKENDS))

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: what is installed is installed again only when pyproject.toml changes.

$(BIN)/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), \
	  f"keras_rq needs Python 3.11 or newer; PYTHON={sys.executable} is {sys.version.split()[0]}"'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.lint: pyproject.toml | $(BIN)/python
	$(PIP) install --quiet "$(RUFF)"
	@touch $@

$(VENV)/.demo: pyproject.toml | $(BIN)/python
	$(PIP) install --quiet -e ".[demo]" $(TENSORFLOW)
	@touch $@

# One command, so that pip settles all three frameworks together.
$(VENV)/.test: pyproject.toml | $(BIN)/python
	$(PIP) install --quiet -e ".[dev]" $(TENSORFLOW) $(JAX) $(TORCH)
	$(PIP) install --quiet --no-deps $(KERAS_HUB)
	@touch $@ $(VENV)/.demo $(VENV)/.lint
