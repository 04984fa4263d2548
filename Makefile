# Two commands are all that is needed: `make demo` and `make test`. Both set up what they need, once.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: help setup models demo test faults fuzz docs lock sbom audit lint clean

help:
	@echo "make demo    set up, then two agents learn opposite styles by being talked to (about 20 minutes on 2 cores)"
	@echo "make test    set up, then style, types and all tests"
	@echo "make faults  kill and break the whole system under traffic, then compare what is kept with what was received"
	@echo "make fuzz    attack the running system: 20,000 made-up requests, every route with every key"
	@echo "make setup   virtual environment with everything, once; done again only when the requirements change"
	@echo "make docs    write the configuration reference anew from the settings classes"
	@echo "make lock    pin what the gateway installs, and what builds our wheel, with hashes: deploy/*.lock"
	@echo "make sbom    list what the lock installs as a CycloneDX file, dist/gateway.cdx.json"
	@echo "make audit   look up known vulnerabilities of what the lock installs; without the network: ADVISORIES=all.zip"
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

COMPILE = $(BIN)/uv pip compile --universal --python-version 3.11 --generate-hashes --no-annotate \
	--custom-compile-command "make lock" --quiet $(LOCK_ARGS)

lock: setup
	$(COMPILE) pyproject.toml --extra gateway --extra postgres -o deploy/gateway.lock
	@$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
		| $(COMPILE) - -o deploy/build.lock

# Tools of the two targets below stay out of the virtual environment; uv keeps them in its cache.
sbom: setup
	@mkdir -p dist
	$(BIN)/uv tool run --from "cyclonedx-bom>=7.2,<8" cyclonedx-py requirements deploy/gateway.lock \
		--spec-version 1.6 --output-reproducible --output-file dist/gateway.cdx.json
	@$(BIN)/python scripts/check_sbom.py deploy/gateway.lock dist/gateway.cdx.json

# --strict: a package that could not be looked up is no package without vulnerabilities.
audit: setup
ifdef ADVISORIES
	$(BIN)/python -m scripts.audit_offline deploy/gateway.lock $(ADVISORIES) $(AUDIT_ARGS)
else
	$(BIN)/uv tool run --from "pip-audit>=2.9,<3" pip-audit --requirement deploy/gateway.lock \
		--disable-pip --require-hashes --strict $(AUDIT_ARGS)
endif

lint: setup
	$(BIN)/ruff check .
	$(BIN)/mypy

test: models lint
	$(BIN)/pytest -q $(TEST_ARGS)

fuzz: models
	METACLAW_TEST_SECURITY=long $(BIN)/pytest -q -s tests/security $(TEST_ARGS)

faults: models
	$(BIN)/python -m tests.faults $(FAULTS_ARGS)

clean:
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist runs
