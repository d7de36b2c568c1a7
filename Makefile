# `make` prints what there is. A target that needs .venv makes it first; PYTHON=python3.12 chooses its Python.

PYTHON ?= python3

help:
	@echo "make setup      make .venv with everything that steer needs (torch for CPUs, the packages of requirements.lock)"
	@echo "make demo       extract a steering vector, validate it, try it, bake it, merge models, compare all results"
	@echo "make test       run the tests; make test-fast leaves out the slow ones"
	@echo "make test-v2    the tests of engines on vLLM's V2 runner, all of them: without a GPU some take minutes"
	@echo "make load       experiments on a server under load: 500 requests, 32 at once, while databases, disks and servers fail"
	@echo "make hostile    hours of trials: 10,000 requests to a server, signals at random moments, many processes at once;"
	@echo "                TRIALS=--small for ten minutes, TRIALS='--only files' for one of processes, serving, serving-v2, files"
	@echo "make vllm-changes  what the newest vLLM has changed about the methods that the plugin wraps (fails after a change)"
	@echo "make parity     steer every kind of decoder in vLLM beside hooked transformers, and write what comes out into"
	@echo "                tests/steer/serving/engine/parity.json, on both model runners; models that are compiled, or cut"
	@echo "                over two processes in every way (half an hour and more)"
	@echo "make lint       ruff and mypy"
	@echo "make docs       build the documentation into docs/_build"
	@echo "make clean      remove everything that the other targets made, .venv too"

setup:
	@$(PYTHON) scripts/setup.py

demo: setup
	@.venv/bin/python examples/demo.py

# One worker a core, which takes a group of tests (tests/groups.py) or one at a time, so that none waits behind slow ones.
PYTEST = .venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadgroup --durations 25

# The tests of vLLM's V2 runner need it where there is no GPU.
triton: setup
	@$(PYTHON) scripts/setup.py --triton

test: setup triton
	$(PYTEST)

test-v2: setup triton
	STEER_TEST_V2=all .venv/bin/python -m pytest tests/steer/serving/engine tests/steer/folding/test_fold_in_vllm.py -m v2

test-fast: setup
	$(PYTEST) -m "not slow"

load: setup
	STEER_TEST_LOAD=all .venv/bin/python -m pytest tests/steer/serving/http/test_experiments_live.py

hostile: setup triton
	.venv/bin/python tests/hostile/all_trials.py $(TRIALS)

vllm-changes: setup
	.venv/bin/python scripts/vllm_changes.py

parity: setup triton
	STEER_TEST_EVERY_DECODER=1 STEER_TEST_V2=all STEER_RECORD_PARITY=1 .venv/bin/python -m pytest \
	  tests/steer/serving/engine/test_parity.py tests/steer/serving/engine/test_every_decoder.py
	STEER_TEST_EVERY_DECODER=1 .venv/bin/python -m pytest -m "not v2" tests/steer/serving/engine/test_compiled.py \
	  tests/steer/serving/engine/test_together.py

lint: setup
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy steer probes merges vectors

docs: setup
	.venv/bin/python -m sphinx -q -W docs docs/_build

clean:
	rm -rf .venv build demo hostile-failures docs/_build docs/commands.md *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help setup triton demo test test-fast test-v2 load hostile vllm-changes parity lint docs clean
