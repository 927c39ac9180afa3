# Two commands on a fresh machine: `make demo` and `make test`. Both can be run again at any time.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint

demo: .venv/installed  ## install into .venv, then train the bundled model on the bundled task
	@echo "== training the bundled model on the bundled task: python train.py --preset tiny"
	$(BIN)/python train.py --preset tiny

test: .venv/installed-dev  ## install the test extras into .venv, then run the tests
	@echo "== testing: python -m pytest"
	$(BIN)/python -m pytest

lint: .venv/installed-dev  ## style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/installed: requirements.txt
	@echo "== making .venv and installing requirements.txt into it"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	@echo "== installing the test extras into .venv"
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	@touch $@
