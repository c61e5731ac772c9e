PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test check changed lint clean

quickstart: .venv/installed
	$(BIN)/bpkd quickstart

# One process a core, each with one thread: most tests are too small for more. In the order of the files: by default those
# with few tests come last, and they are the longest.
test: .venv/tested
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

# Quick feedback, in less than two minutes: lint, types, and the tests of what changed since this branch left main.
check: .venv/installed
	+$(MAKE) --no-print-directory --jobs=2 lint changed

changed: .venv/installed
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m tests.changed

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

clean:
	rm -rf .venv quickstart

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[all,dev]'
	touch $@

# A real Triton server for the tests; its requirement of an old numpy is that of a Python API which they do not use.
.venv/tested: .venv/installed
	$(BIN)/pip install --quiet --no-compile --no-deps --constraint constraints.txt nvidia-pytriton
	touch $@
