# `make demo` and `make test` work on a fresh clone with nothing but Python (>= 3.11).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test fmt lint check docs bench gpu clean

demo: .venv/.ready
	$(BIN)/ckptools demo

# Two at a time: more would need more memory than a small laptop has.
JOBS ?= 2
test: .venv/.dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --cov --cov-report=term

fmt: .venv/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell
	$(BIN)/python -m cogapp --check $(COGGED)
	$(BIN)/ckptools schema | diff - docs/recipe.schema.json

check: lint test

# Generated parts of the documents: command reference, methods, schema.
COGGED := README.md docs/commands.md docs/methods.md docs/loras.md
docs: .venv/.dev
	$(BIN)/python -m cogapp -r $(COGGED)
	$(BIN)/ckptools schema > docs/recipe.schema.json

bench: .venv/.dev
	$(BIN)/python benchmarks/bench.py --write docs/benchmarks.md

gpu: .venv/.dev
	$(BIN)/python -m pytest -m gpu

clean:
	rm -rf .venv out demo

# Pinned versions are installed first, so that a newer torch never comes in with its gigabytes.
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/.dev: .venv/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@
