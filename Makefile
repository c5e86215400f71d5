# One command each: `make serve` answers queries, `make test` proves that it does. Both set up what they need, once.

# The first of these that runs and is 3.11 or 3.12.
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && command -v $$p && break; done)
VENV   ?= .venv
TORCH  ?= deploy/requirements/torch-cpu.txt
PORT   ?= 8000

BIN   := $(VENV)/bin
READY := $(VENV)/.ready

export HF_HUB_OFFLINE ?= 1

.PHONY: help setup serve test check lint format pocket clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 10

setup: $(READY)  ## make the virtual environment

# torch comes first and from its own file: a CPU machine never pulls CUDA, and `TORCH=other.txt` chooses another build.
$(READY): pyproject.toml $(TORCH)
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed and none was found: name one with make PYTHON=/path/to/python"; exit 1; }
	@echo "==> Setting up $(VENV) with $(PYTHON) (once; a few minutes)"
	@$(PYTHON) -m venv $(VENV)
	@echo "==> Installing torch ($(TORCH))"
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet -r $(TORCH)
	@echo "==> Installing the service, its trainers and its tests"
	@rm -rf *.egg-info  # what an older version left there would be found before the new one
	@$(BIN)/python -m pip install --quiet -e '.[train,dev]'
	@touch $@

serve: $(READY)  ## start the service on PORT (default 8000) with the pocket fleet
	@echo "==> Starting the service on port $(PORT)"
	@exec $(BIN)/router-service serve --port $(PORT)

test: $(READY) lint  ## every test: real Ray Serve, real Redis, real weights
	@echo "==> Running all tests"
	@$(BIN)/python -m pytest

check: $(READY) lint  ## the fast tests, in under two minutes
	@echo "==> Running the fast tests"
	@$(BIN)/python -m pytest -m 'not slow'

lint: $(READY)
	@echo "==> Checking style and types"
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --quiet --check .
	@$(BIN)/mypy --no-error-summary

format: $(READY)  ## put the code in its usual shape
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

pocket: $(READY)  ## train the pocket fleet again, from nothing
	@$(BIN)/python -m training.pocket build

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build *.egg-info
