"""Residual branches that keep their input alone for backward, and pixels as tokens."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils.checkpoint import checkpoint

import cxv_kernels
from cxv_kernels.tracing import record_call, refuse_torchscript
from cxv_kernels.validation import is_plain_tensor

from .recompute import ForwardState, records_or_transforms

# Tokens of a chunk: what backward recomputes at once is small. On a CPU its widest tensors stay in the last-level
# cache; a GPU needs more work at a time to be full (how much, nobody has measured yet).
CHUNK_TOKENS = 8192
DEVICE_CHUNK_TOKENS = 65536

# (x, residual) → dropout(x) + residual; (x) → dropout(x); (x, gelu=True) → dropout(GELU(x))
Drop = Callable[..., Tensor]


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) → (B, H·W, C), pixels in raster order; a view if x is channels_last."""
    return x.flatten(2).transpose(1, 2)


def to_pixels(tokens: Tensor, like: Tensor) -> Tensor:
    """(B, H·W, C) → (B, C, H, W), channels_last in memory; a view."""
    # no unflatten: torch.onnx.export(dynamo=False) takes the sizes of its result for constants
    return tokens.transpose(1, 2).view(tokens.shape[0], tokens.shape[2], *like.shape[2:])


def to_channels_last(x: Tensor) -> Tensor:
    """x (B, C, H, W), channels_last in memory; by what ``torch.func.vmap`` has a rule for."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The linear map weight (C_out, C_in) at every pixel of x (B, C_in, H, W)."""
    # float32 on a CPU: oneDNN's convolution is up to twice as fast as the BLAS behind F.linear, and its backward is a
    # fifth faster where all tokens are one row of pixels
    if x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() and not torch.is_autocast_enabled("cpu"):
        row = to_tokens(x).reshape(1, 1, -1, x.shape[1]).permute(0, 3, 1, 2)
        y = nn.functional.conv2d(row, weight[:, :, None, None], bias)
        return to_pixels(to_tokens(y).reshape(x.shape[0], -1, y.shape[1]), x)
    return to_pixels(nn.functional.linear(to_tokens(x), weight, bias), x)


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """The linear map ``layer`` at every pixel of x (B, C_in, H, W); one that is not plain gets tokens."""
    if is_plain(layer):
        return pointwise(x, layer.weight, layer.bias)
    return to_pixels(layer(to_tokens(x)), x)


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """conv(x), where a 1×1 kernel is a linear map."""
    if is_plain(conv) and conv.kernel_size == (1, 1) and conv.groups == 1:
        return pointwise(x, conv.weight.flatten(1), conv.bias)
    return conv(x)


def watched(*modules: nn.Module) -> bool:
    """Whether a hook may change, or hold on to, what goes into or comes out of one of these modules."""
    own = any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in modules)
    shared = nn.modules.module
    forward = shared._global_forward_hooks or shared._global_forward_pre_hooks
    return bool(own or forward or shared._global_backward_hooks or shared._global_backward_pre_hooks)


def is_plain(layer: nn.Module) -> bool:
    """True if the layer is an unmodified nn.Linear, nn.Conv2d ("same" padding) or nn.LayerNorm without hooks whose
    weights are plain tensors, so that they can go to a fused op. Every other layer must be called: an adapter, a pruned
    layer, one with quantized or distributed weights (tensor subclasses), one that a hook observes."""
    if type(layer) not in (nn.Linear, nn.Conv2d, nn.LayerNorm) or "forward" in layer.__dict__ or watched(layer):
        return False
    if not all(t is None or is_plain_tensor(t) for t in (layer.weight, layer.bias)):
        return False
    if type(layer) is not nn.Conv2d:
        return True
    same = tuple(k // 2 for k in layer.kernel_size)
    return (layer.stride, layer.dilation, layer.padding, layer.padding_mode) == ((1, 1), (1, 1), same, "zeros")


# dropout draws from seeds, so there is no random state to restore
_checkpoint = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class ResidualBranch(nn.Module):
    """x (B, C, H, W) → x + branch(x), dropout included.

    With ``use_fused`` the batch is split into chunks of images, and only x is saved for backward, which recomputes one
    chunk at a time (see :class:`ForwardState`). Dropout masks are functions of seeds, so the recomputation drops the
    same elements. A branch whose images depend on each other sets ``couples_images``: the whole batch is one chunk.
    If a layer inside is not plain, or PyTorch records or transforms the branch (tracing, ``torch.func``), the branch
    runs once on the whole batch and saves activations like ``use_fused=False``.

    Args:
        drop_rate: probability of a zero in training. use_fused: see above; False also pins the reference.
        pre_norm: channels of a LayerNorm at the branch's entry; None for none.
        recompute: False keeps the activations for backward instead, on the whole batch: faster, with more memory.
    """

    num_drops = 1  # dropouts of the branch
    first_image = 0  # place of x's first image in the batch: given a part of a batch, dropout uses that part's masks
    couples_images = False  # True if the result for an image depends on the other images of the batch
    __prepare_scriptable__ = refuse_torchscript

    def __init__(self, drop_rate: float, use_fused: bool, pre_norm: int | None = None, recompute: bool = True):
        super().__init__()
        self.pre_norm = None if pre_norm is None else nn.LayerNorm(pre_norm)
        self.drop_rate = drop_rate
        self.use_fused = use_fused
        self.recompute = recompute
        self.backend = None if use_fused else "reference"

    def branch(self, x: Tensor, drop: Drop, *more_drops: Drop) -> Tensor:
        """x + the branch of x, for images that do not see one another unless ``couples_images``."""
        raise NotImplementedError

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        """(B, C, H, W) → the same; ``inplace`` allows the result to be written into x where no gradient is wanted."""
        if isinstance(x, Proxy):
            return record_call(self, x)
        dropping = self.training and self.drop_rate > 0
        seeds = [cxv_kernels.dropout_seed(x.device) for _ in range(self.num_drops)] if dropping else []
        first, drops = self.first_image, (self.drop_rate, *seeds)
        keep = torch.is_grad_enabled()
        if not self.use_fused or not all(map(is_plain, self.children())) or (keep and not self.recompute):
            return self._run(x, first, *drops)
        if torch.compiler.is_compiling():  # the compiler plans memory itself
            recompute = keep and not torch.compiler.is_exporting()
            return _checkpoint(self._run, x, first, *drops) if recompute else self._run(x, first, *drops)
        if records_or_transforms():
            return self._run(x, first, *drops)
        images = self._chunk_size(x)
        if keep:
            state = ForwardState(self)
            parts = enumerate(x.split(images))
            chunks = [_checkpoint(state.recomputable(self._run), part, first + i * images, *drops) for i, part in parts]
            # as tokens: torch.cat takes a channels_last image alone for a contiguous one
            return chunks[0] if len(chunks) == 1 else to_pixels(torch.cat([to_tokens(y) for y in chunks]), x)
        if x.shape[0] <= images:
            return self._run(x, first, *drops)
        out = None
        for start in range(0, x.shape[0], images):
            y = self._run(x[start : start + images], first + start, *drops)
            if out is None:  # autocast may have changed the dtype
                out = x if inplace and y.dtype == x.dtype else torch.empty_like(x, dtype=y.dtype)
            out[start : start + images] = y
            del y  # before the next chunk takes memory
        return out

    def entry(self, x: Tensor) -> Tensor:
        """What the branch computes on, (B, C, H, W): x, or its norm."""
        return x if self.pre_norm is None else to_pixels(self.pre_norm(to_tokens(x)), x)

    def _chunk_size(self, x: Tensor) -> int:
        """Images of a chunk, at least 1."""
        if self.couples_images:
            return max(1, x.shape[0])
        tokens = CHUNK_TOKENS if x.device.type == "cpu" else DEVICE_CHUNK_TOKENS
        return max(1, tokens // max(1, x.shape[2] * x.shape[3]))

    def _run(self, x: Tensor, first_image: int, drop_rate: float, *seeds: Tensor) -> Tensor:
        drops = (self._drop(first_image, drop_rate, seed) for seed in seeds or [None] * self.num_drops)
        return self.branch(x, *drops)

    def _drop(self, first_image: int, drop_rate: float, seed: Tensor | None) -> Drop:
        def drop(x: Tensor, residual: Tensor | None = None, gelu: bool = False) -> Tensor:
            if seed is None:
                x = nn.functional.gelu(x) if gelu else x
                return x if residual is None else x + residual
            options = {"offset": first_image * x.shape[1:].numel(), "backend": self.backend}
            if gelu:
                return cxv_kernels.gelu_dropout(x, drop_rate, seed, **options)
            return cxv_kernels.dropout(x, drop_rate, seed, residual=residual, **options)

        return drop

    def extra_repr(self) -> str:
        return f"drop_rate={self.drop_rate}, use_fused={self.use_fused}"
