# make chat    environment, installation, and a conversation about a photo (without a terminal: one question)
# make test    environment, installation, lint and all tests
# make bench   our towers beside ViTs on this machine, in under three minutes; fails where a ratio of times fell back (lab/attention.md)
# make matrix  the tests that meet transformers, with the oldest release that we declare and with the newest of 5
#
# PYTHON is the interpreter that the environment is made with; IMAGE and QUESTION are what `make chat` talks about; TESTS is what
# `make matrix` runs (TESTS=tests: all).

PYTHON ?= python3
IMAGE ?= examples/chelsea.jpg
QUESTION ?= What is in this picture?

TESTS ?= $(addprefix tests/unit/,hf vlm export teachers train)

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: help chat test bench lint matrix clean

help:
	@sed -n 's/^# //p' Makefile

chat: .venv/installed
	@if [ -t 0 ] && [ -t 1 ]; then \
		$(BIN)/sparse-vlm chat --image "$(IMAGE)"; \
	else \
		echo "$(IMAGE): $(QUESTION)"; \
		$(BIN)/sparse-vlm chat --image "$(IMAGE)" --question "$(QUESTION)"; \
	fi

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

bench: .venv/installed
	$(BIN)/python tools/guard_ratios.py --baseline docs/ratios.json

# An environment of the matrix is the main one with another transformers, and what that pins, laid over it.
oldest := $(shell sed -n 's/^ *"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml).*
newest := 5.*

matrix: matrix-oldest matrix-newest

matrix-%: .venv/installed-dev
	@$(BIN)/python -m venv --without-pip build/matrix/$*
	@$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" \
		> "$$(build/matrix/$*/bin/python -c 'import site; print(site.getsitepackages()[0])')/main.pth"
	@$(PIP) --python build/matrix/$*/bin/python install --upgrade 'transformers==$($*)'
	@build/matrix/$*/bin/python -c "import transformers; print('$* transformers:', transformers.__version__)"
	build/matrix/$*/bin/python -m pytest $(TESTS)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv build dist *.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) install --constraint constraints.txt --editable .
	@touch $@

.venv/installed-dev: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@touch .venv/installed $@
