"""DualOpT to the letter of the paper's section 4."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

from cxv import DualOpT


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def train_epoch(model, opt, steps=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, y = torch.randn(16, 6, generator=g), torch.randint(3, (16,), generator=g)
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same(model, saved):
    for k, v in model.state_dict().items():
        assert torch.equal(v, saved[k]), k


def test_first_phase_is_the_papers_adamw():
    opt = DualOpT(make_model().parameters(), patience=20)
    assert opt.phase == "adamw"
    assert type(opt.optimizer) is torch.optim.AdamW
    group = opt.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (
        1e-3,
        (0.9, 0.999),
        1e-8,
        0.01,
    )
    assert group["amsgrad"] is False
    assert opt.max_epochs == {"adamw": 300, "sgd": 100}


def test_steps_are_those_of_torch_in_both_phases():
    a, b = make_model(), make_model()
    opt = DualOpT(a.parameters(), max_epochs=(1, 5))
    plain = torch.optim.AdamW(b.parameters(), lr=1e-3, weight_decay=0.01)
    train_epoch(a, opt)
    train_epoch(b, plain)
    assert_same(a, snapshot(b))
    opt.end_epoch(0.5)
    assert opt.phase == "sgd"
    plain = torch.optim.SGD(b.parameters(), lr=1e-3, momentum=0.9)
    train_epoch(a, opt, seed=1)
    train_epoch(b, plain, seed=1)
    assert_same(a, snapshot(b))


def test_a_tie_is_progress_and_its_weights_are_kept():
    model = make_model()
    opt = DualOpT(model, patience=2)
    train_epoch(model, opt)
    assert opt.end_epoch(50.0) is True
    train_epoch(model, opt)
    assert opt.end_epoch(49.0) is False
    assert opt.num_bad_epochs == 1
    train_epoch(model, opt)
    tied = snapshot(model)
    assert opt.end_epoch(50.0) is True
    assert (opt.num_bad_epochs, opt.best_epoch) == (0, 3)
    train_epoch(model, opt)
    opt.load_best()
    assert_same(model, tied)


def test_switch_after_patience_reloads_the_best_weights_with_a_fresh_sgd():
    model = make_model()
    opt = DualOpT(model, patience=3)
    script = [10.0, 30.0, 20.0, 29.9, 25.0]
    for i, top1 in enumerate(script):
        assert opt.phase == "adamw"
        train_epoch(model, opt, seed=i)
        if opt.end_epoch(top1):
            best = snapshot(model)
        elif opt.phase == "adamw":
            assert not torch.equal(model[0].weight, best["0.weight"])
    assert opt.phase == "sgd"
    assert (opt.switch_epoch, opt.switch_reason, opt.num_bad_epochs) == (5, "patience", 0)
    assert (opt.best_top1, opt.best_epoch) == (30.0, 2)
    assert_same(model, best)  # the running statistics of the BatchNorm too
    assert type(opt.optimizer) is torch.optim.SGD
    group = opt.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (1e-3, 0.9, 0, False)
    assert not opt.optimizer.state  # no momentum from before
    assert all(p.grad is None for p in model.parameters())


def test_parameters_alone_leave_the_buffers():
    model = make_model()
    opt = DualOpT(model.parameters(), patience=1)
    train_epoch(model, opt)
    opt.end_epoch(1.0)
    best = snapshot(model)
    train_epoch(model, opt)
    now = snapshot(model)
    opt.end_epoch(0.0)
    for name, p in model.named_parameters():
        assert torch.equal(p, best[name])
    assert torch.equal(model[1].running_mean, now["1.running_mean"])
    assert not torch.equal(model[1].running_mean, best["1.running_mean"])


def test_max_epochs_end_the_phase():
    model = make_model()
    opt = DualOpT(model, patience=20, max_epochs=(2, 3))
    phases = []
    for top1 in (1, 2, 3, 4, 5):
        assert not opt.finished
        phases.append(opt.phase)
        opt.end_epoch(top1)
    assert phases == ["adamw"] * 2 + ["sgd"] * 3
    assert opt.finished
    assert (opt.switch_epoch, opt.switch_reason, opt.stop_reason) == (2, "max_epochs", "max_epochs")
    with pytest.raises(RuntimeError, match="both phases"):
        opt.end_epoch(6)


def test_the_best_so_far_is_shared_by_both_phases():
    model = make_model()
    opt = DualOpT(model, patience=2)
    for top1 in (90, 80, 80):
        opt.end_epoch(top1)
    assert opt.phase == "sgd"
    assert opt.end_epoch(89) is False  # the best of this phase, but not the best
    assert opt.num_bad_epochs == 1
    assert opt.end_epoch(90) is True
    assert opt.best_epoch == 5
    assert [opt.end_epoch(t) for t in (85, 86)] == [False, False]
    assert opt.finished
    assert opt.stop_reason == "patience"


def test_a_phase_can_be_left_out():
    only_sgd = DualOpT(make_model(), max_epochs=(0, 1))
    assert only_sgd.phase == "sgd"
    only_sgd.end_epoch(1)
    assert only_sgd.finished
    only_adamw = DualOpT(make_model(), max_epochs=(1, 0))
    only_adamw.end_epoch(1)
    assert only_adamw.finished
    assert only_adamw.phase == "adamw"
    uncapped = DualOpT(make_model(), patience=1, max_epochs=(None, None))
    for i in range(400):
        uncapped.end_epoch(i)
    assert uncapped.phase == "adamw"


@pytest.mark.parametrize("saved_after", [2, 5], ids=["adamw", "sgd"])
def test_state_dict_round_trip_goes_on_bit_for_bit(saved_after):
    script = [10, 30, 20, 20, 25, 31, 12, 31, 0, 0]  # AdamW ends after 4 with patience 2, then SGD

    def run(model, opt, epochs):
        for i in epochs:
            train_epoch(model, opt, seed=i)
            opt.end_epoch(script[i])

    whole = make_model()
    whole_opt = DualOpT(whole, patience=2)
    run(whole, whole_opt, range(10))
    assert whole_opt.finished

    first = make_model()
    first_opt = DualOpT(first, patience=2)
    run(first, first_opt, range(saved_after))
    buffer = io.BytesIO()
    torch.save({"model": first.state_dict(), "opt": first_opt.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)

    second = make_model(seed=99)
    second.load_state_dict(saved["model"])
    second_opt = DualOpT(second, patience=2)
    second_opt.load_state_dict(saved["opt"])
    assert second_opt.phase == first_opt.phase
    run(second, second_opt, range(saved_after, 10))
    assert_same(second, snapshot(whole))
    for name in ("epoch", "num_bad_epochs", "best_top1", "best_epoch", "switch_epoch", "switch_reason", "finished"):
        assert getattr(second_opt, name) == getattr(whole_opt, name), name
    whole_opt.load_best()
    second_opt.load_best()
    assert_same(second, snapshot(whole))


def test_a_loaded_state_is_independent_of_its_source():
    a = make_model()
    opt_a = DualOpT(a, max_epochs=(1, 9))
    opt_a.end_epoch(1)
    train_epoch(a, opt_a)
    b = make_model()
    opt_b = DualOpT(b)
    opt_b.load_state_dict(opt_a.state_dict())
    momentum = [s["momentum_buffer"].clone() for s in opt_b.optimizer.state.values()]
    assert momentum
    train_epoch(a, opt_a, seed=5)
    for before, s in zip(momentum, opt_b.optimizer.state.values(), strict=True):
        assert torch.equal(before, s["momentum_buffer"])


def test_caps_raised_after_the_end_go_on():
    model = make_model()
    opt = DualOpT(model, max_epochs=(2, 0))
    opt.end_epoch(2)
    train_epoch(model, opt)
    opt.end_epoch(1)
    assert opt.finished
    longer = DualOpT(model, max_epochs=(3, 0))
    longer.load_state_dict(opt.state_dict())
    assert not longer.finished
    assert longer.phase == "adamw"
    with_sgd = DualOpT(model, max_epochs=(2, 1))
    with_sgd.load_state_dict(opt.state_dict())
    assert with_sgd.phase == "sgd"  # due at once, and the best weights are in
    assert torch.equal(model[0].weight, opt.state_dict()["best"]["0.weight"])


# --- as any optimizer of torch


SCHEDULERS = {
    "lambda": lambda opt: LambdaLR(opt, lambda n: 0.9**n),
    "cosine": lambda opt: CosineAnnealingLR(opt, 12),
    "onecycle": lambda opt: OneCycleLR(opt, max_lr=0.01, total_steps=13),
}


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_take_it_and_go_on_over_the_switch(make):
    a, b = make_model(), make_model()
    opt, plain = DualOpT(a, sgd_lr=1.0, max_epochs=(2, 2)), torch.optim.AdamW(b.parameters())
    ours, theirs = make(opt), make(plain)
    for epoch in range(4):
        if epoch == 2:
            assert_same(a, snapshot(b))
            assert opt.phase == "sgd"
            plain = torch.optim.SGD(b.parameters(), momentum=0.9)
        for step in range(3):
            plain.param_groups[0]["lr"] = rate = theirs.get_last_lr()[0]
            assert opt.param_groups[0]["lr"] == opt.optimizer.param_groups[0]["lr"] == rate
            train_epoch(a, opt, 1, seed=3 * epoch + step)
            train_epoch(b, plain, 1, seed=3 * epoch + step)
            ours.step()
            theirs.step()
        opt.end_epoch(epoch)
    assert_same(a, snapshot(b))


def test_a_scaler_and_a_closure_step_it_as_lightning_and_skorch_do():
    """With ``zero_grad(set_to_none)``, ``step(closure)`` and the hooks of an optimizer."""
    a, b = make_model(), make_model()
    opt, plain = DualOpT(a), torch.optim.AdamW(b.parameters())
    assert isinstance(opt, torch.optim.Optimizer)
    steps = []
    opt.register_step_post_hook(lambda *_: steps.append(1))
    x, y = torch.randn(8, 6), torch.randint(3, (8,))
    for model, optimizer in ((a, opt), (b, plain)):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad(set_to_none=False)
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        closure()
        optimizer.zero_grad(set_to_none=False)
        assert all(not p.grad.any() for p in model.parameters())
        assert optimizer.step(closure=closure).item() > 0
        optimizer.zero_grad(set_to_none=True)
        assert all(p.grad is None for p in model.parameters())
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert steps == [1, 1]
    assert_same(a, snapshot(b))
    assert opt.state is opt.optimizer.state
    assert len(opt.state) == len(list(a.parameters()))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_copies_go_on_alone(copied):
    model = make_model()
    opt = DualOpT(model, max_epochs=(1, 2))
    LambdaLR(opt, lambda n: 1.0)  # puts a wrapper in place of step
    train_epoch(model, opt)
    for phase in ("adamw", "sgd"):
        other, other_opt = copied((model, opt))
        before = snapshot(model)
        train_epoch(other, other_opt, seed=1)
        assert_same(model, before)
        train_epoch(model, opt, seed=1)
        assert_same(other, snapshot(model))
        assert other_opt.phase == opt.phase == phase
        opt.end_epoch(1.0)


def test_parameters_can_be_added_in_both_phases():
    model, (first, *_, last) = make_model(), make_model().children()
    opt = DualOpT(first.parameters(), max_epochs=(2, 2))
    opt.end_epoch(1.0)
    opt.add_param_group({"params": last.weight, "lr": 2e-3})
    added = last.weight.detach().clone()
    assert [group["lr"] for group in opt.param_groups] == [1e-3, 2e-3]
    (last.weight.sum() + first.weight.sum()).backward()
    opt.step()
    opt.end_epoch(0.0)
    assert torch.equal(last.weight, added)  # the best weights again
    opt.add_param_group({"params": last.bias})
    assert [(group["lr"], group["momentum"]) for group in opt.param_groups] == [(1e-3, 0.9), (2e-3, 0.9), (1e-3, 0.9)]
    other = DualOpT([*first.parameters()], max_epochs=(2, 2))
    for group in ({"params": last.weight, "lr": 2e-3}, {"params": last.bias}):
        other.add_param_group(group)
    other.load_state_dict(opt.state_dict())
    assert other.phase == "sgd"
    with pytest.raises(ValueError, match=r"params: .*'momentum'"):
        opt.add_param_group({"params": model[0].weight, "momentum": 0.1})


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"patience": 0}, "patience"),
        ({"patience": 2.5}, "patience"),
        ({"patience": True}, "patience"),
        ({"lr": 0.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"sgd_lr": float("inf")}, "sgd_lr"),
        ({"eps": -1.0}, "eps"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"momentum": 1.0}, "momentum"),
        ({"max_epochs": (0, 0)}, "max_epochs"),
        ({"max_epochs": (-1, 3)}, "max_epochs"),
        ({"max_epochs": (3,)}, "max_epochs"),
        ({"max_epochs": 5}, "max_epochs"),
        ({"betas": 0.9}, "betas"),
        ({"lr": "a"}, "lr"),
        ({"momentum": None}, "momentum"),
    ],
)
def test_bad_arguments_are_named(kwargs, name):
    with pytest.raises(ValueError, match=rf"^{name}: "):
        DualOpT(make_model(), **kwargs)


W = torch.zeros(3)
BAD_PARAMS = [[], nn.ReLU(), W, [1.0], None, [{"params": []}], [{"lr": 1.0}], [W, {"params": [W]}], {"params": [W]}]
BAD_PARAMS += [[{"params": W, "lr": -1.0}], [{"params": W, "weight_decay": "a"}], [{"params": W, "lr_scale": 0.5}]]


@pytest.mark.parametrize("params", BAD_PARAMS, ids=repr)
def test_bad_params_are_named(params):
    with pytest.raises(ValueError, match=r"^params: "):
        DualOpT(params)


def test_groups_have_their_own_rates_in_both_phases_and_resume():
    def groups(model):
        return [{"params": model[0].parameters(), "lr": 1e-4, "weight_decay": 0.0}, {"params": model[3].weight}]

    def rates(opt):
        return [(group["lr"], group["weight_decay"]) for group in opt.param_groups]

    a, b = make_model(), make_model()
    opt = DualOpT(groups(a), lr=1e-3, sgd_lr=1e-2, max_epochs=(1, 2))
    plain = torch.optim.AdamW(groups(b), lr=1e-3)
    assert rates(opt) == [(1e-4, 0.0), (1e-3, 0.01)]
    train_epoch(a, opt)
    train_epoch(b, plain)
    opt.end_epoch(1)
    assert rates(opt) == [(pytest.approx(1e-3), 0), (1e-2, 0)]
    same = [group | {"lr": lr, "weight_decay": 0} for group, (lr, _) in zip(groups(b), rates(opt), strict=True)]
    plain = torch.optim.SGD(same, momentum=0.9)
    train_epoch(a, opt, seed=1)
    train_epoch(b, plain, seed=1)
    assert_same(a, snapshot(b))
    other = DualOpT(groups(b), lr=1e-3, sgd_lr=1e-2)
    other.load_state_dict(opt.state_dict())
    train_epoch(a, opt, seed=2)
    train_epoch(b, other, seed=2)
    assert_same(a, snapshot(b))
    with pytest.raises(ValueError, match="its optimizer does not fit"):
        DualOpT([*b[0].parameters(), b[3].weight]).load_state_dict(opt.state_dict())


@pytest.mark.parametrize("top1", [float("nan"), float("-inf"), torch.tensor(float("nan")), (0.1, 50.0), None])
def test_top1_that_is_not_finite_is_refused_and_counts_for_nothing(top1):
    opt = DualOpT(make_model())
    with pytest.raises(ValueError, match=r"^top1: "):
        opt.end_epoch(top1)
    assert (opt.epoch, opt.best_top1) == (0, None)


def test_a_state_of_another_model_is_refused():
    opt = DualOpT(make_model())
    opt.end_epoch(1)
    other = DualOpT(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"other parameters: .*0\.bias|0\.weight|bias"):
        other.load_state_dict(opt.state_dict())
    with pytest.raises(ValueError, match="not a state_dict of DualOpT"):
        other.load_state_dict({"epoch": 3})


def test_restart_begins_anew_from_the_best_weights_and_the_best_so_far_goes_on():
    model = make_model()
    opt = DualOpT(model, patience=2, max_epochs=(2, 2))
    for i, top1 in enumerate((10, 30, 20, 25)):
        train_epoch(model, opt, seed=i)
        if opt.end_epoch(top1):
            best = snapshot(model)
    assert opt.finished
    opt.restart()
    assert_same(model, best)
    assert (opt.phase, opt.finished, opt.epoch, opt.num_bad_epochs) == ("adamw", False, 4, 0)
    assert (opt.best_top1, opt.best_epoch, opt.switch_epoch) == (30, 2, None)
    assert not opt.optimizer.state  # no moments from before
    assert [opt.end_epoch(t) for t in (29, 29)] == [False, False]
    assert (opt.phase, opt.switch_epoch, opt.switch_reason) == ("sgd", 6, "patience")
    assert opt.end_epoch(30) is True
    sgd = DualOpT(make_model(), max_epochs=(0, 1))
    sgd.end_epoch(1)
    sgd.restart()
    assert sgd.phase == "sgd"
