#!/usr/bin/env bash
# check_wheel.sh WHEEL TORCH [PYTHON]: install the wheel with that version of torch into a new environment and run the
# self-check. Only the dependencies of the ops are installed, because some versions of torch have no torchvision.
set -euo pipefail
wheel=$(realpath "$1")
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
"${3:-python3}" -m venv "$venv"
"$venv/bin/pip" install --quiet "torch==$2" numpy
"$venv/bin/pip" install --quiet --no-deps "$wheel"
cd "$venv"
"$venv/bin/python" -m cxv_kernels
