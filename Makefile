# `make demo`  set up once, train Vim beside DeiT on real images, write runs/demo/report.html
# `make test`  set up once, run every check; `make test-gpu` runs the tests that need a CUDA device
# Nothing but a Python >= 3.11 and a network connection is needed; everything goes into .venv, build and runs.

VENV    := .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready
WORKERS ?= 2
BENCH   := $(BIN)/visionmamba bench
PYTEST  := $(BIN)/python -m pytest --numprocesses $(WORKERS)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-gpu sanitize-gpu results results-gpu format lint types tests tests-without-compiler tests-from-wheel clean

help:
	@sed -n 's/^# //p' Makefile | head -n 3

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@for name in "$$PYTHON" python3 python3.13 python3.12 python3.11 python3.14; do \
	  if [ -n "$$name" ] && "$$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    python="$$name"; break; \
	  fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "visionmamba needs Python 3.11 or newer with its venv module, and none was found on PATH;" \
	       "install it (Debian, Ubuntu: apt install python3-venv) or name it: make PYTHON=/path/to/python3.11 demo" >&2; \
	  exit 1; \
	fi; \
	if ! $(BIN)/python -c '' 2>/dev/null; then \
	  echo "Setting up $(VENV) with $$("$$python" --version); the first time downloads PyTorch and takes some minutes."; \
	  "$$python" -m venv --clear $(VENV) || exit 1; \
	fi
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/visionmamba demo --out runs/demo

test: lint types tests tests-without-compiler tests-from-wheel

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(READY)
	$(BIN)/mypy

tests: $(READY)
	$(PYTEST)

tests-without-compiler: $(READY)
	bash .ci/tests_without_compiler $(BIN) $(WORKERS)

tests-from-wheel: $(READY)
	bash .ci/tests_from_wheel $(BIN) $(WORKERS)

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu -rs

sanitize-gpu: $(READY)
	compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python -m tests.ops.cuda.sanitize
	compute-sanitizer --tool racecheck $(BIN)/python -m tests.ops.cuda.sanitize racecheck

results: $(READY)
	$(BENCH) efficiency --threads 2 --device cpu --out docs/results
	$(BENCH) efficiency --threads 2 --device cpu --mode train --out docs/results
	$(BENCH) kernels --threads 2 --device cpu --out docs/results
	$(BIN)/python docs/update_results.py

results-gpu: $(READY)
	$(BENCH) efficiency --device cuda --models vim deit deit-compile deit-eager --label cases \
	  --resolutions 1248 224 224 1024 1248 2048 1248 --batch 8 64 1 8 1 8 64 --out docs/results
	$(BENCH) efficiency --device cuda --models vim vim-lean deit deit-compile deit-eager deit-checkpoint --label cases \
	  --mode train --resolutions 224 1248 2048 --batch 128 8 4 --out docs/results
	$(BENCH) efficiency --device cuda --models vim deit deit-compile deit-eager --batch 8 \
	  --resolutions 224 512 640 736 1024 1248 2048 --out docs/results
	$(BENCH) efficiency --device cuda --models vim deit deit-eager --batch 8 --pyramid \
	  --resolutions 512 640 736 1024 1248 --out docs/results
	$(BENCH) kernels --device cuda --out docs/results
	$(BENCH) segmentation --device cuda --models vim vim-lean deit deit-eager --label classes150 --out docs/results
	$(BENCH) detection --device cuda --out docs/results
	$(BENCH) complexity --out docs/results
	$(BIN)/python docs/update_results.py

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache
