# The one way to set up, check and try swaft. Every target builds .venv first where it is missing.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
EXTRAS := deepspeed,peft,metrics,report,demo,test,dev

.DEFAULT_GOAL := help
SHELL := /bin/bash

# DeepSpeed compiles a small helper the first time it starts. It is built once, alone, into the virtual
# environment, so ranks that start together neither race for it nor wait on a lock somebody left behind.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
export TOKENIZERS_PARALLELISM := false

.PHONY: help
help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.PHONY: venv
venv: $(VENV)/.ready  ## build .venv with all extras, at the tested versions

# torch comes first and alone: DeepSpeed's own build step imports it, so it is installed without isolation.
$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt setuptools wheel ninja numpy torch
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation deepspeed
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[$(EXTRAS)]'
	$(BIN)/python -m swaft.training.deepspeed_extension
	touch $@
