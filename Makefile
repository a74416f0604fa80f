# `make demo` and `make test` do all the set-up themselves; a second run starts at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slurm lint clean
.DELETE_ON_ERROR:

$(STAMP): setup.cfg pyproject.toml
	@echo "setting up $(VENV) with torch, transformers, deepspeed and the rest: some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python -m launch.demo

# Three at a time, on two cores too: many tests wait until some limit has passed.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadgroup --ignore=tests/slurm

# On a real SLURM that the tests start themselves; skipped, and said so, where that cannot be.
test-slurm: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/slurm -rs

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis demo
