# Everything a newcomer, a developer and the continuous integration run. `make help` lists it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
JOBS ?= 2
BENCH_INSTALLED := $(VENV)/.installed-bench

.PHONY: help install demo figures test test-long notebooks docs lint types format bench clean

help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-10s %s\n", $$1, $$2}'

install: $(INSTALLED)  ## Make the virtual environment with the versions of constraints.txt

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "curvdiag needs Python 3.11 or newer; say which: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,dev,docs,notebooks]'
	@touch $@

demo: $(INSTALLED)  ## Train a small network with the monitor attached; pictures in runs/demo/
	$(BIN)/curvdiag demo --out runs/demo

figures: demo  ## Remake the pictures of the README and of docs/ (those of MNIST where CURVDIAG_DATA names its folder)
	cp runs/demo/heatmap.png figures/demo_heatmap.png
	$(BIN)/python benchmarks/figure.py
	$(BIN)/curvdiag report runs/demo/run.db -o runs/demo/report.html
	@if command -v chromium >/dev/null; then \
	  chromium --headless --no-sandbox --disable-gpu --disable-background-networking --hide-scrollbars \
	    --user-data-dir="$$(mktemp -d)" --window-size=1280,1475 --virtual-time-budget=10000 \
	    --screenshot=figures/report.png runs/demo/report.html; \
	  else echo "figures/report.png stays as it is: there is no chromium"; fi
	$(BIN)/curvdiag reproduce geometry --out figures
	$(BIN)/curvdiag reproduce cwgd --out figures
	@if [ -n "$$CURVDIAG_DATA" ]; then \
	  $(BIN)/curvdiag reproduce superlinear --out figures && $(BIN)/curvdiag reproduce lpnorm --out figures; \
	  else echo "figures/superlinear.png and lpnorm.png stay as they are: CURVDIAG_DATA names no folder"; fi

test: $(INSTALLED) lint types  ## Lint, types, the test suite and the notebooks, JOBS files at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --nbmake tests notebooks

test-long: $(INSTALLED)  ## The tests that take minutes
	$(BIN)/python -m pytest -m long

notebooks: $(INSTALLED)  ## Run the notebooks again and keep their outputs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --nbmake --overwrite notebooks

docs: $(INSTALLED)  ## The documentation as pages, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: $(INSTALLED)  ## Style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)  ## Static types
	$(BIN)/mypy

format: $(INSTALLED)  ## Rewrite the files in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BENCH_INSTALLED): $(INSTALLED) benchmarks/requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --requirement benchmarks/requirements.txt
	@touch $@

bench: $(BENCH_INSTALLED)  ## Speed beside the other libraries, as ratios in one run; results in benchmarks/results/
	$(BIN)/python benchmarks/run.py

clean:  ## Remove the environment and everything that was made
	rm -rf $(VENV) build dist site *.egg-info runs .pytest_cache .mypy_cache .ruff_cache
