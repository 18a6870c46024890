#!/usr/bin/env bash
# Run the quick tests, and one train, export and generate, with other versions of the packages; add the rows to
# docs/versions.md. Every environment is thrown away at the end.
#
#   bash tests/versions.sh                       # lowest, locked and newest
#   TORCH=2.14.1 bash tests/versions.sh locked   # one of them, with another torch
#   bash tests/versions.sh transformers==5.20.0  # the lock, but for one package
#
# Takes about five minutes and 2 GB of disk for each; a CUDA build of torch takes 6 GB.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- lowest locked newest

checkout=$PWD
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export OMP_NUM_THREADS=1
# The checkout as it is committed: nothing is written into this one.
git archive --prefix=source/ HEAD | tar x -C "$scratch"
cd "$scratch/source"

# "name>=1.2,<2" of setup.py as name==1.2; torch is chosen by TORCH.
lowest() { grep -oE '^ {8}"[A-Za-z_]+>=[0-9.]+' setup.py | tr -d ' "' | sed 's/>=/==/' | grep -v -E '^torch=='; }
# The lock without one package, and that one.
but_for() { grep -v -i "^${1%%==*}==" constraints.txt; echo "$1"; }

try() {
    local name=$1 venv=$scratch/venv options=() result=passed
    rm -rf "$venv"
    cp constraints.txt "$scratch/constraints.txt"
    case $name in
        lowest) lowest >"$scratch/constraints.txt" ;;
        locked) ;;
        newest) options=(--newest) ;;
        *==*) but_for "$name" >"$scratch/constraints.txt" ;;
        *) echo "error: versions.sh $name: expected lowest, locked, newest or package==version" >&2 && exit 2 ;;
    esac
    if ! VENV=$venv CONSTRAINTS=$scratch/constraints.txt bash launch/install.sh "${options[@]}" test; then
        row "$name" "cannot be installed" "-"
        return
    fi
    PATH="$venv/bin:$PATH" python -m pytest --quick >"$scratch/tests.log" 2>&1 || result=failed
    tail -n 20 "$scratch/tests.log"
    row "$name" "$result: $(tail -n 1 "$scratch/tests.log" | tr -d '=' | xargs)" "$(end_to_end "$venv")"
}

end_to_end() {
    local run=$scratch/run
    rm -rf "$run"
    if PATH="$1/bin:$PATH" bash tests/train_export_generate.sh "$run" >"$scratch/run.log" 2>&1; then
        echo passed
    else
        tail -n 20 "$scratch/run.log" >&2
        echo failed
    fi
}

row() {
    local versions
    versions=$("$scratch/venv/bin/python" tests/installed.py)
    echo "| $(date -u +%F) | $(git -C "$checkout" rev-parse --short HEAD) | $1 | $versions | $2 | $3 |" | tee -a "$checkout/docs/versions.md"
}

for name in "$@"; do try "$name"; done
