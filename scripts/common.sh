# Sourced by the run_*.sh scripts. Recognises each argument by its form, so that both the model
# zoo's order and ours work: a number becomes `number`, CPU, GPU or Ascend `target`, a .json file
# `table`, the first path `data`, the second `checkpoint`. Arguments that begin with - go to
# `flags`.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -f "$root/.venv/bin/activate" ]; then source "$root/.venv/bin/activate"; fi
number=; target=; table=; data=; checkpoint=; flags=()

fail() { echo "error: $1; $usage" >&2; exit 2; }

take_apart() {
    for argument in "$@"; do
        case $argument in
            -*) flags+=("$argument") ;;
            "") fail "an argument is empty" ;;
            CPU|GPU|Ascend) [ -z "$target" ] || fail "two devices, $target and $argument"; target=$argument ;;
            *) take_word "$argument" ;;
        esac
    done
    [ -n "$data" ] || fail "no DATA_PATH"
}

take_word() {
    if [[ $1 =~ ^[0-9]+$ ]]; then
        [ -z "$number" ] || fail "two numbers, $number and $1"
        number=$1
    elif [[ $1 == *.json && -z $data ]]; then
        [ -f "$1" ] || fail "'$1' does not exist"
        table=$1
    elif [ -z "$data" ]; then
        [ -e "$1" ] || [ "$1" = digits ] || fail "DATA_PATH '$1' does not exist"
        data=$1
    elif [ -z "$checkpoint" ]; then
        [ -e "$1" ] || fail "the checkpoint '$1' does not exist"
        checkpoint=$1
    else
        fail "'$1' is one argument too many"
    fi
}

# Whether the arguments are in the model zoo's order, with the number before the path. Its scripts
# put their runs into ./output.
is_zoo_order() { [[ ${1:-} =~ ^[0-9]+$ ]]; }
