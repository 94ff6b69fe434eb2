# `make demo` runs the workflow on the demo model; `make test` runs the test suite.
# Both set up .venv first. `make help` lists all targets. PYTHON: Python 3.11, 3.12 or 3.13.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# An environment with lm-eval, which also sees the packages of .venv.
LM_EVAL := $(VENV)/lm-eval

# onnxruntime-extensions has no wheel for Python 3.14.
CHECK_PYTHON := 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else \
	"error: Python %d.%d is not supported, only 3.11 to 3.13: make PYTHON=python3.13" % v)'

PURELIB := 'import sysconfig; print(sysconfig.get_path("purelib"))'

# SLURM's PMIx plugin looks for a name that is only in Debian's development package.
PMIX := /usr/lib/$(shell uname -m)-linux-gnu/pmix2/lib/libpmix.so
SLURM_PACKAGES := slurm-wlm slurm-client munge libpmix-dev
INSTALL_SLURM := (apt-get update && apt-get install -y --no-install-recommends $(SLURM_PACKAGES))

DEMO := smoke_tests/mpt-demo/fp16/1-gpu.json

.PHONY: demo help test test-install slurm-ready test-slurm test-lm-eval test-gpu test-tensorrt test-kills fuzz robustness nightly bench check docs clean

demo: $(VENV)/installed
	$(BIN)/snakemake --cores 2 $(DEMO)

# Lists the targets, from the table in CONTRIBUTING.md.
help:
	@sed -n 's/^| `make \([a-z-]*\)` | \(.*\) | \(.*\) |$$/\1\n    \2 (\3)/p' CONTRIBUTING.md | tr -d '`'

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Tests `pip install .` and `pip install -e .` in fresh environments: half a minute.
test-install: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m install tests/install

# Checks that SLURM can run here: installs Debian's packages if needed, and needs root for device files.
slurm-ready:
	command -v slurmctld munged srun >/dev/null && test -e $(PMIX) || $(INSTALL_SLURM)
	device=$$(mktemp -u) && mknod $$device c 195 0 && rm $$device

# Tests the workflow on a real SLURM, which it starts and stops: about 2 minutes. Debian, as root.
test-slurm: $(VENV)/installed-dev slurm-ready
	$(BIN)/python -m pytest -m slurm tests/slurm

# Tests ONNX Runtime on CUDA GPUs, with 2 and 4 ranks if there are as many GPUs; replaces onnxruntime in
# .venv with onnxruntime-gpu, and adds NCCL.
test-gpu: $(VENV)/installed-dev
	$(BIN)/python -m pip uninstall --quiet --yes onnxruntime
	$(PIP) install --quiet "onnxruntime-gpu[cuda,cudnn]==1.31.1" nccl4py==0.6.0 nvidia-nccl-cu13==2.28.9
	$(BIN)/python -m pytest -m gpu tests/gpu

# Tests engines as models of lm-eval against lm-eval's own: 2 minutes.
test-lm-eval: $(LM_EVAL)/installed
	$(LM_EVAL)/bin/python -m pytest tests/harness

# TensorRT plans on a GPU that they are built for: every variant and feature, with tokens chosen by
# the host and by the GPU, compared, checked and measured. Ends with a table and first_contact.json.
# To run some cases: CONTACT="--only int8"
test-tensorrt: $(VENV)/installed-dev
	PYTHONPATH=.:tests $(BIN)/python -m first_contact $(CONTACT)

# Tests readers of foreign files on 2,000 mutations of every kind: about 20 minutes.
fuzz: $(VENV)/installed-dev
	MPT_TRT_FUZZ=2000 $(BIN)/python -m pytest tests/fuzz

# Kills the workflow at 20 points, and a process that replaces a folder at each of its system calls:
# about 10 minutes. The latter needs strace; without it, that test is skipped.
test-kills: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m kills tests/kills

# Sends 10,000 requests that share batches from several threads, and cancels a third: 2 minutes.
robustness: $(VENV)/installed-dev
	MPT_TRT_REQUESTS=10000 $(BIN)/python -m pytest tests/scheduling/test_robustness.py

# Tests real shapes with two blocks, every feature in every quantization on the simulated TensorRT,
# and slow cases of other tests: about 20 minutes, 10 GB of memory, 10 GB of disk space.
nightly: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m nightly tests

# Compares speed and memory on small models with recorded ratios: 1 to 3 minutes, 4 GB of disk space.
# To record them anew: make bench BENCH=--record
bench: $(VENV)/installed-dev
	$(BIN)/python benchmarks/regressions.py $(BENCH)

# Checks style, spelling, types, and the order of imports between packages.
check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/snakefmt --check Snakefile rules
	$(BIN)/snakemake --lint
	$(BIN)/codespell
	$(BIN)/lint-imports
	$(BIN)/mypy

# Writes the generated tables of docs/.
docs: $(VENV)/installed
	$(BIN)/python tools/update_docs.py

# Makes .venv with PYTHON; the stamp files show that the pinned packages are installed.
$(VENV)/installed: requirements.txt constraints.txt
	@$(PYTHON) -c $(CHECK_PYTHON)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --requirement requirements.txt --constraint constraints.txt
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(PIP) install --quiet --requirement requirements-dev.txt --constraint constraints.txt
	touch $@

# 400 MB. Python compiles what the tests use, which is a small part of it.
$(LM_EVAL)/installed: $(VENV)/installed-dev
	$(BIN)/python -m venv --clear --without-pip $(LM_EVAL)
	$(BIN)/python -c $(PURELIB) >"$$($(LM_EVAL)/bin/python -c $(PURELIB))/venv.pth"
	$(PIP) --python $(LM_EVAL)/bin/python install --quiet --no-compile \
		lm_eval==0.4.13 accelerate==1.15.0 peft==0.21.2 --constraint constraints.txt
	touch $@

# Deletes only logs and outputs that Snakemake has recorded. Checkpoints, engines and results that you
# made or put there yourself are kept, and so is .venv.
clean:
	$(PYTHON) tools/clean.py
