PYTHON ?= $(shell command -v python3.11 || command -v python3)
RUN := .venv/bin/python

.PHONY: venv quickstart test lint docs

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

lint: venv
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright

docs: venv
	$(RUN) -m mkdocs build --strict
