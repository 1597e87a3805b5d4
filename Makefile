# Works with GNU make 3.81 (macOS) and newer. Variables can be given after the target: make reproduce PRESET=mini SEEDS="0 1 2"
.DEFAULT_GOAL := help
SHELL := /bin/sh

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-stamp
# Beside .venv, not in it: it must outlive a .venv that is being thrown away.
UNFINISHED := .setup-unfinished

PRESET ?= quick
SEEDS ?= 0
TABLE ?=
DETECTORS ?=
TEACHER ?=
START ?=
GPUS ?=
CORES ?= $(shell getconf _NPROCESSORS_ONLN)
DRY ?=
JOBS ?= 2
ARGS ?=

.PHONY: help setup test test-fast faults reproduce report prose lab lint benchmark gpu-check clean constraints

help:
	@echo "make setup        make .venv and install everything in the versions of constraints.txt (PYTHON=$(PYTHON))"
	@echo "make test         run the tests (JOBS=$(JOBS) processes, ARGS=... for pytest)"
	@echo "make test-fast    those of them that take a minute together: before each commit"
	@echo "make faults       the fault tests with their long loops, and a table of what was tried, survived, lost, into docs/trust.md"
	@echo "make reproduce    run what is missing of a preset: runs, tables, figures, notebooks, report"
	@echo "                  (PRESET=$(PRESET) SEEDS=\"$(SEEDS)\" TABLE=\"components logits\" DETECTORS=... CORES=$(CORES)"
	@echo "                  TEACHER=... START=... a published detector (docs/published_detectors.md): file, folder, run or hub id;"
	@echo "                  GPUS=... a run; DRY=1 only lists it, with the time it is expected to take; ARGS=... for snakemake)"
	@echo "make report       write tables and figures again from stored results, without training (PRESET=$(PRESET);"
	@echo "                  for a paper: ARGS=\"--width 3.3 --font serif --figures forest main_results\", see docs/report.md)"
	@echo "make lab          open the notebooks in JupyterLab"
	@echo "make lint         check style, and that source notebooks carry no outputs"
	@echo "make benchmark    measure times and ratios, print them, write benchmarks/*.csv (two hours; ARGS=--quick: a quarter of an hour)"
	@echo "make gpu-check    what only a GPU can tell, in 8 minutes on one: numbers, memory, speed, resuming; writes benchmarks/gpu.csv"
	@echo "make prose        for maintainers: write the numbers and curves in README.md and docs/ again from committed results"
	@echo "make constraints  write the versions installed in .venv into constraints.txt"
	@echo "make clean        remove caches; results, data and .venv stay"

# An interpreter that does not start (its Python was removed or replaced) cannot be mended, only made again.
setup:
	@if [ -e $(VENV) ] && ! $(BIN)/python -c '' >/dev/null 2>&1; then echo "$(VENV) is broken, making it again"; rm -rf $(VENV); fi
	@$(MAKE) --no-print-directory --silent $(STAMP)

# The stamp is written last. A setup that was killed leaves $(UNFINISHED), and the next one starts from nothing, since a package
# may lie in .venv by half; what was downloaded is in pip's cache. The process id inside tells a dead setup from a living one.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: Python 3.11 or newer is needed, but '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo missing);" \
	    "install one and name it: make setup PYTHON=python3.12" >&2; exit 1; }
	@if [ -e $(UNFINISHED) ]; then \
	  if ps -o args= -p "$$(cat $(UNFINISHED))" 2>/dev/null | grep -q constraints.txt; then \
	    echo "error: another setup is running here (process $$(cat $(UNFINISHED))); wait for it, or end it" >&2; exit 1; fi; \
	  echo "the last setup did not finish, making $(VENV) again"; rm -rf $(VENV); fi; \
	echo $$$$ > $(UNFINISHED); \
	{ $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV); } && \
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[all]' && \
	touch $(STAMP); \
	status=$$?; \
	if [ $$status -eq 0 ]; then rm -f $(UNFINISHED); fi; exit $$status

# One thread a process: more only fight for the cores, and sums then come out the same on every machine.
# Files keep the order of tests/conftest.py, the longest first.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: setup
	$(PYTEST) $(ARGS)

test-fast: setup
	$(PYTEST) -m "not slow" $(ARGS)

faults: setup
	$(PYTEST) tests/faults tests/export --long $(ARGS)

# Snakemake's lock outlives a killed snakemake. Running without a lock would let two of them delete each other's unfinished files, so
# the process id of the owner is kept, also when a signal ends it: a living owner is respected, a dead one's lock is removed. Its
# command is looked at too, since ids are given anew after a restart, and a killed process keeps its id for a moment.
OWNER := .snakemake/owner
SNAKEMAKE := $(BIN)/snakemake --snakefile workflow/Snakefile --config preset=$(PRESET) seeds="$(SEEDS)" tables="$(TABLE)" detectors="$(DETECTORS)" $(if $(GPUS),gpus=$(GPUS)) $(if $(TEACHER),teacher="$(TEACHER)") $(if $(START),start="$(START)")

NAMED = --preset $(PRESET) $(if $(TABLE),--tables $(TABLE)) $(if $(DETECTORS),--detectors $(DETECTORS)) $(if $(TEACHER),--teacher "$(TEACHER)") $(if $(START),--start "$(START)")
WHICH = $(NAMED) --seeds $(SEEDS)
# Seeds that are not stated are all that are stored: a report of one must not stand in the place of one of three.
REPORTED = $(NAMED) $(if $(filter-out file,$(origin SEEDS)),--seeds $(SEEDS))

reproduce: setup
	$(if $(DRY),@$(BIN)/detrdistill plan $(WHICH))
	@mkdir -p .snakemake; if [ -e $(OWNER) ]; then \
	  if ps -o args= -p "$$(cat $(OWNER))" 2>/dev/null | grep -q workflow/Snakefile; then \
	    echo "error: another 'make reproduce' is running here (process $$(cat $(OWNER))); wait for it, or end it" >&2; exit 1; fi; \
	  $(SNAKEMAKE) --unlock --quiet && rm -f $(OWNER) || exit 1; fi; \
	sh -c 'echo $$$$ > $(OWNER); exec $(SNAKEMAKE) --cores $(CORES) $(if $(DRY),--dry-run) $(ARGS)'; \
	status=$$?; if [ $$status -lt 128 ]; then rm -f $(OWNER); fi; exit $$status

report: setup
	$(BIN)/detrdistill report $(REPORTED) $(ARGS)

prose: setup
	$(BIN)/python -m workflow.prose

lab: setup
	$(BIN)/jupyter lab notebooks

lint: setup
	$(BIN)/ruff check .
	find notebooks -name '*.ipynb' -not -path '*/.ipynb_checkpoints/*' -exec $(BIN)/nbstripout --verify {} +

benchmark: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.detectors $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.distillation $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.growth $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.teacher_outputs $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.export $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.loader $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.coverage $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.gpu_days $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.pulls $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.since $(ARGS)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.benchmarks $(ARGS)

gpu-check: setup
	$(BIN)/python benchmarks/gpu_check.py $(ARGS)

# To move to newer versions: .venv/bin/pip install --upgrade -e '.[all]', run the tests, then this. What torch needs for CUDA comes
# with torch, differs by platform, and is left out; so is the local part of a version (+cpu).
constraints:
	@{ sed -n '/^#/p' constraints.txt; \
	  $(BIN)/python -m pip freeze --exclude-editable | sed -E 's/\+[a-z0-9.]+$$//' | grep -E '^[^@ ]+==[^@ ]+$$' \
	    | grep -v -E '^(nvidia-|cuda-|triton==)'; } > constraints.txt.part
	@mv constraints.txt.part constraints.txt

clean:
	rm -rf .pytest_cache .ruff_cache .hypothesis build dist
	find . -name .venv -prune -o -name results -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +
