#!/usr/bin/env bash
# Install armt_dist into .venv, made if there is none:  bash launch/install.sh [extras, for example test]
# Without a CUDA driver torch comes as its CPU build where one is to be had.
set -euo pipefail
cd "$(dirname "$0")/.."

extras=${1:+[$1]}
python=${PYTHON:-python3}
[ -x .venv/bin/python ] || "$python" -m venv .venv

# Nothing to do while what was installed is what setup.py asks for.
stamp=.venv/.armt_dist-${1:-base}
wanted=$(cksum setup.py launch/install.sh)
[ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && exit 0

pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

if ! .venv/bin/python -c 'import torch' 2>/dev/null && ! command -v nvidia-smi >/dev/null; then
    # A CPU build is named by its version on some indexes and has an index of its own; CUDA wheels are the last resort.
    pip install -q torch==2.13.0+cpu 2>/dev/null ||
        pip install -q torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu 2>/dev/null ||
        pip install -q torch==2.13.0
fi
# DeepSpeed compiles its extensions when they are first used, not now.
pip install -q setuptools wheel ninja
DS_BUILD_OPS=0 pip install -q --no-build-isolation -e ".$extras"
echo "$wanted" >"$stamp"
