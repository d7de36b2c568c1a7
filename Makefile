# `make` prints what there is. A target that needs .venv makes it first; PYTHON=python3.12 chooses its Python.

PYTHON ?= python3

help:
	@echo "make setup      make .venv with all that steer needs (the CPU torch, the packages of requirements.lock)"
	@echo "make demo       watch a model change: extract a vector, judge it, try it"
	@echo "make test       run all tests; make test-fast leaves out the slow ones"
	@echo "make hostile    the hostile trials, which take an hour and more: signals, processes at once"
	@echo "make lint       ruff and mypy"
	@echo "make docs       build the documentation into docs/_build"
	@echo "make clean      remove everything that these made, .venv too"

setup:
	@$(PYTHON) scripts/setup.py

demo: setup
	@.venv/bin/python examples/demo.py

# One worker a core; loadgroup deals out few tests at a time, so that slow ones do not wait behind each other.
PYTEST = .venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadgroup

test: setup
	$(PYTEST)

test-fast: setup
	$(PYTEST) -m "not slow"

hostile: setup
	PYTHONPATH=tests .venv/bin/python tests/hostile/processes/process_trial.py

lint: setup
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy steer probes merges vectors

docs: setup
	.venv/bin/python -m sphinx -q -W docs docs/_build

clean:
	rm -rf .venv build demo docs/_build docs/commands.md *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help setup demo test test-fast hostile lint docs clean
