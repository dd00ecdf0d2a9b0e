PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
JOBS ?= 2

.PHONY: demo test check docs format clean

demo: .venv/demo.stamp  ## float, nearest and genie on handwritten digits: the main job in minutes, no data to download
	rm -rf runs/demo
	$(BIN)/python examples/demo.py

test: check  ## everything that must be clean before a change goes in
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

check: docs .venv/test.stamp  ## format, lint, types, the documentation
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

# Without --quiet, under which --strict sees no warnings.
docs: .venv/test.stamp  ## the documentation, into site/; whatever mkdocs warns of is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

format: .venv/test.stamp  ## rewrite the code as the checks want it
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format

clean:
	rm -rf .venv/*.stamp runs/demo site build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch comes first and alone, pinned, so that no later requirement picks another build of it.
.venv/torch.stamp: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch==$(shell sed -n 's/^torch==//p' constraints.txt)
	touch $@

.venv/demo.stamp: .venv/torch.stamp pyproject.toml
	$(PIP) --editable '.[digits]'
	touch $@

# torchvision and timm without their requirements: theirs on torch would replace it.
.venv/test.stamp: .venv/demo.stamp
	$(PIP) --editable '.[digits,onnx,ort,openvino,pt2e,ray,report,docs,dev]' huggingface_hub pyyaml
	$(PIP) --no-deps torchvision timm
	touch $@
