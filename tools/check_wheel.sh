#!/usr/bin/env bash
# check_wheel.sh WHEEL TORCH [PYTHON]: installs the wheel beside that version of torch into a fresh environment, and runs
# the self-check there. Of what the package needs, only what the ops do: another torch may have no torchvision.
set -euo pipefail
wheel=$(realpath "$1")
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
"${3:-python3}" -m venv "$venv"
"$venv/bin/pip" install --quiet "torch==$2" numpy
"$venv/bin/pip" install --quiet --no-deps "$wheel"
cd "$venv"
"$venv/bin/python" -m cxv_kernels
