# `make demo` and `make test` begin on a machine with nothing but Python 3.11 to 3.13, its venv module and make.
# VENV: where the environment is made. PIP_ARGS: arguments for pip, such as another index. WORKERS: processes of the tests.
VENV ?= .venv
PIP_ARGS ?=
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ $$n -gt 8 ] && echo 8 || echo $$n)
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$python && break; done)

READY := $(VENV)/.ready
BIN := $(VENV)/bin
DEMO := demo

.PHONY: help demo test lint format federation wheel-check docs proto containers containers-check clean
.DEFAULT_GOAL := help

help:  ## These lines
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## */\t/' | expand -t 20

demo: $(READY)  ## Make histories, train federated, compare with baselines, say where the report lies
	@test -e $(DEMO)/histories.txt || $(BIN)/fedssl data synthesize $(DEMO)/histories.txt
	@number=1; while [ -e $(DEMO)/run-$$number ]; do number=$$((number + 1)); done; \
	$(BIN)/fedssl simulate demo --set data.path=$(DEMO)/histories.txt --baselines --out $(DEMO)/run-$$number

test: $(READY)  ## The tests, in parallel; what was skipped and why
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -rs

lint: $(READY)  ## ruff, mypy strict, and the floors that may import one another
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)  ## Let ruff put the code in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

federation: $(READY)  ## Over a SuperLink here: three devices record, train and recommend; nodes, and devices with agents, reach the simulation's bytes
	OMP_NUM_THREADS=1 FEDSSL_FEDERATION=1 $(BIN)/python -m pytest tests/end_to_end/test_three_devices.py tests/end_to_end/test_federation.py tests/end_to_end/test_devices.py tests/end_to_end/test_away_and_back.py -v -rs

containers: $(READY)  ## Build and run docker/compose.yaml, where `docker` reaches an engine: three devices record, train and recommend
	OMP_NUM_THREADS=1 FEDSSL_ENGINE=docker $(BIN)/python -m pytest tests/end_to_end/test_containers.py -v -s

containers-check: $(READY)  ## Hold images, compose, units, proxy and what ARM resolves to their own tools; which are missing is said
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/docker -v -rs

wheel-check: $(READY)  ## Install the wheel with all it needs for PYTHON in an empty environment; the demo and a federation run there
	OMP_NUM_THREADS=1 $(BIN)/python tests/wheel_check.py --python $(PYTHON) --pip-args='$(PIP_ARGS)'

docs: $(READY)  ## Write docs/settings.md and docs/device.md from the settings' classes
	$(BIN)/python -m fedssl_simulations.settings_page run > docs/settings.new && mv docs/settings.new docs/settings.md
	$(BIN)/python -m fedssl_simulations.settings_page device > docs/device.new && mv docs/device.new docs/device.md

proto: $(READY)  ## Write what speaks the agent's language from client/fedssl_client/device.proto
	$(BIN)/python -m grpc_tools.protoc -I client --python_out=client --pyi_out=client fedssl_client/device.proto

clean:  ## Remove the environment, the demo and what tools left behind; never runs/
	rm -rf $(VENV) .ci-venv $(DEMO) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last: an installation that was cut short begins anew.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11, 3.12 or 3.13 found; on Debian: apt install python3 python3-venv, or make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) cannot make a virtual environment; on Debian: apt install python3-venv" >&2; rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS) -e '.[dev]'
	@touch $@
