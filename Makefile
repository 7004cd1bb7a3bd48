# `make demo` and `make test` do all their own set-up in .venv.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DIR ?= .demo
SECONDS ?= 0
DEMO_OPTIONS ?=
FUZZ_SECONDS ?= 20
FUZZ_ONLY ?=

# What pip says, as one line a package.
SHOW := sed -u -n -E 's/^ *Collecting ([A-Za-z0-9._-]+).*/  fetching \1/p; s/^(Installing collected packages).*/  installing/p; /^ERROR/p'

.PHONY: help demo setup check fix test test-boxes words lock fuzz chaos release sbom schema clean
help: ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

demo: $(VENV)/.demo-installed ## a whole fleet on this machine; SECONDS=60 ends by itself, DIR= says where its state goes
	@$(BIN)/skerry demo --dir "$(DIR)" --seconds "$(SECONDS)" $(DEMO_OPTIONS)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Skerry needs Python 3.11 or newer; set PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.demo-installed: requirements/demo.txt pyproject.toml | $(BIN)/python
	@echo "set-up: the locked requirements go into $(VENV)"
	@set -o pipefail; $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --require-hashes -r requirements/demo.txt 2>&1 | $(SHOW)
	@$(BIN)/python -m pip install -qqq --disable-pip-version-check --no-deps --no-build-isolation --editable . 2>/dev/null
	@touch $@

$(VENV)/.test-installed: requirements/test.txt pyproject.toml | $(BIN)/python
	@echo "set-up: the locked requirements for development go into $(VENV)"
	@set -o pipefail; $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --require-hashes -r requirements/test.txt 2>&1 | $(SHOW)
	@$(BIN)/python -m pip install -qqq --disable-pip-version-check --no-deps --no-build-isolation --editable . 2>/dev/null
	@touch $@ $(VENV)/.demo-installed

setup: $(VENV)/.test-installed ## install everything that developing needs

check: setup ## format, lint, types, import rules
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo 2>/dev/null || $(BIN)/lint-imports

fix: setup ## format and apply safe lint fixes
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

test: check ## the checks and every test; ends with what was not run and why
	@$(BIN)/python -m tests

words: setup ## the console's catalogues: what is new in the source, and what programs read of them
	@$(BIN)/python .ci/words

lock: ## resolve the requirements again (needs uv)
	uv pip compile -q --generate-hashes --no-emit-index-url --no-header --universal --python-version 3.11 --extra cpu --extra grpc --extra demo --group build pyproject.toml -o requirements/demo.txt
	uv pip compile -q --generate-hashes --no-emit-index-url --no-header --universal --python-version 3.11 --extra cpu --extra grpc -c requirements/demo.txt pyproject.toml -o requirements/box.txt
	uv pip compile -q --generate-hashes --no-emit-index-url --no-header --no-strip-extras --universal --python-version 3.11 --extra cpu --extra grpc --extra demo --extra image --group build --group test -c requirements/demo.txt pyproject.toml -o requirements/test.txt
	@.ci/bare-extras requirements/test.txt
	uv pip compile -q --generate-hashes --no-emit-index-url --no-header --universal --python-version 3.11 --group worker -c requirements/demo.txt -o skerry/image/worker.txt
	uv pip compile -q --generate-hashes --no-emit-index-url --no-header --universal --python-version 3.11 --group worker-cuda -c requirements/demo.txt -o skerry/image/worker-cuda.txt
	uv pip compile -q --generate-hashes --no-emit-index-url --no-header --universal --python-version 3.11 --group mlserver -o requirements/mlserver.txt
	uv pip compile -q --generate-hashes --no-emit-index-url --no-header --universal --python-version 3.11 --group fuzz -o requirements/fuzz.txt

RELEASE_FOR ?=
release: setup ## all that a box or a coordinator needs, in one file, build/skerry-VERSION.tar; for boxes unlike this machine RELEASE_FOR="--python 3.13 --machine aarch64"
	@rm -rf build/wheels build/lib && mkdir -p build/wheels
	@set -o pipefail; $(BIN)/skerry release fetch --requirements requirements/box.txt --wheels build/wheels $(RELEASE_FOR) 2>&1 | $(SHOW)
	@$(BIN)/python -m pip wheel -qqq --disable-pip-version-check --no-deps --no-build-isolation -w build/wheels . 2>/dev/null
	@$(BIN)/skerry release build --wheels build/wheels --requirements requirements/box.txt --out build $(RELEASE_FOR)

sbom: setup ## the bill of materials of what boxes and coordinators install, build/sbom.json (CycloneDX)
	@mkdir -p build
	@PYTHONWARNINGS=ignore $(BIN)/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible --validate --of JSON -o build/sbom.json requirements/box.txt

fuzz: $(VENV)/.fuzz-installed ## every decoder under a fuzzer that is guided by coverage; FUZZ_SECONDS=60 for each, FUZZ_ONLY="gRPC"
	@$(BIN)/python -m tests.fuzz.atheris_run --seconds "$(FUZZ_SECONDS)" --only "$(FUZZ_ONLY)"

test-boxes: setup ## as root: boxes that boot, installed by Ansible, upgraded, given bad releases (needs systemd-nspawn and mmdebstrap); of another Debian: SKERRY_BOXES_SUITE=trixie
	@SKERRY_REQUIRE=all SKERRY_BOXES=1 $(BIN)/python -m pytest tests/boxes $(BOXES_OPTIONS)

CHAOS_SEED ?= 1
CHAOS_SECONDS ?= 60
chaos: setup ## as root: a real fleet under load, and all that a seed has in store for it; CHAOS_SEED=7, CHAOS_SECONDS=600
	@$(BIN)/python -m tests.chaos --seed "$(CHAOS_SEED)" --seconds "$(CHAOS_SECONDS)"

$(VENV)/.fuzz-installed: requirements/fuzz.txt | setup
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements/fuzz.txt
	@touch $@

schema: setup ## write skerry/wire/schema.json again, after SCHEMA_VERSION was raised
	$(BIN)/python -m skerry.wire.schema > skerry/wire/schema.json.new && mv skerry/wire/schema.json.new skerry/wire/schema.json

clean: ## remove everything made here
	rm -rf $(VENV) .demo .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .fuzz *.egg-info
