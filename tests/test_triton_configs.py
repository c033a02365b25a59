"""The table of launch options: which entry holds for a kernel, and that every entry holds for some."""

import itertools

import pytest
import torch

from cxv_kernels.ops.linear_attention.triton import configs

ARCHITECTURES = (0, 75, 80, 90, 100)
DIMS = (16, 32, 64, 128)
FEATURES = (None, 44, 64, 110, 128, 266, 512)
DTYPES = (torch.float16, torch.float32, torch.float64)


@pytest.mark.parametrize("kernel", configs.packaged())
def test_every_entry_is_used(kernel):
    calls = itertools.product(ARCHITECTURES, DIMS, FEATURES, DTYPES)
    assert {configs.find(kernel, *call) for call in calls} == set(configs.packaged()[kernel])


def test_lookup_of_the_nearest_entry():
    table = {
        "default": {"num_warps": 9},
        "default sm_80": {"num_warps": 1},
        "32 16-bit sm_80": {"num_warps": 3},
        "32x128 16-bit sm_80": {"num_warps": 2},
        "32x128 sm_80": {"num_warps": 1},
        "64 sm_90": {"num_warps": 4},
    }
    with configs.override({"a_kernel": table}):
        assert configs.lookup("a_kernel", 90, 32, 110, torch.float16) == {"num_warps": 2}
        assert configs.lookup("a_kernel", 90, 20, 64, torch.float16) == {"num_warps": 2}  # the next size
        assert configs.lookup("a_kernel", 86, 32, 110, torch.float32) == {"num_warps": 1}
        assert configs.lookup("a_kernel", 80, 64, 110, torch.float16) == {"num_warps": 1}
        assert configs.lookup("a_kernel", 80, 32, 129, torch.float16) == {"num_warps": 1}
        assert configs.lookup("a_kernel", 80, 32, None, torch.float16) == {"num_warps": 3}  # no projection
        assert configs.lookup("a_kernel", 75, 32, 110, torch.float16) == {"num_warps": 9}
        assert configs.lookup("a_kernel", 90, 64, None, torch.float16) == {"num_warps": 4}
        assert configs.lookup("a_kernel", 100, 64, None, torch.float16) == {"num_warps": 1}  # "sm_90" is Hopper alone
        assert configs.lookup("key_pass", 90, 32, 110, torch.float16)["num_warps"] > 0
    with pytest.raises(KeyError):
        configs.lookup("a_kernel", 90, 32, 110, torch.float16)


def test_lookup_returns_a_copy():
    first = configs.lookup("key_pass", 90, 32, 110, torch.float16)
    first["num_warps"] = 0
    assert configs.lookup("key_pass", 90, 32, 110, torch.float16)["num_warps"] > 0
