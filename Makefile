# `make demo` and `make test` set up `.venv` by themselves on a fresh machine.
PYTHON ?= python3
BIN := .venv/bin
export MPLBACKEND := Agg

.PHONY: demo test test-all lint docs wheel clean

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/.installed
	# small networks gain nothing from threads, which wait for one another beside another job
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python examples/replace_mse_head.py --out demo

test: .venv/.installed
	$(BIN)/python -m pytest -q -n 2 --cov=flowpost --cov-report=term:skip-covered --cov-fail-under=90

test-all: .venv/.installed
	$(BIN)/python -m pytest -q -n 2 -m ''

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: .venv/.installed
	$(BIN)/python -m build --wheel

clean:
	rm -rf .venv dist demo .pytest_cache .mypy_cache .ruff_cache
