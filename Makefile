# The one way to set up, check and try swaft. Every target builds .venv first where it is missing or out of date.
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

# torch comes first and alone, from wherever pip is configured to take it (a CPU build, say): DeepSpeed's own
# build step imports it, so DeepSpeed is installed without build isolation, and compiles nothing yet. What it
# compiles when it first starts without a GPU is compiled now, once, so that ranks do not race for it later.
$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel ninja numpy torch
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	$(PIP) --editable '.[$(EXTRAS)]'
	$(BIN)/python -m swaft.training.launch.deepspeed_extension
	touch $@

quickstart: venv  ## fine-tune the embedded model; last weights against averaged ones (3 to 6 minutes on 2 cores)
	launch/quickstart.sh

quality: venv  ## lint, format check and type check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: venv  ## mend what can be mended by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One thread a process: the tests start ranks, and ranks that each take every core only slow each other down. Two
# files at a time: while one waits for its processes to start, the other computes.
TESTS = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test: venv  ## the tests, in at most 20 minutes on 2 cores without a GPU
	$(TESTS) -m "not gpu and not slow"

test-full: venv  ## everything that runs without a GPU
	$(TESTS) -m "not gpu"

# Both ends of the version ranges in pyproject.toml, each in an environment of its own that is made anew: what meets
# other libraries, and a few units.
AT_BOTH_ENDS = tests/integrations tests/distributed/test_averaging.py tests/averaging/test_averager.py \
  tests/noise/test_objectives.py tests/training/test_accelerator.py tests/soup/test_soup_mean.py

test-versions:  ## the integrations at the lowest and at the newest versions that pyproject.toml allows
	$(PYTHON) tests/version_ranges.py > .venv-lowest.txt
	: > .venv-newest.txt
	for end in lowest newest; do \
	  rm -rf .venv-$$end; \
	  $(MAKE) at-both-ends VENV=.venv-$$end CONSTRAINTS=.venv-$$end.txt || exit 1; \
	done

at-both-ends: venv
	$(BIN)/python -m pip list | grep -E '^(torch|numpy|accelerate|transformers|datasets|deepspeed|peft|trl) '
	$(TESTS) $(AT_BOTH_ENDS)

soak: venv  ## kill 200 runs and hold each to the bits of an unbroken one; a broken-off soak goes on (an hour)
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/soak.py

# Where PYTHON is given (make gpu PYTHON=python3), that environment is used as it is: nothing is installed, and what is
# missing is listed. Else .venv is built, with what the loss is compared with. ARGS=--dry tries the calls on a CPU.
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

evidence: venv  ## draw docs/evidence.md and its figures from the committed rows of the study, in under a minute
	$(BIN)/python -m benchmarks.study evidence

constraints: venv  ## write the versions in .venv to constraints.txt, after trying newer ones
	{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | sed -E 's/\+cpu$$//'; } > constraints.new
	grep -E '^(triton|liger-kernel)==' constraints.txt | while IFS== read -r name rest; do \
	  grep -q "^$$name==" constraints.new || echo "$$name==$${rest#=}" >> constraints.new; done
	mv constraints.new constraints.txt

clean:  ## remove what the targets built, but no run
	rm -rf $(VENV) .venv-lowest* .venv-newest* .ruff_cache .pytest_cache build dist *.egg-info
