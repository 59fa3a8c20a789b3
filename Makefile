# Every target sets up what it needs in .venv on first use. `PYTHON=python3 VENV=` runs it in an existing interpreter
# instead and installs nothing (offline GPU nodes).
PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
DOCS   ?= build/docs

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
else
PY := $(VENV)/bin/python
DEMO_READY := $(VENV)/.ready-demo
DEV_READY  := $(VENV)/.ready-dev
endif

# The GPU's packages are hundreds of megabytes, so the demo takes them only where there is a driver to use them.
HAS_DRIVER := $(or $(wildcard /proc/driver/nvidia/version),$(shell command -v nvidia-smi))
GPU_EXTRAS := cu13,numba
ifeq ($(HAS_DRIVER),)
DEMO_EXTRAS := demo
else
DEMO_EXTRAS := demo,$(GPU_EXTRAS)
endif
# One pytest worker a core where pytest-xdist is installed, and one BLAS thread a worker.
XDIST = $(shell $(PY) -c "import xdist" 2>/dev/null && printf '%s' '-n auto --maxprocesses 8')

.DEFAULT_GOAL := help
.PHONY: help install demo test test-gpu compile bench bench-cache table docs lint format clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "  %-11s %s\n", $$1, $$2}'
	@echo '  Options: PYTHON=python3 VENV= (existing interpreter, installs nothing), ARGS="..." (passed to demo, tests, bench)'

install: $(DEV_READY) ## set up .venv with everything: kernels, tests, bench
	@$(PY) -m mlacore info

demo: $(DEMO_READY) ## a decode loop over a paged cache, on the GPU if there is one, else on the CPU
	$(PY) -m mlacore demo $(ARGS)

test: $(DEV_READY) ## every test that needs no GPU
	OPENBLAS_NUM_THREADS=1 $(PY) -m pytest -m "not gpu" $(XDIST) $(ARGS)

test-gpu: $(DEV_READY) ## the GPU tests; fails, not skips, without a Hopper GPU
	MLACORE_REQUIRE_GPU=1 $(PY) -m pytest -m gpu $(ARGS)

compile: $(DEV_READY) ## build every kernel variant (no GPU needed); registers, shared memory and spills of each
	$(PY) -m mlacore compile

bench: $(DEV_READY) ## measure on this GPU against its ceilings and the peers found; then table and plot
	$(PY) -m bench.decode $(ARGS)
	$(PY) -m bench.plot
	$(PY) -m bench.table

bench-cache: $(DEV_READY) ## measure the paged cache, on the GPU if there is one; then the README's section
	$(PY) -m bench.cache $(ARGS)

table: $(DEV_READY) ## rewrite the README's tables and the plots from bench/results
	$(PY) -m bench.plot
	$(PY) -m bench.table

docs: $(DEV_READY) ## the API reference, from the docstrings, as static HTML in build/docs
	MLACORE_COMPILE=lazy $(PY) -m pdoc --docformat numpy --no-show-source --output-directory $(DOCS) mlacore mlacore.flash_mla mlacore.jax

lint: $(DEV_READY) ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(DEV_READY) ## rewrite the sources in the house format
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean: ## remove .venv, builds and tool caches (not the kernel cache)
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find mlacore tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

ifneq ($(strip $(VENV)),)
# --without-pip: distributions that split off ensurepip (Debian) still work; the outer pip fills the environment.
$(VENV)/bin/python:
	$(PYTHON) -m venv --without-pip $(VENV)

$(VENV)/.ready-demo: pyproject.toml | $(VENV)/bin/python
	$(PYTHON) -m pip --python $(VENV)/bin/python install --quiet pip -e ".[$(DEMO_EXTRAS)]"
	@touch $@

$(VENV)/.ready-dev: pyproject.toml | $(VENV)/bin/python
	$(PYTHON) -m pip --python $(VENV)/bin/python install --quiet pip -e ".[$(GPU_EXTRAS),demo,plot,docs,test]"
	@touch $@ $(VENV)/.ready-demo
endif
