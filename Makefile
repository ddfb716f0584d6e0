# `make demo` and `make test` need Python >= 3.10 and make, nothing else: .venv is made and filled on first use,
# and again only when pyproject.toml changes. PIP_CONSTRAINT=FILE, if set, holds versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OTHER_TRITON := $(VENV)/triton-3.6.0

TRACES ?= $(EPLB_TRACES)
ONLY = $(if $(PLANNERS),--planners "$(PLANNERS)")
OUT = $(if $(RESULTS),--out "$(RESULTS)")

.PHONY: demo test test-host test-kernels test-other-triton lint types clean
.PHONY: peers bench bench-scale bench-next-window bench-conformance bench-balance bench-report bench-docs

demo: $(INSTALLED)
	$(BIN)/eplb-triton demo

test: test-host test-kernels test-other-triton

# Everything that runs on a CPU as it is, and the code that the kernels compile to.
test-host: $(INSTALLED)
	$(BIN)/python -m pytest -q -n auto -m "not slow and not gpu"

# The kernels in Triton's interpreter: a process of its own, since the kernels there are no longer compiled.
test-kernels: $(INSTALLED)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n auto -m "not slow" tests/interpreted

# A part of them again with the oldest Triton that serving frameworks still ship.
test-other-triton: $(INSTALLED) $(OTHER_TRITON)
	TRITON_INTERPRET=1 PYTHONPATH=$(OTHER_TRITON) $(BIN)/python -m pytest -q -n auto -m other_triton tests/interpreted

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

peers: $(INSTALLED)
	$(BIN)/python -m bench.fetch_peers

bench: $(INSTALLED)
	$(BIN)/python -m bench.run $(if $(CASES),--cases "$(CASES)") $(ONLY) $(if $(TRACES),--traces "$(TRACES)") $(OUT)

bench-scale: $(INSTALLED)
	$(BIN)/python -m bench.scale $(ONLY) $(OUT)

bench-next-window: $(INSTALLED)
	$(BIN)/python -m bench.next_window $(if $(TRACES),--traces "$(TRACES)") $(ONLY) $(OUT)

bench-conformance: $(INSTALLED)
	$(BIN)/python -m bench.conformance $(OUT)

bench-balance: $(INSTALLED)
	$(BIN)/python -m bench.balance $(if $(TRACES),--traces "$(TRACES)") $(OUT)

bench-report: $(INSTALLED)
	$(BIN)/python -m bench.report $(RESULTS)

bench-docs: $(INSTALLED)
	$(BIN)/python -m bench.report $(RESULTS) --fill docs/benchmarks.md --fill docs/policies.md --fill README.md

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[cli,cpu,test,dev]'
	touch $@

$(OTHER_TRITON): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $@ triton==3.6.0
	touch $@
