#!/usr/bin/env bash
# Prepare an environment in which the packages are installed: `bash scripts/finish_setup.sh PYTHON`.
# setup.sh and `acnet setup` call it. It sets mpirun up, and builds the kernels of src/kernels with
# the machine's C++ compiler (or CXX=). Without the kernels everything runs, but slower, and the
# commands say so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -eq 1 ] || { echo "error: this takes no arguments; it builds the kernels for CPU and prepares mpirun" >&2; exit 2; }
python=$1
prefix=$("$python" -c 'import sys; print(sys.prefix)')
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')

# Allow more ranks than cores: Open MPI's default refuses them. Map by slot, so that ranks fill every
# host's slots before they share any: ':oversubscribe' alone would put all ranks on the first host.
prepare_mpirun() {
    local settings=$prefix/etc/prte-mca-params.conf line='rmaps_default_mapping_policy = slot:oversubscribe'
    mkdir -p "$prefix/etc"
    grep -qsx "$line" "$settings" || echo "$line" >> "$settings"
}

build_kernels() {
    [ "$(uname -m)" = x86_64 ] || return 0
    "$python" -m src.kernels.build --check && return 0
    local compiler=() candidate work
    for candidate in ${CXX:-} g++ c++ clang++; do
        if command -v "$candidate" >/dev/null; then compiler=("$candidate"); break; fi
    done
    if [ ${#compiler[@]} -eq 0 ] && "$python" -c 'import ziglang' 2>/dev/null; then
        compiler=("$python" -m ziglang c++)
    fi
    if [ ${#compiler[@]} -eq 0 ]; then
        echo "no C++ compiler for the fast CPU kernels: bash scripts/setup.sh --kernels installs" \
            "one (100 MB)"
        return 0
    fi
    echo "compiling the kernels for CPU with ${compiler[*]} (up to a minute)"
    work=$(mktemp -d)
    "$python" scripts/dependencies.py pinned onednn-devel "constraints/python$version.txt" > "$work/headers.txt" \
        && "$python" -m pip --disable-pip-version-check download -qq --no-deps ${UNCHECKED:+--no-cache-dir} \
            -d "$work" -r "$work/headers.txt" 2>"$work/reason" \
        && "$python" -m zipfile -e "$work"/onednn_devel-*.whl "$work/headers" \
        && "$python" -m src.kernels.build "$work"/headers/onednn_devel-*.data/data/include "${compiler[@]}" \
        || { tail -n 1 "$work/reason" 2>/dev/null; echo "the kernels for CPU could not be built, MindSpore's own are used; the reason is above"; }
    rm -rf "$work"
}

prepare_mpirun
build_kernels
