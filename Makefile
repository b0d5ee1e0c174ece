# Every target sets up what it needs; `make plan` needs nothing but python3 >= 3.11, no GPU and no torch.

PYTHON ?= python3
GPU_PYTHON ?= python3
MODEL ?= llama-3.1-8b
PROFILE_OUT ?= .out/profile
BENCH_OUT ?= .out/kernels.json

BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

.PHONY: plan dashboard compiled test check test-gpu bench-kernels profile worked-answers screenshots clean

plan: .venv/.plan-ready ## recommend a configuration for the sample trace on 8 GPUs
	$(BIN)/plan --trace traces/samples/sample.jsonl.gz --gpus 8

dashboard: .venv/.plan-ready ## the capacity-planning dashboard, in a browser
	$(BIN)/streamlit run app.py

compiled: .venv/.plan-ready ## make `plan` and simulations twice as fast (a minute; needs a C compiler)
	@$(INSTALL) --editable '.[compiled]'
	$(BIN)/python -m engine.compile

test: .venv/.dev-ready ## the tests that need no GPU
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m 'not gpu and not slow' -n auto --maxprocesses 8

check: .venv/.dev-ready ## lint, format, types, and that imports only fall
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py

# These three run where torch, Triton and a GPU are already: they install nothing.
test-gpu: ## the tests that need a GPU
	$(GPU_PYTHON) -m pytest -q -m gpu tests/kernels tests/engine

bench-kernels: ## every kernel against its reference and its bound
	@mkdir -p $(dir $(BENCH_OUT))
	$(GPU_PYTHON) -m kernels bench --out $(BENCH_OUT)

profile: ## measure the engine's steps and operators
	@mkdir -p $(dir $(PROFILE_OUT))
	$(GPU_PYTHON) -m engine profile --model $(MODEL) --out $(PROFILE_OUT)

worked-answers: .venv/.plan-ready ## work out anew what the dashboard's first screens show
	$(BIN)/python -m planner.worked

screenshots: .venv/.dev-ready ## take docs/screenshots anew (needs Chromium)
	$(BIN)/python -m tests.dashboard.browser

clean: ## remove what building and testing left (not .venv)
	rm -rf build dist *.egg-info .compiled .pytest_cache .ruff_cache .mypy_cache .hypothesis .out plan-output
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# One environment, in two sizes: `plan` takes the small one, the tests add torch and the tools to it.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'error: Python 3.11 or newer is needed; say which: make PYTHON=python3.12 ...' >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.plan-ready: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'setting up .venv for plan (a minute or two) ...' >&2
	@$(INSTALL) --editable .
	@touch $@

.venv/.dev-ready: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'setting up .venv with torch and the tools for tests (some minutes) ...' >&2
	@$(INSTALL) --editable '.[engine,dev,cluster]'
	@touch .venv/.plan-ready $@
