# The words that CI, the README and people use. Needs Python 3.11+ and, for the C++ extension, g++.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
PIP    := $(BIN)/pip install --quiet --constraint $(VENV)/constraints.txt
# Tests share two cores between processes: one thread each, or they would fight over them.
TEST   := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

.PHONY: demo test battery sanitize lint type traffic audit bench real gpu clean

demo: $(STAMP)
	$(BIN)/fastllm-train demo

test: $(STAMP)
	$(TEST) -m "not battery and not sanitize"

# Long fault and fuzz runs: kill -9 and resume, damaged checkpoints, hostile data.
battery: $(STAMP)
	$(TEST) -m battery

# The C++ under AddressSanitizer and UndefinedBehaviorSanitizer: builds all of it again, 5 minutes.
sanitize: $(STAMP)
	$(BIN)/pytest -m sanitize

lint: $(STAMP)
	$(BIN)/ruff check .

type: $(STAMP)
	$(BIN)/mypy fastllm
	$(BIN)/mypy kernels

# What every kernel moves over the least it could, and its machine code for three GPUs: gates, and
# nothing worse than the files under bench/results. Without --check the two write those files.
traffic: $(STAMP)
	$(BIN)/python bench/traffic.py --check

audit: $(STAMP)
	$(BIN)/python bench/audit.py --check

# CPU benchmarks, interleaved with their peers; JSON into bench/results/cpu-2core.
bench: $(STAMP)
	$(BIN)/python bench/optim.py
	$(BIN)/python bench/attention.py
	$(BIN)/python bench/train.py
	$(BIN)/python bench/zero.py
	$(BIN)/python bench/wire.py
	$(BIN)/python bench/demo.py
	$(BIN)/python bench/readme.py

# A real model from PyPI: imported, asked, scored, compared with transformers.
real: $(STAMP)
	$(BIN)/python bench/real.py
	$(BIN)/python bench/readme.py

# All that only a GPU can say, within MINUTES: builds, tests, compute-sanitizer, every kernel and
# attention beside their peers; JSON into bench/results/<GPU> or OUT. PART="kernels counters": only
# these (bench/gpu.py names them). A PYTHON that has torch with CUDA serves as it is, so that a GPU
# machine without network needs nothing; elsewhere the environment is installed first. DRY=1: no
# GPU, each part as far as a CPU goes, into OUT.
MINUTES ?= 9
gpu:
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not ("$(DRY)" or torch.cuda.is_available()))' \
		2> /dev/null; \
	then python=$(PYTHON); else $(MAKE) --no-print-directory $(STAMP) && python=$(BIN)/python; fi && \
	$$python bench/gpu.py --minutes $(MINUTES) $(if $(PART),--part $(PART)) \
		$(if $(OUT),--out $(OUT)) $(if $(DRY),--dry-run)

# Installed once, and again when a dependency, the packaging or the C++ changed.
$(STAMP): pyproject.toml setup.py constraints.txt MANIFEST.in $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastllm needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	grep -v '^triton' constraints.txt > $(VENV)/constraints.txt
	$(PIP) torch setuptools wheel ninja pybind11 numpy
	# A CUDA build of torch brings the triton that it was built with; beside a CPU build goes ours.
	$(BIN)/pip freeze | grep -q '^triton==' || $(BIN)/pip install --quiet $$(grep '^triton' constraints.txt)
	$(PIP) --no-build-isolation --editable ".[hf,data,export,dev,peers,trl]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) build *.egg-info fastllm/_C*.so
