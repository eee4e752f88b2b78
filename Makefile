# The two commands of the README are `make demo` and `make test`; `make help` lists the rest.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up
TESTS ?=
UNDO ?=
NAMES ?=
SEEDS ?= 1000
FIRST ?= 0
WORDS ?=
GO_ON ?=
MINUTES ?=

HALVES := test-hosts test-rest
test-hosts := tests/contract/ tests/faults/
test-rest := $(filter-out $(test-hosts) tests/demo/ tests/fakes/ tests/lab/ tests/__pycache__/,$(wildcard tests/*/))

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_CACHE_DIR := 1

.DEFAULT_GOAL := help
.PHONY: help setup packages check format test $(HALVES) long soak faults demo bench clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

setup: packages $(STAMP) ## install the system packages that are missing and make the virtual environment

packages:
	@.ci/install-packages

# The distribution's Python, with its site packages: libnbd is not on PyPI, and libvirt would need a compiler.
$(STAMP): pyproject.toml .ci/packages | packages
	/usr/bin/python3 -m venv --system-site-packages $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

check: setup ## linters, formatting, types, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup ## let ruff format everything and fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: setup ## every test, those on real libvirt and QEMU included (TESTS=tests/unit for some)
ifeq ($(strip $(TESTS)),)
	@$(MAKE) --no-print-directory --jobs=2 $(HALVES)
else
	$(BIN)/pytest -q $(TESTS)
endif

# Two runs side by side: one waits for hypervisors most of the time, the other computes.
$(HALVES):
	$(BIN)/pytest -q -o cache_dir=.pytest_cache/$@ $($@)

long: setup ## the rest of the tests on real hypervisors: every kind of disk onto every other, and the like
	$(BIN)/pytest -q -m long tests/e2e

soak: setup ## whole failbacks under faults, simulated, in two processes (SEEDS=10000 for as many, FIRST=n from there)
	$(BIN)/python -m tests.simulation --seeds $(SEEDS) --first $(FIRST)

faults: setup ## every fault at every step on real hosts, about 40 minutes; writes docs/FAULTS.md (WORDS="kill-qemu audit" for some; MINUTES=30 then GO_ON=1 in parts)
	$(BIN)/python -m tests.faults $(if $(filter-out 0 no,$(GO_ON)),--go-on) $(if $(MINUTES),--minutes $(MINUTES)) $(WORDS)

demo: setup ## a real VM fails back to its original before your eyes (UNDO=1 ends with undo instead of commit)
	$(BIN)/python -m tests.demo $(if $(filter-out 0 no,$(UNDO)),--undo)

bench: setup ## every benchmark, more than two hours, with a report in bench/report (NAMES="memory sparse" for some)
	$(BIN)/pip install --quiet --editable '.[bench]'
	$(BIN)/python -m bench.report $(NAMES)

clean: ## remove everything that the other commands made here
	rm -rf $(VENV) .lab demo-run build bench/report failback.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
