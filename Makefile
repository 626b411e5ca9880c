# Everything runs in .venv, which `make install` fills from constraints.txt. PYTHON and PIP_ARGS can be set, for example
# PIP_ARGS="--index-url ..." for another build of torch.
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin

.PHONY: help install demo test conformance fuzz style types check corners vllm-test docs grid templates hf-suite bench study real gpu gpu-pack clean

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

install: .venv/installed  ## Put the project and all it needs into .venv

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "SparseCut needs Python 3.11 or newer, but $(PYTHON) is `$(PYTHON) --version`; set PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { echo "$(PYTHON) cannot make a virtual environment; on Debian: apt-get install python3-venv"; rm -rf .venv; exit 1; }
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

demo: install  ## Train and compare LLaVA, two controls and SparseCut on drawn images (some minutes)
	$(BIN)/sparsecut demo --out runs/demo

test: install  ## Run the tests (offline, five and a half minutes on two cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --ignore tests/conformance

conformance: install  ## Run the slow grids: more families, engines, sizes, compiling, some drawn inputs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests/conformance tests/fuzz

SECONDS ?= 300
SEED ?= 0
fuzz: install  ## Try drawn inputs of every kind (SECONDS=300, SEED=0)
	FUZZ_SECONDS=$(SECONDS) FUZZ_SEED=$(SEED) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -v tests/fuzz

style: install  ## Check formatting and lint
	$(BIN)/ruff format --check . && $(BIN)/ruff check .

types: install  ## Check types with mypy (a minute at first, then seconds)
	$(BIN)/python -m mypy

check: style types test conformance  ## What CI runs first

CORNER ?=
TORCH ?=
corners:  ## Test with the oldest, newest and pinned versions, and without extras (CORNER=oldest, TORCH=2.13.0)
	TORCH="$(TORCH)" PIP_ARGS="$(PIP_ARGS)" $(PYTHON) .ci/corners.py $(CORNER)

FAMILIES ?=
vllm-test:  ## Test models inside vLLM on CPUs, in an environment of their own (7 GB, six minutes; FAMILIES=1)
	PIP_ARGS="$(PIP_ARGS)" $(PYTHON) .ci/vllm_test.py $(if $(FAMILIES),--families)

docs: install  ## Build the documentation site into runs/site
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev,docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open runs/site/index.html"

grid: install  ## Run every model family and write docs/support.md (slow)
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/grid.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/upgrades.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/compiling.py

templates: install  ## Try the chat templates of a folder and write docs/support.md (FOLDER=...)
	@test -n "$(FOLDER)" || { echo "name a folder of chat templates: make templates FOLDER=..."; exit 1; }
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/templates.py "$(FOLDER)" --page

hf-suite: install  ## Run transformers' own tests on our classes and write docs/support.md (REPOSITORY=a checkout of it)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev,hf-suite]'
	$(BIN)/python benchmarks/hf_suite.py $(if $(REPOSITORY),--repository $(REPOSITORY))

bench: install  ## Memory and time of prefill, plan by plan
	$(BIN)/python benchmarks/prompt.py --plan llava --plan hires_channels --plan official_13b --plan sparsecut

study: install  ## The main comparison: ways of fusion x seeds on drawn images (hours)
	$(BIN)/sparsecut study shapes

real: install  ## Real weights: fetch, check, convert, prove, train on two cores, ask (half an hour, 180 MB)
	$(BIN)/pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -r examples/real/requirements.txt
	$(BIN)/python examples/real/prepare.py runs/real
	$(BIN)/sparsecut train real --resume
	$(BIN)/python examples/real/ask.py runs/real

gpu:  ## Plans at CLIP-L + 7B size on a GPU, and vLLM: nine minutes; PYTHON has torch, the rest is seen to
	$(PYTHON) benchmarks/gpu_run.py --out runs/gpu/bench

gpu-pack:  ## Fetch what `make gpu` needs beside torch, for a machine without a network
	$(PYTHON) benchmarks/gpu_python.py --pack

clean:  ## Remove .venv, .corners and caches, keep runs/
	rm -rf .venv .corners .pytest_cache .ruff_cache build *.egg-info
