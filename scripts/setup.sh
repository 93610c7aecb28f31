#!/usr/bin/env bash
# Make or update .venv: `bash scripts/setup.sh [--gpu] [--onnx] [--hdf5] [--test] [--parity] [--lint]`, the options being extras of
# pyproject.toml. Needs Linux and Python 3.10-3.12 with pip; PYTHON=FILE chooses one, VENV=FOLDER another place.
# Versions are those of constraints/; UPDATE=1 takes the newest that pyproject.toml allows and writes them there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "error: $*" >&2; exit 2; }

venv=${VENV:-.venv}
extras=()
for argument in "$@"; do
    case $argument in
        --gpu|--onnx|--hdf5|--test|--parity|--lint) extras+=("${argument#--}") ;;
        *) fail "unknown argument '$argument'; usage: bash scripts/setup.sh [--gpu] [--onnx] [--hdf5] [--test] [--parity] [--lint]" ;;
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

# What is installed: interpreter and declared dependencies on the first line, then a line for each extra.
state=$venv/installed
wanted() { echo "$("$python" --version) $({ cat pyproject.toml scripts/setup.sh; cat constraints/*.txt 2>/dev/null || true; } | sha256sum)"; }
[ "$(head -n 1 $state 2>/dev/null)" = "$(wanted)" ] || { [ ! -e $state ] || rm $state; }
missing=()
for extra in ${extras[@]+"${extras[@]}"}; do
    grep -qx "$extra" $state 2>/dev/null || missing+=("$extra")
done
if [ -e $state ] && [ ${#missing[@]} -eq 0 ] && [ -z "${UPDATE:-}" ]; then exit 0; fi

echo "setting up $venv (about 1 GB to download; a few minutes the first time)"
[ -x "$venv/bin/python" ] && fits "$venv/bin/python" || "$python" -m venv "$venv" 2>/dev/null \
    || { rm -rf "$venv"; "$python" -m pip --version >/dev/null 2>&1 \
         && "$python" -m pip install --quiet --user virtualenv && "$python" -m virtualenv --quiet "$venv"; } \
    || fail "'$python -m venv $venv' failed; install Python's venv module (Debian: python3-venv) or name another Python with PYTHON="
lists=$("$venv/bin/python" - ${extras[@]+"${extras[@]}"} <<'PYTHON'
import re, sys
text = open("pyproject.toml").read()
for key in ("dependencies", *sys.argv[1:]):
    block = re.search(rf"^{key} = \[(.*?)\]\s*(#.*)?$", text, re.M | re.S).group(1)
    print("\n".join(re.findall(r'"([^"]+)"', block)))
PYTHON
)
mapfile -t requirements <<<"$lists"
constraints=constraints/python$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
if [ -n "${UPDATE:-}" ]; then
    mkdir -p constraints
    pip install -qq --upgrade "${requirements[@]}" && pip freeze --exclude-editable | grep -v '^torch' > "$constraints"
else
    pip install -qq "${requirements[@]}" $([ ! -s "$constraints" ] || echo "--constraint $constraints")
fi || fail "pip could not install the dependencies; its message is above (a proxy or an index? set PIP_INDEX_URL)"

# A user may start more ranks than cores, and as root in a container: Open MPI's defaults refuse both.
grep -q '^rmaps_default_mapping_policy' "$venv/etc/prte-mca-params.conf" 2>/dev/null \
    || echo 'rmaps_default_mapping_policy = :oversubscribe' >> "$venv/etc/prte-mca-params.conf"
grep -q OMPI_ALLOW_RUN_AS_ROOT "$venv/bin/activate" \
    || echo 'export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1' >> "$venv/bin/activate"
{ wanted; tail -n +2 $state 2>/dev/null || true
  [ ${#extras[@]} -eq 0 ] || printf '%s\n' "${extras[@]}"; } > $state.new
mv $state.new $state
echo "set up; 'source $venv/bin/activate' gives this shell python3 and mpirun"
