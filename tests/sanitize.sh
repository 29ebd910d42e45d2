#!/usr/bin/env bash
# Builds the kernels with AddressSanitizer and UndefinedBehaviorSanitizer and runs the tests of the ops on them, with few
# examples each. The build lies beside links to the Python sources, which a run without site-packages' hooks imports.
set -euo pipefail
cd "$(dirname "$0")/.."
tree=$PWD/build/sanitize
package=$tree/package/lswag_fast

mkdir -p "$package"
find "$package" -type l -delete
ln -s "$PWD"/lswag_fast/*.py "$package"
for folder in lswag_fast/*/; do
    [ "$folder" = lswag_fast/__pycache__/ ] || ln -s "$PWD/${folder%/}" "$package"
done

cmake -S . -B "$tree" -DCMAKE_BUILD_TYPE=Debug -DLSWAG_SANITIZE=ON -DLSWAG_WERROR=ON -DLSWAG_CUDA=off \
    -DPython_EXECUTABLE="$(command -v python)" -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" \
    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$package" >"$tree/configure.log" || { cat "$tree/configure.log"; exit 1; }
cmake --build "$tree" --parallel "$(nproc)" >"$tree/build.log" || { cat "$tree/build.log"; exit 1; }

compiler=$(sed -n 's/^CMAKE_CXX_COMPILER:[A-Z]*=//p' "$tree/CMakeCache.txt")
site=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
export LD_PRELOAD="$("$compiler" -print-file-name=libasan.so):$("$compiler" -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 UBSAN_OPTIONS=print_stacktrace=1
export LSWAG_TEST_PROFILE=sanitize PYTHONPATH=$tree/package:$site OMP_NUM_THREADS=2
# Without -P the working directory, and with it a build without instruments, would come first. The tests that run others
# once for each instruction set are left out, since theirs would be such a build too; a report is lost where the
# descriptor that it goes to is captured.
run() { python -P -S -m pytest -q --capture=sys -p no:cacheprovider -k "not instruction_set and ($1)" tests/ops; }
run test
paths=$(python -P -S -c 'import torch; from lswag_fast import _C; print(*[p for p in _C.cpu_paths() if p != _C.cpu_path()])')
for path in $paths; do
    LSWAG_CPU=$path run "native or hold or count or packed or torchs"
done
