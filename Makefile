# Everything runs from a plain checkout: no environment needs to be active. `make` alone lists what there is.
PYTHON ?= python3
VENV ?= .venv
OUT ?= out/demo
PYTEST_ARGS ?=
# Processes that share the tests, each on one thread.
WORKERS ?= 2

# The pair that the figures in this repository were made with; the package itself takes any torch from 2.4 on.
TORCH ?= torch==2.14.1 torchvision==0.29.1
# Index that has another build of torch, such as the small one for CPUs; used for torch and torchvision only.
TORCH_INDEX ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test docs leaderboard browser canvas clean

help: ## list the targets
	@echo "make [TARGET] [PYTHON=python3] [VENV=.venv] [TORCH_INDEX=URL of a wheel index with, say, the CPU build of torch]"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' Makefile | expand -t 12

install: $(STAMP) ## make .venv and install the suite with all extras, once

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; name one with make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -f $@; echo "the venv module failed; on Debian and Ubuntu it comes with python3-venv"; exit 1; }

# --no-deps: the index may hold torch alone; what torch needs comes with the second line.
$(STAMP): pyproject.toml setup.py | $(BIN)/python
ifneq ($(strip $(TORCH_INDEX)),)
	$(PIP) install --no-deps --index-url $(TORCH_INDEX) $(TORCH)
endif
	$(PIP) install $(TORCH) -e '.[all,dev]'
	@touch $@

demo: $(STAMP) ## erase the dagger from the embedded model with three methods, measure, and write a report
	$(BIN)/erasure bench --model canvas --concept dagger --methods negative_prompt,uce,safree --suite canvas-demo --out $(OUT)
	@echo "The report: $(OUT)/report.html"

test: $(STAMP) ## ruff, mypy, pytest (PYTEST_ARGS='-k name' for some of the tests)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

# The variable hides a notice on the theme's successor, printed on every run.
docs: $(STAMP) ## build the documentation into site/, warnings as errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --site-dir site
	@echo "The documentation: site/index.html"

leaderboard: $(STAMP) ## make docs/leaderboard.md and leaderboard/index.html from the folders in leaderboard/
	$(BIN)/python -m erasure.eval.leaderboard

browser: ## install Chromium for the report's test, where that is possible
	@if command -v chromedriver >/dev/null && { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null; then \
	  echo "Chromium and its driver are here already"; \
	elif ! command -v apt-get >/dev/null; then \
	  echo "not installed: no apt-get here; install Chromium and chromedriver by hand"; \
	elif [ "$$(id -u)" != 0 ]; then \
	  echo "not installed: only root may; run sudo apt-get install chromium chromium-driver"; \
	else \
	  apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium chromium-driver \
	    || echo "not installed: apt-get failed, see above"; \
	fi

canvas: $(STAMP) ## train the embedded models again (hours; goes on where it stopped)
	$(PIP) install -e '.[canvas-train]'
	$(BIN)/python scripts/train_canvas.py

clean: ## remove results, build artefacts and caches; .venv and canvas-build/ stay
	rm -rf out build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
