# `make demo` and `make test` need Python >= 3.10 and make, nothing else: .venv is made and filled on first use,
# and again only when pyproject.toml changes. PIP_CONSTRAINT=FILE, if set, holds versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
OLDEST_TRITON := $(VENV)/triton-3.4.0
ANOTHER_TRITON := $(VENV)/triton-3.6.0

PYTEST := $(BIN)/python -m pytest -q -n auto
CHOICE := not full and not slow and not gpu
EVERYTHING = $(if $(REST),full and )not slow and not gpu

TRACES ?= $(EPLB_TRACES)
ONLY = $(if $(PLANNERS),--planners "$(PLANNERS)")
OUT = $(if $(RESULTS),--out "$(RESULTS)")

.PHONY: demo test test-host test-kernels test-all all-host all-kernels all-oldest-triton all-another-triton lint types clean
.PHONY: peers bench bench-scale bench-next-window bench-conformance bench-balance bench-serving bench-splitting bench-report bench-docs

demo: $(INSTALLED)
	$(BIN)/eplb-triton demo

# A choice, in minutes: every test but those marked `full`.
test: test-host test-kernels

# Everything that needs no GPU and no hour. REST=1 leaves out what `make test` runs.
test-all: all-host all-kernels all-oldest-triton all-another-triton

# What runs on a CPU as it is, and the code that the kernels compile to.
test-host: $(INSTALLED)
	$(PYTEST) -m "$(CHOICE)"

all-host: $(INSTALLED)
	$(PYTEST) -m "$(EVERYTHING)"

# The kernels in Triton's interpreter: a process of its own, since the kernels there are no longer compiled.
test-kernels: $(INSTALLED)
	TRITON_INTERPRET=1 $(PYTEST) -m "$(CHOICE)" tests/kernels/interpreted

all-kernels: $(INSTALLED)
	TRITON_INTERPRET=1 $(PYTEST) -m "$(EVERYTHING)" tests/kernels/interpreted

# A part of them again with the oldest Triton that is supported, and what it compiles to: all but replanning.
all-oldest-triton: $(INSTALLED) $(OLDEST_TRITON)
	TRITON_INTERPRET=1 PYTHONPATH=$(OLDEST_TRITON) $(PYTEST) -m "other_triton and not slow" tests/kernels/interpreted
	PYTHONPATH=$(OLDEST_TRITON) $(PYTEST) -m "not slow" -k "test_contract and sm_90 and not replanning" tests/bench/ptx

# Whether another Triton, of images that are about, compiles every kernel, and to what it must; and, since it lays tiles
# out in other ways, whether lanes of a replan wait for one another there too.
all-another-triton: $(INSTALLED) $(ANOTHER_TRITON)
	PYTHONPATH=$(ANOTHER_TRITON) $(PYTEST) -m "not slow" -k "test_contract and (sm_90 or gfx942) or test_plans_as_recorded" tests/bench/ptx

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

peers: $(INSTALLED)
	$(BIN)/python -m bench.planners.fetch

bench: $(INSTALLED)
	$(BIN)/python -m bench.run $(if $(CASES),--cases "$(CASES)") $(ONLY) $(if $(TRACES),--traces "$(TRACES)") $(OUT)

bench-scale: $(INSTALLED)
	$(BIN)/python -m bench.studies.scale $(ONLY) $(OUT)

bench-next-window: $(INSTALLED)
	$(BIN)/python -m bench.studies.next_window $(if $(TRACES),--traces "$(TRACES)") $(ONLY) $(OUT)

bench-conformance: $(INSTALLED)
	$(BIN)/python -m bench.studies.conformance $(OUT)

bench-balance: $(INSTALLED)
	$(BIN)/python -m bench.studies.balance $(if $(TRACES),--traces "$(TRACES)") $(OUT)

# The serving simulation, and how tokens are split: on drawn loads, and on recorded traces where TRACES names a folder.
bench-serving: $(INSTALLED)
	$(BIN)/python -m bench.studies.serving --output "$(or $(RESULTS),bench/results/serving)" $(if $(TRACES),--traces "$(TRACES)")

bench-splitting: $(INSTALLED)
	$(BIN)/python -m bench.studies.splitting --output "$(or $(RESULTS),bench/results/splitting)" $(if $(TRACES),--traces "$(TRACES)")

bench-report: $(INSTALLED)
	$(BIN)/python -m bench.report $(RESULTS)

bench-docs: $(INSTALLED)
	$(BIN)/python -m bench.report $(RESULTS) --fill docs/benchmarks.md --fill docs/policies.md

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[cli,cpu,test,dev]'
	touch $@

$(OLDEST_TRITON) $(ANOTHER_TRITON): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $@ triton==$(@:$(VENV)/triton-%=%)
	touch $@
