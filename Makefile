# On a machine with Python 3.11+, git and make: `make demo` shows what this is, `make test` checks it.
# Each makes the environment it needs in this folder, once, with the versions in constraints/.

PYTHON ?= python3
DEMO_MODEL ?= examples/models/llama
# Real text, and few enough padded batches that it takes a minute or two.
DEMO_OPTIONS ?= --prompts examples/prompts/mixed.jsonl --max-new-tokens 64 --padded-sizes 8,32 --padded-subset 32 \
    --loop-subset 16 --pool-rows 32
# Processes of pytest, each on a core of its own; 0: one process on all of them.
WORKERS ?= 2
PYTEST := -m pytest -n $(WORKERS) --dist worksteal
# More words for pytest, e.g. PYTEST_ARGS="--parity-seed=20260131 -x"
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := pip install --quiet --disable-pip-version-check
COMPAT := 5.6 5.17
# What depends on transformers most: the rotating parity grid, patches, every option of generate(), undo, weights, threads.
COMPAT_TESTS := tests/parity tests/patches tests/generation tests/test_reversible.py tests/test_live_weights.py \
    tests/test_threads.py

.PHONY: help demo test test-full test-clients test-compat test-gpu lint format types bench benchmarks-page demo-models clean

help:
	@echo "make demo         one model, with and without hf_paged: a table, and compare.json"
	@echo "make test         units and a rotating part of the parity grid (6 minutes on 2 cores)"
	@echo "make test-full    everything, slow tests and other people's libraries too (17 minutes on 2 cores)"
	@echo "make test-clients the tests with TRL, lm-evaluation-harness, LangChain, outlines and others (3 minutes)"
	@echo "make test-compat  parity, patches and generate() on the oldest and a middle transformers ($(COMPAT); 4 minutes)"
	@echo "make test-gpu     the tests that need a CUDA device"
	@echo "make lint         ruff, rules and format;   make format applies both"
	@echo "make types        mypy"
	@echo "make bench        the speed figures of the README on this machine"
	@echo "make benchmarks-page  docs/benchmarks.md and the README's figures, from benchmarks/results"
	@echo "make demo-models  train the models in examples/models again (about half an hour)"
	@echo "make clean        remove environments, caches and build results"

demo: $(VENV)/.ready
	$(BIN)/hf-paged compare $(DEMO_MODEL) $(DEMO_OPTIONS) --json compare.json

test: $(VENV)/.ready-test
	$(BIN)/python $(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-full: $(VENV)/.ready-test test-clients
	$(BIN)/python $(PYTEST) $(PYTEST_ARGS)

# An environment of its own: LangChain wants an older huggingface_hub than the newest transformers is run with.
test-clients: .venv-clients/.ready
	.venv-clients/bin/python $(PYTEST) -m clients $(PYTEST_ARGS)

test-gpu: $(VENV)/.ready-test
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

test-compat: $(COMPAT:%=.venv-%/.ready)
	@set -e; for version in $(COMPAT); do \
	    .venv-$$version/bin/python -c "import transformers; print('transformers', transformers.__version__)"; \
	    .venv-$$version/bin/python $(PYTEST) -m "not slow and not clients" $(COMPAT_TESTS) $(PYTEST_ARGS); \
	done

lint: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.ready-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.ready-test
	$(BIN)/mypy

bench: $(VENV)/.ready
	$(BIN)/hf-paged bench

benchmarks-page: $(VENV)/.ready
	$(BIN)/python benchmarks/make_page.py

demo-models: $(VENV)/.ready
	@set -e; for family in gpt2 gpt_bigcode llama; do \
	    OMP_NUM_THREADS=1 $(BIN)/python examples/train_demo_models.py \
	        --family $$family --output examples/models/$$family; \
	done

clean:
	rm -rf $(VENV) .venv-clients $(COMPAT:%=.venv-%) build dist *.egg-info compare.json
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp in each environment: made once, installed again when the metadata or the pins change.
CREATE = @$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
    { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."; exit 1; }

$(VENV)/.created:
	$(CREATE)
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.ready: $(VENV)/.created pyproject.toml constraints/base.txt constraints/newest.txt
	@echo "Installing into $(VENV) (a minute or more; torch is large)"
	@$(BIN)/$(PIP_INSTALL) --constraint constraints/newest.txt --editable .
	@touch $@

$(VENV)/.ready-test: $(VENV)/.ready
	@echo "Installing what the tests need into $(VENV)"
	@$(BIN)/$(PIP_INSTALL) --constraint constraints/newest.txt --editable '.[test]'
	@touch $@

.venv-clients/.ready: pyproject.toml constraints/base.txt constraints/clients.txt
	$(CREATE)
	@echo "Installing other people's libraries and the tests into .venv-clients"
	@test -d .venv-clients || $(PYTHON) -m venv .venv-clients
	@.venv-clients/bin/$(PIP_INSTALL) --constraint constraints/clients.txt --editable '.[test,clients]'
	@touch $@

.venv-%/.ready: pyproject.toml constraints/base.txt constraints/transformers-%.txt
	$(CREATE)
	@echo "Installing transformers $* and the tests into .venv-$*"
	@test -d .venv-$* || $(PYTHON) -m venv .venv-$*
	@.venv-$*/bin/$(PIP_INSTALL) --constraint constraints/transformers-$*.txt --editable '.[test]'
	@touch $@
