# Two commands on a fresh machine: `make demo` and `make test`. Both can be run again at any time.
# `make torture` is the long part of the tests: about an hour and a half, most of it the soak's hour.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint torture

demo: .venv/installed  ## install into .venv, then train the bundled model on the bundled task
	@echo "== training the bundled model on the bundled task: python train.py --preset tiny"
	$(BIN)/python train.py --preset tiny

test: .venv/installed-dev  ## install the test extras into .venv, then run the tests
	@echo "== testing: python -m pytest"
	$(BIN)/python -m pytest

torture: .venv/installed-dev  ## what docs/reliability.md promises, in full: kills, hostile text, every model, an hour's soak
	$(BIN)/python benchmarks/kill_resume.py --kills 50
	$(BIN)/python benchmarks/fuzz_rewards.py --cases 1000000
	$(BIN)/python benchmarks/families.py
	$(BIN)/python benchmarks/soak.py --minutes 60

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
