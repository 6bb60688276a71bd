# make demo | test | check | bench | gpu: each sets up .venv first; the second time that takes seconds.
PYTHON ?= python3
# Others go into an environment of their own:
# make test VENV=.venv-low TORCH="torch==2.4.1 torchvision==0.19.1"
TORCH ?= torch==2.14.1 torchvision==0.29.1
# A path, a wheel or a URL; whatever pip can install.
DETECTRON2 ?= git+https://github.com/facebookresearch/detectron2.git@02b5c4e295e990042a714712c21dc79b731e8833

VENV ?= .venv
BIN := $(VENV)/bin
DEMO_OUTPUT ?= output/demo
GPU_OUTPUT ?= output/gpu

.PHONY: demo test test-fast check bench gpu lint types setup clean

demo: setup
	PYTHONWARNINGS=ignore $(BIN)/python -m gnpractical.demo --output-dir $(DEMO_OUTPUT)

test: setup
	$(BIN)/python -m pytest tests

# Without what trains in a subprocess.
test-fast: setup
	$(BIN)/python -m pytest tests -m "not slow"

check: lint types test

# Up to half an hour on a quiet machine; see benchmarks/README.md.
bench: setup
	@for script in group_norm weight_standardization folding simulation_speed law steps; do \
	  echo "== $$script"; PYTHONWARNINGS=ignore $(BIN)/python benchmarks/$$script.py || exit 1; done
	@if $(BIN)/python -c "import detectron2" 2>/dev/null; then \
	  for script in building frameworks probe_cost; do \
	    echo "== $$script"; PYTHONWARNINGS=ignore $(BIN)/python benchmarks/$$script.py || exit 1; done; \
	else echo "Detectron2 is not installed: its benchmarks are left out"; fi

# What only a GPU can show, tested and measured; goes on where it was stopped.
gpu: setup
	PYTHONWARNINGS=ignore $(BIN)/python benchmarks/gpu.py --output $(GPU_OUTPUT)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

# Detectron2 is optional: where it cannot be had, say so in one line and go on.
setup: $(VENV)/.installed
	@if [ "$$(cat $(VENV)/.detectron2 2>/dev/null)" != "$(DETECTRON2)" ]; then \
	  echo "Installing Detectron2 from $(DETECTRON2) (a few minutes; log: $(VENV)/detectron2.log)"; \
	  if $(BIN)/pip install --no-build-isolation "$(DETECTRON2)" > $(VENV)/detectron2.log 2>&1; then \
	    echo "$(DETECTRON2)" > $(VENV)/.detectron2; \
	  else \
	    echo "Detectron2 could not be installed (see $(VENV)/detectron2.log); going on without it: what needs it is skipped. Set DETECTRON2=<path, wheel or URL> to install it from elsewhere."; \
	  fi; \
	fi

# setuptools from 77 on reads pyproject.toml's licence, and below 82 still has pkg_resources, which
# detectron2.model_zoo imports.
$(VENV)/.installed: pyproject.toml setup.py Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "setuptools>=77,<81" wheel ninja $(TORCH)
	$(BIN)/pip install --quiet --no-build-isolation -e ".[dev,search,tv]"
	touch $@

clean:
	rm -rf $(VENV) output build *.egg-info
