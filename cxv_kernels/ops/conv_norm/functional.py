"""3×3 convolution followed by LayerNorm over channels. README.md has the derivation."""

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
    """Apply a 3×3 convolution (stride 1, padding 1), then LayerNorm over the channels of each pixel.

    This is the convolutional sub-layer of the paper (sections 3.3 and 3.4). The norm is that of ``F.layer_norm``, with
    eps added to the variance. The released code of the paper divides by σ + eps instead, and its gradient is NaN at a
    pixel whose channels are all equal.

    Under autocast, x, weight and bias are cast to the autocast dtype. The op saves x, its output and one number per
    pixel for the backward pass, so the output must not be modified in place. Second and higher derivatives use the
    reference. Forward-mode AD and ``torch.func.vmap`` require ``backend="reference"``.

    Args:
        x: Images, shape (B, C_in, H, W), NCHW or channels_last, in float64, float32, float16 or bfloat16.
        weight: Weight of the convolution, shape (C_out, C_in, 3, 3), in the dtype of x.
        bias: Bias of the convolution, shape (C_out,), in the dtype of x, or None.
        gamma: Gain of the norm, shape (C_out,), in any floating dtype.
        beta: Offset of the norm, shape (C_out,), in any floating dtype.
        eps: Number added to the variance.
        backend: Backend for this call, see :func:`cxv_kernels.use_backend`. Default: the one set there.

    Returns:
        Tensor of shape (B, C_out, H, W) in the dtype of x (the autocast dtype under autocast). It is channels_last if x
        or weight is, otherwise NCHW. The reference always returns channels_last.

    Raises:
        ValueError: If a rank, shape or device does not match, or ``eps`` or ``backend`` is invalid.
        TypeError: If a dtype is not supported, or x, weight and bias have different dtypes.
        RuntimeError: If the named backend does not support the call.
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
    vectors = {"gamma": gamma, "beta": beta} if bias is None else {"bias": bias, "gamma": gamma, "beta": beta}
    for name, t in vectors.items():
        check_tensor(name, t, 1, "(C_out,)")
        check_same(name, t, "x", x, dtype=name == "bias" and not cast)
        if t.shape[0] != weight.shape[0]:
            raise ValueError(f"{name} has {t.shape[0]} channels, weight {weight.shape[0]}: they must agree")
    eps = check_eps(eps)
    selected = dispatch.resolve("conv_norm", x, backend, weight.shape[0])
    with computing("conv_norm", x=x, weight=weight, bias=bias, gamma=gamma, beta=beta):
        if selected == "reference":
            bias = None if bias is None else bias.to(x.dtype)
            return conv_norm_reference(x, weight.to(x.dtype), bias, gamma, beta, eps)
        dtype = accumulate_dtype(x.dtype)
        return conv_norm_op(x, weight, bias, gamma.to(dtype), beta.to(dtype), eps, selected)[0]
