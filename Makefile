# make demo: the whole method on a synthetic shop, on a CPU.    make test: lint, formatting and every test.
# Both make their own environment in .venv; PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test lint clean

demo: .venv/installed
	$(BIN)/python -m prepare.demo --out data/demo --train-users 120 --val-users 20 --test-users 60
	$(BIN)/python summarize.py --batch-size 64
	$(BIN)/python train.py
	$(BIN)/python evaluate.py --k 3 5 10

test: .venv/installed-test lint
	$(BIN)/python -m pytest

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml .venv/bin/python
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/installed-test: pyproject.toml .venv/bin/python
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
