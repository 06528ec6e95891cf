# `make` says what there is. Everything runs in .venv, made on first use with the first Python 3.11,
# 3.12 or 3.13 found; `make PYTHON=/path/to/python3.12 ...` chooses one.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON ?=
WORKERS ?= 2

# texts, tasks and vocabulary to pretrain on, and what scores are measured on; `data` is a link to DATA
define pretraining_data
test -d "$(DATA)" || { echo "make $@ needs DATA=<directory of the raw data>" >&2; exit 2; }; \
test -e data || ln -s "$(DATA)" data; \
test data -ef "$(DATA)" || { echo "data is not $(DATA): remove it, or make that folder" >&2; exit 2; }; \
$(BIN)/python tools/mini/prepare.py --data "$(DATA)" --out mini_data && \
$(BIN)/python tools/mini/held_out.py --data "$(DATA)" --out compare_data && \
$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bleu]'
endef

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test check format mini nano clean

help:  ## what there is to make
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP)  ## install into .venv (the other targets do it by themselves)

quickstart: $(STAMP)  ## train a prompt on the demo set with the backbone in the package
	@$(BIN)/jaxprompt train quickstart

test: $(STAMP)  ## run all tests, WORKERS files at a time (2; each takes up to 3 GiB)
	@$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

check: $(STAMP)  ## formatting, lint, types, structure
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright
	@$(BIN)/shellcheck --external-sources $(filter-out %.example %.py %/Dockerfile %/env,$(wildcard tpu_scripts/*))
	@$(BIN)/python -m pytest tests/test_structure.py

format: $(STAMP)  ## put formatting and imports right
	@$(BIN)/ruff check --select I --fix .
	@$(BIN)/ruff format .

mini: $(STAMP)  ## make jaxprompt-mini anew: data, weights, scores, package (DATA=directory of raw data)
	@$(pretraining_data)
	@$(BIN)/jaxprompt pretrain pretrain/ladder/4m --only span --only lm --only tasks
	@$(BIN)/jaxprompt scale scale/figure1 'scale.backbones={4M: runs/ladder/4m/tasks/backbone}'
	@$(BIN)/python tools/mini/package.py --run runs/ladder/4m/tasks --data-card mini_data/data_card.json \
	    --scores runs/scale/figure1/scale.json --name jaxprompt-mini

nano: $(STAMP)  ## make jaxprompt-nano anew, as mini (DATA=directory of raw data)
	@$(pretraining_data)
	@$(BIN)/jaxprompt pretrain pretrain/nano
	@$(BIN)/jaxprompt scale scale/figure1 'scale.backbones={nano: runs/nano/backbone}' output_dir=runs/scale/nano
	@$(BIN)/python tools/mini/package.py --run runs/nano --data-card mini_data/data_card.json \
	    --scores runs/scale/nano/scale.json --name jaxprompt-nano

clean:  ## remove .venv
	@rm -rf $(VENV)

$(STAMP): pyproject.toml constraints.txt
	@set -euo pipefail; \
	if [ ! -x $(BIN)/python ]; then \
	  python=$$(sh tools/find_python.sh $(PYTHON)); \
	  echo "Making $(VENV) with $$($$python --version) ($$python)"; \
	  "$$python" -m venv $(VENV); \
	fi
	@set -euo pipefail; \
	log=$(VENV)/install.log; start=$$SECONDS; \
	echo "Installing jaxprompt and what it needs; the first time takes a few minutes (log: $$log)"; \
	if ! $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off \
	    -c constraints.txt -e '.[plots,dev]' 2>&1 | tee $$log | awk ' \
	      /^Collecting |^Requirement already/ { if (++n % 10 == 0) { printf "."; fflush() } } \
	      /^Installing collected/ { printf " installing"; fflush() } \
	      END { print "" }'; then \
	  grep -E '^(ERROR|error)' $$log || tail -n 20 $$log; \
	  echo "The installation failed; all of it is in $$log" >&2; exit 1; \
	fi; \
	echo "Ready after $$((SECONDS - start)) s"
	@touch $@
