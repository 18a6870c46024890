#!/usr/bin/env bash
# Write constraints.txt, launch/hashes.txt and launch/hashes-test.txt anew, from the newest versions that setup.py allows:
#
#   bash tests/lock.sh
#
# Then run the tests, and bash tests/versions.sh, before it is committed.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
VENV=$folder/venv bash launch/install.sh --newest test
{
    echo "# What armt_dist was tested with on Python 3.11 and 3.12; launch/install.sh installs these unless told --newest."
    echo "# torch is not here: its build depends on your CUDA (see TORCH in launch/install.sh), and its version bounds that of"
    echo "# setuptools. tests/lock.sh wrote this file."
    # Packages of a CUDA build are pinned by torch itself.
    "$folder/venv/bin/python" -m pip list --format=freeze --exclude-editable --exclude pip --exclude torch --exclude setuptools |
        grep -v -i -E '^(nvidia|cuda|triton)'
} >"$folder/constraints.txt"
mv "$folder/constraints.txt" constraints.txt
"$folder/venv/bin/python" tests/hashes.py
