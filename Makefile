# make demo: install everything and do the main job on a real model.  make test: every check there is.  make fuzz: odd inputs.
# make kill: kills, and full disks, at random moments of saving; real full disks need root.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test fuzz kill install clean

demo: $(VENV)/installed
	$(BIN)/python -m benchmarks.demo --out demo-output

test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

# As many inputs as INPUTS says, other ones every time. What failed is kept in .hypothesis, and tried first the next time.
INPUTS ?= 10000
fuzz: $(VENV)/installed
	LIAR_FUZZ=$(INPUTS) $(BIN)/python -m pytest tests/fuzz

kill: $(VENV)/installed
	$(BIN)/python tests/kill

install: $(VENV)/installed

# torch first and pinned: an unpinned torch brings gigabytes of GPU libraries to machines that have no use for them.
$(VENV)/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo-output
