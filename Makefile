# Everything runs from a private `.venv`; nothing else has to be installed than Python >= 3.11, make and pip.
# The package is installed properly, not in editable mode: tests and types see the tree that users get.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
FOLDERS := dsa_gym envs agents experiments
SOURCES := pyproject.toml constraints.txt $(shell find $(FOLDERS) -name __pycache__ -prune -o -print)
DEMO_OUT ?= runs/demo
# Further arguments for pytest: make test ARGS="-k masks"
ARGS ?=

# `python -c` and `python -m` must not find the checkout's `dsa_gym/`, which lacks envs, agents and experiments.
export PYTHONSAFEPATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# build/ must not survive: setuptools would put files deleted since into the next wheel.
REMOVE_BUILD := rm -rf build dsa_gym.egg-info
INSTALL = $(REMOVE_BUILD) && $(BIN)/python -m pip install --quiet -c constraints.txt

.PHONY: help demo test test-all lint format types wheel clean

help:
	@echo "make demo      install, train PPO on the bundled environment; prints where report and logs are"
	@echo "make test      the tests that are not slow (at most 12 minutes on two cores)"
	@echo "make test-all  all tests"
	@echo "make lint      ruff check and ruff format --check; make format repairs both"
	@echo "make types     mypy over the installed package"
	@echo "make wheel     build dist/*.whl and check its contents"
	@echo "make clean     remove .venv, builds and caches (runs/ stays)"

# Each stamp stands for an install of the sources it is newer than. `dev` includes `test`, `test` includes the base.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "no python3.11 or python3 found; name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is older than 3.11; name another: make PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	$(INSTALL) . && $(REMOVE_BUILD)
	@touch $@

$(VENV)/.installed-test: $(SOURCES) | $(BIN)/python
	$(INSTALL) ".[test]" && $(REMOVE_BUILD)
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: $(SOURCES) | $(BIN)/python
	$(INSTALL) ".[dev]" && $(REMOVE_BUILD)
	@touch $@ $(VENV)/.installed-test $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/dsa-gym demo --out $(DEMO_OUT)

test: $(VENV)/.installed-test
	$(BIN)/pytest -m "not slow" --durations=10 $(ARGS)

test-all: $(VENV)/.installed-test
	$(BIN)/pytest --durations=20 $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# From inside the environment, so that mypy finds the installed package and not the checkout's `dsa_gym/`.
types: $(VENV)/.installed-dev
	cd $(VENV) && bin/mypy --config-file $(CURDIR)/pyproject.toml --python-executable bin/python -p dsa_gym

wheel: $(VENV)/.installed-test
	rm -rf dist && $(REMOVE_BUILD)
	$(BIN)/python -m build --wheel --no-isolation --outdir dist . && $(REMOVE_BUILD)
	$(BIN)/check-wheel-contents dist/*.whl

clean:
	rm -rf $(VENV) dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	$(REMOVE_BUILD)
	find $(FOLDERS) tests -name __pycache__ -type d -prune -exec rm -rf {} +
