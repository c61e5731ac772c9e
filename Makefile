PYTHON ?= python3
BIN := .venv/bin

# pip does not compile the packages, so the first process that imports a module writes its bytecode for all others. Without
# that, each new process compiles torch again: 12 seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test test-all check changed lint docs clean

quickstart: .venv/quickstart
	$(BIN)/bpkd quickstart

# One process per core, and one more for the time in which tests wait for servers and browsers. Each has one thread,
# because most tests are too small for more. The files keep their order: xdist would otherwise run files with few tests
# last, and these take the longest. "test-all" runs the tests marked slow too.
test test-all: .venv/tested
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/pytest \
		--numprocesses $$($(BIN)/python -c 'import os; print(os.cpu_count() + 1)') --dist loadfile --no-loadscope-reorder \
		$(if $(filter test-all,$@),-m 'slow or not slow')

# Quick feedback in less than two minutes: linter, types, and the tests of what changed since this branch left main.
check: .venv/installed
	+$(MAKE) --no-print-directory --jobs=2 lint changed

changed: .venv/installed
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m tests.changed

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The site in build/site. Warnings are errors: dead links, unknown names, docstrings that cannot be read. It contains the
# pages of the repository at their paths in it, and the notebooks with the outputs of a run of so many steps.
docs: export BPKD_NOTEBOOK_STEPS ?= 2
docs: .venv/documented
	rm -rf build/notebooks build/pages build/site
	mkdir -p build/pages
	git ls-files --cached --others --exclude-standard '*.md' CITATION.cff LICENSE benchmarks/results demos docs \
		| xargs cp --parents --target-directory build/pages
	cp -r docs/notebooks build/notebooks
	PYTHONWARNINGS='ignore:IProgress not found' $(BIN)/jupyter nbconvert --log-level ERROR --execute --to markdown \
		--output-dir build/pages/docs/notebooks build/notebooks/*.ipynb
	sed --in-place 's/[.]ipynb)/.md)/g' build/pages/*.md build/pages/docs/*.md build/pages/docs/notebooks/*.md
	$(BIN)/zensical build --clean --strict >build/docs.log 2>&1 || { cat build/docs.log; false; }
	! grep ^griffe: build/docs.log

clean:
	rm -rf .venv quickstart

# What the quickstart uses, and the page that it names at its end.
.venv/quickstart: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[export,serve]'
	touch $@

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[all,dev]'
	touch $@

# A Triton server and Albumentations for the tests, without their dependencies: those of the server require an old numpy,
# for a Python API that the tests do not use, and Albumentations requires a second copy of OpenCV.
.venv/tested: .venv/installed
	$(BIN)/pip install --quiet --no-compile --no-deps --constraint constraints.txt nvidia-pytriton \
		albumentations albucore stringzilla simsimd
	touch $@

.venv/documented: .venv/installed
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[docs]'
	touch $@
