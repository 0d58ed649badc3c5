# Everything runs in $(VENV), which `make install` makes from nothing but Python 3.11 or later.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
PORT ?= 8000
PIP_ARGS ?=
BIN := $(VENV)/bin
READY := $(VENV)/.odlkit-ready
BUILT := _build/.book-built

# Two workers share the cores; one thread each is faster than two that fight, and keeps sums in one order.
export OMP_NUM_THREADS ?= 1
export PYTHONDONTWRITEBYTECODE ?= 1

.DEFAULT_GOAL := help
.PHONY: help install book test lint execute pages certificates serve clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(READY)  ## make .venv with the package and all that the book and the tests need

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "odlkit needs Python 3.11 or later, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable '.[book,test]'
	@touch $@

book: $(BUILT)  ## build the book into _build/html from the executed chapters; any warning is an error
	@echo "The book is in _build/html/index.html"

$(BUILT): $(READY) _config.yml _toc.yml tools/assets.py $(shell find book odlkit -type f ! -path '*/.*' ! -path '*__pycache__*')
	$(BIN)/python tools/assets.py
	rm -rf _build/html _build/.doctrees
	$(BIN)/jupyter-book build . -W -n --keep-going
	@touch $@

test: lint $(BUILT)  ## lint, types, every test, and every chapter run again and compared with its stored output
	$(BIN)/python -m pytest tests book --nbval-lax --nbval-current-env \
		-n $(JOBS) --dist loadfile -q --durations 10

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy odlkit

execute: $(READY)  ## run the chapters whose text or library changed, store the outputs (ALL=1: every chapter)
	$(BIN)/python tools/execute.py -j $(JOBS) $(if $(ALL),--all)

pages: $(READY)  ## write the pages that are made from data, and the notation boxes of the chapters
	$(BIN)/python tools/pages.py

certificates: $(READY)  ## play every proposition again, store what it says, and write its page
	$(BIN)/python tools/pages.py --record

serve:  ## show the built book on this machine
	$(PYTHON) -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)

clean:  ## remove what was built; the environment stays
	rm -rf _build build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
