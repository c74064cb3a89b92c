# Every target makes .venv and installs what it needs by itself; only pip is used.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-full check format clean

# Tests are shared among as many processes; two fit two cores and 16 GiB.
TEST_PROCESSES ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal

# Two processes on CPUs, whatever else the machine has.
ON_CPUS := CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu OMP_NUM_THREADS=1

demo: $(STAMP)  ## data, stand-ins and all five stages with two CPU processes; stopped and typed again, it goes on
	$(ON_CPUS) $(BIN)/python -m data.demo runs/demo/data
	$(ON_CPUS) $(BIN)/python -m launch.pipeline megrez_omni model=tiny data=demo runs=runs/demo \
	  accelerate=cpu2 zero=zero2

test: $(STAMP)  ## what every change must pass: all tests but the slow ones and those with a SLURM
	$(PYTEST) -m "not slow and not slurm"

test-full: $(STAMP)  ## all tests this machine can run
	$(PYTEST)

check: $(STAMP)  ## lint, format and types: what CI checks before it tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: $(STAMP)  ## mends what `make check` would complain of, where it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## forgets the virtual environment
	rm -rf $(VENV)

$(STAMP): pyproject.toml
	@echo "Installing into $(VENV) (some minutes the first time)"
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(STAMP)
