# SPDX-License-Identifier: Apache-2.0
# make demo | test | check | bench | fuzz   each makes its own .venv first
# make chaos                         faults at random for ten minutes; ARGS='--seed 7 --seconds 600 --vms 30'
# make format | clean                PYTHON=python3.12 picks another interpreter, ARGS='-k wire' goes to pytest
# make fuzz ARGS='--seconds 10 frame doors'                  all targets for a minute each if none is named

SHELL := /bin/bash
PYTHON ?= python3
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# The stamp holds the folder it was made for: an editable install points at that folder and would go on using it after a move.
STAMP := $(VENV)/.installed
STAMPED := $(shell cat $(STAMP) 2>/dev/null)

.NOTPARALLEL:
.PHONY: help demo test check bench fuzz chaos format clean venv bootstrap FORCE

help:
	@sed -n 's/^# make/make/p' Makefile

demo: bootstrap venv
	$(BIN)/python deploy/demo.py

test: bootstrap venv
	$(BIN)/python -m $(if $(strip $(ARGS)),pytest -q $(ARGS),vmloop.tests)

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=$(VENV)/src $(BIN)/mypy -p vmloop
	$(BIN)/python -m pytest -q tests/unit/test_architecture.py

bench: venv
	$(BIN)/python -m vmloop.tests.bench $(ARGS)

# atheris leads the fuzzing where there is a wheel of it for this Python; without it hypothesis does.
fuzz: venv
	@$(BIN)/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("atheris") is None)' || \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --only-binary :all: 'atheris>=2.3' || true
	$(BIN)/python -m vmloop.tests.fuzz $(ARGS)

chaos: bootstrap venv
	$(BIN)/python -m vmloop.tests.system.chaos $(ARGS)

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist vmloop.egg-info .mypy_cache .ruff_cache .hypothesis .pytest_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# Debian packages (QEMU, the parts of a tiny guest). Never fails a target: without them the tests that need QEMU skip and say so.
bootstrap:
	@deploy/bootstrap

venv: $(STAMP)

ifneq ($(STAMPED),$(CURDIR))
$(STAMP): FORCE
endif

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo 'vmloop needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ...' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo '$(PYTHON) cannot make a venv; on Debian run: sudo apt-get install -y python3-venv' >&2; exit 1; }
	@if [ -n '$(STAMPED)' ] && [ '$(STAMPED)' != '$(CURDIR)' ]; then rm -rf $(VENV); fi
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
# mypy finds the package under its own name here, whatever the checkout's folder is called.
	@mkdir -p $(VENV)/src && ln -sfn ../.. $(VENV)/src/vmloop
	@echo '$(CURDIR)' > $(STAMP)

FORCE:
