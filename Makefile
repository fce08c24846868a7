# `make demo` runs the whole flow on handwritten digits, `make test` the whole test suite; both set up .venv first.
PYTHON ?= $(firstword $(foreach name,python3.12 python3.11 python3,$(shell $(name) -c \
  'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $(name))))
BIN := .venv/bin

.PHONY: demo test lint clean
.DEFAULT_GOAL := setup

.PHONY: setup
setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: error: Python 3.11 or 3.12 is needed and was not found" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: setup
	$(BIN)/python -m ray_jobs.pipeline configs/digits.yaml

# Two processes run tests, because many tests wait for processes of Ray. Each takes whole files, because the tests of a
# file share what is costly.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
