# SPDX-License-Identifier: Apache-2.0
# Two commands do all the set-up on a machine with Python and a C++ compiler:
#   make demo    a virtual environment, everything in it, the main job on data that ships with a dependency, the report
#   make test    the tests
# PYTHON chooses the interpreter, VENV the folder, TORCH what pip installs where no torch is there yet.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch>=2.13,<2.15
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := setup.py pyproject.toml $(shell find csrc curvlab -type f -not -name '*.so' -not -name '*.pyc' 2>/dev/null)
SAY = @printf '\n\033[1m== %s\033[0m\n'

.PHONY: help demo test sanitize bench lint types format check clean

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON): install Python 3.10 or newer (Debian/Ubuntu: apt-get install python3 python3-venv python3-dev)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed, $(PYTHON) is $$($(PYTHON) -V): make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { echo "no C++ compiler: install g++ 11 or newer (Debian/Ubuntu: apt-get install g++), or set CXX"; exit 1; }
	$(SAY) "1/4 virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "the venv module is missing: Debian/Ubuntu: apt-get install python3-venv"; exit 1; }

$(VENV)/.torch: | $(BIN)/python
	$(SAY) "2/4 PyTorch ($(TORCH); the CUDA build is several GB, the first download takes its time)"
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install '$(TORCH)' \
	  || { echo "pip could not install $(TORCH): look above; behind a mirror set PIP_INDEX_URL, or: make $(MAKECMDGOALS) TORCH=torch==2.13.0"; exit 1; }
	@touch $@

$(VENV)/.study: $(SOURCES) | $(VENV)/.torch
	$(SAY) "3/4 curvlab: compiling the kernels (a minute or two), installing what the studies need"
	@$(PIP) install '.[study]' || { echo "the build failed: look above; to see the compiler's output: $(BIN)/pip install -v ."; exit 1; }
	@touch $@

$(VENV)/.test: $(VENV)/.study
	$(SAY) "installing what the tests need"
	@# the curvlab that is installed satisfies it: only the extra's packages are fetched, nothing is compiled again
	@$(PIP) install 'curvlab[test]'
	@touch $@

$(VENV)/.dev: $(VENV)/.test
	$(SAY) "installing what development needs"
	@$(PIP) install 'curvlab[dev]'
	@touch $@

demo: $(VENV)/.study ## set everything up, run the main job on handwritten digits, print where the report lies
	$(SAY) "4/4 the study 'NTK width' on handwritten digits"
	@$(BIN)/python -m experiments run ntk_width --preset smoke

test: $(VENV)/.test ## the tests
	@$(BIN)/python -m pytest $(PYTEST)

sanitize: $(VENV)/.test ## the kernels on the CPU under ASan, UBSan and TSan
	@$(BIN)/python -m pytest -m sanitizer tests/cuda tests/ops $(PYTEST)

bench: $(VENV)/.test ## every benchmark's table, quick form
	@$(BIN)/python -m benchmarks all --quick

lint: $(VENV)/.dev ## ruff and clang-format, changing nothing
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@find csrc tests -name '*.h' -o -name '*.cuh' -o -name '*.cu' -o -name '*.cpp' | xargs -r $(BIN)/clang-format --dry-run -Werror

types: $(VENV)/.dev ## the type checker
	@$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(VENV)/.dev ## rewrite the sources in the house format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@find csrc tests -name '*.h' -o -name '*.cuh' -o -name '*.cu' -o -name '*.cpp' | xargs -r $(BIN)/clang-format -i

check: lint types test sanitize ## all of it

clean: ## remove what was built; the virtual environment and the runs stay
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	@find curvlab -name '*.so' -delete
