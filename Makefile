# make chat    environment, installation, and a conversation about a photo (without a terminal: one question)
# make test    environment, installation, lint and all tests
#
# PYTHON is the interpreter that the environment is made with; IMAGE and QUESTION are what `make chat` talks about.

PYTHON ?= python3
IMAGE ?= examples/chelsea.jpg
QUESTION ?= What is in this picture?

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: help chat test lint clean

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
	$(BIN)/python -m pytest

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
