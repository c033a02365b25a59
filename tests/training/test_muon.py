"""Muon against PyTorch's, for matrices and for the kernels of convolutions."""

import copy

import pytest
import torch
from torch import nn

import cxv
from cxv.training.muon import Muon
from cxv.training.optim import muon_groups


def a_model():
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(128, 16), nn.Linear(16, 4))


def step(model, *optimizers):
    model.zero_grad()
    model(torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()


def test_muon_trains_matrices_as_pytorch_does_and_the_rest_by_adamw():
    model = a_model()
    expected = copy.deepcopy(model)
    groups = muon_groups(model, 0.05)
    inner = [expected[1].weight, expected[3].weight]
    matrices = [nn.Parameter(weight.detach().flatten(1)) for weight in inner]
    rest = [parameter for parameter in expected.parameters() if all(parameter is not weight for weight in inner)]
    decays = {True: [p for p in rest if p.ndim > 1], False: [p for p in rest if p.ndim == 1]}
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [{"params": decays[True], "weight_decay": 0.05}, {"params": decays[False], "weight_decay": 0.0}], lr=1e-2
    )
    optimizer = Muon(groups, lr=1e-2)
    for _ in range(3):
        step(model, optimizer)
        step(expected)
        for matrix, weight in zip(matrices, inner, strict=True):
            matrix.grad = weight.grad.flatten(1)
        muon.step()
        adamw.step()
    for got, want in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_muon_updates_a_channels_last_kernel_as_a_contiguous_one():
    """The columns of the matrix have another order. The iteration runs in bfloat16, hence the tolerance."""
    contiguous = a_model()
    channels_last = copy.deepcopy(contiguous).to(memory_format=torch.channels_last)
    assert not channels_last[1].weight.is_contiguous()
    before = contiguous[1].weight.detach().clone()
    for model in (contiguous, channels_last):
        step(model, Muon(muon_groups(model, 0.0), lr=1e-2))
    change = contiguous[1].weight.detach() - before
    assert change.abs().max() > 1e-3
    torch.testing.assert_close(
        channels_last[1].weight.detach() - before, change, rtol=0, atol=0.02 * change.abs().max().item()
    )


def test_muon_goes_on_from_its_state_with_the_same_bits():
    model = a_model()
    optimizer = Muon(muon_groups(model, 0.05))
    step(model, optimizer)
    other = copy.deepcopy(model)
    reloaded = Muon(muon_groups(other, 0.05))
    reloaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer)
    step(other, reloaded)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("name", ["cpv-2/4", "cnv-2/4", "cltv-2/4"])
def test_muon_groups_leave_out_the_first_and_the_last_layer(name):
    model = cxv.create_model(name, embed_dim=32, img_size=16)
    groups = muon_groups(model, 0.05)
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(id(p) for p in model.parameters())
    (muon,) = (group for group in groups if group.get("muon"))
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    dense = [layer.weight for layer in layers if getattr(layer, "groups", 1) == 1]
    assert dense[0] is model.stem[0].weight
    assert dense[-1] is model.head.weight
    assert {id(p) for p in muon["params"]} == {id(weight) for weight in dense[1:-1]}


def test_muon_runs_the_closure():
    model = a_model()
    optimizer = Muon(muon_groups(model, 0.0))

    def closure():
        loss = model(torch.ones(1, 3, 8, 8)).square().mean()
        loss.backward()
        return loss

    before = model[1].weight.detach().clone()
    assert optimizer.step(closure) > 0
    assert not torch.equal(model[1].weight, before)
