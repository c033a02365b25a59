"""FlopCounterMode counts the same for a model with fused ops and without."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from conftest import needs_cpp
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import cxv
import cxv_kernels
import cxv_kernels.flops

CASES = [
    ("cpv-1/2", {}),
    ("cpv-1/2", {"attn_eps": 0.0}),
    ("cpv-1/2", {"attn_kernel": "relu"}),
    ("cnv-1/2", {"num_landmarks": 5}),
    ("cltv-1/2", {}),
    ("cltv-1/2", {"feature_map": "elu"}),
    ("cltv-1/2", {"feature_map": "relu"}),
    ("hybrid-vip-1/2", {}),
    ("hybrid-vin-1/2", {"num_landmarks": 16}),
    ("hybrid-vilt-1/2", {}),
]
IMAGES = torch.randn(3, 3, 8, 8)
SIZES = ((6, 4), (9, 4), (9, 5))  # tokens and channels of q, k and v


def count(function: Callable[..., Tensor], *inputs: Tensor, **options) -> tuple[int, int]:
    """The FLOPs of ``function(*inputs, **options)`` and of the backward pass of its result."""
    with FlopCounterMode(display=False) as counter:
        loss = function(*inputs, **options).square().sum()
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops() - forward


@needs_cpp
@pytest.mark.parametrize(
    ("name", "options"), CASES, ids=lambda v: v if isinstance(v, str) else "-".join(v) or "default"
)
def test_flops_of_a_model_fused_equal_reference(name, options):
    models = [cxv.create_model(name, embed_dim=16, img_size=8, use_fused=f, **options) for f in (False, True)]
    reference, fused = (count(model, IMAGES) for model in models)
    assert min(reference) > 0
    assert fused == reference


def heads(tokens: int, dim: int) -> Tensor:
    return torch.randn(2, 3, tokens, dim)


W, TAPS = torch.randn(7, 4), torch.randn(3, 1, 5, 1)
OPS = {
    "linear_attention": (partial(cxv_kernels.linear_attention, feature_map="relu"), [heads(*s) for s in SIZES]),
    "kv_state": (lambda k, v, **b: cxv_kernels.kv_state(k, v, **b)[0], [heads(*s) for s in SIZES[1:]]),
    "performer_attention": (
        lambda q, k, v, **b: cxv_kernels.performer_attention(q, k, v, W, **b),
        [heads(*s) for s in SIZES],
    ),
    "performer_features": (lambda x, **b: cxv_kernels.performer_features(x, W, True, **b), [heads(9, 4)]),
    "nystrom_attention": (
        lambda q, k, v, taps, **b: cxv_kernels.nystrom_attention(q, k, v, 4, residual_weight=taps, **b),
        [heads(9, 4), heads(9, 4), heads(9, 4), TAPS],
    ),
    "conv_norm": (
        lambda x, w, **b: cxv_kernels.conv_norm(x, w, None, torch.ones(5), torch.zeros(5), **b),
        [IMAGES, torch.randn(5, 3, 3, 3)],
    ),
}


@needs_cpp
@pytest.mark.parametrize("op", OPS)
def test_flops_of_an_op_fused_equal_reference(op):
    """With the gradients of all arguments, and of each alone; Nyström attention's reference always computes all."""
    function, tensors = OPS[op]
    subsets = [range(len(tensors)), *([i] for i in range(len(tensors)) if op != "nystrom_attention")]
    for needed in subsets:
        inputs = [t.clone().requires_grad_(i in needed) for i, t in enumerate(tensors)]
        reference, fused = (count(function, *inputs, backend=backend) for backend in ("reference", "cpu"))
        assert min(reference) > 0
        assert fused == reference, needed
