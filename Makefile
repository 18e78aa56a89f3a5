PYTHON ?= $(shell command -v python3.11 || command -v python3)
RUN := .venv/bin/python

.PHONY: venv quickstart test notebooks lint docs

venv: .venv/.installed

.venv/.installed: pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --editable '.[export,experiments,dev]'
	touch $@

quickstart: venv  ## float LeNet5, its quantized twin, its two int8 files, on embedded digits
	rm -rf runs/quickstart
	$(RUN) -m experiments.train --config lenet5_mnist --data mnist5k --epochs 15 --name quickstart
	$(RUN) -m experiments.deploy runs/quickstart

test: venv
	$(RUN) -m pytest -n 2

notebooks: venv  ## run them; the second one only where TFDS_DATA_DIR says where CIFAR-10 is
	$(if $(TFDS_DATA_DIR),,@echo "02_cifar10_resnet.ipynb is skipped: TFDS_DATA_DIR is not set.")
	$(RUN) -m pytest --nbmake --nbmake-timeout=1200 -p no:xdist \
	  notebooks/01_mnist_lenet5.ipynb $(if $(TFDS_DATA_DIR),notebooks/02_cifar10_resnet.ipynb)

lint: venv
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright

docs: venv
	$(RUN) -m mkdocs build --strict
