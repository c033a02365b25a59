"""What trains the weights of a run: frozen layers, the optimizer, learning-rate schedules and weight averages."""

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, OneCycleLR, SequentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..checkpoint import load_weights
from ..errors import InputError
from ..models.backbone import Backbone
from .config import TrainConfig
from .dualopt import DualOpT

WARMUP_START = 0.01
"""The first rate of the warm-up before a cosine, relative to the peak."""


def freeze(model: nn.Module, num_layers: int | None) -> list[nn.Module]:
    """Freeze the stem (with positions and class token) and the first layers of a model. None freezes nothing.

    Frozen parameters get no gradient, and so no state of an optimizer.

    Returns:
        The frozen modules. Keep them in ``eval()`` mode, so that batch norms keep their statistics.

    Raises:
        InputError: If the model has no such layers.
    """
    if num_layers is None:
        return []
    if not isinstance(model, Backbone):
        raise InputError(f"`freeze`: {type(model).__name__} has no stem and layers of cxv, of which some can be frozen")
    if num_layers > len(model.layers):
        raise InputError(f"`freeze`: expected at most {len(model.layers)}, the layers of the model, got {num_layers}")
    frozen = [model.stem, *model.layers[:num_layers]]
    for part in (*frozen, *model.parameters(recurse=False)):
        part.requires_grad_(False)
    return frozen


def make_optimizer(model: nn.Module, config: TrainConfig) -> DualOpT:
    """Make the optimizer of a run. A single optimizer is DualOpT with one phase."""
    if config.optimizer == "sgd":
        return DualOpT(model, patience=config.patience, sgd_lr=config.lr, max_epochs=(0, config.epochs))
    groups = model if config.weight_decay is None else weight_decay_groups(model, config.weight_decay)
    return DualOpT(
        muon_groups(model, config.weight_decay) if config.optimizer == "muon" else groups,
        patience=config.patience,
        lr=config.lr,
        sgd_lr=1e-3 if config.sgd_lr is None else config.sgd_lr,
        max_epochs=(config.epochs, config.sgd_epochs or 0),
        module=model,
    )


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


def muon_groups(model: nn.Module, weight_decay: float | None) -> list[dict[str, Any]]:
    """Return the groups of :func:`weight_decay_groups`, with the weights for Muon in a group of their own.

    Muon trains the weights of linear layers and of convolutions without groups, except in the first and the last layer.
    """
    kinds = (nn.Linear, nn.Conv2d)
    layers = [layer for layer in model.modules() if isinstance(layer, kinds) and getattr(layer, "groups", 1) == 1]
    matrices = {id(layer.weight) for layer in layers[1:-1]}
    split = []
    for group in weight_decay_groups(model, 0.01 if weight_decay is None else weight_decay):
        for muon in (True, False):
            if params := [p for p in group["params"] if (id(p) in matrices) == muon]:
                split.append(group | {"params": params} | ({"muon": True} if muon else {}))
    return split


def make_scheduler(
    optimizer: Optimizer, config: TrainConfig, steps: int, saved: dict[str, Any] | None = None
) -> LRScheduler | None:
    """Make the scheduler of the learning rate, which is stepped after every step of the optimizer.

    Args:
        optimizer: The optimizer. Its learning rates are overwritten by those of the first step.
        config: Its ``schedule`` is ``"constant"`` (no scheduler), ``"cosine"`` (down to 0, after a linear warm-up) or
            ``"onecycle"`` (PyTorch's ``OneCycleLR``, which also cycles the momentum). ``lr`` is the peak.
        steps: Number of steps of the run.
        saved: The checkpoint of the run, if it goes on.
    """
    if config.schedule == "constant":
        return None
    warmup = config.warmup_epochs
    if warmup is not None:
        warmup = min(round(warmup * (steps // config.epochs)), steps - 1)  # the last step is after the peak
    if config.schedule == "onecycle":
        options = {} if warmup is None else {"pct_start": warmup / steps}
        scheduler: LRScheduler = OneCycleLR(optimizer, max_lr=config.lr, total_steps=steps, **options)
    else:
        scheduler = CosineAnnealingLR(optimizer, T_max=steps - (warmup or 0))
        if warmup:
            first = LinearLR(optimizer, start_factor=WARMUP_START, total_iters=warmup)
            scheduler = SequentialLR(optimizer, [first, scheduler], milestones=[warmup])
    if saved is not None:
        scheduler.load_state_dict(saved["scheduler"])
        # the constructors have overwritten rates and momenta
        for group, old in zip(optimizer.param_groups, saved["optimizer"]["optimizer"]["param_groups"], strict=True):
            group.update({name: value for name, value in old.items() if name != "params"})
    return scheduler


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
    """Restore the state of :func:`weights_state` from the file ``path``, or raise ``InputError`` if it does not fit."""
    if average is None:
        return load_weights(model, checkpoint, path)
    load_weights(average.module, checkpoint, path)
    load_weights(model, {**checkpoint, "model": checkpoint["training_model"]}, path)
    average.n_averaged.fill_(checkpoint["num_averaged"])
