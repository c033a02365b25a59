"""3×3 convolution followed by LayerNorm over channels. README.md has the math."""

from torch import Tensor

from ... import dispatch
from ...validation import (
    accumulate_dtype,
    autocast_enabled,
    autocast_inputs,
    check_eps,
    check_same,
    check_tensor,
    computing,
)
from .op import conv_norm_op
from .reference import conv_norm_reference

__all__ = ["conv_norm"]


def conv_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """3×3 convolution, stride 1, padding 1, then LayerNorm over the channels of each pixel (paper section 3.3-3.4).

    The norm is ``F.layer_norm``'s: eps inside the root. (The paper's released form divides by σ + eps, whose
    gradient is NaN on a constant pixel.)

    Args:
        x: (B, C_in, H, W), NCHW or channels_last. Under autocast x, weight and bias are cast to its dtype.
        weight: (C_out, C_in, 3, 3); bias: (C_out,) or None; both in x's dtype.
        gamma, beta: (C_out,), the norm's gain and offset, any floating dtype.
        eps: added to the variance.
        backend: see :func:`cxv_kernels.use_backend`.

    Returns:
        (B, C_out, H, W) in x's dtype (autocast's under autocast). In memory it lies as the convolution's own output,
        channels_last if x or weight does, else NCHW; from the reference always channels_last.

    Saved for backward: x, the output (so it must not be changed in place) and one number per pixel. Second and
    higher derivatives go through the reference; forward-mode AD and vmap need ``backend="reference"``.

    Raises:
        ValueError: a wrong rank, shape, device, eps or backend; TypeError: a wrong or mixed dtype;
        RuntimeError: the named backend does not support the call.
    """
    (x,) = autocast_inputs(x)
    check_tensor("x", x, 4, "(B, C_in, H, W)")
    check_tensor("weight", weight, 4, "(C_out, C_in, 3, 3)")
    cast = autocast_enabled(x.device)  # then weight and bias may have another dtype
    check_same("weight", weight, "x", x, dtype=not cast)
    if 0 in x.shape[1:] or weight.shape[0] == 0:
        raise ValueError(
            f"x and weight must have at least one channel, row and column, got {tuple(x.shape)}, {tuple(weight.shape)}"
        )
    if weight.shape[1:] != (x.shape[1], 3, 3):
        raise ValueError(
            f"weight must be (C_out, {x.shape[1]}, 3, 3) for x of {x.shape[1]} channels, got {tuple(weight.shape)}"
        )
    if bias is not None:
        check_tensor("bias", bias, 1, "(C_out,)")
        check_same("bias", bias, "x", x, dtype=not cast)
    for name, t in (("bias", bias), ("gamma", gamma), ("beta", beta)):
        if t is None and name == "bias":
            continue
        check_tensor(name, t, 1, "(C_out,)")
        check_same(name, t, "x", x, dtype=False)
        if t.shape[0] != weight.shape[0]:
            raise ValueError(f"{name} has {t.shape[0]} channels, weight {weight.shape[0]}: they must agree")
    eps = check_eps(eps)
    with computing("conv_norm", x=x, weight=weight, bias=bias, gamma=gamma, beta=beta):
        selected = dispatch.resolve("conv_norm", x, backend, weight.shape[0])
        if selected == "reference":
            bias = None if bias is None else bias.to(x.dtype)
            return conv_norm_reference(x, weight.to(x.dtype), bias, gamma, beta, eps)
        dtype = accumulate_dtype(x.dtype)
        return conv_norm_op(x, weight, bias, gamma.to(dtype), beta.to(dtype), eps, selected)[0]
