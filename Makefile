# make demo: install everything and do the main job on a real model.  make test: every check there is.  make fuzz: odd inputs.
# make test-ecosystem: with ONNX, PEFT, torchao and GGUF.  make test-oldest, test-newest: with other versions of transformers.
# make docs: the documentation as a site, built strictly, links checked.
# make tutorials: run those whose models are there.  make test-package: the wheel and the sdist, each in a fresh environment.
# make test-browser: the page of a report in headless Chromium (Debian: apt install chromium nodejs npm); pictures in browser-output.
# make kill: kills, and full disks, at random moments of saving; real full disks need root.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ECOSYSTEM := .venv-ecosystem
DOCS := .venv-docs

.PHONY: demo test test-browser docs tutorials test-package test-ecosystem test-oldest test-newest fuzz kill install clean

demo: $(VENV)/installed
	$(BIN)/python -m benchmarks.demo --out demo-output

test: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

# The variable silences an advertisement of mkdocs-material's successor.
docs: $(DOCS)/installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict
	$(DOCS)/bin/linkchecker --config docs/linkcheckerrc --no-status site/index.html

tutorials: $(VENV)/installed
	$(BIN)/python -m pytest tests/tutorials

test-package: $(VENV)/installed
	$(BIN)/nox --session package install

# Beside what `make test` needs, which is to run without these packages: an environment of its own.
test-ecosystem: $(ECOSYSTEM)/installed
	$(ECOSYSTEM)/bin/python -m pytest tests/ecosystem

test-oldest test-newest: test-%: $(VENV)/installed
	$(BIN)/nox --session $*

# CHROMIUM says where the browser is, if not where Debian has it.
test-browser: $(VENV)/installed
	npm ci --prefix tests/browser --no-audit --no-fund
	$(BIN)/python tests/browser/pages.py browser-output
	node tests/browser/check.mjs browser-output

# As many inputs as INPUTS says, other ones every time. What failed is kept in .hypothesis, and tried first the next time.
INPUTS ?= 10000
fuzz: $(VENV)/installed
	LIAR_FUZZ=$(INPUTS) $(BIN)/python -m pytest tests/fuzz

kill: $(VENV)/installed
	$(BIN)/python tests/kill

install: $(VENV)/installed

# torch first and pinned: an unpinned torch brings gigabytes of GPU libraries to machines that have no use for them.
$(VENV)/installed: EXTRAS := dev
$(ECOSYSTEM)/installed: EXTRAS := dev,ecosystem
$(DOCS)/installed: EXTRAS := docs
$(VENV)/installed $(ECOSYSTEM)/installed $(DOCS)/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(@D)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf $(VENV) $(ECOSYSTEM) $(DOCS) .nox demo-output dist site browser-output tests/browser/node_modules
