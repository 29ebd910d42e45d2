# demo: score 32 candidates on photographs.   test: every check that a change must pass.
# bench, bench-gpu: measure.                  format: rewrite the sources in the project's style.
PYTHON ?= python3
VENV ?= .venv
STORE ?= demo.db
CUDA_ARCHITECTURES ?= 90a
OUTPUT ?= build/gpu-results
BIN := $(VENV)/bin
CONSTRAINED := $(BIN)/pip install -q -c constraints.txt
CXX_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
NATIVE := CMakeLists.txt pyproject.toml constraints.txt $(CXX_SOURCES)

# Where there is no ninja make builds the extension, and without this one file at a time. What OpenMP is given says
# nothing of compilers, but nproc would follow it.
ifndef CMAKE_BUILD_PARALLEL_LEVEL
export CMAKE_BUILD_PARALLEL_LEVEL := $(shell env -u OMP_NUM_THREADS nproc)
endif

.PHONY: demo test lint pytest sanitize bench bench-gpu format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/lswag-fast score --space autoformer-tiny --count 32 --seed 0 --images photos \
	    --samples 32 --groups 32 --device cpu --store $(STORE) --top 10

test: lint pytest sanitize

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

# A process a core, each with one thread; a file's tests stay together, for what they share takes long to make.
pytest: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

sanitize: $(VENV)/.test
	PATH="$(abspath $(BIN)):$$PATH" bash tests/sanitize.sh

bench: $(VENV)/.bench
	$(BIN)/python -m pytest bench --benchmark-enable --benchmark-only

# On a machine with a GPU, also offline: the packages of its own Python, and a build for its architecture alone.
bench-gpu:
	$(PYTHON) -m pip install -q --no-index --no-deps --no-build-isolation --upgrade --target build/gpu . \
	    -C cmake.define.LSWAG_CUDA=on -C cmake.define.CMAKE_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES) \
	    -C build-dir=build/gpu-objects
	PYTHONPATH=build/gpu $(PYTHON) bench/gpu.py --output $(OUTPUT)

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
