# `make demo` and `make test` need Python >= 3.10 and make, nothing else: .venv is made and filled on first use,
# and again only when pyproject.toml changes. PIP_CONSTRAINT=FILE, if set, holds versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint types clean

demo: $(INSTALLED)
	$(BIN)/eplb-triton demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -q -n auto -m "not slow and not gpu"

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[cli,test,dev]'
	touch $@
