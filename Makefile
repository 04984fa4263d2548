# Two commands are all that is needed: `make demo` and `make test`. Both set up what they need, once.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: help setup models demo test faults docs lock lint clean

help:
	@echo "make demo    set up, then two agents learn opposite styles by being talked to (about 20 minutes on 2 cores)"
	@echo "make test    set up, then style, types and all tests"
	@echo "make faults  kill and break the whole system under traffic, then compare what is kept with what was received"
	@echo "make setup   virtual environment with everything, once; done again only when the requirements change"
	@echo "make docs    write the configuration reference anew from the settings classes"
	@echo "make lock    pin what the gateway installs, with hashes, into deploy/gateway.lock"
	@echo "make lint    style and types alone"
	@echo "make clean   remove the virtual environment, caches and runs"

setup:
	@$(PYTHON) scripts/setup.py --venv $(VENV)

models: setup
	@$(BIN)/python -m demo.models

demo: models
	@$(BIN)/python -m demo $(DEMO_ARGS)

docs: setup
	@$(BIN)/python scripts/reference.py

lock: setup
	$(BIN)/uv pip compile pyproject.toml --extra gateway --extra postgres --universal --python-version 3.11 \
		--generate-hashes --no-annotate --custom-compile-command "make lock" --quiet $(LOCK_ARGS) -o deploy/gateway.lock

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

test: models lint
	$(BIN)/pytest -q $(TEST_ARGS)

faults: models
	$(BIN)/python -m tests.faults $(FAULTS_ARGS)

clean:
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist runs
