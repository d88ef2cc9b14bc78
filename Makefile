PYTHON ?= $(shell command -v python3.11 || echo python3)
BIN := .venv/bin

NO_TORCH := "pip knows no CPU build of PyTorch: set PIP_EXTRA_INDEX_URL to the CPU index that pytorch.org names"

.PHONY: setup demo test test-runtimes test-torch-tensorrt test-heavy docs test-dist matrix versions gpu bench bench-rewriting plots format clean

setup: .venv/ready

# PyTorch first and as constraints.txt has it, so that nothing else can ask for another build of it.
.venv/demo: pyproject.toml constraints.txt
	@echo "Making .venv with $$($(PYTHON) --version), and installing PyTorch in it"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install -q "pip>=25.1"
	@$(BIN)/pip install -q -c constraints.txt torch || { echo $(NO_TORCH); exit 1; }
	@echo "Installing unroll, onnx, ONNX Runtime and the data of the demo"
	@$(BIN)/pip install -q -c constraints.txt --group demo -e ".[onnx]"
	@touch $@

.venv/ready: .venv/demo
	@echo "Installing what tests and linters need"
	@$(BIN)/pip install -q -c constraints.txt --group test --group lint -e ".[bench]"
	@touch $@

demo: .venv/demo
	$(BIN)/python examples/digits.py

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not heavy and not runtimes"

# Runtimes that need no device, in an environment of their own: what pip resolves stands in the group `runtimes` of
# pyproject.toml, the rest is installed here.
RUNTIMES := .venv-runtimes
TENSORRT_RTX := 1.7.1.116

$(RUNTIMES)/ready: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(RUNTIMES)
	$(RUNTIMES)/bin/pip install -q "pip>=25.1"
	$(RUNTIMES)/bin/pip install -q -c constraints.txt torch || { echo $(NO_TORCH); exit 1; }
	$(RUNTIMES)/bin/pip install -q -c constraints.txt --group runtimes -e ".[cli]"
	$(RUNTIMES)/bin/pip install -q --no-deps tensorrt-rtx-cu13-bindings==$(TENSORRT_RTX) tensorrt-rtx-cu13-libs==$(TENSORRT_RTX)
	touch $@

test-runtimes: $(RUNTIMES)/ready
	$(RUNTIMES)/bin/python -m pytest -m runtimes -rs --durations=5 tests/runtimes

# Torch-TensorRT on TensorRT for RTX, in an environment of its own, as it wants a CUDA build of PyTorch: 3 GB. Needs no
# GPU, and stops where a driver is needed. === takes no CPU build, and --no-deps another release of TensorRT for RTX.
TORCH_TENSORRT := .venv-torch-tensorrt
TORCH := 2.13.0

$(TORCH_TENSORRT)/ready: pyproject.toml Makefile
	$(PYTHON) -m venv $(TORCH_TENSORRT)
	$(TORCH_TENSORRT)/bin/pip install -q "pip>=25.1"
	$(TORCH_TENSORRT)/bin/pip install -q torch===$(TORCH) "pytest>=9" "pytest-timeout>=2.4" dllist packaging psutil -e ".[onnx]"
	$(TORCH_TENSORRT)/bin/pip install -q --no-deps torch-tensorrt-rtx==$(TORCH) \
		tensorrt-rtx-cu13-bindings==$(TENSORRT_RTX) tensorrt-rtx-cu13-libs==$(TENSORRT_RTX)
	touch $@

test-torch-tensorrt: $(TORCH_TENSORRT)/ready
	$(TORCH_TENSORRT)/bin/python -m pytest -rs --durations=5 tests/runtimes/test_torch_tensorrt.py

# What `make test` leaves out: whatever is marked heavy, and quantizers, adapters and private training on unrolled layers,
# in an environment of their own, the group `heavy`.
HEAVY := .venv-heavy

$(HEAVY)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(HEAVY)
	$(HEAVY)/bin/pip install -q "pip>=25.1"
	$(HEAVY)/bin/pip install -q -c constraints.txt torch || { echo $(NO_TORCH); exit 1; }
	$(HEAVY)/bin/pip install -q -c constraints.txt --group heavy -e ".[bench]"
	touch $@

test-heavy: $(HEAVY)/ready
	$(HEAVY)/bin/python -m pytest -n 2 --dist loadfile -m heavy -rs --durations=5

# The site, into build/site: every link and anchor is to lead somewhere. Needs no PyTorch.
DOCS := .venv-docs

$(DOCS)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install -q "pip>=25.1"
	$(DOCS)/bin/pip install -q -c constraints.txt --group docs
	touch $@

docs: $(DOCS)/ready
	NO_MKDOCS_2_WARNING=true $(DOCS)/bin/mkdocs build --strict

# Wheel and sdist, each in a fresh environment without the checkout. PyTorch is as constraints.txt has it.
DIST := .venv-dist

$(DIST)/ready: Makefile
	$(PYTHON) -m venv $(DIST)
	$(DIST)/bin/pip install -q build
	touch $@

test-dist: $(DIST)/ready
	$(DIST)/bin/python tests/dist.py

# What `make test` runs, on each version that pyproject.toml takes, an environment of gigabytes after the other; hours.
versions:
	$(PYTHON) tests/versions.py $(ENVIRONMENTS)

# Every runtime, native files too, into benchmarks/results/runtimes.json and docs/runtimes.md. Those below want
# environments of their own; clang is for tinygrad, node and chromium are for onnxruntime-web. The page of
# examples/browser is tried last.
MATRIX := .venv-matrix
APART := tvm tinygrad iree nncf litert executorch
tvm_needs := apache-tvm==0.27.0.post1 onnx==1.23.2 numpy
tinygrad_needs := tinygrad==0.14.0 onnx==1.23.2 numpy
iree_needs := iree-base-compiler==3.13.0 iree-base-runtime==3.13.0 onnx==1.19.1 numpy
nncf_needs := nncf==3.4.0 openvino==2026.4.1 onnx==1.23.2 numpy
litert_needs := -c constraints.txt torch litert-torch==0.10.0
executorch_needs := -c constraints.txt torch executorch==1.5.1
WITH_NODE := UNROLL_NODE_MODULES=$(MATRIX)/node_modules
RUN_MATRIX := PYTHONPATH=. $(WITH_NODE) $(RUNTIMES)/bin/python benchmarks/runtimes.py

$(APART:%=$(MATRIX)/%/ready): $(MATRIX)/%/ready: Makefile constraints.txt
	$(PYTHON) -m venv $(MATRIX)/$*
	$(MATRIX)/$*/bin/pip install -q "pip>=25.1"
	$(MATRIX)/$*/bin/pip install -q $($*_needs)
	touch $@

$(MATRIX)/node_modules/ready: Makefile
	npm install --silent --ignore-scripts --prefix $(MATRIX) onnxruntime-web@1.30.0 playwright-core@1.65.1
	touch $@

matrix: $(RUNTIMES)/ready $(APART:%=$(MATRIX)/%/ready) $(MATRIX)/node_modules/ready
	$(RUN_MATRIX)
	$(foreach name,$(APART),$(RUN_MATRIX) --python $(MATRIX)/$(name)/bin/python $(name) &&) true
	$(WITH_NODE) $(RUNTIMES)/bin/python -m pytest -m runtimes -rs tests/runtimes/test_browser.py

# With the system's Python, its PyTorch, which must know the GPU, NumPy and pytest: tests, then times, in so many minutes.
# `UNROLL_TEST_DEVICE=cpu make gpu` tries it where there is no GPU.
MINUTES := 9
OUTPUT := build/gpu

gpu:
	PYTHONPATH=$(CURDIR) $(PYTHON) benchmarks/gpu.py --minutes $(MINUTES) --output $(OUTPUT)

# What unrolled layers are to reach, and what they reach here: about half an hour, on a machine that does nothing else.
bench: setup
	$(BIN)/python benchmarks/targets.py

# How rewriting grows with the steps, in seconds and memory, and a picture of it: some minutes.
bench-rewriting: setup
	$(BIN)/python benchmarks/rewriting.py

LENGTHS := benchmarks/results/blocks.json

plots: setup $(LENGTHS)
	$(BIN)/python -m unroll bench $(LENGTHS) --plots benchmarks/results

# About ten minutes.
$(LENGTHS):
	$(BIN)/python -m unroll bench --kind lstm --steps 64,256,1024 --contenders eager,unroll-compile \
		--plan default --plan time=16 --plan inductor --limit 400 --rounds 6 --save $@

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv $(RUNTIMES) $(TORCH_TENSORRT) $(HEAVY) $(DOCS) $(DIST) $(MATRIX) .versions
