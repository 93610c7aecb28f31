#!/usr/bin/env bash
# Run the kernels' fuzz and argument tests under AddressSanitizer and UndefinedBehaviorSanitizer, and
# the thread pool under ThreadSanitizer: `bash tests/kernels/sanitize.sh [CASES]`. Needs g++ and a
# .venv with the test extra. About 3 minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source "${VENV:-.venv}/bin/activate"
cases=${1:-40}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

constraints=constraints/python$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt
python3 scripts/dependencies.py pinned onednn-devel "$constraints" > "$work/headers.txt"
python3 -m pip download -qq --no-deps -d "$work" -r "$work/headers.txt"
python3 -m zipfile -e "$work"/onednn_devel-*.whl "$work/headers"
headers=$(echo "$work"/headers/onednn_devel-*.data/data/include)

folder=$(python3 -c 'from src.kernels.library import library_folder; print(library_folder())')
mkdir -p "$work/kernels"
cp "$folder"/libacnn.so.3 "$work/kernels/"
g++ -O1 -g -std=c++17 -fPIC -shared -pthread -mavx2 -mfma -fsanitize=address,undefined \
    -fno-sanitize-recover=undefined -I"$headers" src/kernels/source/*.cpp "$work/kernels/libacnn.so.3" \
    -Wl,-rpath,'$ORIGIN' -o "$work/kernels/libacnet_kernels.so"
export ACNET_KERNELS_LIBRARY=$work/kernels/libacnet_kernels.so
# Python and oneDNN keep memory until the process ends, which is no leak of ours.
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
preload=$(g++ -print-file-name=libasan.so):$(g++ -print-file-name=libstdc++.so.6)
for isa in "" AVX2; do
    LD_PRELOAD=$preload python3 tests/kernels/fuzz.py --cases="$cases" --threads=2 --isa="$isa"
done
LD_PRELOAD=$preload python3 tests/kernels/wrong_calls.py
g++ -O1 -g -std=c++17 -pthread -fsanitize=thread -Isrc/kernels/source tests/kernels/pool.cpp \
    src/kernels/source/thread_pool.cpp -o "$work/pool"
"$work/pool"
echo "sanitize: no error"
