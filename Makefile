# The first of some interpreters that is there and runs.
at-hand = $(firstword $(foreach python,$(1),$(shell $(python) -c '' 2>/dev/null && echo $(python))))
PYTHON ?= $(call at-hand,python3.11 python3)
OLDEST ?= $(call at-hand,python3.11)
NEWEST ?= $(call at-hand,python3.14 python3.13 python3.12)
RUN := .venv/bin/python

.PHONY: venv quickstart test test-faults test-versions test-oldest test-newest notebooks lint docs linkcheck peers peers-torch

venv: .venv/.installed

.venv/.installed: pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --editable '.[export,experiments,dev]'
	touch $@

quickstart: venv  ## float LeNet5, its quantized twin, its two int8 files, on embedded digits
	rm -rf runs/quickstart
	$(RUN) -m experiments.train --config lenet5_mnist --data mnist5k --epochs 15 --name quickstart
	$(RUN) -m experiments.deploy runs/quickstart

# XLA compiles small models in half of the time without its fusion emitters, and in one part each.
# Not every version knows the flags, and one that does not refuses them.
QUICKLY := --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1
quickly = $(shell XLA_FLAGS="$(QUICKLY)" $(RUN) -c 'import jax; jax.devices()' >/dev/null 2>&1 && echo $(QUICKLY))

test: venv
	XLA_FLAGS="$(quickly)" $(RUN) -m pytest -n 2 --dist worksteal -m 'not nightly and not optimized'
	$(RUN) -m pytest -n 2 --dist worksteal -m 'optimized and not nightly'

ROUNDS ?= 3
test-faults: venv  ## end runs of 1, 2 and 4 processes on the way, and compare what they come to
	JAX_PLATFORMS=cpu JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(RUN) tests/killing.py --rounds $(ROUNDS)

test-versions:  ## the tests marked so, with the oldest and the newest that pyproject.toml admits
	$(if $(OLDEST),$(MAKE) test-oldest,@echo "SKIPPED: the oldest versions; there is no python3.11.")
	$(if $(NEWEST),$(MAKE) test-newest,@echo "SKIPPED: the newest; no python3.14, 3.13 or 3.12.")

test-oldest test-newest: test-%: .venv-%/.installed
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 .venv-$*/bin/python -m pytest -n 2 --dist worksteal -m versions \
	  --ignore-glob 'tests/*experiments*'

.venv-oldest/.installed: pyproject.toml .ci/lower_bounds.py
	$(OLDEST) -m venv --clear .venv-oldest
	.venv-oldest/bin/python .ci/lower_bounds.py export test > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --editable '.[export,test]' \
	  --constraint .venv-oldest/constraints.txt
	touch $@

.venv-newest/.installed: pyproject.toml  # `rm -r .venv-newest` for what was released since
	$(NEWEST) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet --editable '.[export,test]'
	touch $@

notebooks: venv  ## run them; the second one only where TFDS_DATA_DIR says where CIFAR-10 is
	$(if $(TFDS_DATA_DIR),,@echo "02_cifar10_resnet.ipynb is skipped: TFDS_DATA_DIR is not set.")
	XLA_FLAGS="$(quickly)" $(RUN) -m pytest --nbmake --nbmake-timeout=1200 -n 2 \
	  notebooks/01_mnist_lenet5.ipynb $(if $(TFDS_DATA_DIR),notebooks/02_cifar10_resnet.ipynb) \
	  notebooks/03_vision_transformer.ipynb notebooks/04_low_bits.ipynb \
	  notebooks/05_why_did_accuracy_drop.ipynb

lint: venv
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright

docs: venv  ## the site, in site/html; a warning is an error, a link to nowhere one of them
	$(RUN) -m sphinx -q -E -W --keep-going -c docs -d site/doctrees . site/html

linkcheck: venv  ## links to other sites, which needs a network
	$(RUN) -m sphinx -q -b linkcheck -c docs -d site/doctrees . site/linkcheck

peers:  ## others' converters, for benchmarks alone, in an environment of their own
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet jax2onnx litert-converter flax ai-edge-quantizer qwix

# Name a build for the CPU here where there is one: others are several GB.
TORCH ?= torch

peers-torch:  ## likewise PyTorch's tools, for `benchmarks/peers/train_step.py`
	test -x .venv-torch/bin/python || $(PYTHON) -m venv .venv-torch
	.venv-torch/bin/python -m pip install --quiet $(TORCH) torchao brevitas nncf openvino
