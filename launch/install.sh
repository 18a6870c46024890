#!/usr/bin/env bash
# Install armt_dist and the tested versions of what it needs (constraints.txt) into .venv, which is made if need be.
#
#   bash launch/install.sh [--newest | --hashes] [extras, for example test]
#
# --newest   the newest versions that setup.py allows instead of the tested ones
# --hashes   the tested versions, and of them only archives with the SHA-256 of hashes.txt and hashes-test.txt; torch, pip
#            and setuptools have none (docs/security.md)
# PYTHON     the Python that .venv is made with (python3)
# TORCH      the version of torch, if .venv has none yet (2.13.0). A torch that is there already stays; without a CUDA
#            driver it comes as its CPU build where one is to be had.
# VENV, CONSTRAINTS    other places than .venv and constraints.txt
set -euo pipefail
cd "$(dirname "$0")/.."

newest='' hashes='' extras=''
for argument in "$@"; do
    case $argument in
        --newest) newest=yes ;;
        --hashes) hashes=yes ;;
        -*) echo "error: install.sh $argument: unknown option; known: --newest, --hashes" >&2 && exit 2 ;;
        *) extras=$argument ;;
    esac
done
locked=launch/hashes${extras:+-$extras}.txt
if [ -n "$hashes" ] && { [ -n "$newest" ] || [ ! -f "$locked" ]; }; then
    echo "error: install.sh --hashes${newest:+ --newest}${extras:+ $extras}: there are hashes of the tested versions alone," \
        "without extras or with the extra test" >&2
    exit 2
fi
venv=${VENV:-.venv} constraints=${CONSTRAINTS:-constraints.txt}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"

# Nothing to do while what was installed is what is asked for.
stamp=$venv/.armt_dist-${extras:-base}
wanted="$newest $hashes $(cksum setup.py launch/install.sh "$constraints" ${hashes:+launch/hashes*.txt})"
[ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && exit 0

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    torch=torch==${TORCH:-2.13.0}
    if command -v nvidia-smi >/dev/null; then
        pip install -q "$torch"
    else
        # A CPU build is named by its version on some indexes and has an index of its own; CUDA wheels come last.
        pip install -q "$torch+cpu" 2>/dev/null ||
            pip install -q "$torch" --index-url https://download.pytorch.org/whl/cpu 2>/dev/null ||
            pip install -q "$torch"
    fi
fi
# torch stays as it is: another one would be another build.
torch=$(mktemp)
trap 'rm -f "$torch"' EXIT
"$venv/bin/python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >"$torch"
if [ -n "$newest" ]; then
    set -- -c "$torch" --upgrade --upgrade-strategy eager
else
    set -- -c "$torch" -c "$constraints"
fi
# Older ones of the first two have known vulnerabilities. DeepSpeed compiles its extensions when they are first used.
pip install -q -c "$torch" "pip>=25.3" "setuptools>=78.1.1" wheel ninja
export DS_BUILD_OPS=0
if [ -n "$hashes" ]; then
    # Again where it is there: torch has brought some of it, unchecked. An editable installation has no hash itself.
    pip install -q --no-build-isolation --no-deps --force-reinstall --require-hashes -r "$locked"
    set -- --no-deps
    extras=''
fi
# setuptools warns of every editable installation.
PYTHONWARNINGS=ignore pip install -q --no-build-isolation "$@" -e ".${extras:+[$extras]}"
[ -z "$hashes" ] || pip check -q
echo "$wanted" >"$stamp"
