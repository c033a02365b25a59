"""DualOpT: AdamW until top-1 accuracy no longer improves, then SGD from the best weights."""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cxv_kernels.validation import to_number, to_numbers

from ..checkpoint import mismatch
from ..errors import InputError
from ..models.arguments import is_whole
from .muon import Muon

_PROGRESS = ("epoch", "num_bad_epochs", "best_top1", "best_epoch", "switch_epoch", "switch_reason")
_OLDER_REASONS = {"stale": "patience", "capped": "max_epochs"}  # of states from before version 0.1.0 was released
_RATE = (lambda value: 0 < value < math.inf, "a finite number above 0")
_DECAY = (lambda value: 0 <= value < math.inf, "a finite number, at least 0")


class DualOpT(torch.optim.Optimizer):
    """The two-phase optimizer of CXV (arXiv 2201.10271, section 4).

    Phase ``"adamw"`` trains with AdamW at a constant rate. When top-1 accuracy has not improved for ``patience``
    epochs, or after ``max_epochs``, DualOpT reloads the best weights and starts phase ``"sgd"`` with a new SGD. When
    the same condition ends this phase, :attr:`finished` is true. Both phases share the best top-1. An equal top-1
    counts as an improvement.

    Example::

        opt = DualOpT(model, patience=20)
        while not opt.finished:
            for images, labels in loader:
                opt.zero_grad()
                F.cross_entropy(model(images), labels).backward()
                opt.step()
            loss, top1 = cxv.training.evaluate(model, test_loader)
            opt.end_epoch(top1)
        opt.load_best()

    The best weights are stored in host memory. Schedulers, a ``GradScaler`` and other trainers take DualOpT like AdamW.
    A scheduler sets the learning rate of both phases, and ``sgd_lr`` is then not used. :attr:`optimizer` is the
    ``AdamW``, ``Muon`` or ``SGD`` that is stepped, with the same ``param_groups`` and ``state``.

    Args:
        params: The ``nn.Module`` to train, or its parameters. For a module, the buffers (such as the statistics of a
            BatchNorm) are also stored and reloaded with the best weights. Parameter groups
            ``{"params": …, "lr": …, "weight_decay": …}`` are accepted as well. Their optional ``lr`` and
            ``weight_decay`` are those of AdamW; SGD keeps the ratio of the group's rate to ``lr``. A group with
            ``"muon": True`` is trained by :class:`Muon` in the first phase, which is then called ``"muon"``.
        patience: Number of epochs without an improvement that end a phase, at least 1.
        lr: Learning rate of AdamW.
        betas: Betas of AdamW.
        eps: eps of AdamW.
        weight_decay: Weight decay of AdamW.
        sgd_lr: Learning rate of SGD.
        momentum: Momentum of SGD, which has no weight decay and no Nesterov momentum.
        max_epochs: Largest numbers of epochs of the AdamW phase and the SGD phase. ``None`` stands for no limit, and 0
            skips the phase.
        module: The module that owns ``params``, if ``params`` are groups. Its buffers are stored and reloaded, too.

    Raises:
        InputError: If an argument is out of range. It is a ``ValueError``.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Tensor] | Iterable[dict[str, Any]],
        patience: int = 20,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        sgd_lr: float = 1e-3,
        momentum: float = 0.9,
        max_epochs: tuple[int | None, int | None] = (300, 100),
        module: nn.Module | None = None,
    ):
        groups = _groups(params)
        if not any(group["params"] for group in groups):
            raise InputError("params: got no parameter to train")
        patience, max_epochs = to_numbers(patience), to_numbers(max_epochs)
        lr, betas, eps, weight_decay, sgd_lr, momentum = to_numbers((lr, betas, eps, weight_decay, sgd_lr, momentum))
        _check("patience", patience, lambda n: is_whole(n) and n >= 1, "a whole number of epochs, at least 1")
        for name, value in (("lr", lr), ("sgd_lr", sgd_lr), ("eps", eps)):
            _check(name, value, *_RATE)
        _check("weight_decay", weight_decay, *_DECAY)
        _check("momentum", momentum, lambda m: 0 <= m < 1, "a number in [0, 1)")
        _check("betas", betas, lambda b: len(b) == 2 and all(0 <= x < 1 for x in b), "two numbers in [0, 1)")
        _check(
            "max_epochs",
            max_epochs,
            lambda caps: len(caps) == 2 and all(n is None or (is_whole(n) and n >= 0) for n in caps),
            "two whole numbers (or None for no cap)",
        )
        if tuple(max_epochs) == (0, 0):
            raise InputError("max_epochs: (0, 0) leaves no epoch to train")

        self._module = params if isinstance(params, nn.Module) else module
        self._groups: list[dict[str, Any]] = []
        self._best: dict[str, Tensor] = {}
        self._phase = "adamw"
        super().__init__(groups, {})

        self.patience = patience
        phases = ("muon" if any(group.get("muon") for group in groups) else "adamw", "sgd")
        self.max_epochs = dict(zip(phases, max_epochs, strict=True))
        self._adamw = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        self._sgd = {"lr": sgd_lr, "momentum": momentum}

        self.epoch = 0
        """Epochs ended, in both phases together."""
        self.num_bad_epochs = self._phase_epoch = 0
        """Epochs of this phase since the last improvement."""
        self.best_top1: float | None = None
        """The best top-1 so far, in the unit given to :meth:`end_epoch`."""
        self.best_epoch: int | None = None
        """The epoch (from 1) with the best top-1. If several epochs are equal, it is the latest one."""
        self.switch_epoch: int | None = None
        """The last epoch of the AdamW phase, after the phase has ended."""
        self.switch_reason: str | None = None
        """The reason why the AdamW phase ended, as in :attr:`stop_reason`."""
        self._first = phases[max_epochs[0] == 0]
        self._start(self._first)

    @property
    def phase(self) -> str:
        """``"adamw"`` (with groups for Muon: ``"muon"``) or ``"sgd"``: the optimizer of the next :meth:`step`."""
        return self._phase

    @property
    def finished(self) -> bool:
        """True when no epoch is left to train."""
        last = self._phase == "sgd" or self.max_epochs["sgd"] == 0
        return last and self.stop_reason is not None

    @property
    def stop_reason(self) -> str | None:
        """The argument that ended the current phase, ``"patience"`` or ``"max_epochs"``, or ``None`` before that."""
        if self.num_bad_epochs >= self.patience:
            return "patience"
        cap = self.max_epochs[self._phase]
        return "max_epochs" if cap is not None and self._phase_epoch >= cap else None

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make a step of the active optimizer, and return the loss of ``closure`` if there is one."""
        return self.optimizer.step(closure)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train more parameters, a group as in ``params``. Their best weights so far are the present ones."""
        group = _group(param_group)
        self._groups.append(dict(group))
        super().add_param_group(self._sgd_group(**group) if self._phase == "sgd" else group)
        if self._best:
            self._best |= {k: _copy(t) for k, t in self._tensors().items() if k not in self._best}

    def __getstate__(self) -> dict[str, Any]:
        """Return what ``pickle`` and ``copy.deepcopy`` store: all but the hooks, and the wrapper of a scheduler."""
        return {k: v for k, v in vars(self).items() if k != "step" and not k.startswith("_optimizer_")}

    def end_epoch(self, top1: float) -> bool:
        """Report the top-1 accuracy of an epoch and switch the phase if it is over.

        Args:
            top1: Top-1 accuracy, as a fraction or in per cent.

        Returns:
            True if the epoch is the best so far. An equal top-1 counts as an improvement: its weights are stored, and
            :attr:`num_bad_epochs` becomes 0.

        Raises:
            InputError: If ``top1`` is not finite.
            RuntimeError: If the training is over (:attr:`finished`).
        """
        if self.finished:
            raise RuntimeError("end_epoch: both phases of DualOpT are over")
        _check("top1", top1, lambda t: math.isfinite(float(t)), "a finite number")
        top1 = float(top1)
        self.epoch += 1
        self._phase_epoch += 1
        best = self.best_top1 is None or top1 >= self.best_top1
        if best:
            self.num_bad_epochs, self.best_top1, self.best_epoch = 0, top1, self.epoch
            self._best = {k: _copy(t) for k, t in self._tensors().items()}
        else:
            self.num_bad_epochs += 1
        self._switch_if_due()
        return best

    def restart(self) -> None:
        """Start the first phase again, from the best weights and with a new optimizer.

        The paper uses this for post-training: after DualOpT on augmented images it runs DualOpT again on clean images.
        The best top-1 and the number of epochs are not reset.
        """
        self.switch_epoch = self.switch_reason = None
        self._reload(self._first)

    @torch.no_grad()
    def load_best(self) -> None:
        """Copy the best weights (and the buffers of a module) into the model, in place."""
        for name, tensor in self._tensors().items():
            if name in self._best:
                tensor.copy_(self._best[name])

    def state_dict(self) -> dict[str, Any]:
        """Return the state from which :meth:`load_state_dict` continues with exactly the same bits.

        It has tensors, numbers and strings, so ``torch.load(weights_only=True)`` can read it. As in torch, the tensors
        are not copied. The state does not include the current weights of the model, ``patience`` and ``max_epochs``.
        """
        return {
            "phase": self._phase,
            "phase_epoch": self._phase_epoch,
            **{name: getattr(self, name) for name in _PROGRESS},
            "best": dict(self._best),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state of :meth:`state_dict`, including the phase.

        If the phase is over according to the ``max_epochs`` of this object, the phase switches here.

        Raises:
            InputError: If the state belongs to other parameters, or is not a state of DualOpT.
        """
        if "stale" in state:
            reason = state.get("switch_reason")
            state = state | {"num_bad_epochs": state["stale"], "switch_reason": _OLDER_REASONS.get(reason, reason)}
        missing = sorted({"phase", "phase_epoch", "best", "optimizer", *_PROGRESS} - set(state))
        if missing:
            raise InputError(f"state: not a state_dict of DualOpT, {', '.join(missing)} missing")
        phase, best = state["phase"], state["best"]
        if phase not in self.max_epochs:
            raise InputError(f"state: phase is {phase!r}, expected one of {tuple(self.max_epochs)}")
        if best and (problem := mismatch(self._tensors(), best, "state")):
            raise InputError(f"state: of other parameters: {problem}")
        self._start(phase)
        try:
            self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        except (KeyError, ValueError) as error:
            raise InputError(f"state: its optimizer does not fit these parameters: {error}") from None
        self._share()
        for name in _PROGRESS:
            setattr(self, name, state[name])
        self._phase_epoch, self._best = state["phase_epoch"], dict(best)
        self._switch_if_due()

    def _start(self, phase: str) -> None:
        self._phase, self._phase_epoch, self.num_bad_epochs = phase, 0, 0
        if phase == "sgd":
            self.optimizer = torch.optim.SGD([self._sgd_group(**group) for group in self._groups], **self._sgd)
        else:
            kind = Muon if phase == "muon" else torch.optim.AdamW
            self.optimizer = kind([dict(group) for group in self._groups], **self._adamw)
        for new, old in zip(self.optimizer.param_groups, self.param_groups, strict=True):
            if "initial_lr" in old:  # of a scheduler, which goes on with its rate, betas and own entries
                new |= {name: value for name, value in old.items() if name == "lr" or name not in new}
        self._share()

    def _share(self) -> None:
        """Show the entries of the active optimizer as those of this one."""
        active = self.optimizer
        self.defaults, self.state, self.param_groups = active.defaults, active.state, active.param_groups

    def _sgd_group(
        self, params: list[Tensor], lr: float | None = None, weight_decay: float = 0, muon: bool = False
    ) -> dict[str, Any]:
        return {"params": params} | ({} if lr is None else {"lr": self._sgd["lr"] * (lr / self._adamw["lr"])})

    def _switch_if_due(self) -> None:
        if self._phase == "sgd" or self.finished or self.stop_reason is None:
            return
        self.switch_epoch, self.switch_reason = self.epoch, self.stop_reason
        self._reload("sgd")

    def _reload(self, phase: str) -> None:
        self.load_best()
        self._start(phase)
        self.zero_grad()  # the gradients were those of other weights

    def _tensors(self) -> dict[str, Tensor]:
        # looked up each time, because a module can replace a buffer by another tensor
        if self._module is not None:
            return dict(self._module.named_parameters()) | dict(self._module.named_buffers())
        return {str(i): p for i, p in enumerate(p for group in self._groups for p in group["params"])}


def _copy(tensor: Tensor) -> Tensor:
    """Return a copy in host memory. It is never modified, so state_dict() can share it."""
    return tensor.detach().to("cpu", copy=True)


def _groups(params: Any) -> list[dict[str, Any]]:
    """Return parameter groups in the form of torch's optimizers; parameters without groups become one group."""
    if isinstance(params, nn.Module):
        params = params.parameters()
    if isinstance(params, Tensor | dict) or not isinstance(params, Iterable):
        raise InputError(
            f"params: expected an iterable of tensors or of groups, or one nn.Module, got a {type(params).__name__}"
        )
    params = list(params)
    return [_group(group) for group in (params if any(isinstance(p, dict) for p in params) else [{"params": params}])]


def _group(group: Any) -> dict[str, Any]:
    """Return a parameter group with a list of tensors and with Python numbers."""
    if not isinstance(group, dict) or not {"params"} <= group.keys() <= {"params", "lr", "weight_decay", "muon"}:
        got = list(group) if isinstance(group, dict) else f"a {type(group).__name__}"
        raise InputError(f"params: expected groups of 'params' and at most 'lr', 'weight_decay' and 'muon', got {got}")
    params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    group = {name: to_number(value) for name, value in group.items() if name != "params"}
    _check("params: lr of a group", group.get("lr", 1), *_RATE)
    _check("params: weight_decay of a group", group.get("weight_decay", 0), *_DECAY)
    for p in params:
        if not isinstance(p, Tensor):
            raise InputError(f"params: expected tensors, groups of them or one nn.Module, got a {type(p).__name__}")
    return {"params": params} | group


def _check(name: str, value: Any, allowed: Callable[[Any], bool], expected: str) -> None:
    try:
        ok = allowed(value)
    except (TypeError, ValueError, RuntimeError):  # of another type altogether
        ok = False
    if not ok:
        raise InputError(f"{name}: expected {expected}, got {value!r}")
