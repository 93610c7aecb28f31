#!/usr/bin/env bash
# Make or update .venv:
#
#   bash scripts/setup.sh [--kernels] [--gpu] [--onnx] [--hdf5] [--heif] [--serve] [--tensorboard]
#                         [--test] [--parity] [--lint] [--docs]
#
# The options are the extras of pyproject.toml. The fast kernels for CPU are built with the machine's
# C++ compiler (or CXX=), or with --kernels by a compiler from the package index. Needs Linux and
# Python 3.10-3.12 with pip. PYTHON=FILE chooses the interpreter, VENV=FOLDER another folder. pip
# checks every file against the versions and hashes in constraints/ (UNCHECKED=1 skips that).
# UPDATE=1 takes the newest versions that pyproject.toml allows, and writes them there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "error: $*" >&2; exit 2; }

venv=${VENV:-.venv}
extras=()
for argument in "$@"; do
    case $argument in
        --kernels|--gpu|--onnx|--hdf5|--heif|--serve|--tensorboard|--test|--parity|--lint|--docs) extras+=("${argument#--}") ;;
        *) fail "unknown argument '$argument'; usage: bash scripts/setup.sh [--kernels] [--gpu] [--onnx] [--hdf5] [--heif] [--serve] [--tensorboard] [--test] [--parity] [--lint] [--docs]" ;;
    esac
done

[ "$(uname -s)" = Linux ] || fail "this needs Linux; $(uname -s) has no MindSpore wheel with MPI"
case $(uname -m) in x86_64|aarch64) ;; *) fail "no MindSpore wheel for $(uname -m); x86_64 and aarch64 have one" ;; esac

fits() { "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }
python=""
for candidate in ${PYTHON:-} python3 python3.12 python3.11 python3.10; do
    if command -v "$candidate" >/dev/null && fits "$candidate"; then python=$candidate; break; fi
done
[ -n "$python" ] || fail "Python 3.10, 3.11 or 3.12 is needed, python3 is $(python3 --version 2>&1 || echo missing);" \
    "install one, or name it: PYTHON=/path/to/python3.11 bash scripts/setup.sh"

# The kernels of src/kernels go into $venv/kernels.
finish() { bash scripts/finish_setup.sh "$venv/bin/python"; }

# Lets TAB complete keys and values after python3 train.py and the other commands.
write_completion() { "$venv/bin/python" -m src.cli.help > "$venv/completion.bash"; }

# What is installed: interpreter and declared dependencies on the first line, then a line for each extra.
state=$venv/installed
wanted() { echo "$("$python" --version) $({ cat pyproject.toml scripts/setup.sh scripts/dependencies.py; cat constraints/*.txt 2>/dev/null || true; } | sha256sum)"; }
[ "$(head -n 1 $state 2>/dev/null)" = "$(wanted)" ] || { [ ! -e $state ] || rm $state; }
missing=()
for extra in ${extras[@]+"${extras[@]}"}; do
    grep -qx "$extra" $state 2>/dev/null || missing+=("$extra")
done
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
constraints_of() { echo "constraints/python$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt"; }
if [ -e $state ] && [ ${#missing[@]} -eq 0 ] && [ -z "${UPDATE:-}" ]; then
    write_completion
    finish
    exit 0
fi

# What MindSpore and the rest take; the extras come on top.
needed=3200
if [ ! -x "$venv/bin/python" ]; then
    mkdir -p "$(dirname "$venv")"
    free=$(df -Pm "$(dirname "$venv")" | awk 'NR == 2 { print $4 }')
    [ "${free:-$needed}" -ge $needed ] || fail "$venv needs $needed MB and there are $free MB free;" \
        "make room, or name a folder on another disk: VENV=FOLDER bash scripts/setup.sh"
    echo "setting up $venv: about 1 GB to download, $needed MB on disk"
else
    echo "updating $venv"
fi
# pip is silent, for minutes where the network is slow.
waited=0
while sleep 1 && kill -0 $$ 2>/dev/null; do
    [ $((++waited % 10)) -ne 0 ] || echo "  after $SECONDS s $venv has $(du -sm "$venv" | cut -f1) MB"
done &
watcher=$!
# So that bash prints nothing when it is killed.
disown "$watcher"
work=
trap 'kill -KILL "$watcher" 2>/dev/null; rm -rf "$work"' EXIT
echo "1 of 3: an environment of Python"
[ -x "$venv/bin/python" ] && fits "$venv/bin/python" || "$python" -m venv "$venv" 2>/dev/null \
    || { rm -rf "$venv"; "$python" -m pip --version >/dev/null 2>&1 \
         && "$python" -m pip install --quiet --user virtualenv && "$python" -m virtualenv --quiet "$venv"; } \
    || fail "'$python -m venv $venv' failed; install Python's venv module (Debian: python3-venv) or name another Python with PYTHON="
constraints=$(constraints_of)
# Reports of what pip would install came with 22.2.
"$venv/bin/python" -c 'import pip, sys; sys.exit(tuple(map(int, pip.__version__.split(".")[:2])) < (22, 2))' || pip install -qq --upgrade pip
work=$(mktemp -d)
dependencies() { "$venv/bin/python" scripts/dependencies.py "$@"; }
dependencies wanted ${extras[@]+"${extras[@]}"} > "$work/wanted"
if [ -n "${UPDATE:-}" ]; then
    mkdir -p constraints
    dependencies wanted --all > "$work/all"
    pip install -qq --dry-run --ignore-installed --report "$work/report" -r "$work/all" \
        && dependencies headers > "$work/headers" \
        && pip install -qq --dry-run --ignore-installed --no-deps --report "$work/of_headers" -r "$work/headers" \
        && dependencies lock "$work/report" "$work/of_headers" > "$work/locked" \
        && mv "$work/locked" "$constraints" || fail "the newest versions could not be found; the reason is above"
fi
echo "2 of 3: packages: $(wc -l < "$work/wanted") and those that they need"
if [ -s "$constraints" ] && [ -z "${UNCHECKED:-}" ]; then
    # First resolve what to install. Then install exactly that, with hash checks. Then PyTorch,
    # which has many builds and is not hashed.
    grep -o '^[^ ]*==[^ ]*' "$constraints" > "$work/pinned"
    pip install -qq --dry-run --report "$work/report" -r "$work/wanted" -c "$work/pinned" \
        && dependencies hashed "$work/report" "$constraints" > "$work/hashed" \
        && { [ ! -s "$work/hashed" ] || pip install -qq --no-deps --require-hashes -r "$work/hashed"; } \
        && pip install -qq -r "$work/wanted" -c "$work/pinned"
else
    pip install -qq -r "$work/wanted"
fi || fail "the dependencies could not be installed; the reason is above (behind a proxy or a" \
    "private index? set PIP_INDEX_URL; if the index has files with other hashes, set UNCHECKED=1)"

grep -q completion.bash "$venv/bin/activate" \
    || echo 'if [ -n "${BASH_VERSION:-}" ] && [ -e "$VIRTUAL_ENV/completion.bash" ]; then . "$VIRTUAL_ENV/completion.bash"; fi' \
        >> "$venv/bin/activate"
# Open MPI's default refuses root, also in a container.
grep -q OMPI_ALLOW_RUN_AS_ROOT "$venv/bin/activate" \
    || echo 'export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1' >> "$venv/bin/activate"
{ wanted; tail -n +2 $state 2>/dev/null || true
  [ ${#extras[@]} -eq 0 ] || printf '%s\n' "${extras[@]}"; } > $state.new
mv $state.new $state
write_completion
echo "3 of 3: the kernels for CPU"
finish
echo "set up after $SECONDS s; 'source $venv/bin/activate' puts python3 and mpirun on this shell's PATH"
