"""Stochastic depth. test_fused_equals_plain.py compares the gradients of its recomputation with the plain model's."""

import pytest
import torch
from torch import Tensor

import cxv
from cxv.models.blocks import Mlp, ResidualBranch

NAMES = ["cpv-3/2", "cnv-3/2", "cltv-3/2", "hybrid-vip-3/2", "hybrid-vin-3/2", "hybrid-vilt-3/2"]


def build(name: str, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    return cxv.create_model(name, embed_dim=16, img_size=8, drop_rate=0.0, **options)


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
def test_drop_path_rate_rises_linearly(name):
    """From 0 in the first layer, for attention and MLP alike."""
    branches = [m for m in build(name, drop_path_rate=0.4).modules() if isinstance(m, ResidualBranch)]
    assert [m.drop_path_rate for m in branches] == pytest.approx([0, 0, 0.2, 0.2, 0.4, 0.4])


@pytest.mark.parametrize("use_fused", [False, True], ids=["reference", "fused"])
@pytest.mark.parametrize("name", NAMES)
def test_drop_path_in_eval_mode_is_the_identity(name, use_fused):
    with_rate, without = (build(name, drop_path_rate=rate, use_fused=use_fused) for rate in (0.5, 0.0))
    x = images(4)
    assert torch.equal(with_rate.eval()(x), without.eval()(x))
    assert not torch.equal(with_rate.train()(x), without.train()(x))


@pytest.mark.parametrize("use_fused", [False, True], ids=["reference", "fused"])
@pytest.mark.parametrize("drop_rate", [0.0, 0.5])
def test_drop_path_drops_whole_images(use_fused, drop_rate):
    """An image keeps its input or gets the branch divided by the probability that it is kept; 0.25 of them keep it."""
    branch = Mlp(32, 32, drop_rate, use_fused, drop_path_rate=0.25).double().train()
    x = torch.randn(4000, 32, 1, 1, dtype=torch.float64)
    torch.manual_seed(3)
    change = branch(x) - x
    branch.drop_path_rate = 0.0
    torch.manual_seed(3)  # the seeds of dropout come first
    expected = (branch(x) - x) / 0.75
    kept = change.flatten(1).abs().amax(1) > 0
    torch.testing.assert_close(change[kept], expected[kept])
    assert kept.double().mean().item() == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / 4000) ** 0.5)


@pytest.mark.parametrize("name", ["cpv-3/2", "hybrid-vin-3/2"])
def test_drop_path_follows_the_seed(name):
    model, x = build(name, drop_path_rate=0.5, use_fused=True).train(), images(6)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(model(x))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_drop_path_of_a_part_is_that_of_the_batch():
    """As in distributed training, where ``first_image`` is the place of a process's part in the batch."""
    branch = Mlp(16, 32, 0.5, use_fused=True, drop_path_rate=0.5).train()
    x = torch.randn(6, 16, 4, 4)
    torch.manual_seed(1)
    whole = branch(x)
    branch.first_image = 2
    torch.manual_seed(1)
    assert torch.equal(branch(x[2:]), whole[2:])


@pytest.mark.parametrize("recompute", [True, False])
def test_drop_path_compiled_equals_eager(recompute):
    model, x = build("cpv-2/2", drop_path_rate=0.5, use_fused=True, recompute=recompute).train(), images(6)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (model, compiled):
        torch.manual_seed(2)
        y = run(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), model.parameters())))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rate", [1.0, -0.1, "0.1", True])
def test_drop_path_rate_out_of_range_raises(rate):
    for name in ("cpv-3/2", "hybrid-vip-3/2"):
        with pytest.raises(ValueError, match=r"drop_path_rate must be in \[0, 1\), got"):
            build(name, drop_path_rate=rate)
