# The two commands of this repository are `make repro` and `make test`; `make help` lists the rest.
# Everything runs in .venv, which `make setup` creates; nothing is installed or registered outside this folder.

.DEFAULT_GOAL := help
.PHONY: help setup kernel repro verify test lab smoke paper figures release bench clean
SHELL := /bin/bash

# The python that creates .venv. Empty: the first of the list in `setup` that is 3.11, 3.12 or 3.13.
PYTHON ?=

# Stages started by DVC find the environment's python, jupyter and dvc first; nothing from outside leaks in.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
unexport PYTHONPATH PYTHONHOME
# What DVC and matplotlib keep between calls lies in this folder: their usual places may be read-only or another user's.
export DVC_SITE_CACHE_DIR ?= $(CURDIR)/.dvc/site
export MPLCONFIGDIR ?= $(CURDIR)/.venv/matplotlib
# Without bytecode every process compiles torch's Python anew: seconds, times a process a stage.
unexport PYTHONDONTWRITEBYTECODE

# The stamp's name holds the lock, the package's metadata and this folder, so that a change of any of them installs
# again and a second call does not. It is written last: an interrupted install leaves none and starts afresh. The
# environment gets today's pip, which resolves this lock twice as fast as the one that comes with Python 3.11.
STAMP := .venv/.setup-$(shell { cat requirements.lock pyproject.toml; pwd; } | git hash-object --stdin)

# Whether another process holds the file of descriptor 9; if not, this one does now, until its shell and what it started have
# ended. Where there is no flock (macOS) nothing is guarded.
TAKEN := command -v flock >/dev/null && ! flock -n 9
# DVC guards its own files, but a second `make repro` would begin by rewriting the stages under the first.
ALONE := set -e; exec 9<.dvc/config; if $(TAKEN); then \
  echo "Another make repro, paper or figures is at work in this folder: wait for it, or stop it, then call again." >&2; exit 1; fi

help:  ## list the commands
	@echo "Reproduce or test everything (the first call also sets up .venv, about 2 minutes):"
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

setup: $(STAMP)  ## create .venv from requirements.lock and install this package in it

$(STAMP):
	@set -e; exec 9<Makefile; \
	if $(TAKEN); then echo "== set-up: another make is setting up .venv; waiting for it"; flock 9; fi; \
	if [ -e $@ ]; then exit 0; fi; \
	echo "== set-up: .venv from requirements.lock (about 2 minutes where the CPU build of torch is at hand)"; \
	export PIP_DISABLE_PIP_VERSION_CHECK=1; \
	if ls .venv/.setup-* >/dev/null 2>&1; then rm -f .venv/.setup-*; else rm -rf .venv; fi; \
	fits='import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))'; \
	py=; for candidate in $(or $(PYTHON),python3 python3.11 python3.12 python3.13); do \
	  if "$$candidate" -c "$$fits" 2>/dev/null; then py=$$candidate; break; fi; \
	done; \
	if [ -z "$$py" ]; then \
	  echo "set-up: no Python 3.11, 3.12 or 3.13 found as $(or $(PYTHON),python3 or python3.1x on the PATH)." >&2; \
	  echo "Install one, or name it: make setup PYTHON=/path/to/python3.11" >&2; exit 1; \
	fi; \
	if [ ! -d .venv ]; then \
	  "$$py" -m venv --without-pip .venv; \
	  "$$py" -m pip --python .venv/bin/python install --quiet pip || "$$py" -m venv .venv; \
	fi; \
	.venv/bin/python -m pip install --no-compile -r requirements.lock; \
	.venv/bin/python -m pip install -qq --no-deps --no-build-isolation -e .; \
	mkdir -p .venv/etc/jupyter; \
	echo '{"ContentsManager": {"pre_save_hook": "pipelines.notebook.drop_empty_end"}}' > .venv/etc/jupyter/jupyter_server_config.json; \
	touch $@
	@echo "== set-up done: .venv is ready"

kernel: setup  ## build the optional compiled CPU kernel (seconds, where a C++ compiler is at hand)
	@python -m eplib.kernels

# What works without the kernel goes on without it and says so. The tests fail where a compiler is there and could not build it.
KERNEL := python -m eplib.kernels || echo "== going on without the compiled kernel: PyTorch computes the same, more slowly"

repro: setup  ## run the quick profile: data, experiments, figures, paper and report (33 minutes on 2 cores)
	@echo "== quick profile: data -> runs -> notebooks -> claims -> paper and report, with DVC."
	@echo "   Whole it takes 33 minutes on 2 cores of an Intel Xeon; what has not changed is not run again."
	@echo "   Ctrl-C is safe: the next 'make repro' goes on from the last checkpoint."
	@$(ALONE); $(KERNEL); set -x; \
	python -m pipelines.stages --write; \
	python -m pipelines.estimate --profile quick; \
	dvc repro; \
	python -m pipelines.close --profile quick

# PROFILE=paper: the paper profile's notebooks from its recorded runs. WHICH=--all: every stage; WHICH="--stage mnist": this one.
PROFILE ?= quick
WHICH ?=
verify: setup  ## make the cheap stages anew, compare every value with its reference, write a receipt (PROFILE=, WHICH=--all)
	@$(KERNEL)
	python -m pipelines.verify --profile $(PROFILE) $(WHICH)

test: setup  ## run the tests (about 11 minutes; fetches MNIST once, about 12 MB)
	@echo "== tests: about 11 minutes on 2 CPU cores; MNIST is fetched once if it is not in data/raw yet"
	@$(KERNEL)
	@pytest -q -n 2 --dist loadfile

lab: setup  ## open JupyterLab on the notebooks, with a kernel that finds eplib
	jupyter lab --notebook-dir=notebooks

smoke: setup  ## run every stage at toy size in a scratch folder (about 8 minutes with set-up; proves nothing)
	@$(KERNEL)
	python -m pipelines.smoke

# The texts of the recorded runs whose weights are in git: the notebooks of the paper profile read these.
RECORDED := plays-chars tinyshakespeare-chars
paper: setup  ## bring the paper profile up to date from its recorded runs (python -m pipelines.train makes those)
	@$(ALONE); set -x; \
	python -m pipelines.data $(RECORDED); \
	dvc repro pipelines/paper/dvc.yaml; \
	python -m pipelines.close --profile paper

release: setup  ## set the paper of the recorded runs as release/paper.pdf, the copy that is in git (seconds)
	python -m pipelines.paper --release

figures: setup  ## redraw the paper profile's figures, paper and report, up to date or not
	@$(ALONE); set -x; \
	python -m pipelines.data $(RECORDED); \
	dvc repro --force pipelines/paper/dvc.yaml

bench: setup  ## time one training step of EP, backprop, BPTT, torchdeq at four sizes (10 to 20 minutes, idle machine)
	@$(KERNEL)
	python -m pipelines.data mnist plays-chars
	MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483648 python -m benchmarks.step --compile

clean:  ## remove .venv, caches, tokens, quick and smoke outputs (downloads, checkpoints and DVC's cache stay)
	rm -rf .venv .pytest_cache .hypothesis .mypy_cache .ruff_cache *.egg-info eplib/kernels/build data/prepared paper/build
	rm -rf results/smoke results/quick figures/smoke figures/quick
	find benchmarks eplib pipelines tests notebooks data -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
