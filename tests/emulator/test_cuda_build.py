"""What nvcc made of the tensor-core kernels: the built library, read with cuobjdump."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import cuda_report
import torch

from cxv_kernels.library import CUDA_MISSING

ARCH = 75  # the default of setup.py

built = pytest.mark.skipif(
    cuda_report.library() is None or cuda_report.cuobjdump() is None, reason="no CUDA library, or no cuobjdump"
)


@built
@pytest.mark.slow
class TestMachineCode:
    def test_every_kernel_is_there(self):
        names = {(k.name, k.step, k.dtype, k.size, k.map) for k in cuda_report.kernels(ARCH)}
        for name in cuda_report.PASSES:
            for dtype in cuda_report.DTYPES:
                wanted = {(name, "", dtype, size, m) for size in (16, 32, 64) for m in cuda_report.MAPS.values()}
                assert wanted <= names, wanted - names

    def test_tensor_cores(self):
        for k in cuda_report.kernels(ARCH):
            assert (k.count("HMMA.1688") > 0) == (k.dtype == "__half"), k


@built
@pytest.mark.slow
def test_nothing_is_kept_on_the_stack():
    """Registers that spill would be there."""
    used = cuda_report.usage(ARCH)
    assert {name: stack for name, (_, stack, _) in used.items() if stack} == {}
    # five passes of three sizes, five maps and two dtypes; three steps of features of the projected maps in three sizes
    # and two dtypes, of which relu has no maximum
    assert len(cuda_report.kernels(ARCH)) == 5 * 3 * 5 * 2 + (3 * 2 - 1) * 3 * 2
    assert sum("ConvNorm" in name for name in used) == 9 * 2
    assert max(shared for _, _, shared in used.values()) <= 48 * 1024
    assert len(cuda_report.report(ARCH).splitlines()) == 2 + len(cuda_report.kernels(ARCH))


@built
def test_ptx_for_newer_gpus():
    assert set(re.findall(r"sm_(\d+)\.ptx", cuda_report.dump("-lptx", str(cuda_report.library())))) == {"75"}


@built
@pytest.mark.slow
class TestTuring:
    def test_shared_memory_and_resident_warps(self):
        for k in cuda_report.kernels(ARCH):
            _, shared = cuda_report.launch(k.name, k.dtype, k.size, k.map, 1000)
            assert shared <= 48 * 1024
            sums = k.name in ("key_pass", "query_backward_sums")
            claimed = 4 if k.dtype == "float" and not sums else 8
            if sums and (k.dtype, k.size) == ("__half", 16) and k.map in cuda_report.PROJECTED:
                claimed = 12
            assert cuda_report.resident_warps(k, 1000) >= claimed, k.name

    def test_the_key_pass_multiplies_on_tensor_cores(self):
        for k in cuda_report.kernels(ARCH):
            if k.name in ("key_pass", "query_backward_sums") and k.dtype == "__half":
                # elu's features are logarithms, which take products of their own
                assert k.tensor_core_share >= (0.5 if k.map == "elu" else 0.8), (k.map, k.size, k.tensor_core_share)


@pytest.mark.skipif(CUDA_MISSING is not None, reason="no CUDA library")
@pytest.mark.parametrize(
    "op", ["linear_attention", "kv_state", "performer_attention", "performer_features", "conv_norm"]
)
def test_the_library_has_both_directions(op):
    for way in ("forward", "backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cxv_kernels::{op}_{way}", "CUDA")
