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

cmake -S . -B "$tree" -DLSWAG_SANITIZE=ON -DLSWAG_WERROR=ON -DLSWAG_CUDA=off -DPython_EXECUTABLE="$(command -v python)" \
    -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$package" >"$tree/configure.log" \
    || { cat "$tree/configure.log"; exit 1; }
cmake --build "$tree" --parallel "$(nproc)" >"$tree/build.log" || { cat "$tree/build.log"; exit 1; }

compiler=$(sed -n 's/^CMAKE_CXX_COMPILER:[A-Z]*=//p' "$tree/CMakeCache.txt")
site=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
export LD_PRELOAD="$("$compiler" -print-file-name=libasan.so):$("$compiler" -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 UBSAN_OPTIONS=print_stacktrace=1
export LSWAG_TEST_PROFILE=sanitize PYTHONPATH=$tree/package:$site OMP_NUM_THREADS=2
exec python -S -m pytest -q -p no:cacheprovider tests/ops "$@"
