# make demo   virtual environment, installation, and the main job: a run folder with a report
# make test   likewise, then lint and tests; MARK= adds the slow ones, which compile every launch setting
# make gpu    on a machine with a GPU, torch and triton: every GPU test, then every benchmark; installs nothing
# make bench  the operators' benchmarks on this machine
# make lint   ruff alone; make clean: what builds and tests leave behind (not .venv, not runs)

PYTHON  ?= python3
VENV    ?= .venv
RESULTS ?= benchmarks/results
BUDGET  ?= 510
JOBS    ?= $(shell $(PYTHON) -c 'import os; print(min(8, os.cpu_count() or 1))')
ARGS    ?=
PYTEST  ?= tests
MARK    ?= not slow

SOURCES := pyproject.toml setup.py scripts/bootstrap.py $(wildcard csrc/*.cpp csrc/*/*)
RUN     := $(VENV)/bin/python

.PHONY: demo test gpu bench lint clean

# The installation is editable: only what decides the installation itself is a prerequisite of its stamp.
$(VENV)/.stamp-train: $(SOURCES)
	$(PYTHON) scripts/bootstrap.py --venv $(VENV) --extras train
	@touch $@

$(VENV)/.stamp-dev: $(SOURCES)
	$(PYTHON) scripts/bootstrap.py --venv $(VENV) --extras train,data,trl,dev
	@touch $@ $(VENV)/.stamp-train

demo: $(VENV)/.stamp-train
	$(RUN) -m mmrpt.train $(ARGS)

lint: $(VENV)/.stamp-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# One thread a worker: on few cores, workers beat threads. A file stays on one worker, so its fixtures are made once.
test: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist loadfile -m "$(MARK)" $(PYTEST)

bench: $(VENV)/.stamp-dev
	$(RUN) -m benchmarks --results $(RESULTS) $(ARGS)

gpu:
	PYTHONPATH=. $(PYTHON) scripts/gpu.py --results $(RESULTS) --budget $(BUDGET)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
