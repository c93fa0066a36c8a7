PYTHON ?= python3
BIN := .venv/bin

.PHONY: bench demo test test-slow lint types wheel

# The stamp is written last: an interrupted installation is taken up again.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e '.[all]'
	touch $@

demo: .venv/installed
	$(BIN)/python -m examples.quickstart

test: .venv/installed
	# A process a core: with more threads than cores they would wait for each other.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: .venv/installed
	$(BIN)/mypy

# Without build/, which setuptools leaves behind and would read deleted modules from.
wheel: .venv/installed
	rm -rf build
	$(BIN)/python -m build --wheel --no-isolation

# Minutes on an idle machine. What is in runs/bench.json is kept (`--again` measures it anew); the
# committed results are of the machine that docs/benchmarks.md names.
BENCH := runs/bench.json
bench: .venv/installed
	$(BIN)/python -m tests.benchmarks.layer --quick --out $(BENCH)
	$(BIN)/python -m tests.benchmarks.models --quick --out $(BENCH)
	$(BIN)/python -m tests.benchmarks.page --results $(BENCH) --races runs --out runs/benchmarks.md
