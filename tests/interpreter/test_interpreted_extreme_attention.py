"""The Triton kernels where float32 underflows, against the oracle of tests/test_extreme_values.py."""

import pytest
import torch
from test_extreme_values import ATTENTION, NAMED_VALUES, check_attention, draw

DTYPES = (torch.float64, torch.float32, torch.float16)


@pytest.mark.parametrize(
    ("name", "means", "scales", "dtype"),
    [
        (*value, dtype)
        for value in NAMED_VALUES
        for dtype in DTYPES
        if "1e-40" not in value[0] and (value[0] != "favor eps=1e-25" or dtype != torch.float16)  # declined
    ],
    ids=str,
)
def test_attention_at_named_values(name, means, scales, dtype):
    check_attention(name, "triton", draw(0, dtype, means, scales))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", [name for name in ATTENTION if "1e-40" not in name])
def test_attention_at_drawn_values(name, seed):
    generator = torch.Generator().manual_seed(seed)
    means = torch.empty(2).uniform_(-100, 100, generator=generator).tolist()
    scales = (10 ** torch.empty(2).uniform_(-22, 2, generator=generator)).tolist()
    check_attention(name, "triton", draw(seed, torch.float32, means, scales))


@pytest.mark.parametrize(
    ("name", "dtype", "least"),
    [
        ("favor eps=1e-40", torch.float32, "1e-30"),
        ("favor relu eps=1e-40", torch.float32, "1e-30"),
        ("favor eps=1e-12", torch.float16, "1e-05"),
    ],
    ids=str,
)
def test_a_tiny_eps_is_declined(name, dtype, least):
    with pytest.raises(RuntimeError, match=f"does not support an eps between 0 and {least}"):
        check_attention(name, "triton", draw(0, dtype, (0.0, 0.0), (1.0, 1.0)))


@pytest.mark.parametrize("name", ["softmax", "elu", "favor eps=0"])
def test_channels_of_far_means_are_found(name):
    """Relative to the largest, the other features' Σ exp underflows."""
    q, k, v = draw(0, torch.float32, (0.0, 0.0), (1.0, 1.0))
    apart = torch.tensor([-200.0, 0.0, -100.0, -300.0])
    check_attention(name, "triton", [q - apart if name == "favor eps=0" else q, k + apart, v])


def test_features_of_opposite_size_are_found():
    q = torch.tensor([[0.0, -300.0], [-300.0, 0.0]]).view(1, 1, 2, 2).repeat(1, 1, 1, 2)
    k = torch.tensor([[-200.0, 0.0], [-201.0, -400.0], [-199.0, -90.0]]).view(1, 1, 3, 2).repeat(1, 1, 1, 2)
    check_attention("elu", "triton", [q, k, torch.randn(1, 1, 3, 3)])
