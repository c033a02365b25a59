"""What nvcc made of the tensor-core kernels: the built library, read with cuobjdump."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import cuda_report
import torch

from cxv_kernels.library import CUDA_MISSING

ARCHS = (75,)  # the default of setup.py
FEATURES = 110  # what the models use, of D = 32

built = pytest.mark.skipif(
    cuda_report.library() is None or cuda_report.cuobjdump() is None, reason="no CUDA library, or no cuobjdump"
)


@built
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
class TestMachineCode:
    def test_every_kernel_is_there(self, arch):
        names = {(k.name, k.role, k.dtype, k.size, k.map) for k in cuda_report.kernels(arch)}
        maps = {"__half": cuda_report.MAPS, "__nv_bfloat16": cuda_report.MAPS, "float": cuda_report.PROJECTED}
        for dtype, served in maps.items():
            roles = [(name, role) for name in ("fold", "grad") for role in ("queries", "keys")]
            for name, role in [*roles, ("read", "")]:
                wanted = {(name, role, dtype, size, m) for size in (16, 32, 64) for m in served}
                assert wanted <= names, wanted - names

    def test_no_spills(self, arch):
        assert {(k.name, k.role, k.dtype, k.size, k.map) for k in cuda_report.kernels(arch) if k.spills} == set()

    def test_tensor_cores(self, arch):
        for k in cuda_report.kernels(arch):
            if k.dtype == "float":
                assert k.count("HMMA") == 0
            elif k.dtype == "__half" or arch >= 80:
                assert k.count("HMMA.16816" if arch >= 80 else "HMMA.1688") > 0, k


@built
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_is_kept_on_the_stack(arch):
    """Where registers that spill would be. And what is not for tensor cores: linear attention in float32, float64 and
    of wide heads, and conv_norm."""
    used = cuda_report.usage(arch)
    assert {name: stack for name, (_, stack, _) in used.items() if stack} == {}
    tensor = ("4foldI", "4readI", "4gradI", "8featuresI")
    others = {n: u for n, u in used.items() if not any(name in n for name in tensor)}
    # fold and grad of queries and keys, and read, of three sizes: five maps in two dtypes, the projected two in
    # float32; three steps of features of the projected maps in three sizes and dtypes
    assert len(used) - len(others) == 5 * 3 * (5 * 2 + 2) + 3 * 2 * 3 * 3 - 9
    assert sum("PlanE" in n for n in others) == 4 * 4 + 2 * 2  # four passes of four dtypes, two sums of splits
    assert sum("ConvNorm" in n for n in others) == 9 * 3
    assert max(shared for _, _, shared in others.values()) <= 48 * 1024


@built
def test_ptx_for_newer_gpus():
    assert set(re.findall(r"sm_(\d+)\.ptx", cuda_report.dump("-lptx", str(cuda_report.library())))) == {"75"}


@built
@pytest.mark.slow
class TestTuring:
    def test_shared_memory_and_resident_warps(self):
        for k in cuda_report.kernels(75):
            _, shared = cuda_report.launch(k.name, k.dtype, k.size, k.map, 1000)
            assert shared <= 48 * 1024
            claimed = 4 if k.dtype == "float" and k.name != "fold" else 8
            if (k.name, k.dtype, k.size) == ("fold", "__half", 16) and k.map in cuda_report.PROJECTED:
                claimed = 12
            if k.dtype != "__nv_bfloat16":
                assert cuda_report.resident_warps(k, 1000) >= claimed, k.name

    def test_the_key_pass_multiplies_on_tensor_cores(self):
        for k in cuda_report.kernels(75):
            if k.name == "fold" and k.dtype == "__half":
                # elu's features are logarithms, which take products of their own
                assert k.tensor_core_share >= (0.5 if k.map == "elu" else 0.8), (k.map, k.size, k.tensor_core_share)

    def test_prediction_counts_what_the_mathematics_says(self):
        rows = {row["pass"]: row for row in cuda_report.prediction(32, FEATURES)}
        assert rows["keys"]["bytes"] + rows["queries"]["bytes"] == 256
        # W x twice, as W is two operands, e vᵀ, and Σ e in eight columns, of 112 features
        assert rows["keys"]["flops"] == 2 * 112 * (2 * 32 + 32 + 8)
        assert all(row["predicted_ns"] >= row["ns"]["memory"] for row in rows.values())
        assert "Predicted, not measured" in cuda_report.report(75)


@pytest.mark.skipif(CUDA_MISSING is not None, reason="no CUDA library")
@pytest.mark.parametrize(
    "op", ["linear_attention", "kv_state", "performer_attention", "performer_features", "conv_norm"]
)
def test_the_library_has_both_directions(op):
    for way in ("forward", "backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"cxv_kernels::{op}_{way}", "CUDA")
