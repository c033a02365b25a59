"""Muon for the weights of linear layers and convolutions, AdamW for all other parameters."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Muon(Optimizer):
    """PyTorch's Muon for matrices and AdamW for the rest, as one optimizer with one learning rate.

    Muon (Jordan et al., 2024) makes the momentum of a matrix orthogonal. Here the kernel of a convolution is the
    matrix of its output channels by everything else. The size of an update is that of AdamW (Liu et al., arXiv
    2502.16982, section 2.2), so both parts use the same ``lr``. A parameter group with ``muon=True`` uses Muon.

    Args:
        params: Parameters or groups. The parameters of a group with ``"muon": True`` need at least two dimensions.
        lr: Learning rate.
        betas: Betas of AdamW.
        eps: eps of AdamW.
        weight_decay: Decoupled weight decay.
        momentum: Momentum of Muon.

    Raises:
        ValueError: At the first step, if PyTorch's Muon or AdamW does not allow a value.
        RuntimeError: At the first step, if the kernel of a convolution is neither contiguous nor channels_last.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 4e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.05,
        momentum: float = 0.95,
    ):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, defaults | {"muon": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step. ``closure`` computes the loss again, as in PyTorch's optimizers."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                (self._step_muon if group["muon"] else self._step_adamw)(params, group)
        return loss

    def _step_muon(self, params: list[Tensor], group: dict[str, Any]) -> None:
        matrices = [nn.Parameter(_rows(p, p).view(len(p), -1)) for p in params]  # views: a step changes the weights
        names = ("lr", "weight_decay", "momentum")
        muon = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **{name: group[name] for name in names})
        for matrix, p in zip(matrices, params, strict=True):
            matrix.grad = _rows(p.grad, p).reshape(matrix.shape)
            muon.state[matrix] = self.state[p]
        muon.step()

    def _step_adamw(self, params: list[Tensor], group: dict[str, Any]) -> None:
        names = ("lr", "betas", "eps", "weight_decay")
        adamw = torch.optim.AdamW(params, **{name: group[name] for name in names})
        adamw.state = self.state
        adamw.step()


def _rows(tensor: Tensor, weight: Tensor) -> Tensor:
    """Return ``tensor`` with the order of dimensions in which a contiguous or channels_last ``weight`` is stored."""
    return (tensor if weight.is_contiguous() else tensor.movedim(1, -1)).detach()
