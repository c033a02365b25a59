"""Before training or evaluation on a GPU: are the fused kernels right there?"""

import time

import torch
from torch import nn

import cxv_kernels
from cxv_kernels import checks

from ..models.residual import ResidualBranch
from .errors import InputError


def verify_kernels(model: nn.Module, device: torch.device, dtype: torch.dtype) -> str | None:
    """:func:`cxv_kernels.verify` for a model's ops, in float32 and the dtype of autocast; what it came to, in a line.
    None: it has no fused ops, is on no GPU, or its backend was chosen by name.

    Raises:
        InputError: a kernel has left the GPU unusable.
    """
    branches = [module for module in model.modules() if isinstance(module, ResidualBranch)]
    fused = [branch for branch in branches if hasattr(branch, "op") and branch.backend is None]
    if not fused or device.type != "cuda" or cxv_kernels.get_backend() != "auto":
        return None
    ops = {module.op for module in fused} | {"conv_norm", "dropout", "gelu_dropout"}
    dims = {module.head_dim for module in fused}
    start = time.monotonic()
    try:
        results = cxv_kernels.verify(device, {dtype, torch.float32}, dims, ops)
    except RuntimeError as error:
        raise InputError(f"--fused: {error}; --no-fused trains and evaluates with plain PyTorch") from error
    seconds = time.monotonic() - start
    name = torch.cuda.get_device_name(device)
    return f"checked against float64 on {name} in {seconds:.0f} s: {checks.summary(results)}"
