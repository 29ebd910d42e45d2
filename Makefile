# demo: score 32 candidates on photographs.   test: every check that a change must pass.
# bench, bench-gpu: measure.                  format: rewrite the sources in the project's style.
# rehearse-gpu: bench-gpu without a GPU.
PYTHON ?= python3
VENV ?= .venv
STORE ?= demo.db
CUDA_ARCHITECTURES ?= 90a
BIN := $(VENV)/bin
CONSTRAINED := $(BIN)/pip install -q -c constraints.txt
CXX_SOURCES := $(shell find bench csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
NATIVE := CMakeLists.txt pyproject.toml constraints.txt $(filter csrc/%,$(CXX_SOURCES))

# Where there is no ninja make builds the extension, and without this one file at a time. What OpenMP is given says
# nothing of compilers, but nproc would follow it.
ifndef CMAKE_BUILD_PARALLEL_LEVEL
export CMAKE_BUILD_PARALLEL_LEVEL := $(shell env -u OMP_NUM_THREADS nproc)
endif

.PHONY: demo test lint pytest sanitize bench bench-gpu rehearse-gpu format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/lswag-fast score --space autoformer-tiny --count 32 --seed 0 --images photos \
	    --samples 32 --groups 32 --device cpu --store $(STORE) --top 10

test: lint pytest sanitize

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy bench/rehearsal
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

# A process a core, each with one thread; a file's tests stay together, for what they share takes long to make.
pytest: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

sanitize: $(VENV)/.test
	PATH="$(abspath $(BIN)):$$PATH" bash tests/sanitize.sh

bench: $(VENV)/.bench
	$(BIN)/python -m pytest bench --benchmark-enable --benchmark-only

# Builds into a folder for one architecture, also offline: with the packages of its own Python.
define build_for_gpu
	$(PYTHON) -m pip install -q --no-index --no-deps --no-build-isolation --upgrade --target $(1) . \
	    -C cmake.define.LSWAG_CUDA=on -C cmake.define.CMAKE_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES) \
	    -C build-dir=$(1)-objects
endef

# On a machine with a GPU.
bench-gpu: OUTPUT ?= build/gpu-results
bench-gpu:
	$(call build_for_gpu,build/gpu)
	PYTHONPATH=build/gpu $(PYTHON) bench/gpu.py --output $(OUTPUT)

# PYTHON has a CUDA build of torch, and there is no GPU. The runtime is another library, which one can stand in for.
rehearse-gpu: OUTPUT ?= build/rehearsal-results
rehearse-gpu:
	$(PYTHON) bench/rehearsal/rehearse.py --check
	$(call build_for_gpu,build/rehearsal) -C cmake.define.CMAKE_CUDA_RUNTIME_LIBRARY=Shared
	PYTHONPATH=build/rehearsal $(PYTHON) bench/rehearsal/rehearse.py --output $(OUTPUT)

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

clean:
	rm -rf build dist $(VENV)

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lswag_fast needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

# Each stamp is an editable install with the extras of one purpose; the tests' has warnings as errors.
$(VENV)/.demo: $(NATIVE) | $(VENV)/bin/pip
	$(CONSTRAINED) -e '.[photos]'
	@touch $@

$(VENV)/.test: $(NATIVE) | $(VENV)/bin/pip
	$(CONSTRAINED) -e '.[dev,gpu,lab,parquet,photos]' -C cmake.define.LSWAG_WERROR=ON
	@touch $@ $(VENV)/.demo

$(VENV)/.bench: $(NATIVE) | $(VENV)/bin/pip
	$(CONSTRAINED) -e '.[bench,dev,photos]'
	@touch $@ $(VENV)/.demo
