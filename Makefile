# Agent Forge. `make demo` makes three models, merges them, teaches the result to think and makes it ternary;
# `make test` passes the tests.
# The first Python that really runs and is new enough (a version manager's stub may be on the path and not run);
# else plain python3, which scripts/bootstrap.py then refuses in one line.
PYTHON  ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; exit; }; done; \
	command -v python3)
VENV    ?= .venv
PROFILE ?= nano
UNTIL   ?= bitnet
BIN     := $(VENV)/bin
JOBS    ?= 2

.PHONY: demo test lint bench docs clean help

help:
	@echo "make demo    three models from nothing, merged, taught to think, made ternary (PROFILE=$(PROFILE))"
	@echo "make test    the whole test suite, with coverage"
	@echo "make lint    style, house limits"
	@echo "make bench   benchmarks against peers, in an environment of their own"
	@echo "make docs    rewrite the generated pages of docs/"
	@echo "make clean   remove environments and caches (sessions in storage/ stay)"

demo:
	@test -n "$(PYTHON)" || { echo "error: no python3 found; install Python 3.11 or newer"; exit 1; }
	@$(PYTHON) scripts/bootstrap.py $(VENV) -
	@$(BIN)/agent-forge run --profile $(PROFILE) --until $(UNTIL)

test:
	@test -n "$(PYTHON)" || { echo "error: no python3 found; install Python 3.11 or newer"; exit 1; }
	@$(PYTHON) scripts/bootstrap.py $(VENV)-test test,lint
	@OMP_NUM_THREADS=1 $(VENV)-test/bin/python -m pytest -n $(JOBS) --cov --cov-report=term:skip-covered --cov-fail-under=90

lint:
	@$(PYTHON) scripts/bootstrap.py $(VENV)-test test,lint
	@$(VENV)-test/bin/ruff check . && $(VENV)-test/bin/ruff format --check .

bench:
	@$(PYTHON) scripts/bootstrap.py $(VENV)-bench bench
	@$(VENV)-bench/bin/python -m benchmarks.run

docs:
	@$(PYTHON) scripts/bootstrap.py $(VENV)-test test,lint
	@$(VENV)-test/bin/python scripts/make_docs.py

clean:
	rm -rf $(VENV) $(VENV)-test $(VENV)-bench build dist *.egg-info .ruff_cache .hypothesis .coverage .coverage.* htmlcov
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
