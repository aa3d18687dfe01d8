# Set up, try, test and check asyncflow. Needs python3, 3.11 or newer, and a network for the first `make setup`.

PYTHON ?= python3

BIN := .venv/bin
INSTALLED := .venv/.installed
CONSTRAINTS := deploy/constraints

# torch's CPU build comes from the wheel folders that the environment names for pip or uv, where it does, otherwise from
# torch's own index. uv doesn't read pip's variable, and wants commas where pip takes spaces.
comma := ,
empty :=
space := $(empty) $(empty)
UV_FIND_LINKS ?= $(subst $(space),$(comma),$(strip $(PIP_FIND_LINKS)))
ifeq ($(UV_FIND_LINKS),)
unexport UV_FIND_LINKS
TORCH := --torch-backend cpu
else
export UV_FIND_LINKS
endif

.PHONY: setup demo test test-faults check clean

# Bytecode is compiled once, here: where PYTHONDONTWRITEBYTECODE is set, as in many images, each process would compile
# torch and transformers again, which takes as long as importing them.
setup: $(INSTALLED)

$(INSTALLED): pyproject.toml $(wildcard $(CONSTRAINTS)/*)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("asyncflow needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + ": name another with make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS)/cpu.txt uv
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python $(TORCH) --override $(CONSTRAINTS)/overrides-cpu.txt --constraint $(CONSTRAINTS)/cpu.txt --editable '.[cpu,dev]'
	@touch $@

# All three steps of RLHF on a small task: minutes on two cores.
demo: setup
	$(BIN)/asyncflow demo deploy/recipes/sorting

# One thread per process, because services and engines share the cores. Two workers run the test files in order, one file at
# a time, because tests on Ray mostly wait for it. ARGS goes to pytest: make test ARGS=tests/protocols
test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not gpu and not faults" --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# The fault matrix: processes of real runs die and stop at named places and at random moments.
test-faults: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -m faults -s tests/asyncflow/faults $(ARGS)

# Needs no engine, no Ray and no network: node is installed as a wheel, and pyright must not look for its own updates.
check: export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/pytest tests/test_architecture.py

# Removes everything that the other targets create again; the folders of runs in runs/ stay.
clean:
	rm -rf .venv .hypothesis .pytest_cache .ruff_cache build dist
	find asyncflow protocols workers deploy tests -name __pycache__ -type d -prune -exec rm -rf {} +
