# Two commands for a newcomer: `make demo` and `make test`. Both make .venv on first use; nothing is installed by hand.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The stamp's name carries a checksum of what decides the environment: a changed dependency makes a new one due.
STAMP := $(VENV)/.locret-$(shell cat pyproject.toml constraints.txt | cksum | tr -s ' ' '-')

# A process a core, each with one thread: tests are small, and a second thread of one process finds nothing to do. A file
# stays with one process, for what its tests share.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile

.PHONY: help demo test check format gpu-test eval-quick wheel wheel-test docs clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(STAMP)  ## the embedded model answers questions about a long document from a 20x smaller cache
	@$(BIN)/locret demo

test: $(STAMP)  ## all tests that need no GPU
	@$(PYTEST)

check: $(STAMP)  ## format, lint, types, tests
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(PYTEST)

format: $(STAMP)  ## let ruff rewrite the files
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

# A GPU machine's own torch fits its driver: where python3 already has what the tests need, that is what runs them.
gpu-test:  ## tests that need a CUDA device, the embedded model included
	@if $(PYTHON) -c 'import pytest, torch, transformers; assert torch.cuda.is_available()' 2>/dev/null; then \
	  python=$(PYTHON); \
	else $(MAKE) --no-print-directory $(STAMP); python=$(BIN)/python; fi; \
	PYTHONPATH=src$${PYTHONPATH:+:$$PYTHONPATH} "$$python" -m pytest -q -m gpu -p no:cacheprovider

# Two processes of one thread share the samples: that is faster than one of two, and the numbers do not depend on it.
# bfloat16 takes half of float32's time where the CPU has instructions for it, and twice its time elsewhere.
eval-quick: $(STAMP)  ## 6 tasks x 5 methods x 2 budgets at 4K on two cores, with a report: runs/eval-quick/report.html
	@dtype=$$(grep -qE 'amx_bf16|avx512_bf16' /proc/cpuinfo 2>/dev/null && echo bfloat16 || echo float32); \
	pids=; for rank in 0 1; do \
	  RANK=$$rank WORLD_SIZE=2 OMP_NUM_THREADS=1 $(BIN)/locret eval recipes/grids/quick.toml --dtype $$dtype \
	    --output runs/eval-quick & pids="$$pids $$!"; \
	done; trap 'kill $$pids; exit 130' INT TERM; for pid in $$pids; do wait $$pid; done

wheel: $(STAMP)  ## dist/locret-*.whl
	@rm -rf dist && $(BIN)/python -m build --wheel --no-isolation --outdir dist . >/dev/null && ls -l dist/*.whl

# The wheel, in an empty environment outside the clone, must find its own embedded model.
wheel-test: wheel  ## install the wheel into an empty environment elsewhere and run `locret doctor` there
	@wheel=$$(ls $(CURDIR)/dist/locret-*.whl); constraints=$(CURDIR)/constraints.txt; \
	dir=$$(mktemp -d); trap 'rm -rf "$$dir"' EXIT; cd "$$dir"; \
	echo "set-up: an empty environment in $$dir"; \
	$(abspath $(BIN))/python -m venv venv; \
	venv/bin/pip install --quiet --disable-pip-version-check -c "$$constraints" "$$wheel"; \
	env -u PYTHONPATH -u VIRTUAL_ENV venv/bin/locret doctor

docs: $(STAMP)  ## rewrite docs/cli.md from --help
	@$(BIN)/python docs/generate_cli.py

clean:
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .mypy_cache

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"locret needs Python 3.11 or newer; {sys.executable} is {sys.version.split()[0]}. Try: make demo PYTHON=python3.12")'
	@echo "set-up: installing locret and its dependencies into $(VENV) (once; a minute or two)"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@rm -f $(VENV)/.locret-*; touch $@
	@echo "set-up: done"
