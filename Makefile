# The one way to set up, check and try swaft. Targets build .venv first if it is missing or out of date.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
EXTRAS := recipes,deepspeed,peft,metrics,report,demo,test,dev
CONSTRAINTS := constraints.txt
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)

SHELL := /bin/bash
.DEFAULT_GOAL := help
export TOKENIZERS_PARALLELISM := false

.PHONY: help venv quickstart quality format test test-full test-versions at-both-ends soak gpu bench evidence constraints clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

venv: $(VENV)/.ready  ## build .venv with all extras, at the tested versions

# torch is installed before the rest, from wherever pip is configured to get it (a CPU build, say): DeepSpeed's build
# step imports it. So DeepSpeed is installed without build isolation, and compiles nothing yet. What it would compile
# at its first start without a GPU is compiled here, once, so that ranks do not race to do it later.
$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel ninja numpy torch
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	$(PIP) --editable '.[$(EXTRAS)]'
	$(BIN)/python -m swaft.training.launch.deepspeed_extension
	touch $@

quickstart: venv  ## fine-tune the embedded model, compare last and averaged weights (2 to 4 minutes on 2 cores)
	launch/quickstart.sh

quality: venv  ## lint, format check and type check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: venv  ## fix what can be fixed automatically
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One thread per process: the tests start ranks, and ranks that each use every core only slow each other down. Two
# files at a time: while one waits for its processes to start, the other computes.
TESTS = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test: venv  ## the tests, in at most 20 minutes on 2 cores without a GPU
	$(TESTS) -m "not gpu and not slow"

# A stamp for each folder that has passed on this commit, so that an interrupted run continues where it was.
test-full: venv  ## everything that runs without a GPU, folder by folder; resumes if interrupted (hours)
	commit=$$(git rev-parse HEAD) && change=$$(git diff HEAD | sha1sum | cut -c1-8) || exit 1; \
	done=runs/test-full/$$commit-$$change; mkdir -p $$done; failed=0; \
	for part in tests/*/ tests/test_*.py; do \
	  stamp=$$done/$$(basename $$part); test -e $$stamp && continue; \
	  $(TESTS) -m "not gpu" $$part; code=$$?; \
	  if [ $$code = 0 ] || [ $$code = 5 ]; then touch $$stamp; else failed=1; fi; \
	done; exit $$failed

# Both ends of the version ranges in pyproject.toml, each in a fresh environment: the tests that touch other
# libraries, and a few unit tests.
AT_BOTH_ENDS = tests/integrations tests/distributed/test_averaging.py tests/averaging/test_averager.py \
  tests/noise/test_objectives.py tests/training/test_accelerator.py tests/soup/test_soup_mean.py

test-versions:  ## the integrations at the lowest and the newest versions that pyproject.toml allows
	$(PYTHON) tests/version_ranges.py > .venv-lowest.txt
	: > .venv-newest.txt
	for end in lowest newest; do \
	  rm -rf .venv-$$end; \
	  $(MAKE) at-both-ends VENV=.venv-$$end CONSTRAINTS=.venv-$$end.txt || exit 1; \
	done

at-both-ends: venv
	$(BIN)/python -m pip list | grep -E '^(torch|numpy|accelerate|transformers|datasets|deepspeed|peft|trl) '
	$(TESTS) $(AT_BOTH_ENDS)

soak: venv  ## kill 200 runs, compare each to the bit with an uninterrupted one; resumes if interrupted (an hour)
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/soak.py

# If PYTHON is given (make gpu PYTHON=python3), that environment is used as it is: nothing is installed, and what is
# missing is listed. Otherwise .venv is built, with what the loss is compared to. ARGS=--dry tries the calls on a CPU.
ifeq ($(origin PYTHON),file)
gpu: venv  ## what needs a GPU, within 8 minutes: tests, probes, benchmarks; results in runs/gpu
	$(PIP) --editable '.[bench]' || echo 'liger-kernel is missing; the benchmark will say so'
	$(BIN)/python -m benchmarks.gpu $(ARGS)
else
gpu:
	$(PYTHON) -m benchmarks.gpu $(ARGS)
endif

bench: venv  ## benchmarks, side by side in one run; results go to benchmarks/results/
	$(BIN)/python -m benchmarks.averaging
	$(BIN)/python -m benchmarks.fused_loss

evidence: venv  ## generate docs/evidence.md and its figures from the study's committed rows, in under a minute
	$(BIN)/python -m benchmarks.study evidence

constraints: venv  ## write the versions in .venv to constraints.txt, after trying newer ones
	{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | sed -E 's/\+cpu$$//'; } > constraints.new
	grep -E '^(triton|liger-kernel)==' constraints.txt | while IFS== read -r name rest; do \
	  grep -q "^$$name==" constraints.new || echo "$$name==$${rest#=}" >> constraints.new; done
	mv constraints.new constraints.txt

clean:  ## remove what the targets built, but not the runs
	rm -rf $(VENV) .venv-lowest* .venv-newest* .ruff_cache .pytest_cache build dist *.egg-info
