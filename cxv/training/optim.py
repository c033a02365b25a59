"""Parameter groups, learning-rate schedules and weight averages of a training run, from PyTorch's pieces."""

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, OneCycleLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..checkpoint import load_weights

SCHEDULES = ("constant", "cosine", "onecycle")
WARMUP_START = 0.01
"""The first rate of a warm-up before the cosine, over the peak."""


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of the parameters: matrices and kernels of convolutions, which decay, and all others, which do not.

    Norms, biases, positions and class tokens are the others.
    """
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim >= 2 and name.endswith("weight")].append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
        for decays, parameters in groups.items()
        if parameters
    ]


def make_scheduler(
    optimizer: Optimizer, schedule: str, lr: float, steps: int, warmup_steps: int | None = None
) -> LRScheduler | None:
    """Make the scheduler of a run's learning rate; it is stepped after every step of the optimizer.

    Args:
        optimizer: its rates are overwritten by those of the first step.
        schedule: ``"constant"`` (no scheduler), ``"cosine"`` (down to 0, after a linear warm-up) or ``"onecycle"``
            (PyTorch's ``OneCycleLR``, which also cycles the momentum).
        lr: the peak.
        steps: of the whole run.
        warmup_steps: until the peak; by default none before the cosine, and OneCycleLR's own 30 %.
    """
    if schedule == "constant":
        return None
    if schedule == "onecycle":
        options = {} if warmup_steps is None else {"pct_start": warmup_steps / steps}
        return OneCycleLR(optimizer, max_lr=lr, total_steps=steps, **options)
    cosine = CosineAnnealingLR(optimizer, T_max=steps - (warmup_steps or 0))
    if not warmup_steps:
        return cosine
    warmup = LinearLR(optimizer, start_factor=WARMUP_START, total_iters=warmup_steps)
    return SequentialLR(optimizer, [warmup, cosine], milestones=[warmup_steps])


def load_scheduler(scheduler: LRScheduler, state: dict[str, Any], optimizer_state: dict[str, Any]) -> None:
    """Restore a scheduler that was made anew, and the rates and momenta that its constructor has overwritten.

    Args:
        state: what its ``state_dict`` gave. optimizer_state: what the optimizer's gave at that time.
    """
    scheduler.load_state_dict(state)
    for group, saved in zip(scheduler.optimizer.param_groups, optimizer_state["param_groups"], strict=True):
        group.update({name: value for name, value in saved.items() if name != "params"})


def make_average(model: nn.Module, decay: float | None) -> AveragedModel | None:
    """Make the exponential moving average of a model's weights, or None without ``decay``; buffers are copied."""
    return None if decay is None else AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


def weights_state(model: nn.Module, average: AveragedModel | None) -> dict[str, Any]:
    """A checkpoint's entries about weights: ``model`` has the weights to use, which are the average's if there is one.

    ``training_model`` then has those that the optimizer goes on from, and ``num_averaged`` the updates of the average.
    """
    if average is None:
        return {"model": model.state_dict()}
    return {
        "model": average.module.state_dict(),
        "training_model": model.state_dict(),
        "num_averaged": int(average.n_averaged),
    }


def load_weights_state(model: nn.Module, average: AveragedModel | None, checkpoint: dict[str, Any], path: Any) -> None:
    """Restore what :func:`weights_state` gave.

    Raises:
        InputError: names or shapes differ, in the file named ``path``.
    """
    if average is None:
        return load_weights(model, checkpoint, path)
    load_weights(average.module, checkpoint, path)
    load_weights(model, {**checkpoint, "model": checkpoint["training_model"]}, path)
    average.n_averaged.fill_(checkpoint["num_averaged"])
