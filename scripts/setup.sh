#!/usr/bin/env bash
# Make or update .venv with all that the program needs: `bash scripts/setup.sh [--test]`. Needs Python 3.10-3.12 and pip.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "error: $*" >&2; exit 2; }

extras=""
for argument in "$@"; do
    case $argument in
        --test) extras="test" ;;
        *) fail "unknown argument '$argument'; usage: bash scripts/setup.sh [--test]" ;;
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

# One line a state: nothing to do when the declared dependencies and the interpreter are those of the last time.
wanted="$("$python" --version) $extras $(sha256sum pyproject.toml scripts/setup.sh | sha256sum)"
state=.venv/installed
if [ -x .venv/bin/python ] && { [ "$(cat $state 2>/dev/null)" = "$wanted" ] \
    || [ "$(cat $state 2>/dev/null)" = "$("$python" --version) test $(sha256sum pyproject.toml scripts/setup.sh | sha256sum)" ]; }; then
    exit 0
fi

rm -f $state
echo "setting up .venv (about 1 GB to download; a few minutes the first time)"
"$python" -m venv .venv 2>/dev/null || { rm -rf .venv; "$python" -m pip --version >/dev/null 2>&1 \
    && "$python" -m pip install --quiet --user virtualenv && "$python" -m virtualenv --quiet .venv; } \
    || fail "'$python -m venv .venv' failed; install Python's venv module (Debian: python3-venv) or name another Python with PYTHON="
lists=$(.venv/bin/python - "$extras" <<'PYTHON'
import re, sys
text = open("pyproject.toml").read()
def listed(key):
    return re.findall(r'"([^"]+)"', re.search(rf"^{key} = \[(.*?)\](?=\s|$)", text, re.M | re.S).group(1))
names = listed("dependencies") + (listed("test") if sys.argv[1] else [])
print("\n".join(names))
PYTHON
)
mapfile -t requirements <<<"$lists"
.venv/bin/python -m pip install -qq --disable-pip-version-check "${requirements[@]}" \
    || fail "pip could not install the dependencies; its message is above (a proxy or an index? set PIP_INDEX_URL)"

# A user may start more ranks than cores, and as root in a container: Open MPI's defaults refuse both.
grep -q '^rmaps_default_mapping_policy' .venv/etc/prte-mca-params.conf 2>/dev/null \
    || echo 'rmaps_default_mapping_policy = :oversubscribe' >> .venv/etc/prte-mca-params.conf
grep -q OMPI_ALLOW_RUN_AS_ROOT .venv/bin/activate \
    || echo 'export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1' >> .venv/bin/activate
echo "$wanted" > $state
echo "set up; 'source .venv/bin/activate' gives this shell python3 and mpirun"
