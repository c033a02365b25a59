"""Parameter groups, learning-rate schedules and weight averages of a training run."""

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, OneCycleLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..checkpoint import load_weights

SCHEDULES = ("constant", "cosine", "onecycle")
WARMUP_START = 0.01
"""The first rate of the warm-up before a cosine, relative to the peak."""


def weight_decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return two parameter groups: matrices and convolution kernels with weight decay, all others without.

    The others are norms, biases, positions and class tokens.
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
    """Make the scheduler of the learning rate. Step it after every step of the optimizer.

    Args:
        optimizer: The optimizer. Its learning rates are overwritten by those of the first step.
        schedule: ``"constant"`` (no scheduler), ``"cosine"`` (down to 0, after a linear warm-up) or ``"onecycle"``
            (PyTorch's ``OneCycleLR``, which also cycles the momentum).
        lr: Peak of the learning rate.
        steps: Number of steps of the run.
        warmup_steps: Number of steps before the peak. Default: 0 for ``"cosine"``, 30 % for ``"onecycle"``.
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
    """Restore a new scheduler, and the rates and momenta that its constructor has overwritten.

    Args:
        scheduler: The new scheduler.
        state: ``state_dict`` of the old scheduler.
        optimizer_state: ``state_dict`` of the optimizer from the same time.
    """
    scheduler.load_state_dict(state)
    for group, saved in zip(scheduler.optimizer.param_groups, optimizer_state["param_groups"], strict=True):
        group.update({name: value for name, value in saved.items() if name != "params"})


def make_average(model: nn.Module, decay: float | None) -> AveragedModel | None:
    """Make the exponential moving average of the weights (buffers are copied), or return None without ``decay``."""
    return None if decay is None else AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))


def weights_state(model: nn.Module, average: AveragedModel | None) -> dict[str, Any]:
    """Return the weights for a checkpoint. ``model`` has the weights to use: the average, if there is one.

    With an average, ``training_model`` has the weights from which the optimizer continues, and ``num_averaged`` the
    number of updates of the average.
    """
    if average is None:
        return {"model": model.state_dict()}
    return {
        "model": average.module.state_dict(),
        "training_model": model.state_dict(),
        "num_averaged": int(average.n_averaged),
    }


def load_weights_state(model: nn.Module, average: AveragedModel | None, checkpoint: dict[str, Any], path: Any) -> None:
    """Restore the state of :func:`weights_state`.

    Raises:
        InputError: If names or shapes in the file ``path`` differ from the model.
    """
    if average is None:
        return load_weights(model, checkpoint, path)
    load_weights(average.module, checkpoint, path)
    load_weights(model, {**checkpoint, "model": checkpoint["training_model"]}, path)
    average.n_averaged.fill_(checkpoint["num_averaged"])
