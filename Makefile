# make demo   virtual environment, installation, and the main job: a run folder with a report
# make test   likewise, then lint and tests; MARK= adds the slow ones, which compile every launch setting
# make test-versions  the integration tests with the oldest and the newest releases that pyproject.toml admits
# make constraints    constraints.txt anew: the newest releases that pip can get
# make gpu    on a machine with a GPU, torch and triton: every GPU test, then every benchmark; installs nothing
# make bench  the operators' benchmarks on this machine
# make lint   ruff alone; make clean: what builds and tests leave behind (not .venv, not runs)
#
# CONSTRAINTS= (empty)  installs the newest releases instead of those in constraints.txt, into .venv-newest
# ISA=avx2              computes as on a CPU that has AVX2 and no bfloat16 instructions

PYTHON  ?= python3
CONSTRAINTS ?= constraints.txt
VENV    ?= .venv$(if $(CONSTRAINTS),,-newest)
ISA     ?=
RESULTS ?= benchmarks/results
BUDGET  ?= 510
JOBS    ?= $(shell $(PYTHON) -c 'import os; print(min(8, os.cpu_count() or 1))')
ARGS    ?=
PYTEST  ?= tests
MARK    ?= not slow

SOURCES := pyproject.toml setup.py scripts/bootstrap.py $(CONSTRAINTS) $(wildcard csrc/*.cpp csrc/*/*)
RUN     := $(VENV)/bin/python

BOOTSTRAP = $(PYTHON) scripts/bootstrap.py --venv $(VENV) --constraints "$(CONSTRAINTS)"

ifeq ($(ISA),avx2)
export ONEDNN_MAX_CPU_ISA := AVX2
export ATEN_CPU_CAPABILITY := avx2
export MKL_ENABLE_INSTRUCTIONS := AVX2
# Inductor would take code from its cache that was made for the CPU as it is, and compute wrong results.
export TORCHINDUCTOR_CACHE_DIR := $(abspath $(VENV))/inductor-avx2
else ifneq ($(ISA),)
$(error ISA=$(ISA): expected avx2 or nothing)
endif

.PHONY: demo test test-versions constraints gpu bench lint clean

# The installation is editable: only what decides the installation itself is a prerequisite of its stamp.
$(VENV)/.stamp-train: $(SOURCES)
	$(BOOTSTRAP) --extras train
	@touch $@

$(VENV)/.stamp-dev: $(SOURCES)
	$(BOOTSTRAP) --extras train,data,trl,lora,dev
	@touch $@ $(VENV)/.stamp-train

demo: $(VENV)/.stamp-train
	$(RUN) -m mmrpt.train $(ARGS)

lint: $(VENV)/.stamp-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# One thread a worker: on few cores, workers beat threads. A file stays on one worker, so its fixtures are made once.
# A worker that dies ends the run: xdist waits for ever for the file that it hands to a dead worker's successor.
test: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist loadfile --max-worker-restart 0 -m "$(MARK)" --durations=15 $(PYTEST)

test-versions: $(VENV)/.stamp-dev
	$(RUN) -m scripts.versions --jobs $(JOBS) $(ARGS)

constraints: $(VENV)/.stamp-dev
	$(RUN) -m scripts.constraints

bench: $(VENV)/.stamp-dev
	$(RUN) -m benchmarks --results $(RESULTS) $(ARGS)

gpu:
	PYTHONPATH=. $(PYTHON) scripts/gpu.py --results $(RESULTS) --budget $(BUDGET)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
