# `make demo` and `make test` work on a fresh clone with nothing but Python (>= 3.11).
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
# What is installed is compiled when it is first imported, a tenth of it, and not while one waits.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test coverage fmt lint check docs pictures bench gpu clean

demo: .venv/.ready
	$(BIN)/ckptools demo

# Two at a time: more would need more memory than a small laptop has.
JOBS ?= 2
test: .venv/.dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# The same with every branch counted, at least 95 % of them: nearly twice the time.
coverage: .venv/.dev
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

# The pictures of `render` and `sweep` in the documents, drawn anew.
pictures: .venv/.dev
	$(BIN)/ckptools render recipes/add-difference.yaml --set M=1 -q -o out/pictures
	$(BIN)/ckptools sweep recipes/add-difference.yaml --set M=0:1:0.25 -q -f -o out/sweep
	cp out/pictures/sheet.png docs/images/sheet.png
	cp out/sweep/curve.png docs/images/sweep-curve.png
	cp out/sweep/sheet.png docs/images/sweep-sheet.png

bench: .venv/.dev
	$(BIN)/python benchmarks/bench.py --write docs/benchmarks.md
	$(BIN)/python benchmarks/loading.py --write docs/benchmarks.md

gpu: .venv/.dev
	$(BIN)/python -m pytest -m gpu

clean:
	rm -rf .venv out demo

# Pinned versions are installed first, so that a newer torch never comes in with its gigabytes.
.venv/.ready: pyproject.toml constraints.txt hatch_build.py ckptools/kernels.c
	@echo "Setting up .venv: torch, diffusers and what they need, 1.3 GB, once; some minutes."
	$(PYTHON) -m venv .venv
	$(PIP) -e ".[render]"
	$(BIN)/python -m compileall -q ckptools
	touch $@

.venv/.dev: .venv/.ready
	$(PIP) -e ".[dev]"
	touch $@
